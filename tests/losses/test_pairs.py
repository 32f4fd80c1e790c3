from math import log

import pytest
import torch

from trl.losses.pairs import F_DIVERGENCES, PairLogps, apply_divergence, sum_pairs, wpo_weights


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values).double()


def test_ratios_margin_and_averages_by_hand():
    pair = PairLogps(tensor(-10), tensor(-12), tensor(-11), tensor(-15), tensor(2), tensor(4))
    assert (pair.chosen_ratio_B.item(), pair.rejected_ratio_B.item(), pair.margin_B.item()) == (1.0, 3.0, -2.0)
    assert pair.averaged().margin_B.item() == 0.5 - 0.75


def test_without_a_reference_the_ratios_are_the_log_probabilities():
    pair = PairLogps(tensor(-10), tensor(-12))
    assert (pair.chosen_ratio_B.item(), pair.margin_B.item()) == (-10.0, 2.0)


def test_half_a_reference_and_missing_lengths_are_refused():
    with pytest.raises(ValueError, match="ref_chosen_B and ref_rejected_B"):
        PairLogps(tensor(-1), tensor(-1), ref_chosen_B=tensor(-1))
    with pytest.raises(ValueError, match="chosen_tokens_B"):
        PairLogps(tensor(-1), tensor(-1)).averaged()


def test_length_desensitised_sums_by_hand():
    """Chosen has 3 tokens, rejected 1: the chosen's 2nd and 3rd weigh alpha; the mask may start late."""
    chosen, rejected = tensor(9, -1, -2, -4)[None], tensor(-8, 9)[None]
    masks = tensor(0, 1, 1, 1)[None], tensor(1, 0)[None]
    for alpha, expected in ((1.0, -7.0), (0.5, -4.0), (0.0, -1.0)):
        summed = sum_pairs(chosen, rejected, *masks, ld_alpha=alpha)
        assert [x.item() for x in summed] == [expected, -8.0]
    with pytest.raises(ValueError, match="ld_alpha=2"):
        sum_pairs(chosen, rejected, *masks, ld_alpha=2.0)


def test_wpo_weights_by_hand():
    """Mean-token probabilities sqrt(.5 .125) = .25 and .5; the collision probability of a uniform pair is 1/2."""
    chosen, rejected = tensor(0.5, 0.125).log()[None], tensor(0.5, 0.9).log()[None]
    masks = tensor(1, 1)[None], tensor(1, 0)[None]
    assert wpo_weights(chosen, rejected, *masks).item() == pytest.approx(0.125)
    collision = tensor(0.5, 0.5).log()[None]
    assert wpo_weights(chosen, rejected, *masks, collision, collision).item() == pytest.approx(0.5)
    assert wpo_weights(rejected, rejected, *masks[::-1], collision, collision).item() == 1.0  # .5 .. .67, capped


@pytest.mark.parametrize(
    ("name", "at_2", "at_half"),
    [
        ("reverse_kl", log(2), -log(2)),
        ("forward_kl", -0.5, -2.0),
        ("js_divergence", log(4 / 3), log(2 / 3)),
        ("alpha_divergence", (1 - 2**-0.5) / 0.5, (1 - 2**0.5) / 0.5),
    ],
)
def test_divergences_by_hand_at_ratios_2_and_a_half(name, at_2, at_half):
    pair = PairLogps(tensor(2).log(), tensor(0.5).log(), tensor(0), tensor(0))
    seen = apply_divergence(pair, name, 0.5)
    assert [seen.chosen_ratio_B.item(), seen.rejected_ratio_B.item()] == pytest.approx([at_2, at_half])


def test_the_alpha_divergence_runs_from_the_reverse_to_the_forward_kl():
    ratios = torch.linspace(-2, 2, 9).double()
    link = F_DIVERGENCES["alpha_divergence"]
    torch.testing.assert_close(link(ratios, 1e-7), ratios, atol=1e-5, rtol=0)
    torch.testing.assert_close(link(ratios, 1.0) - 1, F_DIVERGENCES["forward_kl"](ratios, 0.0))


def test_extreme_ratios_stay_finite():
    pair = PairLogps(torch.tensor([500.0]), torch.tensor([-500.0]), torch.zeros(1), torch.zeros(1))
    for name in F_DIVERGENCES:
        assert apply_divergence(pair, name, 0.5).margin_B.isfinite().all()


def test_a_divergence_needs_a_reference_a_name_and_a_coefficient():
    with pytest.raises(ValueError, match="there is none"):
        apply_divergence(PairLogps(tensor(-1), tensor(-1)), "forward_kl")
    with pytest.raises(ValueError, match="f_divergence_type='kl'"):
        apply_divergence(PairLogps(tensor(-1), tensor(-1)), "kl")
    with pytest.raises(ValueError, match="f_alpha_divergence_coef=0"):
        apply_divergence(PairLogps(tensor(-1), tensor(-1), tensor(0), tensor(0)), "alpha_divergence", 0.0)
