"""The return type of every objective: a sum, and the count of what was summed."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token", "sequence", "constant", "sequence_sum"]


@dataclass(frozen=True, slots=True)
class Extreme:
    """A metric that is the least or the most of what was seen, in place of a mean; infinite where nothing was. []"""

    value: Tensor
    largest: bool


Measure = Tensor | tuple[Tensor, Tensor | float] | Extreme


@dataclass(frozen=True, slots=True)
class LossSum:
    """A loss that has been summed but not yet divided.

    Only the training loop divides, once, by the `count` of the whole optimizer step over all ranks. A mean of
    means cannot be written, so gradient accumulation equals the large batch.
    """

    total: Tensor
    """[] differentiable"""
    count: Tensor | float
    """what `total` was summed over: tokens, sequences or pairs"""
    metrics: dict[str, Measure] = field(default_factory=dict)
    """[] detached sums over the same count, `(sum, count)` where a metric is counted in something else, extremes"""

    @property
    def mean(self) -> Tensor:
        """The loss of this batch alone; 0 where nothing counts."""
        return self.total / torch.as_tensor(self.count, dtype=self.total.dtype, device=self.total.device).clamp(min=1)

    def noting(self, metrics: dict[str, Measure]) -> "LossSum":
        """This loss with further metrics."""
        return LossSum(self.total, self.count, self.metrics | metrics) if metrics else self

    def plus(self, other: "LossSum", weight: float = 1.0) -> "LossSum":
        """This loss with `weight` times another one, which must be summed over the same things."""
        return LossSum(self.total + weight * other.total, self.count, self.metrics | other.metrics)


def counted(mask_BT: Tensor, how: Aggregation, max_tokens: int = 0) -> Tensor:
    """The count of `aggregate`. It follows from the mask alone, so it is known before any forward pass. []

    Rows without a single counted token count for nothing in `sequence` and `sequence_sum`; `constant` keeps them.
    """
    if how == "token":
        return mask_BT.sum()
    if how in ("sequence", "sequence_sum"):
        return (mask_BT.sum(-1) > 0).sum()
    if how == "constant":
        if max_tokens <= 0:
            raise ValueError(
                f"max_tokens={max_tokens}: aggregation 'constant' divides by it; give the completion limit"
            )
        return torch.as_tensor(len(mask_BT) * max_tokens, device=mask_BT.device)
    raise ValueError(f"aggregation={how!r}: choose 'token', 'sequence', 'constant' or 'sequence_sum'")


def aggregate(loss_BT: Tensor, mask_BT: Tensor, how: Aggregation, max_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """`(total, count)` of a per-token loss. Masked positions may hold anything finite. [], []

    token:    every token weighs the same (DAPO, eq. 12 of arXiv:2503.14476).
    sequence: every completion weighs the same (GRPO, eq. 3 of arXiv:2402.03300).
    constant: every completion is divided by the same `max_tokens` (Dr. GRPO, arXiv:2503.20783).
    sequence_sum: every completion weighs its own length (LUSPO, arXiv:2602.05261).
    """
    weight_BT = mask_BT.to(loss_BT.dtype)
    if how == "sequence":
        weight_BT = weight_BT / weight_BT.sum(-1, keepdim=True).clamp(min=1)
    return (loss_BT * weight_BT).sum(), counted(mask_BT, how, max_tokens)


def masked_sum(values_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """A metric per token: its detached sum where the mask counts, and the number of those tokens. [], []"""
    return (values_BT.detach() * mask_BT).sum(), mask_BT.sum()


def row_share(flags_BT: Tensor, mask_BT: Tensor, *, largest: bool) -> Extreme:
    """The least or the largest share of flagged tokens in one row, of the rows that count tokens."""
    tokens_B = mask_BT.sum(-1)
    share_B = (flags_BT * mask_BT).sum(-1) / tokens_B.clamp(min=1)
    return extreme(share_B.masked_fill(tokens_B == 0, -torch.inf if largest else torch.inf), largest=largest)


def extreme(values: Tensor, *, largest: bool) -> Extreme:
    """The least or the largest of the values; infinite where there is none."""
    nothing = values.new_full((1,), -torch.inf if largest else torch.inf)
    joined = torch.cat([values.detach().flatten(), nothing])
    return Extreme(joined.max() if largest else joined.min(), largest)
