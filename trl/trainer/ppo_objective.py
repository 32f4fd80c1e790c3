"""The two terms that PPO minimises."""

from __future__ import annotations

from torch import Tensor

from trl.losses.loss_sum import LossSum, Measure, masked_sum
from trl.losses.policy import clipped_surrogate, clipped_value
from trl.trainer.ppo_config import PPOConfig


def terms(
    config: PPOConfig, old_logprobs: Tensor, values: Tensor, vpreds: Tensor, logprobs: Tensor, mask: Tensor,
    advantages: Tensor, returns: Tensor, entropy: Tensor,
) -> tuple[LossSum, LossSum]:  # fmt: skip
    """Clipped surrogate, and `vf_coef` times the clipped value loss, with what there is to report of them.

    All tensors [B, T]; both terms are summed over the tokens that count.
    """
    clip = config.cliprange
    policy = clipped_surrogate(logprobs, old_logprobs, advantages, mask, clip_low=clip, clip_high=clip)
    value = clipped_value(vpreds, values, returns, mask, config.cliprange_value)
    weighed = config.vf_coef * value.total
    of_policy: dict[str, Measure] = {
        **policy.metrics,
        "policy": policy.total.detach(),
        "entropy": masked_sum(entropy, mask),
        "advantage": masked_sum(advantages, mask),
    }
    of_value: dict[str, Measure] = {**value.metrics, "value_loss": weighed.detach()}
    return LossSum(policy.total, policy.count, of_policy), LossSum(weighed, value.count, of_value)
