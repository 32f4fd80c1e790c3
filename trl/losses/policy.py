"""Policy-gradient objectives. Each one chooses a baseline, a ratio level, a clip rule, a KL term and an aggregation.

Shape letters: B completions, T tokens (DDPO: denoising steps), G group. The pieces live in `advantages`, `clipping` and
`token_weights`; all of them can be imported from here.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from trl.losses.advantages import (
    ADVANTAGES,
    REWARD_AGGREGATIONS,
    batch_relative,
    generalized_advantages,
    group_relative,
    group_then_batch,
    leave_one_out,
    normalize_then_sum,
    soft_overlong_punishment,
    sum_then_normalize,
    token_rewards,
    whiten,
)
from trl.losses.clipping import CLIP_RULES, LOG_RATIO_LIMIT, RATIO_LEVELS, ClipRule, Surrogate, cispo, clip, sapo, vespo
from trl.losses.kl import KL_ESTIMATORS
from trl.losses.loss_sum import Aggregation, LossSum, Measure, aggregate, extreme, masked_sum, row_share
from trl.losses.token_weights import (
    Correction,
    adaptive_entropy_coef,
    importance_correction,
    mask_truncated,
    off_policy_mask,
    top_entropy_mask,
)

__all__ = [
    "ADVANTAGES",
    "CLIP_RULES",
    "RATIO_LEVELS",
    "REWARD_AGGREGATIONS",
    "ClipRule",
    "Correction",
    "Surrogate",
    "adaptive_entropy_coef",
    "batch_relative",
    "cispo",
    "clip",
    "clipped_surrogate",
    "clipped_value",
    "generalized_advantages",
    "group_relative",
    "group_then_batch",
    "importance_correction",
    "kl_in_loss",
    "leave_one_out",
    "mask_truncated",
    "normalize_then_sum",
    "off_policy_mask",
    "policy_loss",
    "sampling_metrics",
    "sapo",
    "soft_overlong_punishment",
    "sum_then_normalize",
    "token_rewards",
    "top_entropy_mask",
    "vespo",
    "whiten",
]


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    rule: ClipRule,
    level: str = "token",
    weight_BT: Tensor | None = None,
    reference_BT: Tensor | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    kl_importance: bool = False,
    entropy_BT: Tensor | None = None,
    entropy_coef: float = 0.0,
    entropy_share: Tensor | float | None = None,
    how: Aggregation = "token",
    max_tokens: int = 0,
    sampled_BT: Tensor | None = None,
    clip_range: tuple[float, float] = (0.0, torch.inf),
) -> LossSum:
    """`weight rule(ratio, A) + beta KL` per token, added up by `how`, minus `entropy_coef` times the mean entropy.

    advantages: [B, 1] or [B, T]. rule: of `CLIP_RULES`, its numbers bound. level: of `RATIO_LEVELS`. weight_BT: of
    `token_weights`, for the surrogate alone. kl, kl_importance: see `kl_in_loss`; a reference with beta 0 is only
    recorded, so is an entropy with coefficient 0. The entropy is a mean over tokens, and metrics are too, whatever
    `how`. entropy_share: the count of the loss over that of tokens, in the whole optimizer step; None: in this batch.
    sampled_BT, clip_range: see `sampling_metrics`; None: these are not recorded.
    """
    if beta and reference_BT is None:
        raise ValueError(f"beta={beta}: the KL term needs reference_BT")
    if entropy_coef and entropy_BT is None:
        raise ValueError(f"entropy_coef={entropy_coef}: the bonus needs entropy_BT")
    if level not in RATIO_LEVELS:
        raise ValueError(f"importance_sampling_level={level!r}: choose one of {list(RATIO_LEVELS)}")
    log_ratio = RATIO_LEVELS[level](logprobs_BT, old_logprobs_BT, mask_BT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    surrogate = rule(log_ratio, logprobs_BT, advantages)
    loss_BT = surrogate_BT = surrogate.loss_BT if weight_BT is None else weight_BT * surrogate.loss_BT
    metrics = _policy_metrics(logprobs_BT, old_logprobs_BT, mask_BT, log_ratio, surrogate)
    if sampled_BT is not None:
        metrics |= sampling_metrics(logprobs_BT, sampled_BT, mask_BT, level, clip_range)
    if reference_BT is not None:
        kl_BT = kl_in_loss(logprobs_BT, reference_BT, old_logprobs_BT if kl_importance else None, kl)
        loss_BT = loss_BT + beta * kl_BT if beta else loss_BT
        metrics["kl"] = masked_sum(KL_ESTIMATORS["k3" if kl == "k3" else "k1"](logprobs_BT, reference_BT), mask_BT)
    total, count = aggregate(loss_BT, mask_BT, how, max_tokens)
    alone = loss_BT is surrogate_BT
    metrics["policy_loss"] = (total if alone else aggregate(surrogate_BT, mask_BT, how, max_tokens)[0]).detach()
    if entropy_BT is not None:
        metrics["entropy"] = masked_sum(entropy_BT, mask_BT)
    if entropy_BT is not None and entropy_coef:
        share = count / mask_BT.sum().clamp(min=1) if entropy_share is None else entropy_share
        total = total - entropy_coef * share * (entropy_BT * mask_BT).sum()
    return LossSum(total, count, metrics)


def clipped_surrogate(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    **terms: Any,
) -> LossSum:
    """`policy_loss` with PPO's rule `clip`. Serves PPO, GRPO, RLOO (per token) and DDPO (per denoising step)."""
    rule = partial(clip, clip_low=clip_low, clip_high=clip_high, delta=delta)
    terms.setdefault("clip_range", (1 - clip_low, 1 + clip_high))
    return policy_loss(logprobs_BT, old_logprobs_BT, advantages, mask_BT, rule=rule, **terms)


