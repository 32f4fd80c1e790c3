"""Advantages: from rewards to the weight of each completion or token in a policy gradient. G = completions a prompt."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
Moments = tuple[Tensor, Tensor, Tensor]
"""mean, variance divided by n, n"""


def _count_mean_std(values: Tensor, dim: int, unbiased: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics along `dim` of what is not NaN. One value has no spread (0), nor have values equal up to rounding."""
    valid = ~values.isnan()
    count = valid.sum(dim, keepdim=True)
    mean = values.nan_to_num().sum(dim, keepdim=True) / count.clamp(min=1)
    square = ((values - mean) ** 2).masked_fill(~valid, 0.0).sum(dim, keepdim=True)
    std = (square / (count - int(unbiased)).clamp(min=1)).sqrt()
    return count, mean, std.masked_fill(std <= 1e-6 * mean.abs(), 0.0)


def _divide(centred: Tensor, std: Tensor, eps: float) -> Tensor:
    """`centred / (std + eps)`; 0 where the values do not vary, also at eps 0."""
    return torch.where(std > 0, centred / (std + eps).clamp(min=torch.finfo(std.dtype).tiny), 0.0)


def _grouped(rewards_B: Tensor, group_size: int, least: int = 1) -> Tensor:
    if group_size < least or len(rewards_B) % group_size:
        raise ValueError(
            f"group_size={group_size}: must be at least {least} and divide the {len(rewards_B)} rewards, "
            "a group of equal prompts in a run"
        )
    return rewards_B.view(-1, group_size)


def _centred(rewards_B: Tensor, group_size: int) -> Tensor:
    rewards = _grouped(rewards_B, group_size)
    return (rewards - _count_mean_std(rewards, 1)[1]).flatten()


def group_relative(
    rewards_B: Tensor, group_size: int, scale: Scale = "group", *, unbiased: bool = True, eps: float = 1e-4
) -> Tensor:
    """Reward minus its group's mean, over the std of its group or of the batch if `scale`. [B]

    group: GRPO, arXiv:2402.03300 (the paper leaves the std's kind open; `unbiased` divides by G - 1).
    batch: the std of all the given rewards (arXiv:2508.08221). none: Dr. GRPO, arXiv:2503.20783.
    A NaN reward is left out of the statistics and gets advantage 0.
    """
    centred_B = _centred(rewards_B, group_size).nan_to_num()
    if scale == "none":
        return centred_B
    if scale == "group":
        rewards = _grouped(rewards_B, group_size, least=2)
        return _divide(centred_B.view_as(rewards), _count_mean_std(rewards, 1, unbiased)[2], eps).flatten()
    if scale == "batch":
        return _divide(centred_B, _count_mean_std(rewards_B, 0, unbiased)[2], eps)
    raise ValueError(f"scale_rewards={scale!r}: choose 'group', 'batch' or 'none'")


def leave_one_out(rewards_B: Tensor, group_size: int) -> Tensor:
    """RLOO: reward minus the mean of the *other* completions of its group (arXiv:2402.14740). [B]

    A NaN reward is left out and gets advantage 0; so does a completion without others.
    """
    rewards = _grouped(rewards_B, group_size, least=2)
    count, mean, _ = _count_mean_std(rewards, 1)
    return ((rewards - mean) * count / (count - 1).clamp(min=1)).nan_to_num().flatten()


def batch_relative(rewards_B: Tensor, group_size: int = 1, *, scale: bool = True, eps: float = 1e-8) -> Tensor:
    """Reward minus the mean of all the given rewards, over their std if `scale`: REINFORCE++ on whole completions. [B]

    `group_size` is not read: the baseline is the batch's. Taken over the whole batch (arXiv:2501.03262).
    """
    _, mean, std = _count_mean_std(rewards_B, 0)
    centred = (rewards_B - mean).nan_to_num()
    return _divide(centred, std, eps) if scale else centred


def group_then_batch(rewards_B: Tensor, group_size: int, *, eps: float = 1e-8) -> Tensor:
    """REINFORCE++-baseline: reward minus its group's mean, then whitened over the batch (arXiv:2501.03262). [B]"""
    return batch_relative(_centred(rewards_B, group_size), eps=eps)


def no_baseline(rewards_B: Tensor, group_size: int = 1) -> Tensor:
    """REINFORCE: the rewards themselves; NaN gives 0. [B]"""
    return rewards_B.nan_to_num()


Advantage = Callable[[Tensor, int], Tensor]

ADVANTAGES: dict[str, Advantage] = {
    "group": group_relative,  # GRPO
    "group_mean": partial(group_relative, scale="none"),  # Dr. GRPO
    "group_batch_std": partial(group_relative, scale="batch"),
    "leave_one_out": leave_one_out,  # RLOO
    "batch": batch_relative,  # REINFORCE++
    "batch_mean": partial(batch_relative, scale=False),
    "group_then_batch": group_then_batch,  # REINFORCE++-baseline
    "none": no_baseline,  # REINFORCE
}
"""`f(rewards_B, group_size) -> advantages_B`"""


