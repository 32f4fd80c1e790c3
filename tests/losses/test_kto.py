from math import log

import pytest
import torch

from trl.losses.kto import UNPAIRED_LOSSES, mismatched_kl, unpaired_loss
from trl.losses.pairs import PairLogps
from trl.losses.preference import PAIR_LOSSES

RATIO = torch.tensor([1.0, 1.0])
DESIRABLE = torch.tensor([True, False])


@pytest.mark.parametrize(
    ("name", "state", "losses"),
    [
        ("kto", {"kl": 0.5}, [0.4875026, 0.5124974]),  # 1 - sigma(.05), 1 - sigma(-.05)
        ("bco", {"delta": 0.05}, [0.6684602, 0.7184602]),  # -log sigma(.05), -log sigma(-.05)
        ("apo_zero_unpaired", {}, [0.4750208, 0.5249792]),
    ],
)
def test_by_hand(name, state, losses):
    assert UNPAIRED_LOSSES[name](RATIO, DESIRABLE, beta=0.1, **state).tolist() == pytest.approx(losses, abs=1e-6)
    loss = unpaired_loss(name, RATIO, DESIRABLE, beta=0.1, desirable_weight=2.0, undesirable_weight=3.0, **state)
    assert loss.total.item() == pytest.approx(2 * losses[0] + 3 * losses[1], abs=1e-5)
    assert loss.count == 2


def test_apo_zero_by_hand_at_another_ratio():
    """1 - sigma(.2) of a desirable completion at log-ratio 2"""
    loss = UNPAIRED_LOSSES["apo_zero_unpaired"](torch.tensor([2.0]), torch.tensor([True]), beta=0.1)
    assert loss.item() == pytest.approx(0.4501660, abs=1e-6)


def test_rewards_are_counted_by_side():
    metrics = unpaired_loss("kto", torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 0, 0]), beta=0.1, kl=0.0).metrics
    assert [float(x) for x in metrics["rewards/chosen"]] == pytest.approx([0.1, 1])
    assert [float(x) for x in metrics["rewards/rejected"]] == pytest.approx([0.6, 2])


def test_a_pair_split_in_two_costs_as_much_as_the_pair():
    pair = PairLogps(RATIO[:1], -RATIO[:1], torch.zeros(1), torch.zeros(1))
    ratios = torch.cat([pair.chosen_ratio_B, pair.rejected_ratio_B])
    for unpaired, paired, state in (("apo_zero_unpaired", "apo_zero", {}), ("bco", "bco_pair", {"delta": 0.3})):
        whole = PAIR_LOSSES[paired](pair, beta=0.1, **state).sum()
        torch.testing.assert_close(unpaired_loss(unpaired, ratios, DESIRABLE, beta=0.1, **state).total, whole)


def test_the_reference_point_is_a_kl_so_never_negative():
    ratios = torch.tensor([1.0, 2.0, -6.0])
    assert mismatched_kl(ratios.sum(), len(ratios)).item() == 0.0
    assert mismatched_kl(ratios[:2].sum(), torch.tensor(2.0)).item() == 1.5
    assert mismatched_kl(torch.zeros(()), 0).item() == 0.0


def test_at_the_reference_point_every_completion_costs_a_half():
    loss = unpaired_loss("kto", torch.full((4,), 0.7), torch.tensor([1, 0, 1, 0]), beta=0.1, kl=0.7)
    assert loss.mean.item() == pytest.approx(0.5)
    bco = unpaired_loss("bco", torch.full((2,), 7.0), DESIRABLE, beta=0.1, delta=0.7)
    assert bco.mean.item() == pytest.approx(log(2), abs=1e-6)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="Unknown loss type: sigmoid"):
        unpaired_loss("sigmoid", RATIO, DESIRABLE, beta=0.1)


def test_log_probabilities_are_recorded_for_either_side():
    loss = unpaired_loss("kto", RATIO, DESIRABLE, beta=0.1, kl=0.0, logps_B=torch.tensor([-3.0, -5.0]))
    assert [x.item() for x in loss.metrics["logps/chosen"]] == [-3.0, 1.0]
    assert [x.item() for x in loss.metrics["logps/rejected"]] == [-5.0, 1.0]
