"""Attention over a token tree on a GPU: FlexAttention with two numbers a token, or flash attention over rows alone.

A query sees a key that does not stand behind it, if the key's segment is its own or an ancestor. In the tour that
numbers each segment when it is entered and again when it is left, this reads enter[k] <= enter[q] < leave[k]. Which
blocks of 128 x 128 have anything to compute follows from the segments' bounds, on the host: no tensor has a number for
each pair of tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count as numbers_from
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trl.data.records import Segment, moved_ahead

BLOCK = 128
"""tokens along a side of a block"""
_ALIGNED = 64
"""numbers to whose multiples each table is laid: kernels are compiled for aligned memory"""


def padded_tokens(tokens: int) -> int:
    """The next of a few lengths: multiples of a step that grows with them, at most 1/32 of the length above 4,096."""
    step = max(BLOCK, 1 << max(0, tokens.bit_length() - 6))
    return max(2 * BLOCK, -(-tokens // step) * step)  # a dimension of one block would be compiled for itself


class Tour(NamedTuple):
    """Of each segment: when it is entered and left, and how many tokens of its rows stand before it. [segments] each"""

    enter: np.ndarray
    leave: np.ndarray
    depth: np.ndarray


def tour_of(segments: Sequence[Segment]) -> Tour:
    """The tour through segments of which each stands behind its parent."""
    inside, depth = np.ones(len(segments), np.int32), np.zeros(len(segments), np.int32)
    for index in range(len(segments) - 1, -1, -1):  # a segment counts itself and all below it
        if (parent := segments[index].parent) >= 0:
            inside[parent] += inside[index]
    enter, taken, roots = np.zeros(len(segments), np.int32), np.ones(len(segments), np.int32), 0
    for index, (_, _, parent) in enumerate(segments):
        if parent < 0:
            enter[index], roots = roots, roots + inside[index]
        else:
            enter[index] = enter[parent] + taken[parent]
            taken[parent] += inside[index]
            depth[index] = depth[parent] + segments[parent].end - segments[parent].start
    return Tour(enter, enter + inside, depth)


class Pairs(NamedTuple):
    """Which blocks hold any pair of tokens that see each other, and in which all pairs do. [blocks, blocks] each"""

    some: np.ndarray
    full: np.ndarray


def block_pairs(segments: Sequence[Segment], depth: np.ndarray, blocks: int, window: int | None) -> Pairs:
    """The blocks of the mask of these segments, from their bounds.

    depth: of each segment, see `Tour`. window: a query sees this many tokens of its row, itself included.
    """
    some, seen = np.zeros((blocks, blocks), bool), np.zeros((blocks, blocks), np.int32)
    for index, (start, end, _) in enumerate(segments):
        rows = np.arange(start // BLOCK, (end - 1) // BLOCK + 1)
        first_q, last_q = np.maximum(rows * BLOCK, start)[:, None], np.minimum((rows + 1) * BLOCK, end)[:, None] - 1
        link = index
        while link >= 0:
            begin, stop, parent = segments[link]
            columns = np.arange(begin // BLOCK, (stop - 1) // BLOCK + 1)
            first_k, last_k = np.maximum(columns * BLOCK, begin), np.minimum((columns + 1) * BLOCK, stop) - 1
            any_pair, all_pairs = first_k <= last_q, last_k <= first_q
            if window is not None:  # how far a query of the row stands behind a key: more than their places say
                away = int(depth[index] - depth[link]) - start + begin
                any_pair = any_pair & (first_q - last_k + away < window)
                all_pairs = all_pairs & (last_q - first_k + away < window)
            place = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
            some[place] |= any_pair
            seen[place] += (all_pairs & any_pair) * (last_q - first_q + 1) * (last_k - first_k + 1)
            link = parent
    full = seen == BLOCK * BLOCK
    return Pairs(some & ~full, full)


def _listed(choices: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each choice, how many columns are chosen in each row, and which: [blocks], [blocks, most of all counts]."""
    counts = [chosen.sum(1, dtype=np.int32) for chosen in choices]
    most, blocks = max(2, *(int(each.max()) for each in counts)), {len(chosen) for chosen in choices}
    width = 1 << (most - 1).bit_length()
    while width in blocks:  # the compiler takes sizes that are equal at first to be equal always
        width += 1
    lists = []
    for chosen, count in zip(choices, counts, strict=True):
        table, (rows, columns) = np.zeros((len(chosen), width), np.int32), chosen.nonzero()
        table[rows, np.arange(len(rows)) - (count.cumsum() - count)[rows]] = columns
        lists += [count, table]
    return lists


