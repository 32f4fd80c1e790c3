"""Weights and masks of single tokens in a policy loss: for engine mismatch, staleness, entropy, truncation.

Each function returns a detached [B, T] or [B, 1]. Multiplied into a mask it also shrinks the count that the loss is
divided by; given as `weight_BT` it leaves that count.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from trl.losses.clipping import LOG_RATIO_LIMIT, RATIO_LEVELS
from trl.losses.loss_sum import Measure, masked_sum

IMPORTANCE_LEVELS = {"token": "token", "sequence": "trajectory", "geometric": "sequence"}
"""level of a correction -> the ratio of `RATIO_LEVELS` that it reads"""
IMPORTANCE_MODES = tuple(f"{level}_{bound}" for level in IMPORTANCE_LEVELS for bound in ("truncate", "mask"))


@dataclass(frozen=True)
class Correction:
    """How the surrogate of a token is weighed that another computation of the policy sampled: `p_trainer / p_sampler`.

    mode is level_bound. Level: the ratio of each token; of the whole completion, `sequence`, the product of its tokens'
    ratios; or their geometric mean, `geometric`, exp of the mean log-ratio (arXiv:2507.18071, eq. 7). Bound: `truncate`
    the ratio into [clip_min, clip_max], or `mask` it to 0 outside. So

    - token_truncate, clip_max 2: truncated importance sampling, TIS (Ionides 2008; for engines Yao et al. 2025);
    - token_mask, clip_min 0.5, clip_max 5: IcePop (Ring-1T, arXiv:2510.18855);
    - sequence_truncate, sequence_mask: TIS and MIS of whole completions (section 4 of arXiv:2510.26788);
    - any of them where the trainer's log-probabilities are those of the weights at the start of the update, and the
      sampler's are older: decoupled PPO (eq. 4 of arXiv:2110.00641; with stale rollouts: eq. 5 of arXiv:2505.24298).
      These weights are the proximal policy, around which the surrogate is clipped; the sampler is the behaviour.

    The weight multiplies the surrogate and leaves the count that the loss is divided by, so a masked token learns
    nothing and the others learn no more than before. KL and entropy terms are not weighed.
    """

    mode: str = "sequence_mask"
    clip_max: float | None = 3.0
    clip_min: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in IMPORTANCE_MODES:
            raise ValueError(f"importance sampling mode {self.mode!r}: choose one of {list(IMPORTANCE_MODES)}")
        low, high = self.bounds
        if not 0 <= low <= 1 <= high:
            raise ValueError(
                f"importance sampling bounds [{low:g}, {high:g}]: they must enclose 1, the ratio of an engine that "
                "agrees with the trainer"
            )

    @property
    def bounds(self) -> tuple[float, float]:
        return self.clip_min or 0.0, inf if self.clip_max is None else self.clip_max

    def ratio(self, trainer_BT: Tensor, sampler_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The ratio before it is bounded, detached; 1 where nothing counts. [B, T] or [B, 1]"""
        level = IMPORTANCE_LEVELS[self.mode.split("_")[0]]
        change_BT = (trainer_BT - sampler_BT).detach().masked_fill(mask_BT == 0, 0.0)
        log_ratio = RATIO_LEVELS[level](change_BT, torch.zeros_like(change_BT), mask_BT)
        return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()

    def bounded(self, ratio: Tensor) -> Tensor:
        """The weight of tokens with this ratio."""
        low, high = self.bounds
        if self.mode.endswith("truncate"):
            return ratio.clamp(low, high)
        return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)

    def weigh(self, trainer_BT: Tensor, sampler_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, dict[str, Measure]]:
        """The weights, detached, [B, T] or [B, 1]; their mean and the share that was bounded, over counted tokens."""
        ratio = self.ratio(trainer_BT, sampler_BT, mask_BT)
        weight = self.bounded(ratio)
        changed_BT = (weight != ratio).to(mask_BT.dtype).expand_as(mask_BT)
        return weight, {
            "sampling/weight": masked_sum(weight.expand_as(mask_BT), mask_BT),
            "sampling/corrected": masked_sum(changed_BT, mask_BT),
        }


def importance_correction(
    trainer_BT: Tensor,
    sampler_BT: Tensor,
    mask_BT: Tensor,
    mode: str = "sequence_mask",
    clip_max: float | None = 3.0,
    clip_min: float | None = None,
) -> Tensor:
    """The weights of a `Correction`, [B, T] or [B, 1]: `p_trainer / p_sampler` of tokens or completions, bounded."""
    return Correction(mode, clip_max, clip_min).weigh(trainer_BT, sampler_BT, mask_BT)[0]


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
