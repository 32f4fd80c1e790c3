"""PPOTrainer: goldens of the seed, the packed step against padded pieces, and everything a step must keep or refuse."""

import json
import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as t
from datasets import Dataset

from trl import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer
from trl.core import LengthSampler
from trl.models import create_reference_model
from trl.models.prepare import enable_gradient_checkpointing
from trl.trainer import ppo_statistics

pytestmark = pytest.mark.filterwarnings("ignore:No dataset is provided:UserWarning")

COMMON = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SAMPLING = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": 5}
STAT_KEYS = {
    "objective": ["kl", "kl_dist", "logprobs", "ref_logprobs", "kl_coef", "entropy"],
    "ppo": ["mean_non_score_reward", "mean_scores", "std_scores", "learning_rate"],
    "tokens": [f"{which}_{what}" for which in ("queries", "responses") for what in ("len_mean", "len_std", "dist")],
    "ppo/loss": ["policy", "value", "total"],
    "ppo/policy": ["entropy", "approxkl", "policykl", "clipfrac", "advantages", "advantages_mean", "ratio"],
    "ppo/returns": ["mean", "var"],
    "ppo/val": ["vpred", "error", "clipfrac", "mean", "var", "var_explained"],
    "time/ppo": ["forward_pass", "compute_rewards", "compute_advantages", "optimize_step", "calc_stats", "total"],
}


def causal(kind=t.LlamaConfig, peft_config=None, **fields):
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(kind(**{**COMMON, **fields}))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return AutoModelForCausalLMWithValueHead.from_pretrained(model, peft_config=peft_config)


def gpt2():
    torch.manual_seed(0)
    config = t.GPT2Config(
        vocab_size=100, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return AutoModelForCausalLMWithValueHead.from_pretrained(t.AutoModelForCausalLM.from_config(config))


def lora(**fields):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **fields)


@pytest.fixture
def make(tiny_tokenizer):
    def build(model=None, *, dataset=None, **fields):
        given = {name: fields.pop(name) for name in ("ref_model", "optimizer", "lr_scheduler", "num_shared_layers",
                                                     "value_model", "data_collator") if name in fields}  # fmt: skip
        config = PPOConfig(**{"batch_size": 4, "mini_batch_size": 2, "learning_rate": 1e-3, "ppo_epochs": 2, **fields})
        return PPOTrainer(
            config, causal() if model is None else model, tokenizer=tiny_tokenizer, dataset=dataset, **given
        )

    return build


def batch(rows=4, seed=1, response_length=5):
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(4, 100, (n,), generator=g)  # noqa: E731
    queries = [draw(3 + i % 3) for i in range(rows)]
    responses = [draw(response_length - i % 2) for i in range(rows)]
    return queries, responses, [torch.tensor(float(i % 3) - 0.5) for i in range(rows)]


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


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(torch.as_tensor(actual), torch.tensor(expected), atol=atol, rtol=0)


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
        from trl.trainer.ppo_inputs import samples_of

        measured = trainer._measure(samples_of(queries, responses, None))
    torch.testing.assert_close(measured.kl_BT.sum(1), expected, rtol=1e-4, atol=1e-5)


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


# --- models --------------------------------------------------------------------------------------------------------


def test_adapter_off_is_the_reference(make):
    trainer = make(causal(peft_config=lora(lora_dropout=0.3)), learning_rate=0.05)
    assert trainer.ref_model is None
    inner = trainer.model.pretrained_model
    frozen = {name: p.clone() for name, p in inner.named_parameters() if "lora" not in name}
    first = trainer.step(*batch())
    second = trainer.step(*batch())
    assert abs(first["objective/kl"]) < 1e-5 < abs(second["objective/kl"])
    assert first["objective/ref_logprobs"] == pytest.approx(second["objective/ref_logprobs"], abs=1e-5)
    assert all(torch.equal(p, frozen[name]) for name, p in inner.named_parameters() if "lora" not in name)
    assert all(p.requires_grad for name, p in inner.named_parameters() if "lora" in name)


