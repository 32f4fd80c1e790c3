"""One suite for every trainer: the split into batches, packing, saving and resuming change nothing."""

import copy
import inspect
import logging
from dataclasses import fields

import pytest
import torch
import transformers
from conformity import CASES, build, history, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

import trl
from trl.models import forward

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
NOT_SETTINGS = {"distributed_state", "__cached__setup_devices"}
"""what an `Accelerator` keeps in the config object; the same object for all trainers of a process"""
every_trainer = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR)


@every_trainer
def test_the_split_into_microbatches_changes_nothing(name, tmp_path):
    seen = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        if size < CASES[name].smallest:
            continue
        trainer = build(
            name, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=1
        )
        trainer.train()
        seen.append((history(trainer, "loss")[0], history(trainer, "grad_norm")[0]))
    for other in seen[1:]:
        assert other == pytest.approx(seen[0], rel=1e-5, abs=1e-6)  # a policy gradient's first loss may be 0
    assert seen[0][1] > 0


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.packs])
def test_packed_equals_padded(name, tmp_path):
    seen = []
    for padding_free in (True, False):
        trainer = build(name, tmp_path, padding_free=padding_free, max_steps=1)
        trainer.train()
        seen.append((history(trainer, "loss")[0], history(trainer, "grad_norm")[0]))
    assert seen[1] == pytest.approx(seen[0], rel=1e-5, abs=1e-6)


@every_trainer
def test_padding_free_false_reaches_every_pass(name, tmp_path, monkeypatch):
    def refuse(*how):
        raise AssertionError("rows were packed")

    more = {"eval_strategy": "steps", "eval_steps": 1}
    if hasattr(getattr(trl, CASES[name].config)(str(tmp_path)), "precompute_ref_log_probs"):
        more["precompute_ref_log_probs"] = not CASES[name].settings.get("sync_ref_model")
    trainer = build(name, tmp_path, padding_free=False, max_steps=1, **more)
    monkeypatch.setattr(forward, "fast", refuse)
    trainer.train()
    trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))


@every_trainer
def test_same_seed_same_numbers_and_evaluation_disturbs_nothing(name, tmp_path):
    runs = []
    for evaluate in (False, True):
        trainer = build(name, tmp_path, **({"eval_strategy": "steps", "eval_steps": 1} if evaluate else {}))
        trainer.train()
        if evaluate:
            assert all(torch.isfinite(torch.tensor(history(trainer, "eval_loss"))))
        runs.append(weights(trainer))
    for key, value in runs[0].items():
        assert torch.equal(value, runs[1][key]), key


class FlagsAroundEvaluation(TrainerCallback):
    """The training flags of all modules at the end of each step, and after the evaluation that follows."""

    def __init__(self):
        self.before, self.after = [], []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.before.append([module.training for module in model.modules()])

    def on_evaluate(self, args, state, control, model, **kwargs):
        self.after.append([module.training for module in model.modules()])


@every_trainer
def test_training_flags_come_back_after_an_evaluation(name, tmp_path):
    trainer, flags = build(name, tmp_path, eval_strategy="steps", eval_steps=1), FlagsAroundEvaluation()
    trainer.add_callback(flags)
    trainer.train()
    assert any(flags.before[0])
    assert len(flags.after) == 2
    assert flags.after == flags.before


@every_trainer
def test_the_callers_config_stays_as_it_was(name, tmp_path):
    case = CASES[name]
    args = getattr(trl, case.config)(output_dir=str(tmp_path), report_to="none", max_steps=1, **case.settings)
    before = {key: copy.deepcopy(value) for key, value in vars(args).items() if key not in NOT_SETTINGS}
    build(name, tmp_path, args=args).train()
    assert {key: vars(args)[key] for key in before} == before


@every_trainer
def test_resume_equals_the_uninterrupted_run_bit_for_bit(name, tmp_path):
    whole = build(name, tmp_path / "whole", max_steps=4)
    whole.train()
    first = build(name, tmp_path / "parts", max_steps=4, save_strategy="steps", save_steps=2)
    first.train()
    resumed = build(name, tmp_path / "parts", max_steps=4, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    expected, got = weights(whole), weights(resumed)
    for key, value in expected.items():
        assert torch.equal(value, got[key]), key
    assert history(whole, "loss")[2:] == history(resumed, "loss")[-2:]


@every_trainer
def test_saved_and_loaded_gives_equal_logits(name, tmp_path):
    trainer = build(name, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").exists()
    auto = {
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    }.get(CASES[name].task_type, transformers.AutoModelForCausalLM)
    loaded = auto.from_pretrained(tmp_path / "saved").eval()
    ids = torch.tensor([[1, 5, 9, 12]])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


@every_trainer
def test_lora_trains_only_the_adapter(name, tmp_path):
    trainer = build(name, tmp_path, lora=True)
    before = weights(trainer)
    trainer.train()
    changed = {key for key, value in weights(trainer).items() if not torch.equal(value, before[key])}
    assert changed
    assert all("lora" in key or "modules_to_save" in key for key in changed)
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()


@every_trainer
def test_gradient_checkpointing_changes_nothing(name, tmp_path):
    seen = []
    for checkpointing in (False, True):
        trainer = build(name, tmp_path, max_steps=1, gradient_checkpointing=checkpointing)
        trainer.train()
        seen.append((history(trainer, "loss")[0], history(trainer, "grad_norm")[0]))
    assert seen[1] == pytest.approx(seen[0], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("name", "field", "value"), [(n, f, v) for n, c in CASES.items() for f, v in c.wrong.items()])
def test_a_wrong_value_is_named(name, field, value, tmp_path):
    with pytest.raises(ValueError, match=field):
        build(name, tmp_path, **{field: value})


@pytest.mark.parametrize("config", sorted({case.config for case in CASES.values()}))
def test_every_own_field_has_a_docstring(config):
    config_class = getattr(trl, config)
    source = "\n".join(
        inspect.getsource(parent) for parent in config_class.__mro__ if parent.__module__.startswith("trl")
    )
    inherited = {entry.name for entry in fields(TrainingArguments)}
    lines = source.splitlines()
    for entry in fields(config_class):
        if entry.metadata.get("help"):
            continue
        declared = [i for i, line in enumerate(lines) if line.strip().startswith(f"{entry.name}:")]
        if entry.name in inherited and not declared:
            continue
        assert any(lines[i + 1].strip().startswith('"""') for i in declared), f"{config}.{entry.name} has no docstring"


@pytest.mark.parametrize("trainer", sorted({case.trainer for case in CASES.values()}))
def test_only_public_methods_of_trainer_are_overridden(trainer):
    allowed = {"_tag_names"}
    for parent in getattr(trl, trainer).__mro__:
        if parent.__module__.startswith("trl"):
            private = {name for name in vars(parent) if name.startswith("_") and not name.startswith("__")}
            clash = {name for name in private if hasattr(Trainer, name)} - allowed
            assert not clash, f"{parent.__name__} overrides {clash}"
