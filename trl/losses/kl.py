"""Estimates of KL(policy || reference) from the log-probabilities of sampled tokens. All [B, T] -> [B, T].

With x sampled from the policy and d = log policy(x) - log reference(x) (J. Schulman, "Approximating KL divergence").
What their gradients do, in the reward and in the loss, is measured in docs/estimators.md.
"""

from collections.abc import Callable

import torch
from torch import Tensor

KLEstimator = Callable[[Tensor, Tensor], Tensor]


def k1(logprobs_BT: Tensor, reference_BT: Tensor) -> Tensor:
    """`d`: unbiased, of either sign, high variance."""
    return logprobs_BT - reference_BT


def k2(logprobs_BT: Tensor, reference_BT: Tensor) -> Tensor:
    """`d^2 / 2`: positive, biased by O(d^3); its gradient in a loss is that of the token's KL."""
    return 0.5 * (logprobs_BT - reference_BT) ** 2


def k3(logprobs_BT: Tensor, reference_BT: Tensor) -> Tensor:
    """`exp(-d) - 1 + d`: unbiased, positive, low variance; its gradient in a loss is not that of the KL."""
    d_BT = logprobs_BT - reference_BT
    return torch.expm1(-d_BT) + d_BT


def absolute(logprobs_BT: Tensor, reference_BT: Tensor) -> Tensor:
    """`|d|`: a penalty, not an estimate."""
    return (logprobs_BT - reference_BT).abs()


def full(logprobs_BTV: Tensor, reference_BTV: Tensor) -> Tensor:
    """The exact KL at each position, from full log-distributions. [B, T, V] -> [B, T]

    A token that the policy excludes (log-probability -inf) contributes 0.
    """
    difference_BTV = (logprobs_BTV - reference_BTV).masked_fill(logprobs_BTV == -torch.inf, 0.0)
    return (logprobs_BTV.exp() * difference_BTV).sum(-1)


KL_ESTIMATORS: dict[str, KLEstimator] = {"k1": k1, "k2": k2, "k3": k3}
"""of the sampled token, by the names of Schulman's note"""

KL_PENALTIES: dict[str, KLEstimator] = {"kl": k1, "abs": absolute, "mse": k2, "k3": k3, "full": full}
"""by the names of `PPOConfig.kl_penalty`; `full` takes log-distributions"""
