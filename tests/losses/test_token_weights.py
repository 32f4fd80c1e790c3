import pytest
import torch

from trl.losses.policy import (
    Correction,
    adaptive_entropy_coef,
    clipped_surrogate,
    importance_correction,
    mask_truncated,
    off_policy_mask,
    top_entropy_mask,
)
from trl.losses.token_weights import IMPORTANCE_MODES

RATIOS = torch.tensor([[4.0, 0.5, 9.0], [1.0, 0.25, 1.0]])
MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])


@pytest.mark.parametrize(
    ("mode", "bounds", "expected"),
    [
        ("token_truncate", (3.0,), [[3.0, 0.5, 1.0], [1.0, 0.25, 1.0]]),
        ("token_mask", (3.0,), [[0.0, 0.5, 1.0], [1.0, 0.25, 1.0]]),
        ("token_mask", (3.0, 0.3), [[0.0, 0.5, 1.0], [1.0, 0.0, 1.0]]),
        ("sequence_truncate", (1.5, 0.5), [[1.5], [0.5]]),
        ("sequence_mask", (1.5,), [[0.0], [0.25]]),
        ("sequence_mask", (3.0, 0.5), [[2.0], [0.0]]),
        ("geometric_truncate", (1.2, 0.7), [[1.2], [0.7]]),
        ("geometric_mask", (1.5, 0.65), [[2.0**0.5], [0.0]]),
        ("token_truncate", (None,), [[4.0, 0.5, 1.0], [1.0, 0.25, 1.0]]),
    ],
)
def test_importance_correction_by_hand(mode, bounds, expected):
    sampler = torch.randn(2, 3)
    got = importance_correction(sampler + RATIOS.log(), sampler, MASK, mode, *bounds)
    torch.testing.assert_close(got, torch.tensor(expected))


def test_an_engine_that_agrees_needs_no_correction():
    sampler = torch.randn(2, 3)
    for mode in IMPORTANCE_MODES:
        assert (importance_correction(sampler, sampler, MASK, mode) == 1.0).all()
    with pytest.raises(ValueError, match="mode 'geometric'"):
        importance_correction(sampler, sampler, MASK, "geometric")


@pytest.mark.parametrize("bounds", [(0.5, None), (3.0, 1.5), (3.0, -1.0)])
def test_bounds_enclose_the_ratio_of_an_engine_that_agrees(bounds):
    with pytest.raises(ValueError, match="must enclose 1"):
        Correction("token_mask", *bounds)


def test_icepop_drops_tokens_outside_a_half_and_five():
    """The ratios 4, .5 and .25: only the last leaves. The masked token of ratio 9 is not asked."""
    sampler = torch.zeros(2, 3)
    weight, metrics = Correction("token_mask", 5.0, 0.5).weigh(RATIOS.log(), sampler, MASK)
    torch.testing.assert_close(weight, torch.tensor([[4.0, 0.5, 1.0], [1.0, 0.0, 1.0]]))
    assert [float(x) for x in metrics["sampling/corrected"]] == [1.0, 5.0]
    assert [float(x) for x in metrics["sampling/weight"]] == pytest.approx([6.5, 5.0])


def test_the_geometric_mean_of_one_token_is_its_ratio():
    one = torch.tensor([[0.7], [-0.4]])
    mask = torch.ones(2, 1)
    for bound in ("truncate", "mask"):
        got = importance_correction(one, torch.zeros(2, 1), mask, f"geometric_{bound}", 1.8)
        torch.testing.assert_close(got, importance_correction(one, torch.zeros(2, 1), mask, f"token_{bound}", 1.8))


def test_a_completion_that_cannot_be_is_bounded_too():
    """exp(3000) would be infinite, and so would its gradient; what does not count may be anything."""
    trainer = torch.tensor([[3000.0, torch.nan]])
    mask = torch.tensor([[1.0, 0.0]])
    assert importance_correction(trainer, torch.zeros(1, 2), mask, "sequence_truncate", 2.0).tolist() == [[2.0]]
    assert importance_correction(trainer, torch.zeros(1, 2), mask, "sequence_mask", 2.0).tolist() == [[0.0]]
    assert importance_correction(trainer, torch.zeros(1, 2), mask, "token_truncate", None).isfinite().all()


def test_decoupled_ppo_by_hand():
    """Proximal over behaviour 1.5, cut at 1.2; current over proximal 1.3, clipped at 1.2: 1.2 * 1.2 * A, over 2 tokens.

    The second token is at rest, with a proximal ratio of .5: .5 * 1 * A. Eq. 4 of arXiv:2110.00641.
    """
    behaviour = torch.tensor([[-2.0, -1.0]])
    proximal = behaviour + torch.tensor([[1.5, 0.5]]).log()
    current = (proximal + torch.tensor([[1.3, 1.0]]).log()).requires_grad_()
    mask, advantages = torch.ones(1, 2), torch.tensor([[2.0]])
    weight = importance_correction(proximal, behaviour, mask, "token_truncate", 1.2)
    loss = clipped_surrogate(current, proximal, advantages, mask, weight_BT=weight)
    assert float(loss.total.detach()) == pytest.approx(-(1.2 * 1.2 + 0.5) * 2)
    assert float(loss.count) == 2
    (slope,) = torch.autograd.grad(loss.total, current)
    torch.testing.assert_close(slope, torch.tensor([[0.0, -0.5 * 2]]))


def test_only_bad_and_stale_completions_are_masked():
    """Mean drift 1 over two tokens, threshold .5; the same drift with a good advantage stays."""
    old = torch.tensor([[2.0, 0.0, 99.0]] * 3)
    logprobs = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0]] * 3)
    advantages = torch.tensor([[-1.0], [1.0], [-1.0]])
    assert off_policy_mask(logprobs, old, advantages, mask, 0.5).flatten().tolist() == [0.0, 1.0, 1.0]
    assert off_policy_mask(logprobs, old, advantages, mask, 1.5).flatten().tolist() == [1.0, 1.0, 1.0]


def test_the_most_uncertain_tokens_are_kept():
    entropy = torch.tensor([[0.1, 0.9, 99.0], [0.5, 0.3, 0.7]])
    assert top_entropy_mask(entropy, MASK, 0.4).tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert top_entropy_mask(entropy, MASK, 0.2).sum().item() == 1.0
    assert torch.equal(top_entropy_mask(entropy, MASK, 1.0), MASK)
    assert torch.equal(top_entropy_mask(entropy, torch.zeros(2, 3), 0.5), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="top_entropy_quantile=0"):
        top_entropy_mask(entropy, MASK, 0.0)


def test_truncated_completions_count_nothing():
    assert mask_truncated(MASK, torch.tensor([False, True])).tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


def test_the_entropy_coefficient_follows_its_target():
    numbers = {"target": 0.2, "delta": 0.005, "most": 0.01}
    assert adaptive_entropy_coef(0.001, 0.1, **numbers) == pytest.approx(0.006)
    assert adaptive_entropy_coef(0.001, 0.3, **numbers) == 0.0
    assert adaptive_entropy_coef(0.008, 0.1, **numbers) == 0.01
