"""Importance ratios, which measure how far a policy has moved, and clip rules, which bound it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""log-ratios are clamped to +- this, and have no gradient beyond it: `exp` of more would overflow"""


def token_ratio(logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Log-ratio of each token: PPO, GRPO. [B, T]"""
    return logprobs_BT - old_logprobs_BT


def trajectory_ratio(logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Log-ratio of the whole completion: exact importance sampling, high variance; RLOO on completions. [B, 1]"""
    return ((logprobs_BT - old_logprobs_BT) * mask_BT).sum(-1, keepdim=True)


def sequence_ratio(logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean of the tokens' log-ratios: the length-normalised ratio of GSPO, eq. 7 of arXiv:2507.18071. [B, 1]"""
    return trajectory_ratio(logprobs_BT, old_logprobs_BT, mask_BT) / mask_BT.sum(-1, keepdim=True).clamp(min=1)


def sequence_token_ratio(logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """GSPO-token: the value of `sequence_ratio`, the gradient of each token (arXiv:2507.18071). [B, T]"""
    return sequence_ratio(logprobs_BT, old_logprobs_BT, mask_BT).detach() + logprobs_BT - logprobs_BT.detach()


RATIO_LEVELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "token": token_ratio,
    "sequence": sequence_ratio,
    "sequence_token": sequence_token_ratio,
    "trajectory": trajectory_ratio,
}
"""`f(logprobs_BT, old_logprobs_BT, mask_BT) -> log_ratio`, [B, T] or [B, 1]"""


class Surrogate(NamedTuple):
    """A loss per token, and the tokens whose gradient is cut because the ratio is too low or too high."""

    loss_BT: Tensor
    low_BT: Tensor
    high_BT: Tensor


ClipRule = Callable[[Tensor, Tensor, Tensor], Surrogate]
"""`f(log_ratio, logprobs_BT, advantages) -> Surrogate`, its numbers bound with `functools.partial`"""


def clip(
    log_ratio: Tensor,
    logprobs_BT: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
) -> Surrogate:
    """`-min(w A, clip(w, 1 - clip_low, 1 + clip_high) A)`: PPO, eq. 7 of arXiv:1707.06347; DAPO's clip-higher.

    `delta` also bounds w from above where A < 0 (two-sided clipping, arXiv:2505.07291; dual clip, arXiv:1912.09729).
    """
    if delta is not None and delta <= 1 + clip_high:
        raise ValueError(f"delta={delta}: bounds ratios that clip_high leaves free, so it must exceed {1 + clip_high}")
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    loss = -torch.min(bounded * advantages, clipped * advantages)
    too_high = (ratio > 1 + clip_high) & (advantages > 0)
    if delta is not None:
        too_high = too_high | ((ratio > delta) & (advantages < 0))
    return Surrogate(loss, (ratio < 1 - clip_low) & (advantages < 0), too_high)


def cispo(
    log_ratio: Tensor,
    logprobs_BT: Tensor,
    advantages: Tensor,
    *,
    clip_low: float | None = None,
    clip_high: float = 4.0,
) -> Surrogate:
    """`-sg[clip(w, 1 - clip_low, 1 + clip_high)] A log p`: CISPO (arXiv:2506.13585); clips weights, cuts no gradient.

    No lower bound by default, as in the paper's experiments; 1 + clip_high = 5 is ScaleRL's cap (arXiv:2510.13786).
    """
    ratio = log_ratio.detach().exp()
    floor = 0.0 if clip_low is None else 1 - clip_low
    weight = ratio.clamp(floor, 1 + clip_high)
    return Surrogate(-weight * advantages * logprobs_BT, ratio < floor, ratio > 1 + clip_high)


def sapo(
    log_ratio: Tensor, logprobs_BT: Tensor, advantages: Tensor, *, tau_pos: float = 1.0, tau_neg: float = 1.05
) -> Surrogate:
    """`-(4 / tau) sigma(tau (w - 1)) A`: SAPO's soft gate (arXiv:2511.20347), steeper for A <= 0 by `tau_neg`.

    At w = 1 its gradient is that of the unclipped ratio.
    """
    for name, tau in (("tau_pos", tau_pos), ("tau_neg", tau_neg)):
        if tau <= 0:
            raise ValueError(f"{name}={tau}: a gate's temperature must be positive")
    ratio = log_ratio.exp()
    slope = torch.where(advantages > 0, tau_pos, tau_neg)
    loss = -(4 / slope) * torch.sigmoid(slope * (ratio - 1)) * advantages
    never = torch.zeros_like(loss, dtype=torch.bool)
    return Surrogate(loss, never, never)


def vespo(
    log_ratio: Tensor,
    logprobs_BT: Tensor,
    advantages: Tensor,
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> Surrogate:
    """`-sg[w^k exp(lambda (1 - w))] A log p`: VESPO (arXiv:2602.10693), k and lambda by the sign of A.

    w is the ratio of the whole completion (`trajectory_ratio`). The weight is 1 at w = 1; k lessens it below, lambda
    above.
    """
    log_w, positive = log_ratio.detach(), advantages >= 0
    k, decay = torch.where(positive, k_pos, k_neg), torch.where(positive, lambda_pos, lambda_neg)
    weight = (k * log_w + decay * (1 - log_w.exp())).exp()
    loss = -weight * advantages * logprobs_BT
    never = torch.zeros_like(loss, dtype=torch.bool)
    return Surrogate(loss, never, never)


CLIP_RULES: dict[str, Callable[..., Surrogate]] = {"clip": clip, "cispo": cispo, "sapo": sapo, "vespo": vespo}
"""the keyword-only parameters of a rule are its options"""
