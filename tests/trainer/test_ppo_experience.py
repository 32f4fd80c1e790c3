"""Advantages and pieces: golden values of release 0.7.7 and of the PPO papers."""

import pytest
import torch
from accelerate import Accelerator

from trl.data.records import Rollout
from trl.rollout.experience import Experience
from trl.rollout.measure import advantages, pieces, steps_of, whitened

NUMBERS = {"gamma": 1.0, "lam": 0.95, "whiten_rewards": False}


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator()


def test_gae_by_hand(accelerator):
    rewards, values = torch.tensor([[-0.01, 0.02, -0.03, 1.0]]), torch.tensor([[0.5, 0.4, 0.6, 0.8]])
    _, _, returns = advantages(accelerator, values, rewards, torch.ones(1, 4), **NUMBERS)
    torch.testing.assert_close(returns, torch.tensor([[0.9239, 0.962, 0.96, 1.0]]), atol=1e-4, rtol=0)
    _, _, returns = advantages(accelerator, values, rewards, torch.ones(1, 4), **{**NUMBERS, "lam": 1.0})
    torch.testing.assert_close(returns - values, torch.tensor([[0.48, 0.59, 0.37, 0.2]]), atol=1e-5, rtol=0)


def test_gae_does_not_see_padding_or_holes(accelerator):
    torch.manual_seed(1)
    values, rewards = torch.randn(1, 4), torch.randn(1, 4)
    _, _, plain = advantages(accelerator, values, rewards, torch.ones(1, 4), **NUMBERS)
    where = [0, 1, 4, 5]  # two tokens of a tool between, one of padding behind
    mask, wide_values, wide_rewards = torch.zeros(1, 7), torch.randn(1, 7), torch.randn(1, 7)
    mask[:, where], wide_values[:, where], wide_rewards[:, where] = 1.0, values, rewards
    for whiten_rewards in (False, True):
        numbers = {**NUMBERS, "whiten_rewards": whiten_rewards}
        _, plain_advantages, plain = advantages(accelerator, values, rewards, torch.ones(1, 4), **numbers)
        _, wide_advantages, wide = advantages(accelerator, wide_values, wide_rewards, mask, **numbers)
        torch.testing.assert_close(wide[:, where], plain)
        torch.testing.assert_close(wide_advantages[:, where], plain_advantages)


def test_steps_of():
    mask = torch.tensor([[0.0, 1, 0, 0, 1, 0], [1, 1, 0, 0, 0, 0]])
    assert steps_of(mask).tolist() == [[1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1]]


def test_whitening_counts_real_tokens_only(accelerator):
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0], [3.0, -1.0, 0.5, 2.0]])
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    row = whitened(accelerator, values, mask)[0]
    torch.testing.assert_close(row, torch.tensor([-0.42091, 0.140303, 1.26273, 3.507585]), atol=1e-5, rtol=0)
    assert whitened(accelerator, torch.ones(1, 1), torch.ones(1, 1)).item() == 0
    with pytest.raises(ValueError, match="no token of the batch counts"):
        whitened(accelerator, values, torch.zeros_like(mask))


def rows(*sizes):
    """Rows of so many prompt and response tokens."""
    prompts, responses = [[1] * p for p, _ in sizes], [[1] * r for _, r in sizes]
    return Experience.of(Rollout(prompts, responses, [], responses))


def test_pieces():
    def lengths(of, **limits):
        return [len(run) for run in pieces(of, **limits)]

    even = rows(*[(3, 2)] * 7)
    assert lengths(even, rows=2, tokens=0) == [2, 2, 2, 1]
    assert lengths(even, rows=1, tokens=15) == [3, 3, 1]
    assert lengths(even, rows=4, tokens=15) == [4, 3]
    assert lengths(rows((0, 1), (0, 1), (0, 9), (0, 1)), rows=1, tokens=10) == [2, 1, 1]
