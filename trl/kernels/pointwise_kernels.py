"""The code that Triton compiles for `pointwise`, which says what it computes."""

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]


@triton.jit
def rms_norm(x, weight, y, width, eps, WIDE: tl.constexpr):
    """A program: one row."""
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    inside = d < width
    read = tl.load(x + row * width + d, mask=inside, other=0.0)
    numbers = read.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(numbers * numbers, 0) / width + eps)
    scaled = (numbers * inverse).to(read.dtype).to(tl.float32)
    factor = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + d, scaled * factor, mask=inside)


@triton.jit
def rotate(x, cos, sin, y, heads, stride_head, stride_row, HALF: tl.constexpr, WIDE: tl.constexpr):
    """A program: one head of one row; y is [rows, heads, 2 HALF]."""
    row, head, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, WIDE)
    inside = d < HALF
    start = x + row * stride_row + head * stride_head
    x1 = tl.load(start + d, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(start + HALF + d, mask=inside, other=0.0).to(tl.float32)
    angle = row * 2 * HALF + d
    cos1 = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    sin1 = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    target = y + (row * heads + head) * 2 * HALF + d
    tl.store(target, x1 * cos1 - x2 * sin1, mask=inside)
    tl.store(target + HALF, x2 * cos2 + x1 * sin2, mask=inside)


@triton.jit(do_not_specialize=["count"])
def gate(gates, ups, y, count, WIDE: tl.constexpr):
    """A program: WIDE numbers."""
    at = tl.program_id(0).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    inside = at < count
    read = tl.load(gates + at, mask=inside, other=0.0)
    numbers = read.to(tl.float32)
    opened = (numbers / (1.0 + tl.exp(-numbers))).to(read.dtype).to(tl.float32)
    tl.store(y + at, opened * tl.load(ups + at, mask=inside, other=0.0).to(tl.float32), mask=inside)
