"""PPOTrainer: goldens of the seed, the packed step against padded pieces, and everything a step must keep."""

import math

import numpy as np
import pytest
import torch
from ppo_cases import STAT_KEYS, batch, causal, close, gpt2, maker

from trl.data import packing
from trl.data.packing import pack
from trl.models.prepare import enable_gradient_checkpointing
from trl.rollout import experience
from trl.rollout.experience import Experience
from trl.rollout.measure import measure
from trl.trainer.ppo_trainer import rollout_of

pytestmark = pytest.mark.filterwarnings("ignore:No dataset is provided:UserWarning")


@pytest.fixture
def make(tiny_tokenizer):
    return maker(tiny_tokenizer)


def test_empty_responses_and_queries(make):
    nothing = torch.tensor([], dtype=torch.long)
    queries, responses, scores = batch()
    assert make(mini_batch_size=1).step(queries, [*responses[:3], nothing], scores)
    with pytest.raises(ValueError, match="responses: all of them are empty"):
        make().step(queries, [nothing] * 4, scores)
    with pytest.raises(ValueError, match=r"queries\[3\] is empty"):
        make().step([*queries[:3], nothing], responses, scores)


# --- golden values of the seed -----------------------------------------------------------------------------------

LOGPROBS = torch.tensor([[-1.0, -2, -0.5, -3, -1], [-0.2, -0.4, -0.6, -0.8, -1]])
REFERENCE = torch.tensor([[-1.5, -1, -0.5, -2, -2], [-0.4, -0.2, -1.6, -0.8, -0.5]])
MASK = torch.tensor([[0.0, 1, 1, 1, 0], [0, 0, 1, 1, 1]])
VALUES = torch.tensor([[0.5, 0.1, -0.2, 0.3, 0.9], [0.3, 0.2, 0.1, 0, -0.1]])
SCORES = [torch.tensor(1.0), torch.tensor(-2.0)]
CHANGE = torch.tensor([[0.1, 0.3, -0.3, 0.05, 0], [0, 0.2, 0.4, -0.5, 0.1]])


def test_golden_rewards_advantages_and_loss(make):
    trainer = make()
    rewards, penalties = trainer.compute_rewards(SCORES, LOGPROBS, REFERENCE, MASK)
    close(rewards, [[-0.1, 0.2, 0, 1.2, -0.2], [-0.04, 0.04, -0.2, 0, -1.9]])
    close(penalties, [[-0.1, 0.2, 0, 0.2, -0.2], [-0.04, 0.04, -0.2, 0, 0.1]])
    values, advantages, returns = trainer.compute_advantages(VALUES, rewards, MASK)
    close(values, (VALUES * MASK).tolist())
    close(advantages, [[0.956704, 0.932289, 1.033071, 0.759715, 0.21901],
                       [-0.818901, -0.873528, -0.99427, -0.868406, -0.862398]])  # fmt: skip
    close(returns, [[1.227888, 1.28725, 1.155, 1.2, 0], [-1.727599, -1.818525, -1.9195, -1.81, -1.9]])
    logits = torch.zeros(2, 5, 7)
    arguments = (LOGPROBS, values, logits, VALUES + CHANGE, LOGPROBS + CHANGE, MASK, advantages, returns)
    policy, value, stats = trainer.loss(*arguments)
    close(policy, 0.074728)
    close(value, 0.137436)
    close(stats["policy/clipfrac"], 1 / 3)
    close(stats["policy/approxkl"], 0.050208)
    close(stats["policy/policykl"], -0.008333)
    close(stats["policy/entropy"], math.log(7))
    close(stats["loss/total"], 0.074728 + 0.137436)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("kl", [0.5, -1.0, 0.0]), ("abs", [0.5, 1.0, 0.0]), ("mse", [0.125, 0.5, 0.0])],
)
def test_kl_penalties(make, kind, expected):
    trainer = make(kl_penalty=kind)
    close(trainer._kl_penalty(LOGPROBS[0, :3], REFERENCE[0, :3]), expected)


def test_full_kl_penalty(make):
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    close(make(kl_penalty="full")._kl_penalty(p.log()[None, None], q.log()[None, None]), [[0.02526715]])


def test_reward_per_token_of_the_paper(make):
    kl = torch.tensor([[-0.3315, -0.0426, 0.6351]])
    rewards, _ = make(init_kl_coef=0.15).compute_rewards([torch.tensor(0.4)], kl, torch.zeros(1, 3), torch.ones(1, 3))
    close(rewards, [[0.049725, 0.00639, 0.304735]])


