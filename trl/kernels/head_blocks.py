"""Log-probabilities of a linear head and their gradients on a GPU: large blocks of logits, and no wait for the device.

Products have factors in the precision of autocast and sums in float32. A block is walked by one kernel of Triton, where
it is installed, else by torch's operations, which compute the same.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trl.kernels.head_tiles import Head, Softmax, floor_of, row_blocks

logger = logging.getLogger(__name__)

BLOCK = 2**26
"""logits that exist at a time: 256 MiB in float32, and half or all of it again for their gradients"""
MOST_ROWS = 2**13
"""rows of a block"""
HALF = (torch.float16, torch.bfloat16)


class After(NamedTuple):
    """What follows the products: x -> cap(x times scale) / temperature."""

    scale: float
    softcap: float | None
    temperature: float

    @property
    def factor(self) -> float:
        """The derivative, without that of the soft-cap."""
        return self.scale / self.temperature


def blocks(rows: int, vocabulary: int) -> list[slice]:
    """The vocabulary, cut evenly so that a block with this number of rows has the size for a GPU."""
    number = -(-vocabulary // max(64, BLOCK // rows // 64 * 64))
    width = -(-vocabulary // number // 64) * 64
    return [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]


# -- products ---------------------------------------------------------------------------------


def precision_of_products(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's where it is on; else the weight's own."""
    kind = hidden.device.type
    is_cast = torch.is_autocast_enabled(kind) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if is_cast else weight.dtype


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in float32 where the factors are in half precision."""
    if a.dtype not in HALF:
        return a @ b
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b"""
    total += product(a, b)


# -- a block ----------------------------------------------------------------------------------


def walk(
    logits: Tensor, ids_R: Tensor, first: int, after: After, softmax: Softmax, slopes: torch.dtype | None
) -> tuple[Tensor, Tensor] | None:
    """Add a block to the softmaxes of its rows.

    logits: products [R, W] of the words from `first` on. slopes: the dtype of exp(logits - peak) times the soft-cap's
    slope, 0 for the targets. They are returned then, and what rescales sums over earlier blocks. [R, W], [R]
    """
    if (fused := kernels_for(logits.device)) is not None:
        return fused.walk(logits, ids_R, first, after, softmax, slopes)  # type: ignore[no-any-return]
    x, cap_slope = capped(logits, after)
    column, inside = places(ids_R, first, logits.shape[1])
    softmax.chosen = torch.where(inside, x.gather(1, column)[:, 0], softmax.chosen)
    if cap_slope is not None:
        softmax.target_cap_slope = torch.where(inside, cap_slope.gather(1, column)[:, 0], softmax.target_cap_slope)
    peak = torch.maximum(softmax.peak, x.amax(1))
    exponentials = (x - peak[:, None]).exp_()
    rescale, softmax.peak = (softmax.peak - peak).exp_(), peak
    softmax.total = torch.addcmul(exponentials.sum(1), softmax.total, rescale)
    if softmax.want_entropy:
        softmax.mean = torch.addcmul((x * exponentials).sum(1), softmax.mean, rescale)
    if slopes is None:
        return None
    found = exponentials if cap_slope is None else exponentials.mul_(cap_slope)
    found.scatter_(1, column, torch.where(inside, 0.0, found.gather(1, column)[:, 0])[:, None])
    return found.to(slopes), rescale