def test_shared_layers_are_shared_and_frozen(make):
    model = gpt2()
    trainer = make(model, num_shared_layers=2)
    assert (
        trainer.ref_model.pretrained_model.transformer.h[0].ln_1.weight
        is model.pretrained_model.transformer.h[0].ln_1.weight
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer.step(*batch())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert not any(".h.0." in name or ".h.1." in name or "wte" in name for name in moved)
    with pytest.warns(UserWarning, match="num_shared_layers is ignored"):
        make(model, ref_model=create_reference_model(model), num_shared_layers=2)
    with pytest.raises(ValueError, match="num_shared_layers=1"):
        make(causal(peft_config=lora()), num_shared_layers=1)


def seq2seq():
    torch.manual_seed(0)
    config = t.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0,
                        eos_token_id=2, decoder_start_token_id=0)  # fmt: skip
    return AutoModelForSeq2SeqLMWithValueHead.from_pretrained(t.AutoModelForSeq2SeqLM.from_config(config))


def test_encoder_decoder(make):
    trainer = make(seq2seq(), learning_rate=1e-2)
    queries, _, scores = batch()
    responses = trainer.generate(queries, **SAMPLING)
    assert all(int(row[0]) == 0 for row in responses)
    stats = trainer.step(queries, responses, scores)
    assert stats["ppo/policy/advantages"].shape == (sum(len(row) - 1 for row in responses),)
    inputs = trainer.prepare_model_inputs(queries, responses)
    assert set(inputs) == {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
    logprobs, _, values, mask = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
    assert logprobs.shape == values.shape == mask.shape
    assert mask.sum(1).tolist() == [len(row) - 2 for row in responses]  # from the second prediction on, as in the seed


def test_padded_architecture(make):
    torch.manual_seed(0)
    config = t.BloomConfig(
        vocab_size=100, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(t.AutoModelForCausalLM.from_config(config))
    stats = make(model).step(*batch())
    assert np.isfinite(stats["ppo/loss/total"])


def test_bfloat16(make):
    model = causal()
    model.pretrained_model.to(torch.bfloat16)
    trainer = make(model, gradient_accumulation_steps=2)
    queries, _, scores = batch()
    responses = trainer.generate(queries, return_prompt=False, **SAMPLING)
    stats = trainer.step(queries, responses, scores)
    assert np.isfinite(stats["ppo/loss/total"])


def test_separate_value_model(make):
    torch.manual_seed(3)
    critic = t.AutoModelForSequenceClassification.from_config(t.LlamaConfig(**COMMON, num_labels=1))
    before = critic.score.weight.clone()
    model = causal()
    trainer = make(model, value_model=critic)
    stats = trainer.step(*batch())
    assert np.isfinite(stats["ppo/loss/value"])
    assert not torch.equal(critic.score.weight, before)
    assert model.v_head.summary.weight.grad is None
    other = causal()
    with pytest.raises(ValueError, match="it holds no parameter of the `value_model`"):
        make(other, value_model=critic, optimizer=torch.optim.Adam(other.parameters()))
    with pytest.raises(ValueError, match="has no score head"):
        make(causal(), value_model=causal().pretrained_model)


# --- generation ----------------------------------------------------------------------------------------------------


def test_generate_shapes(make):
    trainer = make()
    queries, *_ = batch()
    single = trainer.generate(queries[0], **SAMPLING)
    assert single.shape == (1, len(queries[0]) + 5) or int(single[0, -1]) == 2
    assert trainer.generate(queries[0], return_prompt=False, **SAMPLING).shape[1] <= 5
    rows = trainer.generate(queries, **SAMPLING)
    assert all(torch.equal(row[: len(query)], query) for row, query in zip(rows, queries, strict=True))
    pair = trainer.generate(queries, generate_ref_response=True, return_prompt=False, max_new_tokens=4)
    assert [row.tolist() for row in pair[0]] == [row.tolist() for row in pair[1]]  # greedy, and still the same model
    with pytest.raises(ValueError, match=r"query_tensor must be a tensor of shape \(`seq_len`\)"):
        trainer.generate(torch.ones(2, 3, dtype=torch.long))


def test_generate_greedy_equals_transformers(make):
    trainer = make()
    queries, *_ = batch()
    rows = trainer.generate(queries, batch_size=3, max_new_tokens=6, do_sample=False)
    for row, query in zip(rows, queries, strict=True):
        alone = trainer.model.generate(query[None], max_new_tokens=6, do_sample=False, pad_token_id=0)[0]
        assert row.tolist() == alone.tolist()


def test_generate_ends_at_eos_but_not_in_the_prompt(make):
    trainer = make()
    query = torch.tensor([5, 2, 6, 7])
    rows = trainer.generate([query, query[:2]], max_new_tokens=30, do_sample=True, top_k=0, top_p=1.0)
    assert rows[0][:4].tolist() == query.tolist()
    for row, prompt in zip(rows, (4, 2), strict=True):
        assert (row[prompt:-1] != 2).all()


def test_length_sampler(make):
    trainer = make()
    queries, *_ = batch()
    rows = trainer.generate(queries, length_sampler=LengthSampler(3, 4), return_prompt=False, do_sample=True, top_k=0)
    assert all(len(row) == 3 or int(row[-1]) == 2 for row in rows)


# --- arguments, data, reports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, r, s: (tuple(q), r, s), "queries must be a list of tensors - got"),
        (lambda q, r, s: (q, [row.tolist() for row in r], s), "Elements in responses must be tensors - got"),
        (lambda q, r, s: (q, r, s[:3]), r"Batch size \(4\) does not match number of examples - but got 3 for: scores"),
        (lambda q, r, s: (q, r, [x.view(1, 1) for x in s]), "Scores must be 1-dimensional - got 2"),
        (lambda q, r, s: (q, r, [torch.tensor([1.0, 2.0])] * 4), r"scores\[0\] holds 2 numbers"),
        (lambda q, r, s: (q, r, [*s[:3], torch.tensor(float("nan"))]), r"scores\[3\]=nan is not finite"),
        (lambda q, r, s: (q, r, s, [torch.ones(1)] * 4), r"masks\[0\] has shape"),
    ],
)
def test_what_is_no_batch_is_refused(make, change, message):
    with pytest.raises(ValueError, match=message):
        make().step(*change(*batch()))