def kl_in_loss(
    logprobs_BT: Tensor, reference_BT: Tensor, old_logprobs_BT: Tensor | None = None, kl: str = "k3"
) -> Tensor:
    """The KL estimate `kl` of each token as a term of a loss. [B, T]

    With the sampling policy's `old_logprobs_BT` it is weighed by the token's ratio, gradient included, which makes its
    expectation the current policy's KL and its gradient that of the KL at each token (unbiased KL estimate of
    DeepSeek-V3.2, arXiv:2512.02556). Without, k2 has this gradient on-policy, k3 another one, k1 none at all.
    """
    if kl not in KL_ESTIMATORS:
        raise ValueError(f"kl={kl!r}: choose one of {list(KL_ESTIMATORS)}")
    kl_BT = KL_ESTIMATORS[kl](logprobs_BT, reference_BT)
    if old_logprobs_BT is None:
        return kl_BT
    return (logprobs_BT - old_logprobs_BT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp() * kl_BT


@torch.no_grad()
def _policy_metrics(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor, log_ratio: Tensor, surrogate: Surrogate
) -> dict[str, Measure]:
    """How far the policy moved since it sampled, in sums over tokens: the ratio, k1 and k2 of KL(old || new), clips."""
    change_BT = old_logprobs_BT - logprobs_BT
    low_BT, high_BT = surrogate.low_BT.to(mask_BT.dtype), surrogate.high_BT.to(mask_BT.dtype)
    return {
        "ratio": masked_sum(log_ratio.exp(), mask_BT),
        "approx_kl": masked_sum(0.5 * change_BT**2, mask_BT),
        "policy_kl": masked_sum(change_BT, mask_BT),
        "clip_ratio/region_mean": masked_sum(low_BT + high_BT, mask_BT),
        "clip_ratio/low_mean": masked_sum(low_BT, mask_BT),
        "clip_ratio/low_min": row_share(low_BT, mask_BT, largest=False),
        "clip_ratio/high_mean": masked_sum(high_BT, mask_BT),
        "clip_ratio/high_max": row_share(high_BT, mask_BT, largest=True),
    }


@torch.no_grad()
def sampling_metrics(
    logprobs_BT: Tensor, sampled_BT: Tensor, mask_BT: Tensor, level: str, clip_range: tuple[float, float]
) -> dict[str, Measure]:
    """By how much two computations of one policy differ: the trainer's and the sampler's, before the first update.

    The ratio is of `level`; outside `clip_range` it would be clipped before anything was learned.
    """
    change_BT, low, high = logprobs_BT - sampled_BT, *clip_range
    size_BT = change_BT.abs().masked_fill(mask_BT == 0, -torch.inf)
    ratio = RATIO_LEVELS[level](logprobs_BT, sampled_BT, mask_BT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    counts = mask_BT if ratio.shape == mask_BT.shape else (mask_BT.sum(-1, keepdim=True) > 0).to(mask_BT.dtype)
    unknown = counts == 0  # filled, for picking the others would wait for the device
    outside = ((ratio < low) | (ratio > high)).to(mask_BT.dtype)
    return {
        "sampling/sampling_logp_difference/mean": masked_sum(change_BT.abs(), mask_BT),
        "sampling/sampling_logp_difference/max": extreme(size_BT, largest=True),
        "sampling/importance_sampling_ratio/mean": masked_sum(ratio, counts),
        "sampling/importance_sampling_ratio/min": extreme(ratio.masked_fill(unknown, torch.inf), largest=False),
        "sampling/importance_sampling_ratio/max": extreme(ratio.masked_fill(unknown, -torch.inf), largest=True),
        "sampling/kl": masked_sum(-change_BT, mask_BT),
        "sampling/approx_kl": masked_sum(0.5 * change_BT**2, mask_BT),
        "sampling/outside_clip_range": masked_sum(outside, counts),
    }


def clipped_value(
    values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, clip: float | None
) -> LossSum:
    """`1/2 max((v - R)^2, (clip(v, v_old +- clip) - R)^2)`: PPO's value loss over tokens; `None` does not clip."""
    error_BT = (values_BT - returns_BT) ** 2
    clipped_BT = error_BT
    if clip is not None:
        clipped_BT = (old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip) - returns_BT) ** 2
    total, count = aggregate(0.5 * torch.max(error_BT, clipped_BT), mask_BT, "token")
    metrics: dict[str, Measure] = {
        "value": masked_sum(values_BT, mask_BT),
        "value_error": masked_sum(error_BT, mask_BT),
        "value_clip_fraction": masked_sum((clipped_BT > error_BT).to(mask_BT.dtype), mask_BT),
    }
    return LossSum(total, count, metrics)
