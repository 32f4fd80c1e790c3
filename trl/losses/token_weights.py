"""Weights and masks of single tokens in a policy loss: for engine mismatch, staleness, entropy, truncation.

Each function returns a detached [B, T] or [B, 1]. Multiplied into a mask it also shrinks the count that the loss is
divided by; given as `weight_BT` it leaves that count.
"""

import torch
from torch import Tensor


def importance_correction(
    trainer_BT: Tensor,
    sampler_BT: Tensor,
    mask_BT: Tensor,
    mode: str = "sequence_mask",
    clip_max: float = 3.0,
    clip_min: float | None = None,
) -> Tensor:
    """Weight of samples whose engine disagrees with the trainer: `p_trainer / p_sampler`, bounded. [B, T] or [B, 1]

    Both log-probabilities are of the same weights, before any update. mode is level_bound. Level: each token's ratio,
    or the whole completion's. Bound: `truncate` it into [clip_min, clip_max] (TIS), or `mask` it to 0 outside (MIS).
    """
    if mode not in IMPORTANCE_MODES:
        raise ValueError(f"importance sampling mode {mode!r}: choose one of {list(IMPORTANCE_MODES)}")
    level, bound = mode.split("_")
    log_ratio = (trainer_BT - sampler_BT).detach() * mask_BT
    ratio = (log_ratio if level == "token" else log_ratio.sum(-1, keepdim=True)).exp()
    if bound == "truncate":
        return ratio.clamp(clip_min, clip_max)
    kept = ratio <= clip_max
    return ratio.masked_fill(~kept if clip_min is None else ~(kept & (ratio >= clip_min)), 0.0)


IMPORTANCE_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def off_policy_mask(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages: Tensor, mask_BT: Tensor, threshold: float
) -> Tensor:
    """0 where a completion is both bad (A < 0) and stale: mean of `log p_old - log p` over `threshold`; else 1.

    DeepSeek-V3.2's off-policy sequence masking (arXiv:2512.02556). advantages [B, 1] or [B, T]; so is the mask.
    """
    drift_BT = (old_logprobs_BT - logprobs_BT).detach() * mask_BT
    drift_B1 = drift_BT.sum(-1, keepdim=True) / mask_BT.sum(-1, keepdim=True).clamp(min=1)
    return 1.0 - ((advantages < 0) & (drift_B1 > threshold)).to(logprobs_BT.dtype)


def top_entropy_mask(entropy_BT: Tensor, mask_BT: Tensor, quantile: float) -> Tensor:
    """1 on the `quantile` share of counted tokens with the highest entropy, ties included (arXiv:2506.01939). [B, T]

    Taken over the whole batch. Quantile 1 keeps all.
    """
    if not 0.0 < quantile <= 1.0:
        raise ValueError(f"top_entropy_quantile={quantile}: the share of tokens to keep lies in (0, 1]; 1 keeps all")
    counted_BT = mask_BT > 0
    ordered_N = entropy_BT.detach().masked_fill(~counted_BT, -torch.inf).flatten().sort(descending=True).values
    keep = (counted_BT.sum() * quantile - 1e-6).ceil().long().clamp(min=1)
    threshold = ordered_N.gather(0, (keep - 1).view(1))
    return ((entropy_BT >= threshold) & counted_BT).to(mask_BT.dtype)


def mask_truncated(mask_BT: Tensor, truncated_B: Tensor) -> Tensor:
    """The mask without completions that were cut at the length limit: DAPO's overlong filtering (arXiv:2503.14476)."""
    return mask_BT * (~truncated_B.bool())[:, None]


def adaptive_entropy_coef(
    coef: float, entropy: float, *, target: float, delta: float, least: float = 0.0, most: float = 1.0
) -> float:
    """The next entropy coefficient: one `delta` up below the target entropy, one down above it (arXiv:2505.22312).

    The paper applies the bonus only while `entropy <= target`.
    """
    step = delta if entropy < target else -delta
    return min(max(coef + step, least), most)
