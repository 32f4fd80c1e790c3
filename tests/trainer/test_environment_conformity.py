"""Training on episodes: micro-batches, repetition and processes change nothing."""

import socket

import pytest
import torch
import torch.multiprocessing as mp
from environment_runs import outcome, trainer_for, updates

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def check_same(one, other, exactly=False):
    if exactly:
        assert torch.equal(one["weights"], other["weights"])
    torch.testing.assert_close(other["weights"], one["weights"], rtol=1e-5, atol=1e-6)
    assert one["position"] == other["position"]
    assert one["logs"].keys() == other["logs"].keys()
    for name, values in one["logs"].items():
        assert other["logs"][name] == pytest.approx(values, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("credit", [True, False])
def test_the_size_of_micro_batches_does_not_change_the_update(credit, tmp_path):
    results = []
    for size in (8, 4, 2):
        shape = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        results.append(outcome(trainer_for(str(tmp_path), turn_level_credit=credit, **shape)))
    assert max(results[0]["logs"]["grad_norm"]) > 0
    for result in results[1:]:
        check_same(results[0], result)


def test_the_same_seed_gives_the_same_numbers(tmp_path):
    shape = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    one, other, third = (outcome(trainer_for(str(tmp_path), seed=seed, **shape)) for seed in (5, 5, 6))
    check_same(one, other, exactly=True)
    assert not torch.equal(one["weights"], third["weights"])


@pytest.mark.slow
def test_two_processes_make_the_same_update_from_episodes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(updates, (2, port, str(tmp_path / "two")), nprocs=2)
    mp.spawn(updates, (1, port, str(tmp_path / "one")), nprocs=1)
    one, two = torch.load(tmp_path / "one"), torch.load(tmp_path / "two")
    assert max(one["logs"]["grad_norm"]) > 0
    check_same(one, two)
