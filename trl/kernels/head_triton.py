"""Two kernels over a block of a head's logits, a program for each row. See `head_blocks` for what they compute."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trl.kernels.head_tiles import Softmax

COLUMNS, WARPS = 4096, 8


@triton.jit
def _bent(x, at, words, scale, softcap, inverse_temperature, CAPPED: tl.constexpr):
    """What follows the products, -inf beyond the words; and the soft-cap's slope."""
    if CAPPED:
        bent = 2 * tl.sigmoid(2 * x * scale / softcap) - 1
        x = bent * softcap * inverse_temperature
        slope = 1 - bent * bent
    else:
        x = x * scale * inverse_temperature
        slope = x * 0 + 1
    return tl.where(at < words, x, float("-inf")), slope


@triton.jit
def _walk(
    logits, slopes, ids, peaks, totals, means, chosen, cap_slopes, rescales, first, words, scale, softcap,
    inverse_temperature, CAPPED: tl.constexpr, ENTROPY: tl.constexpr, SLOPES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(ids + row) - first
    before = tl.load(peaks + row)
    peak, total, mean = before, tl.load(totals + row), tl.load(means + row)
    found, found_slope = tl.load(chosen + row), tl.load(cap_slopes + row)
    here = (target >= 0) & (target < words)
    found, found_slope = tl.where(here, 0.0, found), tl.where(here, 0.0, found_slope)
    columns = tl.arange(0, COLUMNS)
    for start in range(0, words, COLUMNS):
        at = start + columns
        x = tl.load(logits + row * words + at, mask=at < words, other=0.0)
        x, slope = _bent(x, at, words, scale, softcap, inverse_temperature, CAPPED)
        higher = tl.maximum(peak, tl.max(x, 0))
        exponentials, kept = tl.exp(x - higher), tl.exp(peak - higher)
        total = total * kept + tl.sum(exponentials, 0)
        if ENTROPY:
            mean = mean * kept + tl.sum(tl.where(at < words, exponentials * x, 0.0), 0)
        found += tl.sum(tl.where(at == target, x, 0.0), 0)
        found_slope += tl.sum(tl.where(at == target, slope, 0.0), 0)
        peak = higher
    tl.store(peaks + row, peak)
    tl.store(totals + row, total)
    tl.store(means + row, mean)
    tl.store(chosen + row, found)
    tl.store(cap_slopes + row, found_slope)
    if SLOPES:
        tl.store(rescales + row, tl.exp(before - peak))
        for start in range(0, words, COLUMNS):
            at = start + columns
            x = tl.load(logits + row * words + at, mask=at < words, other=0.0)
            x, slope = _bent(x, at, words, scale, softcap, inverse_temperature, CAPPED)
            found_x = tl.where(at == target, 0.0, tl.exp(x - peak) * slope)
            tl.store(slopes + row * words + at, found_x.to(slopes.dtype.element_ty), mask=at < words)


@triton.jit
def _slopes(
    logits, slopes, ids, peaks, shares, owns, first, words, scale, softcap, inverse_temperature,
    CAPPED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(ids + row) - first
    peak, share, own = tl.load(peaks + row), tl.load(shares + row), tl.load(owns + row)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(logits + row * words + at, mask=at < words, other=0.0)
    x, slope = _bent(x, at, words, scale, softcap, inverse_temperature, CAPPED)
    found = tl.where(at == target, own, tl.exp(x - peak) * slope * share)
    tl.store(slopes + row * words + at, found.to(slopes.dtype.element_ty), mask=at < words)


def walk(
    logits: Tensor, ids_R: Tensor, first: int, after: Any, softmax: Softmax, slopes: torch.dtype | None
) -> tuple[Tensor, Tensor] | None:
    """`head_blocks.walk`; the sums of the softmaxes are overwritten."""
    rows, words = logits.shape
    made = torch.empty_like(logits, dtype=slopes) if slopes is not None else logits
    rescale = torch.empty_like(softmax.peak)
    _walk[(rows,)](
        logits, made, ids_R, softmax.peak, softmax.total, softmax.mean, softmax.chosen, softmax.target_cap_slope,
        rescale, first, words, after.scale, after.softcap or 1.0, 1 / after.temperature,
        CAPPED=after.softcap is not None, ENTROPY=softmax.want_entropy, SLOPES=slopes is not None, COLUMNS=COLUMNS,
        num_warps=WARPS,
    )  # fmt: skip
    return None if slopes is None else (made, rescale)


def slopes_of(
    logits: Tensor, ids_R: Tensor, first: int, after: Any, peak: Tensor, share: Tensor, own: Tensor, dtype: torch.dtype
) -> Tensor:
    """`head_blocks.slopes_of`."""
    rows, words = logits.shape
    made = torch.empty_like(logits, dtype=dtype)
    _slopes[(rows, triton.cdiv(words, COLUMNS))](
        logits, made, ids_R, peak, share, own, first, words, after.scale, after.softcap or 1.0, 1 / after.temperature,
        CAPPED=after.softcap is not None, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return made
