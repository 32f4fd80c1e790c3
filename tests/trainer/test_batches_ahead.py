"""Batches that are made before they are asked for: by a thread, or by the workers of a data loader."""

import threading

import pytest
import torch
from conformity import build, history
from datasets import Dataset

from trl.data import microbatches
from trl.data.microbatches import BudgetCollator, each_ahead, may_be_ahead
from trl.trainer import sft_trainer
from trl.trainer.sft_trainer import PackingCollator


def weights_of(trainer):
    return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])


@pytest.mark.parametrize("name", ["sft", "dpo-sigmoid", "kto", "reward"])
def test_the_same_numbers_in_the_same_order(name, tmp_path, monkeypatch):
    found = []
    for kinds, workers in ((set(), 0), ({"cpu"}, 0), (set(), 2)):
        monkeypatch.setattr(microbatches, "AHEAD", kinds)
        how = {"dataloader_num_workers": workers, "max_tokens_per_microbatch": 20, "max_steps": 3}
        trainer = build(name, tmp_path / str(len(found)), gradient_accumulation_steps=2, **how)
        trainer.train()
        found.append((history(trainer, "loss"), weights_of(trainer)))
    (loss, weights), *others = found
    for other_loss, other_weights in others:
        assert other_loss == loss
        assert torch.equal(other_weights, weights)


def test_who_packs_them(tmp_path, monkeypatch):
    seen, pack = [], sft_trainer.pack
    monkeypatch.setattr(
        sft_trainer, "pack", lambda trees: seen.append(threading.current_thread().name) or pack(list(trees))
    )
    for kinds in (set(), {"cpu"}):
        monkeypatch.setattr(microbatches, "AHEAD", kinds)
        seen.clear()
        build("sft", tmp_path / str(len(kinds)), max_steps=4, per_device_train_batch_size=2).train()
        assert len(seen) == 4  # an epoch, each batch once
        assert [name.startswith("batches") for name in seen] == [False, *[bool(kinds)] * 3]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
    seen.clear()
    build("sft", tmp_path / "workers", max_steps=4, per_device_train_batch_size=2, dataloader_num_workers=1).train()
    assert seen == []  # another process does it


def test_a_run_that_stopped_goes_on_bit_by_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(microbatches, "AHEAD", {"cpu"})
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    whole = build("sft", tmp_path, **settings)
    whole.train()
    resumed = build("sft", tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights_of(resumed), weights_of(whole))


def test_an_error_comes_at_its_place():
    def rows():
        yield 1
        yield 2
        raise ValueError("row 3 is bad")

    items = each_ahead(rows())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(ValueError, match="row 3 is bad"):
        next(items)
    assert list(each_ahead(iter([]))) == []
    first = each_ahead(iter(range(9)))
    assert next(first) == 0
    first.close()  # whoever stops early leaves no thread
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_only_where_nothing_of_a_user_runs_in_it(monkeypatch):
    rows = Dataset.from_dict({"input_ids": [[1]], "loss_mask": [[1]]})
    ours, theirs = PackingCollator(), PackingCollator(lambda rows: {})
    assert may_be_ahead(rows, BudgetCollator(ours, 9), "cuda", 0)
    for one in (
        (rows, ours, "cpu", 0), (rows, ours, "cuda", 2), (rows, theirs, "cuda", 0), (rows, lambda rows: {}, "cuda", 0),
        (rows.to_iterable_dataset(), ours, "cuda", 0), (rows.with_transform(lambda row: row), ours, "cuda", 0),
    ):  # fmt: skip
        assert not may_be_ahead(*one)
