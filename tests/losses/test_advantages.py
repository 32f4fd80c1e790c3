import pytest
import torch

from trl.losses.advantages import masked_moments
from trl.losses.policy import (
    ADVANTAGES,
    REWARD_AGGREGATIONS,
    generalized_advantages,
    group_relative,
    leave_one_out,
    normalize_then_sum,
    soft_overlong_punishment,
    sum_then_normalize,
    token_rewards,
    whiten,
)

EIGHT = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 0])
NAN = float("nan")


@pytest.mark.parametrize(
    ("advantages", "right", "wrong"),
    [
        (group_relative(EIGHT, 8, unbiased=False, eps=0.0), 1.290994, -0.774597),
        (group_relative(EIGHT, 8, eps=0.0), 1.207615, -0.724569),
        (group_relative(EIGHT, 8, scale="none"), 0.625, -0.375),
        (leave_one_out(EIGHT, 8), 0.714286, -0.428571),
        (ADVANTAGES["batch"](EIGHT, 8), 1.207615, -0.724569),
        (ADVANTAGES["batch_mean"](EIGHT, 8), 0.625, -0.375),
        (ADVANTAGES["none"](EIGHT, 8), 1.0, 0.0),
    ],
)
def test_one_group_of_eight(advantages, right, wrong):
    assert advantages.tolist() == pytest.approx(torch.where(EIGHT > 0, right, wrong).tolist(), abs=2e-6)


def test_two_groups_by_hand():
    """Means 1 and 5, centred -1, 1, -2, 2; std of (0, 2, 3, 7) is sqrt(26 / 3), of the centred sqrt(10 / 3)."""
    rewards = torch.tensor([0.0, 2.0, 3.0, 7.0])
    centred = torch.tensor([-1.0, 1.0, -2.0, 2.0])
    half = 0.5**0.5
    torch.testing.assert_close(group_relative(rewards, 2, eps=0.0), torch.tensor([-half, half, -half, half]))
    torch.testing.assert_close(group_relative(rewards, 2, "batch", eps=0.0), centred / (26 / 3) ** 0.5)
    torch.testing.assert_close(ADVANTAGES["group_then_batch"](rewards, 2), centred / (10 / 3) ** 0.5)
    torch.testing.assert_close(leave_one_out(rewards, 2), 2 * centred)


@pytest.mark.parametrize("name", sorted(set(ADVANTAGES) - {"none"}))
def test_equal_rewards_teach_nothing_and_a_shift_changes_nothing(name):
    torch.testing.assert_close(ADVANTAGES[name](torch.full((6,), 0.1), 3), torch.zeros(6))
    rewards = torch.tensor([0.0, 2.0, 3.0, 7.0])
    torch.testing.assert_close(ADVANTAGES[name](rewards + 5, 2), ADVANTAGES[name](rewards, 2))


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_a_reward_that_is_missing_is_left_out(name):
    """The others get what they would get in a group of their own; the missing one 0."""
    with_gap = ADVANTAGES[name](torch.tensor([1.0, NAN, 4.0]), 3)
    torch.testing.assert_close(with_gap[[0, 2]], ADVANTAGES[name](torch.tensor([1.0, 4.0]), 2))
    assert with_gap[1] == 0.0
    assert torch.equal(ADVANTAGES[name](torch.tensor([NAN, NAN]), 2), torch.zeros(2))


def test_group_sizes_and_scales_that_make_no_sense():
    with pytest.raises(ValueError, match="group_size=3"):
        group_relative(EIGHT, 3)
    with pytest.raises(ValueError, match="group_size=1"):
        leave_one_out(EIGHT, 1)
    with pytest.raises(ValueError, match="scale_rewards='std'"):
        group_relative(EIGHT, 8, "std")


def test_several_reward_functions_by_hand():
    """Weights 1 and 10; row 2 has only the first function, row 4 none: sums 10, 1, 11, nothing."""
    rewards = torch.tensor([[0.0, 1.0], [1.0, NAN], [1.0, 1.0], [NAN, NAN]])
    got = sum_then_normalize(rewards, torch.tensor([1.0, 10.0]), 2, ADVANTAGES["group_mean"])
    assert got.tolist() == pytest.approx([4.5, -4.5, 0.0, 0.0])


def test_normalising_first_lets_no_function_drown_another():
    """Two functions, one on a scale of 100, disagree in the first group and agree in the second: 0, 0, -1, 1 over
    their std sqrt(2 / 3)."""
    rewards = torch.tensor([[0.0, 100.0], [1.0, 0.0], [0.0, 0.0], [1.0, 100.0]])
    got = normalize_then_sum(rewards, torch.ones(2), 2)
    assert got.tolist() == pytest.approx([0.0, 0.0, -(1.5**0.5), 1.5**0.5], abs=1e-3)
    assert sum_then_normalize(rewards, torch.ones(2), 2)[0].item() > 0.7
    assert set(REWARD_AGGREGATIONS) == {"sum_then_normalize", "normalize_then_sum"}