def test_exploded_ratio_is_skipped(make):
    trainer = make(ratio_threshold=1.5)
    arguments = (LOGPROBS, VALUES, torch.zeros(2, 5, 7), VALUES, LOGPROBS + 1, MASK, MASK, MASK)
    with pytest.warns(UserWarning, match=r"The average ratio of batch \(2.72\) exceeds threshold 1.50"):
        policy, value, _ = trainer.loss(*arguments)
    assert policy == value == 0


# --- the packed step ----------------------------------------------------------------------------------------------


def test_step_reports_every_statistic(make):
    trainer = make()
    queries, responses, scores = batch()
    stats = trainer.step(queries, responses, scores)
    expected = {f"{prefix}/{name}" for prefix, names in STAT_KEYS.items() for name in names}
    assert set(stats) == expected
    assert stats["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert stats["objective/kl_coef"] == 0.2
    assert stats["ppo/mean_scores"] == pytest.approx(0.25)
    assert stats["tokens/responses_len_mean"] == 4.5
    assert stats["tokens/queries_dist"].tolist() == [3, 4, 5, 3]
    assert stats["ppo/policy/advantages"].shape == (18,)
    assert stats["ppo/policy/ratio"].shape == (36,)  # two epochs
    assert all(np.isfinite(value).all() for value in stats.values())


def padded_loss(trainer, queries, responses, scores):
    """The seed's composition: padded passes, the whole batch at once."""
    inputs = trainer.prepare_model_inputs(queries, responses)
    with torch.no_grad():
        old, _, values, mask = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
        reference, *_ = trainer.batched_forward_pass(trainer.ref_model, queries, responses, inputs)
    rewards, _ = trainer.compute_rewards(scores, old, reference, mask)
    values, advantages, returns = trainer.compute_advantages(values, rewards, mask)
    new, logits, vpreds, _ = trainer.batched_forward_pass(trainer.model, queries, responses, inputs, return_logits=True)
    return trainer.loss(old, values, logits, vpreds, new, mask, advantages, returns)


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_step_equals_the_padded_pieces(make, side):
    queries, responses, scores = batch()
    optimizer = lambda model: torch.optim.SGD(model.parameters(), lr=0.1)  # noqa: E731
    model, twin = causal(), causal()
    packed = make(model, optimizer=optimizer(model), ppo_epochs=1, mini_batch_size=4)
    padded = make(twin, optimizer=optimizer(twin), ppo_epochs=1, mini_batch_size=4)
    padded.tokenizer.padding_side = side
    policy, value, expected = padded_loss(padded, queries, responses, scores)
    (policy + value).backward()
    padded.optimizer.step()
    stats = packed.step(queries, responses, scores)
    for name in ("loss/policy", "loss/value", "policy/entropy", "val/vpred", "returns/mean", "returns/var"):
        assert stats[f"ppo/{name}"] == pytest.approx(float(expected[name]), rel=1e-4, abs=1e-6), name
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def updated(make, **fields):
    model = causal()
    trainer = make(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.3), **fields)
    queries, responses, scores = batch(8)
    np.random.seed(5)
    trainer.step(queries, responses, scores)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_micro_batches_do_not_change_the_update(make):
    whole = updated(make, batch_size=8, mini_batch_size=8)
    for mini, accumulation in ((4, 2), (2, 4), (1, 8)):
        cut = updated(make, batch_size=8, mini_batch_size=mini, gradient_accumulation_steps=accumulation)
        torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prompts", ["different", "each twice"])
@pytest.mark.parametrize("fields", [{}, {"mini_batch_size": 1, "gradient_accumulation_steps": 2}])
def test_samples_are_packed_once_a_step(make, monkeypatch, prompts, fields):
    queries, responses, scores = batch()
    if prompts == "each twice":
        queries = [queries[0], queries[0].clone(), queries[1], queries[1].clone()]
    masks = [torch.ones_like(response) for response in responses]
    masks[1][2] = 0
    stats, calls, counts = [], [], []
    for packed_once in (Experience.packed_once, lambda rows: rows):
        monkeypatch.setattr(Experience, "packed_once", packed_once)
        trainer = make(ppo_epochs=4, **fields)
        for module in (packing, experience):
            monkeypatch.setattr(module, "pack", lambda trees: calls.append(1) or pack(trees))
        stats.append([trainer.step(queries, responses, scores, masks) for _ in range(2)])
        counts.append(len(calls))
        calls.clear()
    passes = 4 * 4 // trainer.config.mini_batch_size
    assert counts == [2, 2 * (1 + passes)]
    for once, anew in zip(*stats, strict=True):
        timeless = [name for name in once if not name.startswith("time/")]
        assert all(np.array_equal(once[name], anew[name]) for name in timeless)


def test_gradients_are_zeros_after_a_step(make):
    trainer = make()
    trainer.step(*batch())
    assert all(p.grad is not None and not p.grad.any() for p in trainer.model.parameters() if p.requires_grad)


