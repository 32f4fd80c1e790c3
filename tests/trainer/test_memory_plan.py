"""What a run needs is predicted, and what its settings left open is chosen so that it fits."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from conformity import build, history
from datasets import Dataset

from trl import RunFolderCallback, SFTConfig
from trl.data.microbatches import lengths_of
from trl.models import memory
from trl.models.memory import Load, Open, fitted

EMPTY = memory.RankMemory(0, 0, 0, 0, 0, 0, 0, 0)


def estimate(load, checkpointing, offload):
    """1 byte a token, a tenth of it where layers are computed again, a hundredth off the device; 10 a completion."""
    kept = load.tokens / (100 if offload else 10 if checkpointing else 1)
    return replace(EMPTY, weights=100.0, activations=float(kept), rollout=10.0 * load.rows)


ALL = Open(checkpointing=True, tokens=True, rows=True)


@pytest.mark.parametrize(
    ("room", "left", "tokens", "checkpointing"),
    [
        (10**9, ALL, 8000, False),  # it fits
        (5000, ALL, 4000, False),  # half a pass does
        (1000, ALL, 500, False),
        (300, ALL, 1000, True),  # layers computed again, before passes get too small for the device
        (5000, Open(checkpointing=True, tokens=False), 8000, True),
        (5000, Open(checkpointing=False, tokens=False), 8000, False),  # nothing is open
        (None, ALL, 8000, False),  # nobody knows the room
    ],
)
def test_what_is_chosen(room, left, tokens, checkpointing):
    plan = fitted(estimate, Load(tokens=8000, longest=100), room, left)
    assert (plan.load.tokens, plan.checkpointing) == (tokens, checkpointing)


def test_a_pass_is_never_smaller_than_the_longest_row_and_a_gpu_wants_larger_ones():
    assert fitted(estimate, Load(8000, 3000), 200, ALL).load.tokens == 3000
    on_gpu = fitted(estimate, Load(8000, 100), 1000, ALL, "cuda")
    assert (on_gpu.load.tokens, on_gpu.checkpointing, on_gpu.offload) == (8000, True, False)
    tight = fitted(estimate, Load(8000, 100), 300, replace(ALL, offload=True), "cuda")
    assert (tight.load.tokens, tight.checkpointing, tight.offload) == (8000, True, True)


def test_fewer_completions_at_a_time():
    plan = fitted(estimate, Load(100, 100, rows=128), 500, ALL)
    assert plan.load.rows == 32
    assert plan.fits
    kept = fitted(estimate, Load(100, 100, rows=128), 500, replace(ALL, rows=False))
    assert kept.load.rows == 128
    assert not kept.fits


def test_lengths_are_read_off_columns():
    rows = Dataset.from_dict({"prompt_ids": [[1, 2], [3]], "chosen_ids": [[4], [5, 6]], "text": ["a", "b"]})
    assert lengths_of(rows).tolist() == [3, 3]
    assert lengths_of(rows.select([1, 0])).tolist() == [3, 3]
    assert lengths_of([{"input_ids": [1]}]) is None
    assert lengths_of(rows.select_columns("text")) is None


# -- in a run ------------------------------------------------------------------------------------

CASES = ("sft", "dpo-sigmoid", "reward", "kto", "grpo")


def cramped(monkeypatch, share):
    """A device on which what the run needs fits only by this share of it."""

    def room(device):
        return room.bytes

    room.bytes = 1e15
    monkeypatch.setattr(memory, "room", room)
    monkeypatch.setattr(memory, "PROCESS", 0.0)
    monkeypatch.setattr(memory, "resident", lambda: 0.0)
    monkeypatch.setitem(memory.LEAST_TOKENS, "cpu", 8)

    def shrink(trainer):
        room.bytes = trainer.plan_memory().memory.total * memory.MARGIN * share

    return shrink


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_would_not_fit_learns_the_same_in_smaller_passes(name, tmp_path, monkeypatch, caplog):
    shrink = cramped(monkeypatch, 0.999)
    whole = build(name, tmp_path / "a", max_steps=2)
    whole.train()
    assert "memory plan" not in caplog.text
    small = build(name, tmp_path / "b", max_steps=2)
    shrink(small)
    with caplog.at_level(logging.WARNING):
        small.train()
    (line,) = [record.message for record in caplog.records if record.message.startswith("memory plan")]
    assert ("passes of at most" if name != "grpo" else "gradient_checkpointing=True") in line  # a group stays together
    assert history(small, "loss") == pytest.approx(history(whole, "loss"), rel=1e-4, abs=1e-7)


def test_layers_are_computed_again_where_nothing_was_said_of_it(tmp_path, monkeypatch, caplog):
    shrink = cramped(monkeypatch, 0.95)
    seen = []
    for said in ({}, {"gradient_checkpointing": False}, {"memory_plan": False}):
        caplog.clear()
        trainer = build("sft", tmp_path / str(len(seen)), max_steps=1, max_tokens_per_microbatch=10**6, **said)
        if not seen:
            shrink(trainer)
        trainer.train()
        lines = [record.message for record in caplog.records if record.message.startswith("memory plan")]
        seen.append((bool(trainer.args.gradient_checkpointing), lines, history(trainer, "loss")))
    (again, (line,), loss), (kept, (refused,), plain), (off, nothing, _) = seen
    assert (again, kept, off) == (True, False, False)
    assert "gradient_checkpointing=True" in line
    assert "it may not fit" in refused
    assert nothing == []
    assert loss == pytest.approx(plain, rel=1e-6)


def test_what_was_said_is_never_overridden():
    for said, open_ in (
        ({}, True),
        ({"gradient_checkpointing": True}, False),
        ({"gradient_checkpointing": False}, False),
    ):
        config = SFTConfig(output_dir="out", use_cpu=True, **said)
        assert config.leaves_checkpointing is open_
    assert not SFTConfig(output_dir="out", use_cpu=True, memory_plan=False).leaves_checkpointing


def test_the_prediction_stands_in_the_record_of_the_run(tmp_path):
    trainer = build("sft", tmp_path, max_steps=1)
    trainer.add_callback(RunFolderCallback())
    trainer.train()
    found = json.loads((tmp_path / "run.json").read_text())["predicted"]
    assert found["bytes"] == pytest.approx(sum(found["parts"].values()), abs=10)
    assert found["parts"]["gradients"] == 4 * sum(p.numel() for p in trainer.model.parameters())
    assert found["chosen"] == {}
    assert found["room"] > 10**8


def test_room_on_this_machine():
    found = memory.room(torch.device("cpu"))
    assert found > memory.resident() > 10**7
    assert memory.room(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"memory.max": "9000", "memory.current": "8000", "memory.stat": "anon 1000\ninactive_file 6000\n"}, 7000),
        ({"memory.max": "9000", "memory.current": "8000"}, 1000),
        ({"memory.max": "9000", "memory.current": "8000", "memory.stat": "anon 1000\n\n"}, 1000),
        ({"memory.max": "max", "memory.current": "8000", "memory.stat": "inactive_file 6000\n"}, None),
    ],
)
def test_cached_files_of_a_container_are_room(files, free, tmp_path, monkeypatch):
    """A model that was just read from its file fills the cache, and the run has not less room for that."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "GROUPS", ((str(tmp_path), *memory.GROUPS[0][1:]),))
    assert list(memory._free())[1:] == ([] if free is None else [free])