class BlockTables(NamedTuple):
    """What FlexAttention reads of a tree, in the order of the arguments of `BlockMask`."""

    enter_M: Any
    leave_M: Any
    depth_M: Any
    window: Any
    """tokens of its row that a query sees, a number that kernels read; 0: all"""
    kv_counts: Any
    kv_blocks: Any
    full_kv_counts: Any
    full_kv_blocks: Any
    q_counts: Any
    q_blocks: Any
    full_q_counts: Any
    full_q_blocks: Any

    @property
    def tokens(self) -> int:
        return len(self.enter_M)


def block_tables(
    segments: Sequence[Segment], window: int | None = None, blocks: Sequence[int] | None = None
) -> BlockTables:
    """The tables for these segments, padded to `padded_tokens`, as arrays on the host.

    The tail sees itself alone. blocks: those whose queries are computed; None: all.
    """
    total = segments[-1].end
    tokens = padded_tokens(total)
    if tokens > total:
        segments = [*segments, Segment(total, tokens, -1)]
    tour, sizes = tour_of(segments), np.array([end - start for start, end, _ in segments])
    enter_M, leave_M, depth_M = (np.repeat(numbers, sizes) for numbers in tour)
    starts = np.array([start for start, _, _ in segments], np.int32)
    depth_M = depth_M + np.arange(tokens, dtype=np.int32) - np.repeat(starts, sizes)
    some, full = block_pairs(segments, tour.depth, tokens // BLOCK, window)
    if blocks is not None:
        some, full = some[blocks], full[blocks]
    seen = np.array(window or 0, np.int32)
    return BlockTables(enter_M, leave_M, depth_M, seen, *_listed((some, full, some.T, full.T)))


def on_device(tables: BlockTables, device: torch.device) -> BlockTables:
    """The tables as tensors there, by one copy that nothing waits for."""
    starts, size = [], 0
    for table in tables:
        starts.append(size)
        size += -(-table.size // _ALIGNED) * _ALIGNED
    flat = np.zeros(size, np.int32)
    for start, table in zip(starts, tables, strict=True):
        flat[start : start + table.size] = table.ravel()
    moved = moved_ahead(torch.from_numpy(flat), device)
    parts = [moved[a : a + t.size].view(t.shape) for a, t in zip(starts, tables, strict=True)]
    placed = BlockTables(*parts[:4], *(part[None, None] for part in parts[4:]))
    for part in placed:  # whoever compiles for them shall not do so for their lengths
        for axis in range(part.dim()):
            torch._dynamo.maybe_mark_dynamic(part, axis)
    return placed


# -- FlexAttention ----------------------------------------------------------------------------


class Kind(NamedTuple):
    """What a compiled kernel is made for. Each kind is compiled once, whatever the lengths of its rows."""

    dtype: torch.dtype
    heads: tuple[int, int]
    """of queries, and of keys"""
    widths: tuple[int, int]
    """of keys, and of values"""
    scale: float | None
    softcap: float | None
    sinks: bool
    windowed: bool
    learns: bool
    """whether any of query, key and value has a gradient"""
    rounding: str
    """in which float32 products are computed"""


def kind_of(
    query: Tensor, key: Tensor, value: Tensor, *,
    window: int | None, scale: float | None, softcap: float | None, sinks: Tensor | None,
) -> Kind:  # fmt: skip
    """The kind of this attention, of [1, H, N, D] over [1, H or fewer, N, D]."""
    default = scale is None or abs(scale * query.shape[-1] ** 0.5 - 1) < 1e-6
    learns, rounding = False, ""
    backends: Any = torch.backends
    if not torch.compiler.is_compiling():  # else the graph around is compiled for these
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        rounding = backends.cuda.matmul.fp32_precision
    return Kind(
        query.dtype, (query.shape[1], key.shape[1]), (query.shape[-1], value.shape[-1]), None if default else scale,
        softcap, sinks is not None, window is not None, learns, rounding,
    )  # fmt: skip


def flex_blocks(
    kind: Kind, query: Tensor, key: Tensor, value: Tensor, tables: BlockTables, places_Q: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Attention by FlexAttention, and the logarithm of the softmax's denominator where there are sinks."""
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    (enter, leave, depth, window), cap = tables[:4], kind.softcap

    def in_tree(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q = q if places_Q is None else places_Q[q]
        return (k <= q) & (enter[k] <= enter[q]) & (enter[q] < leave[k])

    def in_window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        place = q if places_Q is None else places_Q[q]
        return in_tree(b, h, q, k) & (depth[place] - depth[k] < window)

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score if cap is None else cap * torch.tanh(score / cap)

    torch._check(query.shape[2] % BLOCK == 0)  # kernels need not look at the ends
    mask = BlockMask(
        (query.shape[2], key.shape[2]), *tables[4:], BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=in_window if kind.windowed else in_tree,
    )  # fmt: skip
    how: dict[str, Any] = {"return_aux": AuxRequest(lse=True)} if kind.sinks else {}
    result: Any = flex_attention(
        query, key, value, score_mod=None if cap is None else capped, block_mask=mask, scale=kind.scale,
        enable_gqa=kind.heads[0] != kind.heads[1], **how,
    )  # fmt: skip
    return (result[0], result[1].lse) if kind.sinks else (result, None)


_numbers = numbers_from(0)


@cache
def _compiled(kind: Kind) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`flex_blocks` compiled for a kind.

    It is a function with code of its own: torch counts compilations by code, and leaves off after a few.
    """
    code = flex_blocks.__code__.replace(co_name=f"flex_blocks_{next(_numbers)}")
    own = FunctionType(code, flex_blocks.__globals__, argdefs=flex_blocks.__defaults__)
    return torch.compile(own, fullgraph=True)  # type: ignore[no-any-return]


def flex_tree_attention(
    query: Tensor, key: Tensor, value: Tensor, tables: BlockTables, *, window: int | None = None,
    scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None, compiled: bool = True,
    places_Q: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of [1, H, N, D] over [1, H or fewer, N, D] by these tables.

    places_Q: where the queries stand among the keys, if they are some of them, whole blocks; for tables of those.
    compiled: into a kernel of its own; else it is part of a graph around, or plain operations in a test. Sinks: one
    logit a head that takes its share of each softmax and has no value, so the rest keeps the share
    sigmoid(log sum exp - sink).
    """
    kind = kind_of(query, key, value, window=window, scale=scale, softcap=softcap, sinks=sinks)
    total = query.shape[2]
    key, value = (_lengthened(x, tables.tokens - x.shape[2]) for x in (key, value))
    query = _lengthened(query, 0 if places_Q is not None else tables.tokens - total)
    if compiled:
        if kind.learns:  # all of them: which ones do must not be compiled for
            query, key, value = (x if x.requires_grad else x.detach().requires_grad_() for x in (query, key, value))
        for x in (query, key, value):
            torch._dynamo.maybe_mark_dynamic(x, 2)
        own = () if places_Q is None else (places_Q,)
        for places in own:
            torch._dynamo.maybe_mark_dynamic(places, 0)
        with torch.set_grad_enabled(kind.learns):
            out, log_sum = _compiled(kind)(kind, query, key, value, tables, *own)
    else:
        out, log_sum = flex_blocks(kind, query, key, value, tables, places_Q)
    if sinks is not None and log_sum is not None:
        out = out * torch.sigmoid(log_sum - sinks.view(1, -1, 1))[..., None].to(out.dtype)
    return out[:, :, :total]


def _lengthened(x: Tensor, more: int) -> Tensor:
    """With this many zeros behind its tokens, and each token's heads side by side in memory. [1, H, N, D]"""
    tokens_first = x.transpose(1, 2)
    pads = torch.compiler.is_compiling() or more  # a graph that pads by nothing serves every length
    return (F.pad(tokens_first, (0, 0, 0, 0, 0, more)) if pads else tokens_first.contiguous()).transpose(1, 2)


# -- rows alone -------------------------------------------------------------------------------


class RowBounds(NamedTuple):
    """Where rows begin and the last one ends, and the tokens of the longest. [rows + 1] int32"""

    starts: Tensor
    longest: int


def row_bounds(segments: Sequence[Segment], device: torch.device) -> RowBounds:
    """The bounds of segments that have no parents."""
    starts = torch.tensor([0, *(end for _, end, _ in segments)], dtype=torch.int32)
    return RowBounds(moved_ahead(starts, device), max(end - start for start, end, _ in segments))


@cache
def _flash() -> tuple[Callable[..., Any] | None, frozenset[str]]:
    """torch's flash attention over rows, and the names of what it takes."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, frozenset()
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def flash_takes(kind: Kind) -> bool:
    """Whether `flash_rows` computes attention of this kind, as far as its numbers say."""
    function, names = _flash()
    width, of_values = kind.widths
    fits = kind.dtype in (torch.float16, torch.bfloat16) and width == of_values and width <= 256 and width % 8 == 0
    named = (not kind.windowed or "window_size" in names) and (kind.scale is None or "scale" in names)
    return function is not None and fits and named and kind.softcap is None and not kind.sinks


def flash_rows(
    query: Tensor, key: Tensor, value: Tensor, bounds: RowBounds, *, window: int | None, scale: float | None
) -> Tensor:
    """Attention of rows laid end to end, each causal and alone, by flash attention. [1, H, N, D]"""
    function, names = _flash()
    assert function is not None
    how: dict[str, Any] = {"scale": scale} if "scale" in names else {}
    if "window_size" in names:
        how["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        how["is_causal"] = True
    if "enable_gqa" in names:
        how["enable_gqa"] = query.shape[1] != key.shape[1]
    rows = (x[0].transpose(0, 1) for x in (query, key, value))
    out: Tensor = function(*rows, bounds.starts, bounds.starts, bounds.longest, bounds.longest, **how)
    return out.transpose(0, 1)[None]
