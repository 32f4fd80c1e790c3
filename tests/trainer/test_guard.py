"""A loss, a gradient or a weight that is not finite: the run stops there, and nothing of it is saved (C1, C2)."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import conformity
import ddpo_cases
import pytest
import torch
from conformity import build, history
from ppo_cases import batch, causal, maker
from safetensors.torch import load_file
from tokenizers_for_tests import word_tokenizer
from transformers import TrainerCallback

from trl import IterativeSFTTrainer
from trl.losses.loss_sum import LossSum
from trl.rewards.panel import RewardError
from trl.rollout.source import SamplerSource
from trl.trainer.checkpoints import is_whole
from trl.trainer.configuration import PostTrainingConfig
from trl.trainer.guard import NonFiniteError
from trl.trainer.tally import StepWatch

FAMILIES = (
    "sft", "sft-packing", "reward", "prm", "dpo-sigmoid", "kto", "orpo", "cpo", "simpo", "grpo", "rloo", "online-dpo",
    "raft", "distillation", "gkd",
)  # fmt: skip


class Poison(TrainerCallback):
    """Puts a value into a weight: before the n-th step, or after it."""

    def __init__(self, number, value=math.nan, after=False, name="lm_head.weight"):
        self.number, self.value, self.after, self.name = number, value, after, name

    def _put(self, model):
        named = dict(model.named_parameters())
        with torch.no_grad():
            named.get(self.name, next(reversed(named.values()))).view(-1)[1] = self.value

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if not self.after and state.global_step + 1 == self.number:
            self._put(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.after and state.global_step == self.number:
            self._put(model)


def saving(name, folder, **settings):
    return build(name, folder, **{"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1,
                                  "num_train_epochs": 9, **settings})  # fmt: skip


def check_last_checkpoint(folder, number):
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{number}"]
    kept = folder / f"checkpoint-{number}"
    assert is_whole(kept, contents=True)
    assert all(value.isfinite().all() for value in load_file(kept / "model.safetensors").values())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_poisoned_weight_stops_the_step(name, tmp_path):
    trainer = saving(name, tmp_path)
    trainer.add_callback(Poison(2))
    with pytest.raises(
        NonFiniteError, match=r"^step 2: (the loss is not finite in micro-batch 0 .*)?weights that are not"
    ):  # an on-policy step without advantages computes no loss: there the weights are found before they are saved
        trainer.train()
    check_last_checkpoint(tmp_path, 1)


@pytest.mark.parametrize(("name", "value"), [("sft", math.inf), ("grpo", math.nan), ("dpo-sigmoid", -math.inf)])
def test_what_is_not_finite_after_a_step_is_not_saved(name, value, tmp_path):
    trainer = saving(name, tmp_path)
    trainer.add_callback(Poison(2, value, after=True))
    with pytest.raises(NonFiniteError, match=r"^step 2: weights that are not finite: lm_head.weight; nothing is saved"):
        trainer.train()
    check_last_checkpoint(tmp_path, 1)
    with pytest.raises(NonFiniteError, match="nothing is saved"):
        trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final").exists()


@pytest.mark.parametrize("name", ["grpo", "raft"])
def test_a_sampler_without_finite_logits_is_named_too(name, tmp_path):
    trainer = saving(name, tmp_path, save_strategy="no")
    trainer.add_callback(Poison(1, after=True))
    with pytest.raises(NonFiniteError, match=r"^step 2: .*logits are not finite.*: lm_head.weight; "):
        trainer.train()


def test_a_learning_rate_that_explodes(tmp_path):
    trainer = saving("sft", tmp_path, learning_rate=1e38, max_steps=6)
    with pytest.raises(NonFiniteError, match=r"^step \d: .*not finite"):
        trainer.train()
    assert all(math.isfinite(value) for value in history(trainer, "loss"))
    for folder in tmp_path.glob("checkpoint-*"):
        assert all(value.isfinite().all() for value in load_file(folder / "model.safetensors").values())


def test_the_rows_are_named(tmp_path):
    """A token whose embedding is not finite stands in some rows only, which a budget spreads over several passes."""
    trainer = saving("sft", tmp_path, max_tokens_per_microbatch=10, max_steps=1)
    (batch,) = list(trainer.get_train_dataloader())[:1]
    rows = [0] * sum(len(places) for places in batch["places"])
    for places, piece in zip(batch["places"], batch["pieces"], strict=True):
        for row, place in enumerate(places):
            ids = piece["packed"].ids_N[piece["packed"].row_indices(row)].tolist()
            rows[place] = ids
    token = rows[2][1]
    wrong = [str(place) for place, ids in enumerate(rows) if token in ids]
    assert 0 < len(wrong) < len(rows)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[token] = math.nan
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    named = [each.split(";")[0] for each in str(caught.value).split("in row ")[1:]]
    found = {row.strip() for each in named for row in each.split(", micro")[0].split(",") if row.strip().isdigit()}
    assert found == set(wrong)


def test_the_pair_and_its_column_are_named(tmp_path):
    trainer = saving("reward", tmp_path)
    collate = trainer.data_collator

    def with_margin(rows):
        return {**collate(rows), "margin": torch.tensor([0.0, 0.0, math.nan, 0.0])}

    trainer.data_collator = with_margin
    trainer.args.per_device_train_batch_size = 4
    with pytest.raises(
        NonFiniteError, match=r"^step 1: .*micro-batch 0 \(loss nan\), margin of row 2; the weights are as"
    ):
        trainer.train()


def spoiled(trainer, *steps, value=math.nan):
    """Let the loss of some steps be multiplied by a value."""
    objective = trainer.objective

    def spoilt(model, batch):
        loss = objective(model, batch)
        factor = value if model.training and trainer.state.global_step + 1 in steps else 1.0
        return LossSum(loss.total * factor, loss.count, loss.metrics)

    trainer.objective = spoilt
    return trainer


@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 0.0}, {"gradient_accumulation_steps": 2}])
def test_a_step_that_is_not_finite_is_left_out(settings, tmp_path, caplog):
    trainer = spoiled(saving("sft", tmp_path, on_non_finite="skip", max_steps=2, **settings), 1)
    before = conformity.weights(trainer)
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(conformity.weights(trainer))

    trainer.add_callback(Look())
    trainer.train()
    assert all(torch.equal(seen[0][name], value) for name, value in before.items())
    assert not all(torch.equal(seen[1][name], value) for name, value in before.items())
    assert all(value.isfinite().all() for value in seen[1].values())
    assert "step 1 is left out (1 of at most 10): the loss is not finite in micro-batch 0" in caplog.text
    first, second = history(trainer, "loss")
    assert math.isnan(first)
    assert math.isfinite(second)
    assert history(trainer, "train_loss") == [pytest.approx(second, abs=1e-6)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 1
    assert lines[0]["loss"] is None


def test_no_more_than_so_many_steps_are_left_out(tmp_path):
    """The number is that of the whole run, over a resume too."""
    settings = {"on_non_finite": "skip", "max_non_finite_skips": 2}
    spoiled(saving("sft", tmp_path, max_steps=2, **settings), 1, 2).train()
    trainer = spoiled(saving("sft", tmp_path, max_steps=4, **settings), 4)
    with pytest.raises(NonFiniteError, match=r"step 4: .*max_non_finite_skips=2 steps were left out already"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="max_non_finite_skips=3: it has no effect without on_non_finite='skip'"):
        saving("sft", tmp_path, max_non_finite_skips=3)
    with pytest.raises(ValueError, match="on_non_finite='x': choose one of 'stop', 'skip'"):
        saving("sft", tmp_path, on_non_finite="x")


def test_an_infinite_loss_whose_gradient_is_finite_stops_too(tmp_path):
    trainer = saving("sft", tmp_path)
    objective = trainer.objective
    trainer.objective = lambda model, batch: LossSum((loss := objective(model, batch)).total + math.inf, loss.count, {})
    with pytest.raises(NonFiniteError, match=r"^step 1: the loss is not finite in micro-batch 0 \(loss inf\)"):
        trainer.train()


def test_a_gradient_alone(tmp_path):
    trainer = saving("sft", tmp_path)
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(
        NonFiniteError, match=r"^step 1: the norm of the gradient is (nan|inf); the weights are as before"
    ):
        trainer.train()


@pytest.mark.parametrize(("name", "settings"), [("rloo", {"beta": 0.1}), ("grpo-gspo", {})])
def test_a_reference_that_is_not_finite(name, settings, tmp_path):
    """Its KL is part of the reward there, where nan says that nobody has an opinion: advantages of 0, a loss of 0."""
    trainer = saving(name, tmp_path, **settings)
    with torch.no_grad():
        trainer.ref_model.lm_head.weight.fill_(math.nan)
    with pytest.raises(
        NonFiniteError, match=r"^step 1: the KL of completion 0 to the reference is nan: its weights .*: lm_head.weight"
    ):
        trainer.train()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, 1e30])
def test_rewards_that_rollouts_carry(bad, tmp_path, monkeypatch):
    """As those of reward functions: no number that float32 loses in a group's statistics."""

    def rolled(rows, trainer):
        rollout = trainer.sampled(rows)
        rollout.rewards = [1.0] * (len(rollout) - 1) + [bad]
        return rollout

    case = replace(conformity.CASES["grpo"], arguments=lambda: {"rollout_func": rolled})
    monkeypatch.setitem(conformity.CASES, "grpo", case)
    trainer = build("grpo", tmp_path, max_steps=1)
    source = SamplerSource(trainer.sampler, trainer.sampling_params)
    trainer.sampled = lambda rows: source.draw(rows, 1, 0)
    with pytest.raises(RewardError, match=r"^rollout_func gave .* for completion \d+: give a"):
        trainer.train()


