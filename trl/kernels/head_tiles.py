"""Log-probabilities of a linear head and their gradients, a tile of logits at a time: `[S, V]` never exists whole.

This is how a CPU does it; `head_blocks` is for other devices.

The vocabulary is walked in tiles. A tile stays in the cache from the product that makes it to the sums and products
that use it. Each softmax carries its running maximum and sum along: arXiv:1805.02867, algorithm 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trl.kernels.onednn import MUCH, between, leads, rows_with_room, suits, times, with_room
from trl.kernels.step_memory import Place

CACHED_TILE = 2**18
"""logits that exist at a time, which the cache holds (1 MiB)"""
MOST_ROWS = 2**10
"""rows of a tile: more of them would leave it few columns"""
LOWEST = torch.finfo(torch.float32).min
KEPT_ELEMENTS = 2**25
"""probabilities that a trained head keeps from forward to backward (128 MiB in float32)"""


def row_blocks(count: int, most: int | None = None) -> list[slice]:
    """The rows, cut evenly into blocks of at most so many, by default `MOST_ROWS`."""
    number = -(-count // (most or MOST_ROWS))
    ends = [count * i // number for i in range(number + 1)] if number else []
    return [slice(start, end) for start, end in pairwise(ends)]


def tiles(rows: int, vocabulary: int) -> list[slice]:
    """The vocabulary, cut so that a tile with this number of rows stays in the cache."""
    width = max(64, CACHED_TILE // rows // 64 * 64)
    return [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]


class Head(Protocol):
    """What a model does to the logits of its head: times `scale`, then the soft-cap."""

    @property
    def scale(self) -> float: ...

    @property
    def softcap(self) -> float | None: ...


@dataclass(frozen=True)
class Linear:
    """A linear head and what follows it: logits = post(h Wᵀ + b) / temperature."""

    weight: Tensor
    bias: Tensor | None
    head: Head
    temperature: float
    by_onednn: bool = False
    """whether oneDNN makes the products with rows in float32"""

    @property
    def factor(self) -> float:
        """d logits / d (h Wᵀ + b), without the soft-cap."""
        return self.head.scale / self.temperature

    def memory(self, hidden: Tensor, rows: int, width: int) -> Tensor | None:
        """Memory for the logits of each tile in turn, which stays in the cache; None where dtypes differ."""
        same = hidden.dtype == self.weight.dtype == torch.float32
        if not same or torch.is_autocast_enabled(hidden.device.type):
            return None
        return hidden.new_empty((rows_with_room(rows) if self.by_onednn else rows) * width)

    def logits(self, hidden_RD: Tensor, words: slice, memory: Tensor | None) -> Tensor:
        """[R, words] in float32, in `memory` if it is given."""
        weight, bias = self.weight[words], None if self.bias is None else self.bias[words]
        if memory is None:
            logits = F.linear(hidden_RD, weight, bias).float()
        elif self.by_onednn:
            logits = times(hidden_RD, weight, bias)
        else:
            logits = memory[: len(hidden_RD) * len(weight)].view(len(hidden_RD), len(weight))
            torch.mm(hidden_RD, weight.t(), out=logits)
            if bias is not None:
                logits += bias
        factor = self.factor if self.head.softcap is None else self.head.scale
        if factor != 1.0:
            logits = logits.mul_(factor)
        if self.head.softcap is not None:
            logits = logits.div_(self.head.softcap).tanh_().mul_(self.head.softcap / self.temperature)
        return logits

    def tiles(self, rows: int) -> list[slice]:
        """Those of the vocabulary; the same for all numbers of rows that a program of oneDNN takes."""
        return tiles(rows_with_room(rows) if self.by_onednn else rows, len(self.weight))

    def add_product(self, sum_RD: Tensor, slope_RW: Tensor, words: slice) -> None:
        """sum += slope @ weight[words]"""
        if self.by_onednn:
            sum_RD += times(slope_RW, self.weight[words].T)
        else:
            add_product(sum_RD, slope_RW, self.weight[words])

    def add_to_weight(self, sum_WD: Tensor, slope_RW: Tensor, hidden_RD: Tensor, fresh: bool) -> None:
        """sum += slope.T @ hidden; fresh: the sum holds any numbers so far."""
        if not self.by_onednn:
            sum_WD.addmm_(slope_RW.t(), hidden_RD, beta=0 if fresh else 1)
        elif fresh:
            sum_WD.copy_(between(slope_RW, hidden_RD))
        else:
            sum_WD += between(slope_RW, hidden_RD)

    def softcap_slope(self, logits: Tensor) -> Tensor | None:
        """d softcap(x) / dx where softcap(x) is these logits; None where there is no soft-cap."""
        softcap = self.head.softcap
        return None if softcap is None else 1 - (logits * (self.temperature / softcap)) ** 2


def floor_of(dtype: torch.dtype) -> float:
    """What stands for a bias of -inf: a word that never comes, whose logit is still a number."""
    return max(-1e30, torch.finfo(dtype).min / 2)


def targets_of(ids_R: Tensor, walked: list[slice]) -> list[tuple[Tensor, Tensor]]:
    """For each tile the rows whose target lies in it, and the columns of these targets."""
    ordered, rows = ids_R.sort()
    starts = ids_R.new_tensor([words.start for words in walked])
    tile = torch.bucketize(ordered, starts, right=True) - 1
    counts = tile.bincount(minlength=len(walked)).tolist()
    return list(zip(rows.split(counts), (ordered - starts[tile]).split(counts), strict=True))


class Tile(NamedTuple):
    """The softmax of one tile: probabilities = exp(logits - peak) times share. [R, W], [R], [R]"""

    probabilities: Tensor
    peak: Tensor
    share: Tensor


def softmax_of(logits: Tensor, peak_R: Tensor, memory: Tensor | None) -> tuple[Tile, Tensor]:
    """The softmax of a tile below these peaks, and the sum of its exponentials exp(logits - peak). [R]

    The sum is read off a word whose exponential is known: for the while the tile's first word has the peak for a logit,
    and its probability is the share. So `softmax` is the only operation on all words.
    """
    known = logits.select(1, 0)
    first = known.clone()
    known.copy_(peak_R)
    if memory is None:
        probabilities = torch.softmax(logits, 1)
    else:
        probabilities = torch.softmax(logits, 1, out=memory[: logits.numel()].view_as(logits))
    read = probabilities.select(1, 0)
    share = read.clone()
    own = torch.sub(first, peak_R).exp_().mul_(share)
    known.copy_(first)
    read.copy_(own)
    return Tile(probabilities, peak_R, share), own.sub_(share).add_(1).div_(share)


class Softmax:
    """The softmaxes of some rows over the tiles so far. [R] each"""

    def __init__(self, rows: int, device: torch.device, want_entropy: bool):
        self.peak = torch.full((rows,), LOWEST, device=device)
        self.total, self.mean, self.chosen = (torch.zeros(rows, device=device) for _ in range(3))
        self.target_cap_slope = torch.ones(rows, device=device)
        self.want_entropy = want_entropy

    def take(
        self, logits: Tensor, targets: tuple[Tensor, Tensor], cap_slope: Tensor | None, memory: Tensor | None
    ) -> tuple[Tile, Tensor]:
        """Add a tile, whose logits are overwritten. Returns its softmax, and the factor that rescales sums of
        exponentials over earlier tiles, [R].

        memory: for the probabilities; None: they get their own.
        """
        self.chosen[targets[0]] = logits[targets]
        if cap_slope is not None:
            self.target_cap_slope[targets[0]] = cap_slope[targets]
        peak = torch.maximum(self.peak, logits.amax(1))
        tile, total = softmax_of(logits, peak, memory)
        rescale, self.peak = self.peak.sub(peak).exp_(), peak
        self.total = torch.addcmul(total, self.total, rescale)
        if self.want_entropy:
            self.mean = torch.addcmul(logits.mul_(tile.probabilities).sum(1).div_(tile.share), self.mean, rescale)
        return tile, rescale

    def logprobs(self) -> Tensor:
        """log p of the targets."""
        return self.chosen - self.peak - self.total.log()

    def tops(self) -> Tensor:
        """1 where no word is likelier than the target."""
        return (self.chosen >= self.peak).to(self.chosen.dtype)

    def entropies(self) -> Tensor:
        """-sum p log p; 0 unless wanted."""
        if not self.want_entropy:
            return self.mean
        return (self.peak - self.mean / self.total + self.total.log()).clamp_(min=0.0)

    def target_slope(self) -> Tensor:
        """d log p(target) / d its logit, with the soft-cap's slope: in float32 where half precision rounds p to 1."""
        return -self.logprobs().expm1() * self.target_cap_slope


