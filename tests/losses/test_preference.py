"""Goldens: the seed's released numbers, and numbers worked out by hand from each paper's formula."""

from math import exp, log

import pytest
import torch

from trl.losses.pairs import PairLogps
from trl.losses.preference import (
    PAIR_LOSSES,
    PER_TOKEN,
    REFERENCE_FREE,
    WHOLE_BATCH,
    check_pair_options,
    pair_options,
    preference_loss,
)

SEED = PairLogps(
    torch.tensor([-10.0, -20.0, -5.0]),
    torch.tensor([-12.0, -15.0, -9.0]),
    torch.tensor([-11.0, -18.0, -5.5]),
    torch.tensor([-11.0, -16.0, -8.0]),
)
FIRST = PairLogps(
    torch.tensor([-10.0]), torch.tensor([-12.0]), torch.tensor([-11.0]), torch.tensor([-11.0]),
    torch.tensor([5.0]), torch.tensor([4.0]),
)  # c = 1, r = -1, h = 2  # fmt: skip
WORDS = PairLogps(
    torch.tensor([0.25]).log(), torch.tensor([0.25]).log(),
    chosen_tokens_B=torch.tensor([2.0]), rejected_tokens_B=torch.tensor([1.0]),
)  # per token p(chosen) = 1/2, p(rejected) = 1/4  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "losses"),
    [
        ("sigmoid", {}, [0.598139, 0.854355, 0.620957]),
        ("sigmoid", {"label_smoothing": 0.1}, [0.618139, 0.824355, 0.635957]),
        ("hinge", {}, [0.8, 1.3, 0.85]),
        ("ipo", {}, [9.0, 64.0, 12.25]),
        ("kto_pair", {}, [0.475021, 0.549834, 0.487503, 0.475021, 0.524979, 0.475021]),
    ],
)
def test_the_seeds_numbers(name, options, losses):
    assert PAIR_LOSSES[name](SEED, beta=0.1, **options).tolist() == pytest.approx(losses, abs=1e-6)


def test_the_seeds_reference_free_numbers():
    pair = PairLogps(SEED.chosen_B, SEED.rejected_B)
    assert PAIR_LOSSES["sigmoid"](pair, beta=0.1).tolist() == pytest.approx([0.598139, 0.974077, 0.513015], abs=1e-6)


BY_HAND = [
    ("sigmoid", {}, 0.5981389),
    ("sigmoid_norm", {}, log(1 + exp(-0.1 * (1 / 5 + 1 / 4)))),
    ("robust", {"label_smoothing": 0.1}, 0.5731389),  # (.9 * .598139 - .1 * .798139) / .8
    ("hinge", {}, 0.8),
    ("ipo", {}, 9.0),
    ("ipo", {"average": True}, (1 / 5 + 1 / 4 - 5) ** 2),
    ("kto_pair", {"kl_chosen": 0.5, "kl_rejected": 0.0}, [0.4750208, 0.4625702]),  # 1 - sigma(.1), 1 - sigma(.15)
    ("exo_pair", {}, 2.4220146),
    ("nca_pair", {}, 1.3387933),
    ("bco_pair", {}, 1.2887933),
    ("bco_pair", {"delta": 0.05}, 1.2894167),
    ("sppo_hard", {}, 32.0),
    ("aot", {}, 0.5981389),
    ("aot_unpaired", {}, 0.5981389),
    ("apo_zero", {}, 0.9500416),
    ("apo_down", {}, 0.9751452),
    ("discopop", {}, 0.8147631),  # blend .982014: .017986 * .598139 + .982014 * .818731
    ("sft", {}, 2.0),
    ("cpo", {}, 2.5981389),
]