def test_after_the_last_step(tmp_path):
    """A run that saves nothing does not end as if all were well."""
    trainer = build("sft", tmp_path, max_steps=2)
    trainer.add_callback(Poison(2, after=True))
    with pytest.raises(NonFiniteError, match=r"^after step 2: weights that are not finite: lm_head.weight"):
        trainer.train()


def test_no_clipping_by_its_other_name(tmp_path):
    trainer = saving("sft", tmp_path, max_grad_norm=None)
    assert trainer.args.max_grad_norm == 0.0
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NonFiniteError, match=r"^step 1: the norm of the gradient is nan"):
        trainer.train()


def test_one_read_a_step(tmp_path, monkeypatch):
    """The norm that clipping computes is read once; nothing looks at the loss of each micro-batch."""
    reads = []
    read = StepWatch.read
    monkeypatch.setattr(StepWatch, "read", lambda *args, **kwargs: reads.append(1) or read(*args, **kwargs))
    monkeypatch.setattr("torch.isnan", lambda *args: pytest.fail("read at a micro-batch"))
    trainer = build("sft", tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2, logging_steps=9)
    trainer.train()
    assert len(reads) == 2


def test_an_infinite_gradient_in_fp16_is_left_to_the_scaler():
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1, scaler=object())
    watch = StepWatch()
    watch.losses, watch.norm = [torch.tensor(2.0)], torch.tensor(math.inf)
    assert watch.read(accelerator) == (True, False, [])
    watch.losses.append(torch.tensor(math.nan))
    assert watch.read(accelerator)[0] is False
    accelerator.scaler = None
    watch.losses.pop()
    assert watch.read(accelerator)[0] is False