def test_safety_checker_squeezes_scores(make):
    queries, responses, scores = batch()
    *_, checked, masks = make()._step_safety_checker(4, queries, responses, [score[None] for score in scores])
    assert [score.shape for score in checked] == [torch.Size([])] * 4
    assert masks is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("config", object(), "config must be a PPOConfig, got"),
        ("tokenizer", "gpt2", "tokenizer must be a PreTrainedTokenizerBase like"),
        ("model", torch.nn.Linear(1, 1), "model must be a PreTrainedModelWrapper, got"),
        ("ref_model", torch.nn.Linear(1, 1), "ref_model must be a PreTrainedModelWrapper or `None`"),
        ("dataset", [1], "dataset must be a torch.utils.data.Dataset or datasets.Dataset"),
        ("lr_scheduler", object(), "lr_scheduler must be a torch.optim.lr_scheduler"),
        ("config", PPOConfig(push_to_hub_if_best_kwargs={"private": True}), "You have to specify repo_id"),
    ],
)
def test_arguments_of_the_wrong_kind(tiny_tokenizer, name, value, message):
    given = {"config": PPOConfig(), "model": causal(), "tokenizer": tiny_tokenizer, name: value}
    with pytest.raises(ValueError, match=message):
        PPOTrainer(**given)


def test_both_names_of_the_tokenizer(tiny_tokenizer):
    trainer = PPOTrainer(PPOConfig(), causal(), processing_class=tiny_tokenizer)
    assert trainer.tokenizer is trainer.processing_class is tiny_tokenizer