@pytest.mark.parametrize(("name", "options", "losses"), BY_HAND)
def test_by_hand(name, options, losses):
    given = options if name == "sft" else {"beta": 0.1} | options
    expected = losses if isinstance(losses, list) else [losses]
    assert PAIR_LOSSES[name](FIRST, **given).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "loss"),
    [
        ("sft", {}, log(2)),
        ("orpo", {"beta": 0.1}, log(2) + 0.1 * log(4 / 3)),  # odds 1 and 1/3
        ("simpo", {"beta": 2.0, "gamma": 0.5}, log(1 + exp(0.5 - 2 * log(2)))),
        ("alphapo", {"beta": 1.0, "gamma": 0.5, "alpha": 1.0}, log(1 + exp(0.5 - 2))),  # rewards 1 - 2 and 1 - 4
        ("alphapo", {"beta": 2.0, "gamma": 0.5}, log(1 + exp(0.5 - 2 * log(2)))),
        ("cpo", {"beta": 0.1, "cpo_alpha": 0.0}, log(2)),
    ],
)
def test_reference_free_by_hand(name, options, loss):
    assert PAIR_LOSSES[name](WORDS, **options).item() == pytest.approx(loss, abs=1e-6)


def test_every_entry_is_worked_out_by_hand():
    assert set(PAIR_LOSSES) == {name for name, *_ in BY_HAND} | {"orpo", "simpo", "alphapo"}


def test_policy_equal_to_reference():
    zeros = torch.zeros(2)
    same = PairLogps(zeros, zeros, zeros, zeros)
    expected = {"sigmoid": log(2), "aot": log(2), "aot_unpaired": log(2), "ipo": 25.0, "hinge": 1.0, "robust": log(2)}
    for name, loss in expected.items():
        assert PAIR_LOSSES[name](same, beta=0.1).tolist() == pytest.approx([loss, loss]), name
    assert PAIR_LOSSES["sigmoid"](same, beta=0.1, label_smoothing=0.1).tolist() == pytest.approx([log(2)] * 2)


def test_margin_of_point_eight():
    pair = PairLogps(torch.tensor([0.8]), torch.zeros(1), torch.zeros(1), torch.zeros(1))
    got = [PAIR_LOSSES[name](pair, beta=0.1).item() for name in ("sigmoid", "ipo", "hinge")]
    assert got == pytest.approx([0.653947, 17.64, 0.92], abs=1e-5)
    assert PAIR_LOSSES["sigmoid"](pair, beta=0.1, label_smoothing=0.1).item() == pytest.approx(0.661947, abs=1e-6)


def test_quantiles_are_compared_in_sorted_order():
    """Margins 2, -5 against the reference's 0, -2: sorted -3 and 2. Log-ratios (1, -2) and (-1, 1): sorted -1 and 0."""
    pair = PairLogps(*(x[:2] for x in (SEED.chosen_B, SEED.rejected_B, SEED.ref_chosen_B, SEED.ref_rejected_B)))
    assert PAIR_LOSSES["aot"](pair, beta=0.1).tolist() == pytest.approx([0.854355, 0.598139], abs=1e-6)
    assert PAIR_LOSSES["aot_unpaired"](pair, beta=0.1).tolist() == pytest.approx([0.744397, 0.693147], abs=1e-6)


def test_flipped_labels_leave_the_robust_loss_unbiased():
    flip = 0.2
    swapped = PairLogps(SEED.rejected_B, SEED.chosen_B, SEED.ref_rejected_B, SEED.ref_chosen_B)
    right, wrong = (PAIR_LOSSES["robust"](pair, beta=0.1, label_smoothing=flip) for pair in (SEED, swapped))
    torch.testing.assert_close((1 - flip) * right + flip * wrong, PAIR_LOSSES["sigmoid"](SEED, beta=0.1))


@pytest.mark.parametrize(
    ("name", "options"),
    [("sigmoid", {}), ("aot", {}), ("aot_unpaired", {}), ("cpo", {"cpo_alpha": 0.0}), ("simpo", {"gamma": 0.0})],
)
def test_smoothing_mixes_in_the_flipped_pair(name, options):
    def loss(pair, label_smoothing):
        return PAIR_LOSSES[name](pair, beta=0.1, label_smoothing=label_smoothing, **options)

    first = PairLogps(FIRST.chosen_B, FIRST.rejected_B, chosen_tokens_B=torch.ones(1), rejected_tokens_B=torch.ones(1))
    flipped = PairLogps(
        FIRST.rejected_B, FIRST.chosen_B, chosen_tokens_B=torch.ones(1), rejected_tokens_B=torch.ones(1)
    )
    torch.testing.assert_close(loss(first, 0.3), 0.7 * loss(first, 0.0) + 0.3 * loss(flipped, 0.0))