class HiddenGradient:
    """d log p / d h of some rows, for a frozen head: summed while the logits exist. [R, D]"""

    def __init__(self, linear: Linear, hidden_RD: Tensor):
        self.linear, self.sum_RD = linear, wide_zeros(hidden_RD)
        self.share = torch.ones(len(hidden_RD), device=hidden_RD.device)
        """of the last tile: the sum is one of exponentials times it"""

    def take(
        self, tile: Tile, words: slice, targets: tuple[Tensor, Tensor], cap_slope: Tensor | None, rescale_R: Tensor
    ) -> None:
        """Add the words of a tile, without the targets."""
        slope = tile.probabilities if cap_slope is None else tile.probabilities.mul_(cap_slope)
        slope[targets] = 0.0
        rescale_R = rescale_R * tile.share / self.share
        self.share = tile.share
        self.linear.add_product(self.sum_RD.mul_(rescale_R[:, None]), slope, words)

    def finished(self, softmax: Softmax, ids_R: Tensor) -> Tensor:
        own = self.linear.weight[ids_R].float() * softmax.target_slope()[:, None]
        return own.sub_(self.sum_RD / (self.share * softmax.total)[:, None]).mul_(self.linear.factor)


def wide_zeros(like: Tensor) -> Tensor:
    """Zeros in which products are summed: float32 where the products are in half precision."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def add_product(sum_RD: Tensor, slope: Tensor, weight: Tensor) -> None:
    """sum += slope @ weight, the product in the weight's precision."""
    slope = slope.to(weight.dtype)
    if weight.dtype == sum_RD.dtype:
        sum_RD.addmm_(slope, weight)
    else:
        sum_RD += slope @ weight