def test_no_dataset_is_said(tiny_tokenizer):
    with pytest.warns(UserWarning, match="No dataset is provided"):
        assert PPOTrainer(PPOConfig(), causal(), tokenizer=tiny_tokenizer).dataloader is None


def test_runtime_config(make):
    config = make(gradient_accumulation_steps=2).config
    assert (config.is_encoder_decoder, config.is_peft_model, config.world_size) == (False, False, 1)
    assert (config.global_backward_batch_size, config.global_batch_size) == (4, 4)


def test_dataloader_drops_what_nobody_takes(make):
    rows = Dataset.from_list([{"input_ids": [i], "query": str(i), "other": i} for i in range(10)])
    collate = lambda rows: {name: [row[name] for row in rows] for name in rows[0]}  # noqa: E731
    trainer = make(dataset=rows, data_collator=collate)
    batches = list(trainer.dataloader)
    assert len(batches) == 2  # the rest is dropped
    assert set(batches[0]) == {"input_ids", "query"}
    kept = make(dataset=rows, data_collator=collate, remove_unused_columns=False)
    assert set(next(iter(kept.dataloader))) == {"input_ids", "query", "other"}


def test_accumulation_holds_at_the_end_of_the_data(make):
    """The last batch of a prepared loader makes accelerate step at every micro-batch, unless it is told not to."""
    rows = Dataset.from_list([{"input_ids": [i + 4]} for i in range(4)])
    trainer = make(dataset=rows, data_collator=lambda rows: rows, gradient_accumulation_steps=2, ppo_epochs=1)
    steps = []
    step = trainer.optimizer.optimizer.step
    trainer.optimizer.optimizer.step = lambda *a, **k: steps.append(1) or step(*a, **k)
    for _ in trainer.dataloader:
        trainer.step(*batch())
    assert len(steps) == 1


def test_log_stats(make, tmp_path):
    trainer = make(log_with="tensorboard", project_kwargs={"logging_dir": str(tmp_path)})
    queries, responses, scores = batch()
    stats = trainer.step(queries, responses, scores)
    trainer.log_stats(stats, {"query": ["a"] * 4, "response": ["b"] * 4}, scores)
    trainer.accelerator.end_training()
    assert list(tmp_path.rglob("events.out.*"))
    logged = {}
    trainer.accelerator.log = lambda values, step=None: logged.update(values, step=step)
    trainer.log_stats(stats, {"query": ["a"] * 4, "response": ["b"] * 4}, scores)
    assert logged["env/reward_mean"] == pytest.approx(0.25)
    assert logged["env/reward_std"] == pytest.approx(torch.stack(scores).std().item())
    assert logged["env/reward_dist"].shape == (4,)
    assert logged["step"] == 1
    with pytest.warns(UserWarning, match="The game logs will not be logged"):
        trainer.log_stats(stats, {}, scores)
    assert logged["step"] == 2


def test_push_if_best(make):
    pushed = []
    trainer = make(push_to_hub_if_best_kwargs={"repo_id": "me/it"}, compare_steps=2)
    trainer.push_to_hub = lambda **kwargs: pushed.append(kwargs)
    for score in (
        1.0,
        9.0,
        2.0,
        9.0,
        1.5,
    ):  # only every second step is looked at; the first is what the others must beat
        trainer._push_if_best(torch.full((4,), score))
    assert pushed == [{"repo_id": "me/it"}]
    assert trainer.highest_reward == 2.0


def test_push_to_hub_uploads_model_tokenizer_and_card(make, monkeypatch):
    uploaded = {}

    class Hub:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, **_):
            uploaded[repo_id] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.whoami", lambda: {"name": "me"})
    make().push_to_hub("me/it", private=True)
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(uploaded["me/it"])
    assert b"- ppo" in uploaded["me/it"]["README.md"]
    assert json.loads(uploaded["me/it"]["config.json"])["model_type"] == "llama"


