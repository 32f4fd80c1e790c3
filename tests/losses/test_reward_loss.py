from math import log

import pytest
import torch

from trl.losses.supervised import bradley_terry


def test_equal_scores_cost_ln_2():
    loss = bradley_terry(torch.zeros(3), torch.zeros(3))
    assert loss.mean.item() == pytest.approx(log(2))
    assert loss.metrics["accuracy"].item() == 0.0


def test_margin_and_centre_by_hand():
    """-log sigma(2 - 1 - .5) = .474077, and .1 (2 + 1)^2 = .9"""
    chosen, rejected = torch.tensor([2.0]), torch.tensor([1.0])
    assert bradley_terry(chosen, rejected, torch.tensor([0.5])).total.item() == pytest.approx(0.4740770, abs=1e-6)
    loss = bradley_terry(chosen, rejected, torch.tensor([0.5]), center=0.1)
    assert loss.total.item() == pytest.approx(1.3740770, abs=1e-6)
    assert loss.metrics.pop("mean_reward") == (3, 2)
    assert [loss.metrics.pop(f"{which}_reward").value.item() for which in ("min", "max")] == [1, 2]
    assert {name: value.item() for name, value in loss.metrics.items()} == {
        "accuracy": 1.0,
        "margin": 1.0,
        "rewards/chosen": 2.0,
        "rewards/rejected": 1.0,
    }


def test_only_differences_matter_without_a_centre():
    chosen, rejected = torch.randn(5), torch.randn(5)
    shifted = bradley_terry(chosen + 3, rejected + 3)
    torch.testing.assert_close(shifted.total, bradley_terry(chosen, rejected).total)