@pytest.mark.parametrize("p", [0.3, 0.7, 0.999])
def test_orpo_on_both_branches_of_the_log_odds(p):
    """The odds of a likely token need another formula than those of an unlikely one."""
    pair = PairLogps(
        torch.tensor([p]).log(),
        torch.tensor([0.2]).log(),
        chosen_tokens_B=torch.ones(1),
        rejected_tokens_B=torch.ones(1),
    )
    odds_ratio = (p / (1 - p)) / 0.25
    expected = -log(p) + 2.0 * log(1 + 1 / odds_ratio)
    assert PAIR_LOSSES["orpo"](pair, beta=2.0).item() == pytest.approx(expected, abs=1e-5)


def test_log_odds_stay_finite_where_probabilities_reach_one():
    logps = torch.tensor([0.0, -1e-9, -50.0], requires_grad=True)
    pair = PairLogps(logps, logps.flip(0), chosen_tokens_B=torch.ones(3), rejected_tokens_B=torch.ones(3))
    losses = PAIR_LOSSES["orpo"](pair, beta=0.1)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logps.grad is not None
    assert logps.grad.isfinite().all()


@pytest.mark.parametrize(
    "name", sorted(set(PAIR_LOSSES) - {"sft", "orpo", "kto_pair", "apo_down", "discopop", "aot", "aot_unpaired"})
)
def test_descending_raises_the_chosen_over_the_rejected(name):
    chosen, rejected = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    tokens = torch.ones(3)
    pair = PairLogps(chosen - 3, rejected - 3, torch.full((3,), -3.0), torch.full((3,), -3.0), tokens, tokens)
    PAIR_LOSSES[name](pair, beta=0.1).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert (chosen.grad < rejected.grad).all()


def test_options_are_read_off_the_functions():
    assert set(pair_options("sigmoid")) == {"beta", "label_smoothing"}
    assert pair_options("discopop")["discopop_tau"] == 0.05
    with pytest.raises(ValueError, match="Unknown loss type: kto"):
        pair_options("kto")


def test_an_option_without_effect_is_refused_by_name():
    check_pair_options(["ipo", "sigmoid"], ["beta", "label_smoothing"])
    with pytest.raises(ValueError, match=r"label_smoothing: has no effect with loss_type=\['ipo'\].*sigmoid"):
        check_pair_options(["ipo"], ["beta", "label_smoothing"])
    with pytest.raises(ValueError, match=r"tau: has no effect .* no objective reads it"):
        check_pair_options(["ipo"], ["tau"])


@pytest.mark.parametrize("name", ["robust", "exo_pair"])
def test_impossible_smoothing_is_refused(name):
    with pytest.raises(ValueError, match="label_smoothing"):
        PAIR_LOSSES[name](SEED, beta=0.1, label_smoothing=1.0 if name == "exo_pair" else 0.5)
    with pytest.raises(ValueError, match="label_smoothing=0"):
        PAIR_LOSSES["exo_pair"](SEED, beta=0.1, label_smoothing=0.0)


def test_losses_are_weighed_and_summed_with_the_seeds_metrics():
    loss = preference_loss(SEED, {"sigmoid": 1.0, "ipo": 0.5}, {"beta": 0.1})
    assert loss.total.item() == pytest.approx(0.598139 + 0.854355 + 0.620957 + (9 + 64 + 12.25) / 2, abs=1e-4)
    assert loss.count == 3
    metrics = {name: value.item() for name, value in loss.metrics.items()}
    assert metrics == pytest.approx(
        {
            "rewards/chosen": 0.1 - 0.2 + 0.05,
            "rewards/rejected": -0.1 + 0.1 - 0.1,
            "rewards/accuracies": 2.0,
            "rewards/margins": 0.05,
            "logps/chosen": -35.0,
            "logps/rejected": -36.0,
        },
        abs=1e-6,
    )


def test_kto_pair_counts_pairs():
    loss = preference_loss(SEED, {"kto_pair": 1.0}, {"beta": 0.1})
    assert loss.count == 3
    assert loss.mean.item() == pytest.approx(
        (0.475021 + 0.549834 + 0.487503 + 0.475021 + 0.524979 + 0.475021) / 6, abs=1e-6
    )