# -- trainers that are driven by `step` -------------------------------------------------------------


@pytest.fixture
def make():
    return maker(word_tokenizer())


pytestmark = pytest.mark.filterwarnings("ignore:No dataset is provided", "ignore:No data collator is provided")


def test_ppo(make, tmp_path):
    trainer = make()
    trainer.step(*batch())
    with torch.no_grad():
        trainer.model.pretrained_model.lm_head.weight[3, 3] = math.nan
    before = conformity.weights(trainer)
    with pytest.raises(NonFiniteError, match=r"^step 2: the loss is not finite in micro-batch 0 .*lm_head.weight"):
        trainer.step(*batch(seed=2))
    after = conformity.weights(trainer)
    assert all(torch.equal(after[name], value) for name, value in before.items() if value.isfinite().all())
    for save in (trainer.save_state, trainer.save_pretrained, trainer.save_model):
        with pytest.raises(NonFiniteError, match="nothing is saved"):
            save(tmp_path / "x")
    assert not (tmp_path / "x" / "model.safetensors").exists()


def test_a_reference_of_ppo_that_is_not_finite(make):
    """What is left out for it leaves the coefficient of the KL as it was."""
    trainer = make(on_non_finite="skip", ppo_epochs=1)
    with torch.no_grad():
        trainer.ref_model.pretrained_model.lm_head.weight.fill_(math.nan)
    before, coefficient = conformity.weights(trainer), trainer.kl_ctl.value
    trainer.step(*batch())
    assert all(torch.equal(value, before[name]) for name, value in conformity.weights(trainer).items())
    assert trainer.kl_ctl.value == coefficient