def slopes_of(
    logits: Tensor,
    ids_R: Tensor,
    first: int,
    after: After,
    peak: Tensor,
    share: Tensor,
    own: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of a block: exp(logits - peak) times share and the soft-cap's slope; `own` at the target. [R, W]"""
    if (fused := kernels_for(logits.device)) is not None:
        return fused.slopes_of(logits, ids_R, first, after, peak, share, own, dtype)  # type: ignore[no-any-return]
    x, cap_slope = capped(logits, after)
    column, inside = places(ids_R, first, logits.shape[1])
    found = (x - peak[:, None]).exp_().mul_(share[:, None])
    if cap_slope is not None:
        found.mul_(cap_slope)
    found.scatter_(1, column, torch.where(inside, own, found.gather(1, column)[:, 0])[:, None])
    return found.to(dtype)


def capped(logits: Tensor, after: After) -> tuple[Tensor, Tensor | None]:
    """What follows the products, and the slope of the soft-cap."""
    if after.softcap is None:
        return logits * after.factor, None
    bent = (logits * (after.scale / after.softcap)).tanh_()
    return bent * (after.softcap / after.temperature), 1 - bent * bent


def places(ids_R: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """The column of each row's target, any one where it lies in another block; and whether it lies here. [R, 1], [R]"""
    column = ids_R - first
    return column.clamp(0, width - 1)[:, None], (column >= 0) & (column < width)


@cache
def kernels_for(device: torch.device) -> Any:
    """The module with Triton's kernels; None on a CPU, and where they cannot be built, for which one line says why."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    try:
        from trl.kernels import head_triton

        ids, logits = torch.zeros(1, dtype=torch.long, device=device), torch.zeros(1, 64, device=device)
        head_triton.walk(logits, ids, 0, After(1.0, None, 1.0), Softmax(1, device, False), torch.float32)
    except Exception as error:  # no C compiler, a GPU that is too old for it: Triton raises what it likes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        logger.warning("Triton builds no kernels here (%s): the head is computed by torch's operations, slower", reason)
        return None
    return head_triton


# -- all of it --------------------------------------------------------------------------------


class BlockLogprobs(torch.autograd.Function):
    """log p of the targets; their entropies, and which are the likeliest (no gradient). [S], [S], [S] float32

    For a frozen head the gradient of the states is computed with the logits; a trained head computes these again in the
    backward pass, in the same precision.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, head: Head, temperature: float,
        want_entropy: bool, learns: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        after, dtype = After(head.scale, head.softcap, temperature), precision_of_products(hidden, weight)
        head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        frozen = learns and hidden.requires_grad and not head_trains
        logprobs, entropies, tops, peak, total, slope = torch.zeros(6, len(hidden), device=hidden.device)
        gradient = torch.empty_like(hidden) if frozen else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in row_blocks(len(hidden), MOST_ROWS):
                softmax, sum_RD = _rows(hidden[rows], weight, bias, ids[rows], after, dtype, want_entropy, frozen)
                logprobs[rows], entropies[rows], tops[rows] = softmax.logprobs(), softmax.entropies(), softmax.tops()
                peak[rows], total[rows], slope[rows] = softmax.peak, softmax.total, softmax.target_slope()
                if gradient is not None and sum_RD is not None:
                    own = weight[ids[rows]].float() * slope[rows, None]
                    gradient[rows] = own.sub_(sum_RD.div_(softmax.total[:, None])).mul_(after.factor).to(hidden.dtype)
        if bias is not None and head.softcap is None:
            logprobs.masked_fill_(bias[ids].isneginf(), float("-inf"))  # the floor stands for it
        ctx.after, ctx.dtype = after, dtype
        ctx.save_for_backward(hidden, weight, bias, ids, gradient, peak, total, slope)
        ctx.mark_non_differentiable(entropies, tops)
        return logprobs, entropies, tops

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, ids, gradient, peak, total, slope = ctx.saved_tensors
        if gradient is not None:
            return (gradient * grad_S[:, None].to(gradient.dtype), *[None] * 7)
        after, dtype = ctx.after, ctx.dtype
        wide, grad_S = torch.promote_types(weight.dtype, torch.float32), grad_S * ctx.after.factor
        grad_hidden = torch.zeros_like(hidden, dtype=wide) if ctx.needs_input_grad[0] else None
        grad_weight = _first_empty(weight, len(hidden)) if weight.requires_grad else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and bias.requires_grad else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in row_blocks(len(hidden), MOST_ROWS):
                states, share, own = hidden[rows].to(dtype), -grad_S[rows] / total[rows], grad_S[rows] * slope[rows]
                for words in blocks(len(states), len(weight)):
                    weight_WD = weight[words].to(dtype)
                    logits = _logits(states, weight_WD, bias, words)
                    slopes = slopes_of(logits, ids[rows], words.start, after, peak[rows], share, own, dtype)
                    del logits
                    if grad_hidden is not None:
                        add_product(grad_hidden[rows], slopes, weight_WD)
                    if grad_weight is not None:
                        if rows.start == 0:
                            grad_weight[words] = product(slopes.t(), states)
                        else:
                            add_product(grad_weight[words], slopes.t(), states)
                    if grad_bias is not None:
                        grad_bias[words] += slopes.sum(0, dtype=wide)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            *[None] * 5,
        )


def _rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids_R: Tensor, after: After, dtype: torch.dtype,
    want_entropy: bool, frozen: bool,
) -> tuple[Softmax, Tensor | None]:  # fmt: skip
    """The softmaxes of some rows; for a frozen head the sum of exp(logits - peak) times the weights too. [R], [R, D]"""
    states, softmax = hidden.to(dtype), Softmax(len(hidden), hidden.device, want_entropy)
    sum_RD: Tensor | None = None
    for words in blocks(len(states), len(weight)):
        weight_WD = weight[words].to(dtype)
        logits = _logits(states, weight_WD, bias, words)
        walked = walk(logits, ids_R, words.start, after, softmax, dtype if frozen else None)
        del logits
        if walked is not None:
            slopes, rescale = walked
            if sum_RD is None:
                sum_RD = product(slopes, weight_WD)
            else:
                add_product(sum_RD.mul_(rescale[:, None]), slopes, weight_WD)
    return softmax, sum_RD


def _logits(states: Tensor, weight_WD: Tensor, bias: Tensor | None, words: slice) -> Tensor:
    logits = product(states, weight_WD.t())
    return logits if bias is None else logits.add_(bias[words].clamp(min=floor_of(bias.dtype)))


def _first_empty(weight: Tensor, rows: int) -> Tensor:
    """Memory for the sums over blocks of rows: float32 where more than one of them adds to half precision."""
    several = len(row_blocks(rows, MOST_ROWS)) > 1
    dtype = torch.promote_types(weight.dtype, torch.float32) if several else weight.dtype
    return torch.empty_like(weight, dtype=dtype) if rows else torch.zeros_like(weight)