def test_wandb_gets_a_table_and_arrays(make, monkeypatch):
    tables, logged = [], {}
    fake = SimpleNamespace(Table=lambda columns, rows: tables.append((columns, rows)))
    trainer = make()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    trainer.config.log_with = "wandb"
    trainer.accelerator.log = logged.update
    queries, responses, scores = batch()
    stats = trainer.step(queries, responses, scores)
    assert isinstance(stats["ppo/loss/total"], np.ndarray)
    texts = {"query": list("abcd"), "response": list("efgh"), "ref_response": list("ijkl")}
    trainer.log_stats(stats, texts, scores, columns_to_log=["query", "response", "ref_response"])
    ((columns, rows),) = tables
    assert columns == ["query", "response", "ref_response", "reward"]
    assert rows[1] == ["b", "f", "j", 0.5]
    assert "game_log" in logged
    with pytest.raises(ValueError, match="are not present in the batch"):
        trainer.log_stats(stats, {"query": list("abcd")}, scores)


def test_save_pretrained(make, tmp_path, monkeypatch):
    trainer = make()
    with pytest.warns(UserWarning, match="Cannot retrieve user information"):
        trainer.create_model_card(str(tmp_path / "offline"))
    assert not (tmp_path / "offline").exists()
    monkeypatch.setattr("huggingface_hub.whoami", lambda: {"name": "someone"})
    trainer.save_pretrained(tmp_path / "online")
    assert "someone/online" in (tmp_path / "online" / "README.md").read_text()
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "online"))
    ours, theirs = trainer.model.state_dict(), loaded.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert t.AutoTokenizer.from_pretrained(tmp_path / "online").eos_token == "<eos>"


def test_show_tokens(make, capsys):
    make()._show_tokens(torch.tensor([4, 5]), torch.tensor([0, 1]))
    assert capsys.readouterr().out.split() == ["a", "b"]


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


def test_half_precision_has_coarser_bounds(monkeypatch):
    accelerator = SimpleNamespace(mixed_precision="no")
    off = {"ratio": torch.tensor(1.001), "approx_kl": torch.tensor(1e-4)}
    ppo_statistics.check_on_policy(off, accelerator, torch.nn.Linear(1, 1).to(torch.bfloat16))
    with pytest.raises(RuntimeError):
        ppo_statistics.check_on_policy(off, accelerator, torch.nn.Linear(1, 1))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")  # TF32
    ppo_statistics.check_on_policy(off, accelerator, torch.nn.Linear(1, 1))


def test_generic_logging_does_not_warn(make, caplog):
    with caplog.at_level(logging.WARNING):
        make().step(*batch())
    assert not caplog.records


def test_reward_adapter_scores_and_rests(make, tmp_path):
    """One base model, two adapters: the policy's and the reward model's."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    judge = peft.get_peft_model(
        t.LlamaForSequenceClassification(t.LlamaConfig(**COMMON, num_labels=1)),
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", init_lora_weights=False),
    )
    judge.save_pretrained(str(tmp_path))
    torch.manual_seed(0)
    base = t.AutoModelForCausalLM.from_config(t.LlamaConfig(**COMMON))
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=lora(), reward_adapter=str(tmp_path))
    trainer = make(model, learning_rate=1e-2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    queries, responses, _ = batch()
    for _ in range(2):
        inputs = trainer.prepare_model_inputs(queries, responses)
        raw = trainer.accelerator.unwrap_model(trainer.model).compute_reward_score(**inputs)
        assert raw.shape == (*inputs["input_ids"].shape, 1)
        stats = trainer.step(queries, responses, [row[-1, 0] for row in raw])
    assert stats["objective/kl"] != 0  # against the base model: neither adapter
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("default" in name for name in moved)
    assert not any("reward_adapter" in name or name.startswith("score") for name in moved)