class Kept:
    """The probabilities that the forward pass of a trained head keeps for its backward pass, within a budget."""

    def __init__(self, budget: int):
        self.budget = budget
        self.tiles: dict[tuple[int, int], Tile] = {}
        """the tile at (row, word), its probabilities times the soft-cap's slope"""

    def fits(self, rows: int, words: slice) -> bool:
        return rows * (words.stop - words.start) <= self.budget

    def take(self, place: tuple[int, int], tile: Tile, cap_slope: Tensor | None, dtype: torch.dtype) -> None:
        self.budget -= tile.probabilities.numel()
        slope = tile.probabilities if cap_slope is None else tile.probabilities.mul_(cap_slope)
        self.tiles[place] = tile._replace(probabilities=slope.to(dtype))


class LinearLogprobs(torch.autograd.Function):
    """log p of the targets; their entropies, and which are the likeliest (no gradient). [S], [S], [S] float32

    A frozen head needs only the gradient of h, which the forward pass knows up to a factor for each row: the logits are
    then computed once. A trained head keeps probabilities up to a budget, and computes the others again in the backward
    pass. Each pass over a tile costs time, so all of them work in place.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, head: Head, temperature: float,
        want_entropy: bool, learns: bool, place: Place | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        by_onednn = len(hidden) * weight.numel() >= MUCH and hidden.dtype == weight.dtype and leads()
        by_onednn = by_onednn and suits(weight, 1) and not torch.is_autocast_enabled(hidden.device.type)
        bias_V = None if bias is None else bias.clamp(min=floor_of(bias.dtype))
        linear = Linear(weight, bias_V, head, temperature, by_onednn)
        head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        frozen = learns and hidden.requires_grad and not head_trains
        kept = Kept(KEPT_ELEMENTS if learns and head_trains else 0)
        logprobs, entropies, tops, peak, total, slope = torch.zeros(6, len(hidden), device=hidden.device)
        gradient = torch.empty_like(hidden) if frozen else None
        if by_onednn:
            hidden = with_room(hidden)[: len(hidden)]
        for rows in row_blocks(len(hidden)):
            hidden_RD, ids_R = hidden[rows], ids[rows]
            softmax = Softmax(len(hidden_RD), hidden.device, want_entropy)
            of_hidden = HiddenGradient(linear, hidden_RD) if frozen else None
            walked = linear.tiles(len(hidden_RD))
            memory, room = linear.memory(hidden, len(hidden_RD), walked[0].stop), None
            for words, targets in zip(walked, targets_of(ids_R, walked), strict=True):
                keeps = kept.fits(len(hidden_RD), words)
                if not keeps and memory is not None and room is None:
                    room = torch.empty_like(memory)
                logits = linear.logits(hidden_RD, words, memory)
                cap_slope = linear.softcap_slope(logits) if learns else None
                tile, rescale_R = softmax.take(logits, targets, cap_slope, None if keeps else room)
                if of_hidden is not None:
                    of_hidden.take(tile, words, targets, cap_slope, rescale_R)
                elif keeps:
                    kept.take((rows.start, words.start), tile, cap_slope, weight.dtype)
            logprobs[rows], entropies[rows], tops[rows] = softmax.logprobs(), softmax.entropies(), softmax.tops()
            peak[rows], total[rows], slope[rows] = softmax.peak, softmax.total, softmax.target_slope()
            if gradient is not None and of_hidden is not None:
                gradient[rows] = of_hidden.finished(softmax, ids_R)
        if bias is not None and head.softcap is None:
            logprobs.masked_fill_(bias[ids].isneginf(), -inf)  # the floor stands for it
        ctx.linear, ctx.kept, ctx.place = linear, kept.tiles, place
        ctx.save_for_backward(hidden, weight, bias, ids, gradient, peak, total, slope)
        ctx.mark_non_differentiable(entropies, tops)
        return logprobs, entropies, tops

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, ids, gradient, peak, total, slope = ctx.saved_tensors
        if gradient is not None:
            return (gradient * grad_S[:, None].to(gradient.dtype), *[None] * 8)
        linear, grad_S = ctx.linear, grad_S * ctx.linear.factor
        grad_hidden = wide_zeros(hidden) if ctx.needs_input_grad[0] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and bias.requires_grad else None
        grad_weight, fresh = _weight_gradient(weight, ctx.place, len(hidden))
        for rows in row_blocks(len(hidden)):
            hidden_RD, grad_R, target_R = hidden[rows], grad_S[rows], grad_S[rows] * slope[rows]
            walked = linear.tiles(len(hidden_RD))
            for words, targets in zip(walked, targets_of(ids[rows], walked), strict=True):
                tile = ctx.kept.pop((rows.start, words.start), None) or recomputed(linear, hidden_RD, words, peak[rows])
                own_R = (tile.peak - peak[rows]).exp_().div_(tile.share * total[rows])
                slope_RW = tile.probabilities.mul_((-grad_R * own_R)[:, None])
                slope_RW[targets] = target_R[targets[0]].to(slope_RW.dtype)
                slope_RW = slope_RW.to(weight.dtype)
                if grad_hidden is not None:
                    linear.add_product(grad_hidden[rows], slope_RW, words)
                if grad_weight is not None:
                    linear.add_to_weight(grad_weight[words], slope_RW, hidden_RD, fresh and rows.start == 0)
                if grad_bias is not None:
                    grad_bias[words] += slope_RW.sum(0)
        given = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return given, None if ctx.place is not None else grad_weight, grad_bias, *[None] * 6


def recomputed(linear: Linear, hidden_RD: Tensor, words: slice, peak_R: Tensor) -> Tile:
    """A tile whose share is 1: exp(logits - peak) times the soft-cap's slope."""
    logits = linear.logits(hidden_RD, words, None)
    cap_slope = linear.softcap_slope(logits)
    exponentials = logits.sub_(peak_R[:, None]).exp_()
    return Tile(exponentials if cap_slope is None else exponentials.mul_(cap_slope), peak_R, torch.ones_like(peak_R))


def _weight_gradient(weight: Tensor, place: Place | None, rows: int) -> tuple[Tensor | None, bool]:
    """The tensor in which the gradient of the weight is summed, and whether its old numbers are to be overwritten."""
    if not rows:  # nothing will be written
        empty = torch.zeros_like(weight) if weight.requires_grad else None
        return (empty if place is None else place.gradient()), False
    if place is not None:
        fresh = place.weight.grad is None
        return place.uninitialised(), fresh
    return (torch.empty_like(weight), True) if weight.requires_grad else (None, True)
