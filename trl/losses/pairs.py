"""The input of pairwise objectives: summed log-probabilities of chosen and rejected, and changes to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Log-probabilities of B preference pairs, each summed over its completion. All [B].

    Without a reference the log-ratios are the policy's log-probabilities themselves (`reference_free` of DPO).
    """

    chosen_B: Tensor
    rejected_B: Tensor
    ref_chosen_B: Tensor | None = None
    ref_rejected_B: Tensor | None = None
    chosen_tokens_B: Tensor | None = None
    """completion lengths, for the objectives that average over them"""
    rejected_tokens_B: Tensor | None = None

    def __post_init__(self) -> None:
        for first, second in (("ref_chosen_B", "ref_rejected_B"), ("chosen_tokens_B", "rejected_tokens_B")):
            if (getattr(self, first) is None) != (getattr(self, second) is None):
                raise ValueError(f"{first} and {second}: give both or neither")

    @property
    def chosen_ratio_B(self) -> Tensor:
        """`log policy(chosen) - log reference(chosen)`"""
        return self.chosen_B if self.ref_chosen_B is None else self.chosen_B - self.ref_chosen_B

    @property
    def rejected_ratio_B(self) -> Tensor:
        """`log policy(rejected) - log reference(rejected)`"""
        return self.rejected_B if self.ref_rejected_B is None else self.rejected_B - self.ref_rejected_B

    @property
    def margin_B(self) -> Tensor:
        """`h`, the difference of the two log-ratios"""
        return self.chosen_ratio_B - self.rejected_ratio_B

    def averaged(self) -> PairLogps:
        """The same pairs per token: each log-probability over its completion's length."""
        if self.chosen_tokens_B is None or self.rejected_tokens_B is None:
            raise ValueError("chosen_tokens_B and rejected_tokens_B: needed to average log-probabilities over tokens")
        chosen, rejected = self.chosen_tokens_B.clamp(min=1), self.rejected_tokens_B.clamp(min=1)
        return PairLogps(
            self.chosen_B / chosen,
            self.rejected_B / rejected,
            None if self.ref_chosen_B is None else self.ref_chosen_B / chosen,
            None if self.ref_rejected_B is None else self.ref_rejected_B / rejected,
            torch.ones_like(chosen),
            torch.ones_like(rejected),
        )


def smoothed_logistic(scaled_B: Tensor, label_smoothing: float) -> Tensor:
    """`-log sigma(scaled)` of a pair whose label is flipped with probability `label_smoothing`. [B]"""
    kept_B = -F.logsigmoid(scaled_B)
    return (1 - label_smoothing) * kept_B - label_smoothing * F.logsigmoid(-scaled_B) if label_smoothing else kept_B


def sum_pairs(
    chosen_BT: Tensor, rejected_BT: Tensor, chosen_mask_BT: Tensor, rejected_mask_BT: Tensor, ld_alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of each chosen and rejected completion, summed over its counted tokens. [B], [B]

    LD-DPO (arXiv:2409.06411): tokens beyond the shorter completion's length weigh `ld_alpha`; 1 is DPO.
    The two widths may differ.
    """
    if not 0.0 <= ld_alpha <= 1.0:
        raise ValueError(f"ld_alpha={ld_alpha}: the weight of the excess tokens lies in [0, 1]; 1 switches it off")
    public_B1 = torch.minimum(chosen_mask_BT.sum(-1), rejected_mask_BT.sum(-1))[:, None]

    def summed(logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
        excess_BT = mask_BT.cumsum(-1) > public_B1
        return (logprobs_BT * torch.where(excess_BT, mask_BT * ld_alpha, mask_BT)).sum(-1)

    return summed(chosen_BT, chosen_mask_BT), summed(rejected_BT, rejected_mask_BT)


def wpo_weights(
    chosen_BT: Tensor,
    rejected_BT: Tensor,
    chosen_mask_BT: Tensor,
    rejected_mask_BT: Tensor,
    chosen_collision_BT: Tensor | None = None,
    rejected_collision_BT: Tensor | None = None,
) -> Tensor:
    """The weight of each pair's loss: how likely it is that the policy sampled the pair. In (0, 1], detached. [B]

    Product of the two completions' mean-token probabilities (arXiv:2406.11827), capped at 1. With
    `collision = log sum_v p(v)^2` of each position it is the paper's sampled alignment: a sample as
    likely as the policy's own weighs about 1.
    """

    def mean_log_weight(logprobs_BT: Tensor, mask_BT: Tensor, collision_BT: Tensor | None) -> Tensor:
        log_weight_BT = logprobs_BT if collision_BT is None else logprobs_BT - collision_BT
        return (log_weight_BT * mask_BT).sum(-1) / mask_BT.sum(-1).clamp(min=1)

    with torch.no_grad():
        chosen_B = mean_log_weight(chosen_BT, chosen_mask_BT, chosen_collision_BT)
        return (chosen_B + mean_log_weight(rejected_BT, rejected_mask_BT, rejected_collision_BT)).clamp(max=0).exp()


def _bounded_exp(exponent: Tensor) -> Tensor:
    """`exp` that saturates (and stops its gradient) at the square root of the largest number."""
    return exponent.clamp(max=0.5 * log(torch.finfo(exponent.dtype).max)).exp()


def _reverse_kl(log_ratio: Tensor, alpha: float) -> Tensor:
    return log_ratio


def _forward_kl(log_ratio: Tensor, alpha: float) -> Tensor:
    return -_bounded_exp(-log_ratio)


def _js_divergence(log_ratio: Tensor, alpha: float) -> Tensor:
    return log(2.0) + log_ratio - F.softplus(log_ratio)


def _alpha_divergence(log_ratio: Tensor, alpha: float) -> Tensor:
    return (1.0 - _bounded_exp(-alpha * log_ratio)) / alpha


F_DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": _reverse_kl,  # f'(u) = log u: DPO itself
    "forward_kl": _forward_kl,  # f'(u) = -1/u
    "js_divergence": _js_divergence,  # f'(u) = log(2u / (1 + u))
    "alpha_divergence": _alpha_divergence,  # f'(u) = (1 - u^-alpha) / alpha, alpha in (0, 1)
}
"""name -> f'(exp(log_ratio)): the implicit reward over beta, f-DPO (arXiv:2309.16240)"""


def apply_divergence(pair: PairLogps, name: str, alpha: float = 0.5) -> PairLogps:
    """The pair with f'(ratio) in place of each log-ratio, for an objective that is regularised by another f-divergence.

    `alpha` is read by `alpha_divergence` alone; towards 0 it becomes `reverse_kl`, at 1 `forward_kl` up to a constant.
    """
    if name not in F_DIVERGENCES:
        raise ValueError(f"f_divergence_type={name!r}: choose one of {sorted(F_DIVERGENCES)}")
    if name == "alpha_divergence" and not 0.0 < alpha <= 1.0:
        raise ValueError(f"f_alpha_divergence_coef={alpha}: lies in (0, 1]; for its limit 0 choose 'reverse_kl'")
    if name == "reverse_kl":
        return pair
    if pair.ref_chosen_B is None:
        raise ValueError(f"f_divergence_type={name!r}: measures the distance to a reference, and there is none")
    link = F_DIVERGENCES[name]
    chosen_B, rejected_B = link(pair.chosen_ratio_B, alpha), link(pair.rejected_ratio_B, alpha)
    return PairLogps(chosen_B, rejected_B, torch.zeros_like(chosen_B), torch.zeros_like(rejected_B))