def test_pairs_can_be_weighed_unless_they_are_mixed():
    weight = torch.tensor([1.0, 0.0, 0.5])
    loss = preference_loss(SEED, {"sigmoid": 1.0}, {"beta": 0.1}, weight_B=weight)
    assert loss.total.item() == pytest.approx(0.598139 + 0.620957 / 2, abs=1e-6)
    for name in WHOLE_BATCH:
        with pytest.raises(ValueError, match=name):
            preference_loss(SEED, {name: 1.0}, {"beta": 0.1}, weight_B=weight)


@pytest.mark.parametrize(
    ("divergence", "loss"), [("forward_kl", 0.6209570), ("js_divergence", 0.6590903), ("alpha_divergence", 0.6249344)]
)
def test_dpo_under_another_divergence(divergence, loss):
    """Ratios 2 and 1/2 at beta .1: -log sigma(.1 (f'(2) - f'(1/2)))"""
    pair = PairLogps(torch.tensor([2.0]).log(), torch.tensor([0.5]).log(), torch.zeros(1), torch.zeros(1))
    got = preference_loss(pair, {"sigmoid": 1.0}, {"beta": 0.1}, divergence=divergence)
    assert got.total.item() == pytest.approx(loss, abs=1e-6)
    assert got.metrics["rewards/margins"].item() == pytest.approx(0.2 * log(2), abs=1e-6)


def test_a_reference_free_term_sees_the_policy_itself_under_a_divergence():
    both = preference_loss(FIRST, {"sigmoid": 1.0, "sft": 1.0}, {"beta": 0.1}, divergence="forward_kl")
    alone = preference_loss(FIRST, {"sigmoid": 1.0}, {"beta": 0.1}, divergence="forward_kl")
    assert (both.total - alone.total).item() == pytest.approx(2.0)


def test_objectives_per_token_report_rewards_per_token():
    loss = preference_loss(WORDS, {"simpo": 1.0}, {"beta": 2.0, "gamma": 0.5})
    assert loss.metrics["rewards/margins"].item() == pytest.approx(2 * log(2), abs=1e-6)
    assert set(PAIR_LOSSES) >= PER_TOKEN | REFERENCE_FREE


def test_sigmoid_norm_by_hand():
    """c = -2 over 4 tokens, r = -6 over 3: beta (-.5 + 2) = 1.5 at beta 1, where `sigmoid` sees 4."""
    pair = PairLogps(*(torch.tensor([x]) for x in (-8.0, -9.0, -6.0, -3.0, 4.0, 3.0)))
    loss = preference_loss(pair, {"sigmoid_norm": 1.0}, {"beta": 1.0})
    assert loss.total.item() == pytest.approx(log(1 + exp(-1.5)))
    assert loss.metrics["rewards/margins"].item() == pytest.approx(1.5)
    smoothed = PAIR_LOSSES["sigmoid_norm"](pair, beta=1.0, label_smoothing=0.25)
    assert smoothed.item() == pytest.approx(log(1 + exp(-1.5)) + 0.25 * 1.5)


def test_sigmoid_norm_of_equal_lengths_is_dpo_at_a_smaller_beta():
    pair = PairLogps(*(torch.tensor([x]) for x in (-8.0, -9.0, -6.0, -3.0, 4.0, 4.0)))
    torch.testing.assert_close(PAIR_LOSSES["sigmoid_norm"](pair, beta=2.0), PAIR_LOSSES["sigmoid"](pair, beta=0.5))


def test_the_parts_of_orpo_by_hand():
    """p = 1/2 (odds 1) against 1/5 (odds 1/4): log odds log 4, log sigma of it log 4/5."""
    pair = PairLogps(torch.tensor([0.5]).log() * 2, torch.tensor([0.2]).log() * 3, None, None,
                     torch.tensor([2.0]), torch.tensor([3.0]))  # fmt: skip
    loss = preference_loss(pair, {"orpo": 1.0}, {"beta": 0.1})
    assert loss.metrics["nll_loss"].item() == pytest.approx(log(2))
    assert loss.metrics["log_odds_chosen"].item() == pytest.approx(log(4))
    assert loss.metrics["log_odds_ratio"].item() == pytest.approx(log(0.8))
    assert loss.total.item() == pytest.approx(log(2) - 0.1 * log(0.8))
    assert "nll_loss" not in preference_loss(pair, {"simpo": 1.0}, {"beta": 0.1}).metrics
