import pytest
import torch

from trl.losses.policy import (
    adaptive_entropy_coef,
    importance_correction,
    mask_truncated,
    off_policy_mask,
    top_entropy_mask,
)

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
    ],
)
def test_importance_correction_by_hand(mode, bounds, expected):
    sampler = torch.randn(2, 3)
    got = importance_correction(sampler + RATIOS.log(), sampler, MASK, mode, *bounds)
    torch.testing.assert_close(got, torch.tensor(expected))


def test_an_engine_that_agrees_needs_no_correction():
    sampler = torch.randn(2, 3)
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        assert (importance_correction(sampler, sampler, MASK, mode) == 1.0).all()
    with pytest.raises(ValueError, match="mode 'geometric'"):
        importance_correction(sampler, sampler, MASK, "geometric")


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