def test_the_score_stands_at_the_last_real_token():
    kl = torch.tensor([[-0.3315, -0.0426, 0.6351, 9.0], [1.0, 1.0, 1.0, 1.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    got = token_rewards(torch.tensor([0.4, 5.0]), kl, mask, 0.15)
    assert got[0, :3].tolist() == pytest.approx([0.049725, 0.00639, 0.304735], abs=1e-6)
    assert got[1].tolist() == pytest.approx([-0.15] * 4)


REWARDS = torch.tensor([[-0.01, 0.02, -0.03, 1.0]])
VALUES = torch.tensor([[0.5, 0.4, 0.6, 0.8]])


def test_gae_by_hand():
    advantages = generalized_advantages(REWARDS, VALUES, 1.0, 0.95)
    assert advantages[0].tolist() == pytest.approx([0.4239, 0.562, 0.36, 0.2], abs=5e-5)
    assert (advantages + VALUES)[0].tolist() == pytest.approx([0.9239, 0.962, 0.96, 1.0], abs=5e-5)
    assert generalized_advantages(REWARDS, VALUES, 1.0, 1.0)[0].tolist() == pytest.approx([0.48, 0.59, 0.37, 0.2])


def test_gae_passes_over_padding_and_holes():
    places = torch.tensor([1, 2, 5, 6])
    rewards, values, mask = torch.full((1, 9), 77.0), torch.full((1, 9), -55.0), torch.zeros(1, 9)
    rewards[:, places], values[:, places], mask[:, places] = REWARDS, VALUES, 1.0
    advantages = generalized_advantages(rewards, values, 0.9, 0.95, mask)
    torch.testing.assert_close(advantages[:, places], generalized_advantages(REWARDS, VALUES, 0.9, 0.95))
    assert torch.equal(advantages * (1 - mask), torch.zeros(1, 9))


def test_gae_between_its_limits():
    """lambda 0: the one-step error; lambda 1: what was received minus what was foreseen."""
    next_values = torch.tensor([[0.4, 0.6, 0.8, 0.0]])
    one_step = REWARDS + 0.9 * next_values - VALUES
    torch.testing.assert_close(generalized_advantages(REWARDS, VALUES, 0.9, 0.0), one_step)
    togo = generalized_advantages(REWARDS, torch.zeros(1, 4), 0.9, 1.0, torch.ones(1, 4))
    torch.testing.assert_close(generalized_advantages(REWARDS, VALUES, 0.9, 1.0), togo - VALUES)


def test_reward_to_go_by_hand():
    rewards, mask = torch.tensor([[1.0, 99.0, 2.0, 4.0, 99.0]]), torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]])
    got = generalized_advantages(rewards, torch.zeros_like(rewards), 0.5, 1.0, mask)
    assert got[0].tolist() == [3.0, 0.0, 4.0, 4.0, 0.0]


def test_returns_of_release_0_7_7():
    """Every position is a step there, masked ones with reward and value 0."""
    logprobs = torch.tensor([[-1.0, -2.0, -0.5, -3.0, -1.0], [-0.2, -0.4, -0.6, -0.8, -1.0]])
    reference = torch.tensor([[-1.5, -1.0, -0.5, -2.0, -2.0], [-0.4, -0.2, -1.6, -0.8, -0.5]])
    mask = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0, 1.0]])
    values = torch.tensor([[0.5, 0.1, -0.2, 0.3, 0.9], [0.3, 0.2, 0.1, 0.0, -0.1]])
    rewards = token_rewards(torch.tensor([1.0, -2.0]), logprobs - reference, mask, 0.2)
    expected = torch.tensor([[-0.1, 0.2, 0.0, 1.2, -0.2], [-0.04, 0.04, -0.2, 0.0, -1.9]])
    torch.testing.assert_close(rewards, expected)
    returns = generalized_advantages(rewards * mask, values * mask, 1.0, 0.95) + values * mask
    expected = torch.tensor([[1.227888, 1.28725, 1.155, 1.2, 0.0], [-1.727599, -1.818525, -1.9195, -1.81, -1.9]])
    torch.testing.assert_close(returns, expected, atol=1e-6, rtol=0)
    counted = generalized_advantages(rewards, values, 1.0, 0.95, mask) + values * mask
    torch.testing.assert_close(counted, expected * mask, atol=1e-6, rtol=0)


def test_whitening_by_hand():
    values = torch.arange(1.2, 2.05, 0.1)[None]
    moments = masked_moments(values, torch.ones_like(values))
    got = whiten(values, moments, shift_mean=False)  # the variance is 0.6 / 8
    expected = [0.1394, 0.5046, 0.8697, 1.2349, 1.6, 1.9651, 2.3303, 2.6954, 3.0606]
    assert got[0].tolist() == pytest.approx(expected, abs=5e-5)
    everywhere = (torch.tensor(1.0), torch.tensor(4.0), torch.tensor(5))  # of all processes: unbiased variance 5
    assert whiten(torch.tensor([[6.0]]), everywhere).item() == pytest.approx(5**0.5)
    assert whiten(values, moments).mean().item() == pytest.approx(0.0, abs=1e-6)


def test_whitening_sees_real_tokens_only():
    """The masked whitening of (2, 4, 3, -1, .5, 2) in release 0.7.7."""
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0], [3.0, -1.0, 0.5, 2.0]])
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    got = whiten(values, masked_moments(values, mask)) * mask
    assert got[0].tolist() == pytest.approx([0.0, 0.140303, 1.26273, 0.0], abs=1e-5)
    wider, wider_mask = torch.nn.functional.pad(values, (1, 2), value=NAN), torch.nn.functional.pad(mask, (1, 2))
    padded = whiten(wider, masked_moments(wider, wider_mask))
    torch.testing.assert_close(padded[:, 1:-2] * mask, got)


def test_soft_overlong_punishment_by_hand():
    got = soft_overlong_punishment(torch.tensor([5, 6, 8, 10, 30]), 10, 4)
    assert got.tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]
    with pytest.raises(ValueError, match="cache=0"):
        soft_overlong_punishment(torch.tensor([5]), 10, 0)