def test_everything_trains_and_the_reference_rests(make):
    model = causal()
    trainer = make(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    reference = [p.clone() for p in trainer.ref_model.parameters()]
    trainer.step(*batch())
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
    assert all(torch.equal(p, old) for p, old in zip(trainer.ref_model.parameters(), reference, strict=True))
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())


def test_dropout_is_off_and_modes_return(make):
    model = gpt2().train()
    trainer = make(model)
    trainer.step(*batch())  # raises where the policy is not itself
    assert model.training
    model.eval()
    trainer.step(*batch())
    assert not model.training


def test_randomness_in_the_forward_pass_is_reported(make):
    model = causal()
    noise = lambda module, args, output: output + 0.1 * torch.randn_like(output)  # noqa: E731
    model.pretrained_model.get_input_embeddings().register_forward_hook(noise)
    with pytest.raises(RuntimeError, match="the policy must still be itself"):
        make(model).step(*batch())


def test_gradient_checkpointing_is_kept(make):
    model = causal()
    enable_gradient_checkpointing(model)
    calls = []
    layer = model.pretrained_model.model.layers[0]
    inner = layer._gradient_checkpointing_func
    layer._gradient_checkpointing_func = lambda *a, **k: calls.append(1) or inner(*a, **k)
    make(model).step(*batch())
    assert calls


def test_response_masks(make):
    trainer = make()
    queries, responses, scores = batch()
    masks = [torch.tensor([1, 0, 0, 1, 1])[: len(response)] for response in responses]
    stats = trainer.step(queries, responses, scores, masks)
    assert stats["ppo/policy/advantages"].shape == (sum(int(mask.sum()) for mask in masks),)
    inputs = trainer.prepare_model_inputs(queries, responses)
    *_, mask = trainer.batched_forward_pass(trainer.model, queries, responses, inputs, response_masks=masks)
    assert mask.sum() == sum(mask.sum() for mask in masks)
    assert mask[0].tolist()[2:7] == [1, 0, 0, 1, 1]


def test_empty_responses_count_for_nothing(make):
    queries, responses, scores = batch()
    responses[1] = responses[1][:0]
    stats = make(mini_batch_size=1).step(queries, responses, scores)
    assert stats["tokens/responses_dist"].tolist() == [5, 0, 5, 4]
    assert np.isfinite(stats["ppo/loss/total"])


@pytest.mark.parametrize("kind", ["kl", "abs", "mse", "full"])
def test_every_kl_penalty_steps(make, kind):
    trainer = make(kl_penalty=kind, learning_rate=1e-2, temperature=0.8)
    trainer.step(*batch())
    stats = trainer.step(*batch(seed=2))
    assert np.isfinite(stats["ppo/mean_non_score_reward"])
    if kind != "kl":
        assert stats["ppo/mean_non_score_reward"] < 0


def test_full_kl_is_the_enumerated_one(make):
    trainer = make(kl_penalty="full", learning_rate=1e-2)
    trainer.step(*batch())
    queries, responses, _ = batch(seed=3)
    inputs = trainer.prepare_model_inputs(queries, responses)
    with torch.no_grad():
        logits, reference = (
            trainer.batched_forward_pass(model, queries, responses, inputs, return_logits=True)[1].log_softmax(-1)
            for model in (trainer.model, trainer.ref_model)
        )
        *_, mask = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
        expected = (trainer._kl_penalty(logits, reference) * mask).sum(1)
        rows = Experience.of(rollout_of(queries, responses, None))
        _, kl_BT = measure(
            trainer.actor, trainer.reference, rows, kl_penalty="full", rows=2, tokens=0, device=trainer.current_device
        )
    torch.testing.assert_close(kl_BT.sum(1), expected, rtol=1e-4, atol=1e-5)


def test_temperature_scales_scoring(make):
    queries, responses, scores = batch()
    hot, cold = make(temperature=2.0), make()
    with torch.no_grad():
        inputs = cold.prepare_model_inputs(queries, responses)
        _, logits, _, mask = cold.batched_forward_pass(cold.model, queries, responses, inputs, return_logits=True)
        warm, *_ = hot.batched_forward_pass(hot.model, queries, responses, inputs)
    expected = (logits / 2).log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None])[..., 0]
    torch.testing.assert_close(warm, expected)
    stats = hot.step(queries, responses, scores)
    assert stats["objective/logprobs"].sum() == pytest.approx(float((expected * mask).sum()), rel=1e-4)


# --- scores, controllers, stopping ---------------------------------------------------------------------------------


