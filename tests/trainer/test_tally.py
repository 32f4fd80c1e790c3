"""Means of metrics: right over micro-batches and ranks, read with one transfer, in 32 bits on the device."""

import json
import resource

import pytest
import torch
from accelerate import Accelerator
from conformity import build
from process_group import on_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import TrainerCallback

from trl.losses.loss_sum import LossSum
from trl.trainer.tally import METRICS, Tally, write_metrics
from trl.trainer.update import optimizer_step


def test_means_by_hand():
    tally = Tally()
    tally.add("a", 1.0, 2)
    tally.add("a", torch.tensor(5.0), torch.tensor(4))
    tally.add("none", 0.0, 0.0)
    tally.add_loss(LossSum(torch.tensor(6.0), 3, {"b": torch.tensor(9.0), "c": (torch.tensor(1.0), 8)}))
    assert tally.means() == {"a": 1.0, "loss": 2.0, "b": 3.0, "c": 0.125}
    assert tally.means() == {}


def test_tensors_stay_and_are_kept():
    tally = Tally()
    tally.add("a", torch.tensor(3.0), 4)
    for _ in range(2):
        assert {name: mean.item() for name, mean in tally.tensors().items()} == {"a": 0.75}


def test_long_sums_of_halves_keep_their_digits():
    tally = Tally()
    for _ in range(1000):
        tally.add("a", torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(1.0, dtype=torch.bfloat16))
        tally.add("b", torch.tensor(1.0, dtype=torch.bfloat16), 1000)
    assert tally.means() == {"a": 1.0, "b": 0.001}


class Device(TorchDispatchMode):
    """Counts what waits for a device; "meta" stands for it, as it has no numbers to hand over."""

    def __init__(self):
        super().__init__()
        self.reads, self.dtypes = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
        there = any(each.device.type == "meta" for each in given)
        name = function.overloadpacket.__name__
        to_host = kwargs.get("device", torch.device("meta")).type == "cpu"
        if there and (name == "_local_scalar_dense" or (name == "_to_copy" and to_host)):
            self.reads.append(name)
            return 1.0 if name == "_local_scalar_dense" else torch.ones_like(given[0], device="cpu")
        result = function(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.device.type == "meta":
            self.dtypes.add(result.dtype)
        return result


def test_one_transfer_and_no_float64_on_the_device():
    """Fault d: a read waited once for each metric, and made float64, which Apple's devices lack."""
    tally = Tally("meta")
    with Device() as device:
        for _ in range(3):
            for name in "abcdef":
                tally.add(name, torch.ones((), device="meta"), torch.ones((), device="meta"))
            tally.add("host", 1.0, 2.0)
            tally.add("mixed", torch.ones((), device="meta"), 3)
            tally.add_loss(LossSum(torch.ones((), device="meta"), 2, {"m": torch.ones((), device="meta")}))
        assert not device.reads
        means = tally.means()
    assert len(means) == 10
    assert len(device.reads) == 1
    assert device.dtypes
    assert torch.float64 not in device.dtypes


def ranks_with_different_metrics(rank, world):
    accelerator = Accelerator(cpu=True)
    tally = Tally(accelerator.device)
    tally.add("shared", torch.tensor(float(rank + 1)), 1)
    tally.add(f"own{rank}", 4.0, 2)
    assert tally.means(accelerator) == {"shared": 1.5, "own0": 2.0, "own1": 2.0}


@pytest.mark.slow
def test_ranks_may_lack_metrics():
    on_ranks(ranks_with_different_metrics, 2)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_an_optimizer_step_leaves_accelerate_as_it_is(accumulation):
    """The split into micro-batches is the step's own: what a script set for its own loop stays."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    torch.manual_seed(0)
    layer = torch.nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(layer, torch.optim.SGD(layer.parameters(), lr=1.0))
    before = layer.weight.detach().clone()
    pieces = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])]
    steps, kept = accelerator.step, dict(accelerator.gradient_state.plugin_kwargs)
    means = optimizer_step(
        accelerator, [model], optimizer, pieces, lambda rows: LossSum(model(rows).sum(), len(rows)), len
    )
    torch.testing.assert_close(before - layer.weight.detach(), torch.tensor([[3.0, 4.0]]))  # the mean of three rows
    assert means["loss"].item() == pytest.approx(
        sum((before @ row + layer.bias.detach() + 1).item() for rows in pieces for row in rows) / 3, rel=1e-5
    )
    assert accelerator.gradient_accumulation_steps == accumulation
    assert (accelerator.step, dict(accelerator.gradient_state.plugin_kwargs)) == (steps, kept)
    assert accelerator.sync_gradients


def test_training_metrics_come_with_the_log_of_training_steps(tmp_path):
    """A user's log of a "loss" amid two logs of the loop took them before."""

    class Logs(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                trainer.log({"loss": 7.0})

    trainer = build("dpo-sigmoid", tmp_path, max_steps=2, logging_steps=2)
    trainer.add_callback(Logs())
    trainer.train()
    users, loops, *_ = trainer.state.log_history
    assert users["loss"] == 7.0
    assert "rewards/margins" not in users
    assert "rewards/margins" in loops


def test_the_prefix_of_an_evaluation_by_its_place(tmp_path):
    trainer = build("dpo-sigmoid", tmp_path)
    loader = trainer.get_eval_dataloader()
    by_place = trainer.evaluation_loop(loader, "x", None, None, "mine").metrics
    by_name = trainer.evaluation_loop(loader, "x", metric_key_prefix="mine").metrics
    assert by_place["mine_rewards/margins"] == by_name["mine_rewards/margins"]
    assert "eval_rewards/margins" in trainer.evaluation_loop(loader, "x").metrics


def test_a_line_that_a_full_disk_cuts_off(tmp_path, caplog):
    """It is said, nothing of it stays, and the next line is whole."""
    write_metrics(tmp_path, {"step": 1, "loss": 0.5})
    path, limits = tmp_path / METRICS, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9, limits[1]))
    try:
        write_metrics(tmp_path, {"step": 2, "loss": 0.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "metrics.jsonl: a line of step 2 is not written ([Errno 27] File too large)" in caplog.text
    write_metrics(tmp_path, {"step": 3, "loss": 0.125})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]
