"""The code that Triton compiles for `paged_triton`, which says what it computes."""

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]


@triton.jit(do_not_specialize=["window", "rows", "group_size", "most_pages", "splits"])  # one kernel for all sizes
def attend(
    query, keys, values, outs, logsums, pages, lengths, starts, members, positions,
    scale, softcap, window, rows, group_size, most_pages, splits, heads,
    J: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr,
    WIDE_D: tl.constexpr, WIDE_E: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A program: M queries of one sequence and head, over one run of its pages."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    split, block = tl.program_id(2) % splits, tl.program_id(2) // splits
    place = block * M + tl.arange(0, M)
    member, within = place // J, place % J
    row = tl.load(members + sequence * group_size + member, mask=member < group_size, other=-1)
    is_there = row >= 0
    row = tl.where(is_there, row, 0).to(tl.int64)
    d, e = tl.arange(0, WIDE_D), tl.arange(0, WIDE_E)
    of_row = (row * heads + head) * J + within
    q = tl.load(query + of_row[:, None] * D + d[None], mask=is_there[:, None] & (d < D)[None], other=0.0)

    length, start = tl.load(lengths + sequence), tl.load(starts + sequence)
    position = tl.load(positions + row)
    count = (length + PAGE - 1) // PAGE
    run = (count + splits - 1) // splits
    first = split * run
    last = tl.minimum(first + run, count)
    peak = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, WIDE_E), tl.float32)
    for number in range(first, last):
        page = tl.load(pages + sequence * most_pages + number).to(tl.int64)
        token = number * PAGE + tl.arange(0, PAGE)
        seen = token < length
        at = (page * PAGE + tl.arange(0, PAGE)) * heads + head
        k = tl.load(keys + at[:, None] * D + d[None], mask=seen[:, None] & (d < D)[None], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee" if EXACT else "tf32") * scale
        if CAPPED:
            s = softcap * (1.0 - 2.0 / (tl.exp(2.0 * s / softcap) + 1.0))
        visible = seen[None] & is_there[:, None]
        if WINDOWED:
            visible = visible & (position[:, None] - (start + token)[None] < window)
        s = tl.where(visible, s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        rescale = tl.exp(peak - base)
        p = tl.exp(s - base[:, None])
        total = total * rescale + tl.sum(p, 1)
        v = tl.load(values + at[:, None] * E + e[None], mask=seen[:, None] & (e < E)[None], other=0.0)
        product = tl.dot(p.to(v.dtype), v, input_precision="ieee" if EXACT else "tf32")
        sums = sums * rescale[:, None] + product
        peak = higher
    found = total > 0.0
    safe = tl.where(found, total, 1.0)
    target = (split * rows + row) * heads * J + head * J + within
    tl.store(outs + target[:, None] * E + e[None], sums / safe[:, None], mask=is_there[:, None] & (e < E)[None])
    tl.store(logsums + target, tl.where(found, peak + tl.log(safe), float("-inf")), mask=is_there)


@triton.jit
def merge(
    outs, logsums, merged, sinks, count, per_row,
    S: tl.constexpr, WIDE_S: tl.constexpr, E: tl.constexpr, WIDE_E: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """A program: one query's parts."""
    place = tl.program_id(0).to(tl.int64)
    s, e = tl.arange(0, WIDE_S), tl.arange(0, WIDE_E)
    logsum = tl.load(logsums + s * count + place, mask=s < S, other=float("-inf"))
    peak = tl.max(logsum, 0)
    if SINKS:
        sink = tl.load(sinks + place % per_row)
        peak = tl.maximum(peak, sink)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp(logsum - peak)
    total = tl.sum(weight, 0)
    if SINKS:
        total += tl.exp(sink - peak)
    used = (weight > 0.0)[:, None] & (e < E)[None]  # what nobody wrote may be anything
    part = tl.load(outs + (s * count + place)[:, None] * E + e[None], mask=used, other=0.0)
    result = tl.sum(part * weight[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(merged + place * E + e, result, mask=e < E)