def test_score_scaling_normalising_and_clipping(make):
    scores = torch.tensor([1.0, 2.0, 3.0, 6.0])
    responses = [torch.tensor([5])] * 4
    close(make(score_clip=2.0)._shaped(scores, responses), [1.0, 2.0, 2.0, 2.0])
    std = scores.std()
    close(make(use_score_scaling=True)._shaped(scores, responses), (scores / std).tolist())
    normed = make(use_score_scaling=True, use_score_norm=True)._shaped(scores, responses)
    close(normed, ((scores - 3) / std).tolist())


def test_missing_eos_is_punished(make):
    responses = [torch.tensor([5, 2]), torch.tensor([2, 5]), torch.tensor([5, 29]), torch.tensor([], dtype=torch.long)]
    scores = torch.arange(4.0)
    assert make(missing_eos_penalty=1.0)._shaped(scores, responses).tolist() == [0, -1, -1, -1]
    assert make(missing_eos_penalty=1.0, stop_token="z")._shaped(scores, responses).tolist() == [0, -1, 2, -1]


def test_kl_controllers(make):
    trainer = make(batch_size=4)
    trainer.step(*batch())
    assert trainer.kl_ctl.value == pytest.approx(0.2 * (1 - 0.2 * 4 / 10000))
    fixed = make(adap_kl_ctrl=False)
    fixed.step(*batch())
    assert fixed.kl_ctl.value == 0.2


def test_early_stopping(make):
    stats = make(early_stopping=True, target_kl=1e-9, learning_rate=0.05, ppo_epochs=4).step(*batch())
    assert stats["ppo/policy/ratio"].shape[0] in (18, 36, 54)  # policykl has either sign; it stops once it is positive
    trainer = make(early_stopping=True, target_kl=1.0)
    assert trainer._early_stop(torch.tensor(1.51))
    assert not trainer._early_stop(torch.tensor(1.49))
    assert not make()._early_stop(100.0)


def test_ratio_threshold_stops_the_step_from_being_taken(make):
    model = causal()
    trainer = make(model, ratio_threshold=1e-3)  # even 1 exceeds it
    before = [p.clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match="Skipping batch"):
        trainer.step(*batch())
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert not trainer.optimizer.state


def test_max_grad_norm_holds_at_every_optimizer_step(make):
    model = causal()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = make(model, optimizer=optimizer, max_grad_norm=1e-3, ppo_epochs=1, mini_batch_size=1)
    moves, step = [], optimizer.step

    def watched(*args, **kwargs):
        moves.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item())
        return step(*args, **kwargs)

    optimizer.step = watched
    trainer.step(*batch())
    assert len(moves) == 4
    assert max(moves) <= 1.001e-3


def test_learning_rate_schedules(make):
    model = causal()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    trainer = make(model, optimizer=optimizer, lr_scheduler=scheduler)
    assert trainer.step(*batch())["ppo/learning_rate"] == pytest.approx(1e-3)
    assert trainer.step(*batch())["ppo/learning_rate"] == pytest.approx(5e-4)
    assert trainer.optimizer.optimizer is optimizer
    assert trainer.lr_scheduler.scheduler is scheduler
    annealed = make(anneal_learning_rate=True, steps=8, learning_rate=1e-3)
    assert [annealed.step(*batch())["ppo/learning_rate"] for _ in range(2)] == pytest.approx([1e-3, 5e-4])
    with pytest.raises(ValueError, match="anneal_learning_rate=True"):
        make(model, optimizer=optimizer, lr_scheduler=scheduler, anneal_learning_rate=True)


def test_adam_style(make):
    assert type(make().optimizer.optimizer) is torch.optim.Adam
    tf = make(adam_style="tf", adam_epsilon=1e-5).optimizer.optimizer
    assert (type(tf).__name__, tf.defaults["eps"]) == ("TFAdam", 1e-5)


def test_negative_kl_is_reported(make):
    trainer = make()
    queries, responses, _ = batch(2)
    data = {"masks": MASK, "scores": torch.zeros(2), "non_score_reward": MASK, "train_stats": {}, "queries": queries,
            "responses": responses}  # fmt: skip
    with pytest.warns(UserWarning, match="KL divergence is starting to become negative: -3.00"):
        trainer.record_step_stats(0.2, logprobs=LOGPROBS - 1, ref_logprobs=LOGPROBS, **data)


def test_train_minibatch_accumulates_under_accelerate(make):
    trainer = make(gradient_accumulation_steps=2)

    def arguments(shift):
        return LOGPROBS, VALUES, LOGPROBS + shift, torch.zeros(2, 5, 7), VALUES + shift, MASK, MASK, MASK

    weight = trainer.model.v_head.summary.bias
    before = weight.detach().clone()
    moved = []
    for _ in range(2):
        with trainer.accelerator.accumulate(trainer.model):
            trainer.train_minibatch(*arguments(weight * torch.ones(2, 5)))
        moved.append(not torch.equal(weight, before))
    assert moved == [False, True]