def test_ppo_leaves_a_step_out(make, caplog):
    """A critic's value that is not finite: nothing is learned from that minibatch, with and without clipping."""
    for norm in (None, 1.0):
        trainer = make(on_non_finite="skip", max_non_finite_skips=1, ppo_epochs=1, max_grad_norm=norm)
        objective, calls = trainer._objective, []

        def spoilt(actor, piece, ratios, objective=objective, calls=calls):
            loss = objective(actor, piece, ratios)
            calls.append(1)
            return LossSum(loss.total * (math.nan if len(calls) in (1, 4) else 1.0), loss.count, loss.metrics)

        trainer._objective = spoilt
        before = conformity.weights(trainer)
        trainer.step(*batch())
        after = conformity.weights(trainer)
        assert all(value.isfinite().all() for value in after.values())
        assert any(not torch.equal(after[name], value) for name, value in before.items())
        assert "step 1 is left out (1 of at most 1)" in caplog.text
        with pytest.raises(NonFiniteError, match="max_non_finite_skips=1 steps were left out already"):
            trainer.step(*batch(seed=2))
    with pytest.raises(ValueError, match="max_non_finite_skips=3: no effect without on_non_finite='skip'"):
        make(max_non_finite_skips=3)
    with pytest.raises(ValueError, match="on_non_finite='x': choose 'stop' or 'skip'"):
        make(on_non_finite="x")


def test_the_pieces_of_a_ppo_step(make):
    """`train_minibatch`, which scripts call with tensors of their own."""
    trainer = make(causal())
    grid = torch.zeros(2, 3, requires_grad=True)
    weight = trainer.model.v_head.summary.weight
    values = grid + weight.sum() * math.nan
    ones = torch.ones(2, 3)
    with pytest.raises(NonFiniteError, match=r"^step 0: the loss is not finite in micro-batch 0"):
        trainer.train_minibatch(
            ones * -1, ones, grid - 1, torch.zeros(2, 3, 5), values, torch.ones(2, 3), ones, ones
        )  # fmt: skip


def test_iterative_sft(tmp_path):
    args = PostTrainingConfig(
        output_dir=str(tmp_path), max_steps=9, report_to="none", per_device_train_batch_size=2, save_steps=1,
        save_strategy="steps", learning_rate=1e-2,
    )  # fmt: skip
    trainer = IterativeSFTTrainer(conformity.causal_lm(), args, processing_class=conformity.tokenizer())
    ids = [torch.tensor([4, 5, 6]), torch.tensor([7, 8])]
    trainer.step(ids, labels=ids)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[8] = math.nan
    with pytest.raises(
        NonFiniteError, match=r"^step 2: .*micro-batch 0 \(loss nan\), output of the model in row \d; weights"
    ):
        trainer.step(ids, labels=ids)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_ddpo(action, tmp_path):
    trainer = ddpo_cases.trainer(tmp_path, num_epochs=4, on_non_finite=action)
    trainer.step(0, 0)
    trainer.step(1, 4)
    loss, calls = trainer.calculate_loss, []

    def spoilt(*args):
        first, *rest = loss(*args)
        calls.append(1)
        return first * (math.nan if len(calls) == 2 else 1.0), *rest

    trainer.calculate_loss = spoilt
    kept = tmp_path / "logs" / "checkpoints" / "checkpoint_1"
    if action == "skip":
        trainer.step(2, 8)
        assert all(parameter.isfinite().all() for parameter in trainer.trainable_layers)
        assert trainer._non_finite.skipped == 1
        return
    with pytest.raises(NonFiniteError, match=r"^step 9: the loss is not finite in micro-batch 1 \(loss nan\)"):
        trainer.step(2, 8)
    with torch.no_grad():
        trainer.trainable_layers[0].view(-1)[0] = math.inf
    with pytest.raises(NonFiniteError, match="nothing is saved"):
        trainer._save_checkpoint(2)
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    assert is_whole(kept, contents=True)
