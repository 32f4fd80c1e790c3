"""Samples that the preference trainers show during an evaluation."""

import sys
import types

import pytest
from conformity import causal_lm, pairs, tokenizer
from dpo_cases import PLAIN, config, trainer_of

from trl import ORPOConfig, ORPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*is not set in the DPOTrainer's init.*:UserWarning")


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in that keeps what is logged."""
    stub = types.ModuleType("wandb")
    stub.__spec__ = types.SimpleNamespace(name="wandb")
    stub.run, stub.logged = object(), []
    stub.Table = lambda columns, rows: {"columns": columns, "rows": rows}
    stub.log = stub.logged.append
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setattr("trl.trainer.pair_trainer.is_wandb_available", lambda: True)
    return stub


@pytest.mark.parametrize("kind", ["dpo", "orpo"])
def test_samples_of_an_evaluation(kind, wandb, tmp_path):
    more = {"generate_during_eval": True, "max_completion_length": 4, "per_device_eval_batch_size": 2}
    rows = pairs().select(range(4))
    if kind == "dpo":
        trainer = trainer_of(config(tmp_path, **more), ref_model=causal_lm(seed=5), eval_dataset=rows)
    else:
        args = ORPOConfig(output_dir=str(tmp_path), **{**PLAIN, **more})
        trainer = ORPOTrainer(causal_lm(), args, None, pairs(), rows, tokenizer())
    trainer.evaluate()
    (logged,) = wandb.logged
    table = logged["game_log"]
    assert table["columns"] == ["Prompt", "Policy", "Ref Model"]
    assert len(table["rows"]) == 2
    prompts = {prompt.strip() for prompt in rows["prompt"]}
    assert all(prompt in prompts and policy for prompt, policy, _ in table["rows"])
    assert all(bool(reference) == (kind == "dpo") for *_, reference in table["rows"])


def test_samples_without_wandb(monkeypatch, tmp_path):
    monkeypatch.setattr("trl.trainer.pair_trainer.is_wandb_available", lambda: False)
    with pytest.raises(ValueError, match="Please install `wandb` to resolve"):
        trainer_of(config(tmp_path, generate_during_eval=True))
