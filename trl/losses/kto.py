"""Objectives of unpaired preferences, where each completion is desirable or not: `f(log_ratio_B, desirable_B, ...)`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trl.losses.loss_sum import LossSum, Measure, masked_sum

UnpairedLoss = Callable[..., Tensor]


def kto(log_ratio_B: Tensor, desirable_B: Tensor, *, beta: float, kl: Tensor | float) -> Tensor:
    """`1 - sigma(beta (log_ratio - kl))` of a desirable completion, `1 - sigma(beta (kl - log_ratio))` of another.

    Eq. 8 of arXiv:2402.01306. `kl` is the reference point z0, see `mismatched_kl`.
    """
    return torch.sigmoid(-_sign(desirable_B, log_ratio_B) * beta * (log_ratio_B - kl))


def bco(log_ratio_B: Tensor, desirable_B: Tensor, *, beta: float, delta: Tensor | float = 0.0) -> Tensor:
    """`-log sigma(beta log_ratio - delta)` of a desirable completion, `-log sigma(delta - beta log_ratio)` of another.

    arXiv:2404.04656. `delta` is the running mean of all rewards so far; the caller keeps it.
    """
    return -F.logsigmoid(_sign(desirable_B, log_ratio_B) * (beta * log_ratio_B - delta))


def apo_zero_unpaired(log_ratio_B: Tensor, desirable_B: Tensor, *, beta: float) -> Tensor:
    """`1 - sigma(beta log_ratio)` of a desirable completion, `sigma(beta log_ratio)` of another (arXiv:2408.06266)."""
    return torch.sigmoid(-_sign(desirable_B, log_ratio_B) * beta * log_ratio_B)


def _sign(desirable_B: Tensor, like: Tensor) -> Tensor:
    return desirable_B.to(like.dtype) * 2 - 1


UNPAIRED_LOSSES: dict[str, UnpairedLoss] = {"kto": kto, "bco": bco, "apo_zero_unpaired": apo_zero_unpaired}


def mismatched_kl(total: Tensor, count: Tensor | float) -> Tensor:
    """KTO's reference point: the mean log-ratio of completions paired with *other* rows' prompts, at least 0. []

    Clamping is not linear: give it the sum of the log-ratios of the whole optimizer step over all ranks.
    """
    return (total / torch.as_tensor(count).clamp(min=1)).clamp(min=0)


def unpaired_loss(
    name: str,
    log_ratio_B: Tensor,
    desirable_B: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    logps_B: Tensor | None = None,
    **state: Tensor | float,
) -> LossSum:
    """The objective `name` summed over the completions; desirable and other ones have separate weights.

    log_ratio_B: `log policy - log reference` of each completion. logps_B: the first of the two, which is only recorded.
    state: `kl` for kto, `delta` for bco.
    """
    if name not in UNPAIRED_LOSSES:
        raise ValueError(f"Unknown loss type: {name}. Should be one of {list(UNPAIRED_LOSSES)}")
    desirable_B = desirable_B.bool()
    weight_B = torch.where(desirable_B, desirable_weight, undesirable_weight).to(log_ratio_B.dtype)
    total = (weight_B * UNPAIRED_LOSSES[name](log_ratio_B, desirable_B, beta=beta, **state)).sum()
    with torch.no_grad():
        metrics: dict[str, Measure] = {
            "rewards/chosen": masked_sum(beta * log_ratio_B, desirable_B),
            "rewards/rejected": masked_sum(beta * log_ratio_B, ~desirable_B),
        }
        if logps_B is not None:
            metrics["logps/chosen"] = masked_sum(logps_B, desirable_B)
            metrics["logps/rejected"] = masked_sum(logps_B, ~desirable_B)
    return LossSum(total, len(desirable_B), metrics)