def sum_then_normalize(
    rewards_BF: Tensor, weights_F: Tensor, group_size: int, advantage: Advantage = group_relative
) -> Tensor:
    """The advantage of the weighted sum of F reward functions; a function that gave NaN is left out of the sum. [B]

    A completion that no function scored has a NaN sum and, by every `Advantage` here, advantage 0.
    """
    unscored_B = rewards_BF.isnan().all(-1)
    return advantage((rewards_BF.nan_to_num() @ weights_F).masked_fill(unscored_B, torch.nan), group_size)


def normalize_then_sum(
    rewards_BF: Tensor, weights_F: Tensor, group_size: int, advantage: Advantage = group_relative
) -> Tensor:
    """GDPO: each reward function's advantage, weighted and summed, then whitened over the batch. [B]

    arXiv:2601.05242. No function's scale drowns another's.
    """
    advantages = torch.stack([advantage(rewards_B, group_size) for rewards_B in rewards_BF.unbind(-1)], -1)
    return batch_relative(advantages @ weights_F)


REWARD_AGGREGATIONS = {"sum_then_normalize": sum_then_normalize, "normalize_then_sum": normalize_then_sum}
"""`f(rewards_BF, weights_F, group_size, advantage) -> advantages_B`"""


def token_rewards(scores_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, beta: float) -> Tensor:
    """`-beta kl` at every position, plus the score at the last counted one. [B, T]

    Positions that do not count carry their penalty too (as `compute_rewards` of release 0.7.7 had it): mask it before
    you sum.
    A row in which nothing counts gets no score.
    """
    position_BT = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device) * (mask_BT > 0)
    last_BT = (position_BT == position_BT.amax(1, keepdim=True)) & (mask_BT > 0)
    return -beta * kl_BT + last_BT * scores_B[:, None]


def generalized_advantages(
    rewards_BT: Tensor, values_BT: Tensor, gamma: float, lam: float, mask_BT: Tensor | None = None
) -> Tensor:
    """GAE, eq. 16 of arXiv:1506.02438. [B, T]

    With a mask, positions that do not count are no time steps: their rewards and values are not read, their
    advantage is 0, and the recursion passes over padding and holes (tokens of the environment) as if they were not
    there. Without a mask every position is a step, as in release 0.7.7 (on `rewards * mask` and `values * mask`).
    """
    zero_B = torch.zeros_like(rewards_BT[:, 0])
    last_B, next_value_B, columns = zero_B, zero_B, []
    for t in reversed(range(rewards_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        step_B, value_B = delta_B + gamma * lam * last_B, values_BT[:, t]
        if mask_BT is None:
            last_B, next_value_B = step_B, value_B
            columns.append(step_B)
        else:
            counts_B = mask_BT[:, t] > 0
            last_B, next_value_B = torch.where(counts_B, step_B, last_B), torch.where(counts_B, value_B, next_value_B)
            columns.append(torch.where(counts_B, step_B, zero_B))
    return torch.stack(columns[::-1], 1)


def whiten(values_BT: Tensor, moments: Moments, *, shift_mean: bool = True) -> Tensor:
    """All values scaled to unbiased variance 1 and, if `shift_mean`, shifted to mean 0. [B, T]

    moments: of the values that count: `masked_moments`, or those of all processes. A single value has no spread: it
    becomes 0.
    """
    mean, variance, count = moments
    unbiased = variance * count / (count - 1).clamp(min=1)
    scaled = (values_BT - mean) * torch.rsqrt(unbiased + 1e-8)
    return scaled if shift_mean else scaled + mean


def masked_moments(values_BT: Tensor, mask_BT: Tensor) -> Moments:
    """Mean, variance (divided by n) and number of the counted values. [], [], []"""
    counts_BT = mask_BT != 0
    count = counts_BT.sum()
    mean = values_BT.masked_fill(~counts_BT, 0.0).sum() / count
    return mean, ((values_BT - mean) ** 2).masked_fill(~counts_BT, 0.0).sum() / count, count


def soft_overlong_punishment(lengths_B: Tensor, max_tokens: int, cache: int) -> Tensor:
    """0 up to `max_tokens - cache` tokens, then linearly down to -1 at `max_tokens` and beyond. [B]

    Added to the rewards; eq. 13 of arXiv:2503.14476, in which `max_tokens` counts the punished interval `cache` too.
    """
    if not 0 < cache <= max_tokens:
        raise ValueError(f"cache={cache}: the punished interval must lie in (0, max_tokens={max_tokens}]")
    return ((max_tokens - cache - lengths_B) / cache).clamp(-1.0, 0.0)
