import multiprocessing
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trl.trainer.reward_trainer import compute_accuracy
from trl.trainer.statistics import (
    AdaptiveKLController,
    FixedKLController,
    PerPromptStatTracker,
    RunningMoments,
    exact_div,
    get_global_statistics,
)

ALONE = SimpleNamespace(device=torch.device("cpu"), reduce=lambda tensor: tensor)


def test_adaptive_kl_follows_the_release():
    controller, values = AdaptiveKLController(0.2, 6, 10000), []
    for current in (3, 6.5, 100, 0):
        controller.update(current, 256)
        values.append(controller.value)
    assert values == pytest.approx([0.198976, 0.1994004821, 0.2004214126, 0.199395255], abs=1e-9)


@pytest.mark.parametrize(("kl", "value"), [(3, 0.148464), (6, 0.15), (6.6, 0.150768), (7.2, 0.151536), (50, 0.151536)])
def test_adaptive_kl_by_hand(kl, value):
    controller = AdaptiveKLController(0.15, 6, 10000)
    controller.update(kl, 512)
    assert controller.value == pytest.approx(value, abs=1e-9)


def test_fixed_kl_stays():
    controller = FixedKLController(0.2)
    controller.update(100, 256)
    assert controller.value == 0.2


def test_running_moments_match_the_release():
    moments, means, stds = RunningMoments(ALONE), [], []
    batches = [[1.0, 2, 3, 4], [10.0, 0], [5.0, 5, 5]]
    for batch in batches:
        mean, std = moments.update(torch.tensor(batch))
        assert (mean, std) == pytest.approx((np.mean(batch), np.std(batch, ddof=1)), abs=1e-6)
        means.append(float(moments.mean))
        stds.append(float(moments.std))
    assert means == pytest.approx([2.5, 3.333333, 3.888889], abs=1e-6)
    assert stds == pytest.approx([1.290994, 3.559026, 2.934469], abs=1e-6)
    assert float(moments.var) == pytest.approx(np.var(np.concatenate(batches)), abs=1e-5)
    assert moments.count == 9


def test_running_moments_of_single_values_stay_finite():
    moments = RunningMoments(ALONE)
    assert (moments.mean, moments.std, moments.var, moments.count) == (0, 1, 1, 1e-24)
    assert moments.update(torch.tensor([3.0])) == (3.0, 0.0)
    assert (float(moments.mean), float(moments.std)) == (3.0, 1.0)
    moments.update(torch.tensor([5.0]))
    assert float(moments.std) == pytest.approx(2**0.5)


def test_global_statistics_of_one_process_count_only_the_mask():
    mean, variance, count = get_global_statistics(ALONE, torch.tensor([1.0, 99, 3]), torch.tensor([1, 0, 1]))
    assert (mean.item(), variance.item(), count.item()) == (2.0, 1.0, 2.0)


def _report_statistics(rank: int, port: int, results) -> None:
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    xs, mask = [(torch.tensor([1.0, 99]), torch.tensor([1, 0])), (torch.tensor([3.0, 5]), torch.tensor([1, 1]))][rank]
    moments = RunningMoments(accelerator)
    moments.update(xs[mask.bool()])
    results.put(([x.item() for x in get_global_statistics(accelerator, xs, mask)], float(moments.mean), moments.count))
    accelerator.end_training()


@pytest.mark.slow
def test_global_statistics_of_two_processes():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_report_statistics, args=(rank, port, results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    reported = [results.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join(30)
    assert reported == [(pytest.approx([3.0, 8 / 3, 3.0]), 3.0, 3.0)] * 2


def test_per_prompt_tracker_matches_the_release():
    tracker = PerPromptStatTracker(buffer_size=4, min_count=3)
    first = tracker.update(["x", "y", "x"], [1, 2, 4])
    assert first == pytest.approx([-1.069044, -0.267261, 1.336305], abs=1e-5)
    second = tracker.update(["x", "x", "y"], np.array([2.0, 6, 3]))
    assert second == pytest.approx([-0.650944, 1.432077, -0.392232], abs=1e-5)
    assert tracker.get_stats()["x"] == {"mean": 3.25, "std": pytest.approx(np.std([1, 4, 2, 6])), "count": 4}


def test_accuracy_warns_of_ties():
    assert compute_accuracy((np.array([[2.0, 1], [0, 1]]), np.array([0, 0]))) == {"accuracy": 0.5}
    with pytest.warns(UserWarning, match="There are 1 out of 2 instances"):
        assert compute_accuracy((np.array([[2.0, 1], [1, 1]]), np.array([0, 0])))["accuracy"] == 1.0


def test_exact_div():
    assert exact_div(8, 2, "a", "b") == 4
    with pytest.raises(ValueError, match=r"no, a=7, b=2, inexact division: 7 / 2 = 3\.5"):
        exact_div(7, 2, "a", "b", "no")


def test_compute_accuracy_by_its_older_path():
    from trl.trainer import statistics

    assert statistics.compute_accuracy is compute_accuracy
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        statistics.absent  # noqa: B018
