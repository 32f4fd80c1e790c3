"""Attention over a token tree: who sees whom, and on the CPU its computation as one step of autograd.

What segments share is kept once, not in each of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from trl.data.records import Segment

Made = TypeVar("Made")

# the kernel that `scaled_dot_product_attention` calls on the CPU, and its backward pass
_forward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class Part(NamedTuple):
    """Queries that are computed together, and the segments whose keys they see in it."""

    start: int
    end: int
    chain: list[int]
    adds: bool = False
    """the queries see other keys in an earlier part, to which these are added"""


class TreeLayout:
    """How the packed tokens are cut into segments, and which segments each one sees."""

    def __init__(self, segments: Sequence[Segment], kept: dict[Hashable, Any] | None = None, piece: Any = None):
        """kept: what passes over the same batch share, see `shared`.

        piece: which positions are computed here (`context_parallel.Piece`); None: all.
        """
        self.segments = tuple(segments)
        self.sizes = [end - start for start, end, _ in self.segments]
        self.piece = piece
        everywhere = range(len(self.segments))
        self.own = [i for i in everywhere if piece is None or piece.holds(self.segments[i].start)]
        """the segments whose queries are computed here, one behind the other"""
        self._cache: dict[Hashable, Any] = {}
        self._kept = {} if kept is None else kept
        self.table: Any = None
        """the segments as a tensor, see `tabulated`"""
        self.blocks: dict[int | None, Any] = {}
        """by window, what a compiled graph on an accelerator reads in its place"""
        self._narrow: tuple[Any, list[int]] | None = None

    def cached(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returns, made at the first call with this key: layers with the same pattern share a mask."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]  # type: ignore[no-any-return]

    def tabulated(self) -> TreeLayout:
        """The layout with its `table`, which a compiled graph reads instead of numbers that it would be made for."""

        from torch._dynamo import maybe_mark_dynamic

        def make() -> Tensor:
            table = torch.tensor([*self.segments, (0, 0, -1)])  # a second row, as sizes of one are compiled for
            maybe_mark_dynamic(table, 0)
            return table

        self.table = self.shared("table", make)
        return self

    def shared(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """As `cached`, for as long as the batch lives: what all passes over it need."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]  # type: ignore[no-any-return]

    @cached_property
    def is_flat(self) -> bool:
        """Whether all segments are computed here, and each sees itself alone."""
        return self.piece is None and all(segment.parent < 0 for segment in self.segments)

    def read_only_at(self, module: Any, positions: Sequence[int]) -> None:
        """Promise that the output of this attention module is read at these positions only, in ascending order."""
        skipped = []
        for start, end, _ in self.segments:
            first = bisect_left(positions, start)
            skipped.append(min(positions[first], end) - start if first < len(positions) else end - start)
        self._narrow = module, skipped

    def skipped(self, module: Any) -> list[int]:
        """How many of its first queries each segment may leave out in this attention module."""
        if self._narrow is not None and self._narrow[0] is module:
            return self._narrow[1]
        return [0] * len(self.segments)

    def parts(self, module: Any, window: int | None) -> list[Part]:
        """The attention of this module in parts, so that siblings read the keys that they share only once.

        A segment usually sees its whole chain in one part. Siblings that are computed whole see themselves in a part
        each, and their common ancestors in one more. A sliding window starts at another key in each row, so nothing is
        shared then.
        """
        found, skipped = [], self.skipped(module)
        end = 0
        for (parent, whole), run in groupby(self.own, lambda i: (self.segments[i].parent, not skipped[i])):
            siblings, first = list(run), end
            several = len(siblings) > 1 or self.piece is not None  # a part of a segment sees a long one, unmasked
            shared = parent >= 0 and whole and window is None and several
            for index in siblings:
                start, end = end, end + self.sizes[index]
                found.append(Part(start + skipped[index], end, [index] if shared else self.seen_by(index, window)))
            if shared:
                found.append(Part(first, end, self.chains[parent], adds=True))
        return [part for part in found if part.start < part.end]

    @cached_property
    def chains(self) -> list[list[int]]:
        """Each segment's ancestors from the root, then itself."""
        chains: list[list[int]] = []
        for index, segment in enumerate(self.segments):
            chains.append([*(chains[segment.parent] if segment.parent >= 0 else []), index])
        return chains

    def seen_by(self, index: int, window: int | None) -> list[int]:
        """A segment's chain, without the ancestors that lie before every one of its windows."""
        chain = self.chains[index]
        if window is None:
            return chain
        seen, reach = [index], window - 1
        for link in reversed(chain[:-1]):
            if reach <= 0:
                break
            seen.append(link)
            reach -= self.sizes[link]
        return seen[::-1]

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
        """[queries, keys], True = seen; the queries are the last keys. None: a plain causal mask is enough."""
        if queries == keys and (window is None or keys <= window):
            return None

        def make() -> Tensor:
            seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
            return seen if window is None else seen.triu(keys - queries - window + 1)

        return self.cached(("mask", queries, keys, window, device), make)

    def bias(self, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor | None:
        """`mask` as numbers to add: 0 where seen, -inf elsewhere, with the dtype and device of `like`."""
        seen = self.mask(queries, keys, window, like.device)
        if seen is None:
            return None
        return self.cached(
            ("bias", queries, keys, window, like.device, like.dtype),
            lambda: like.new_zeros(queries, keys).masked_fill_(~seen, float("-inf")),
        )


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `tree_attention` can compute this."""
    same = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    return _backward is not None and same and query.device.type == "cpu" and query.dtype in _DTYPES


def _joined(x: Tensor, layout: TreeLayout, part: Part, heads: int) -> Tensor:
    """The keys or values that a part sees, of [1, H or fewer, N, D]; repeated so that each query head has its own."""
    parts = [x[:, :, slice(*layout.segments[link][:2])] for link in part.chain]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    repeats = heads // x.shape[1]
    return joined if repeats == 1 else joined.repeat_interleave(repeats, 1)


def _mask(layout: TreeLayout, part: Part, keys: int, window: int | None, query: Tensor) -> tuple[Tensor | None, bool]:
    """What to add to a part's scores, and whether the kernel has to mask the future."""
    if part.adds:  # all of these keys are past
        return None, False
    bias = layout.bias(part.end - part.start, keys, window, query)
    return bias, bias is None


def _covered(parts: list[Part], total: int) -> bool:
    """Whether every query is computed."""
    return sum(part.end - part.start for part in parts if not part.adds) == total


def _merge(output: Tensor, logsum: Tensor, more: Tensor, more_logsum: Tensor) -> None:
    """Add more keys to attention over some keys, [1, H, Q, D] with [1, H, Q], in place.

    Each half is weighted with its share of the softmax's denominator.
    """
    whole = torch.logaddexp(logsum, more_logsum)
    output.mul_((logsum - whole).exp_()[..., None]).addcmul_(more, (more_logsum - whole).exp_()[..., None])
    logsum.copy_(whole)


def _attended(
    query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, parts: list[Part],
    window: int | None, scale: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output [1, N, H, D], and the logarithms of the softmax's denominators [1, N, H]."""
    _, heads, total, width = query.shape
    output = (query.new_empty if _covered(parts, total) else query.new_zeros)(1, total, heads, width)
    logsums = torch.empty(1, total, heads, dtype=torch.promote_types(query.dtype, torch.float32))
    for part in parts:
        rows = slice(part.start, part.end)
        seen_keys, seen_values = (_joined(x, layout, part, heads) for x in (key, value))
        bias, causal = _mask(layout, part, seen_keys.shape[2], window, query)
        of_part, logsum = _forward(query[:, :, rows], seen_keys, seen_values, 0.0, causal, attn_mask=bias, scale=scale)
        if part.adds:
            _merge(output[:, rows].transpose(1, 2), logsums[:, rows].transpose(1, 2), of_part, logsum)
        else:
            output[:, rows], logsums[:, rows] = of_part.transpose(1, 2), logsum.transpose(1, 2)
    return output, logsums


def _gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsums: Tensor, layout: TreeLayout,
    parts: list[Part], window: int | None, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Those of query, key and value, given that of the output."""
    heads = query.shape[1]
    grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
    grad_query = (torch.empty_like if _covered(parts, query.shape[2]) else torch.zeros_like)(query)
    for part in parts:
        rows = slice(part.start, part.end)
        seen_keys, seen_values = (_joined(x, layout, part, heads) for x in (key, value))
        bias, causal = _mask(layout, part, seen_keys.shape[2], window, query)
        # given the whole softmax's output and denominator, the gradient of each part is exact
        of_query, *of_seen = _backward(
            grad[:, rows].transpose(1, 2), query[:, :, rows], seen_keys, seen_values,
            output[:, rows].transpose(1, 2), logsums[:, rows].transpose(1, 2), 0.0, causal,
            attn_mask=bias, scale=scale,
        )  # fmt: skip
        if part.adds:
            grad_query[:, :, rows] += of_query
        else:
            grad_query[:, :, rows] = of_query
        for whole, seen in zip((grad_key, grad_value), of_seen, strict=True):
            seen = seen.unflatten(1, (whole.shape[1], -1)).sum(2) if heads != whole.shape[1] else seen
            at = 0
            for first, stop, _ in (layout.segments[link] for link in part.chain):
                whole[:, :, first:stop] += seen[:, :, at : at + stop - first]
                at += stop - first
    return grad_query, grad_key, grad_value


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, parts: list[Part],
        window: int | None, scale: float | None,
    ) -> Tensor:  # fmt: skip
        output, logsums = _attended(query, key, value, layout, parts, window, scale)
        ctx.save_for_backward(query, key, value, output, logsums)
        ctx.how = layout, parts, window, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *_gradients(grad, *ctx.saved_tensors, *ctx.how), None, None, None, None


def tree_attention(
    layout: TreeLayout, module: Any, query: Tensor, key: Tensor, value: Tensor, *,
    window: int | None, scale: float | None,
) -> Tensor:  # fmt: skip
    """Attention of the packed row [1, H, N, D] over [1, H or fewer, N, D], as [1, N, H, D].

    It is 0 at the queries that the layout lets `module` skip.
    """
    parts = layout.parts(module, window)
    return _TreeAttention.apply(query, key, value, layout, parts, window, scale)  # type: ignore[no-any-return]


# -- inside a graph that torch compiles ---------------------------------------------------------

_layouts = WeakIdKeyDictionary()
"""by table: the layout that it says"""


def _layout_of(table: Tensor) -> TreeLayout:
    if table not in _layouts:
        _layouts[table] = TreeLayout([Segment(*row) for row in table.tolist() if row[1]])
    return _layouts[table]  # type: ignore[no-any-return]


@torch.library.custom_op(
    "trl::tree_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor table, int? window, float? scale) -> (Tensor, Tensor)",
)
def _tree_op(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, window: int | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    layout = _layout_of(table)
    return _attended(query, key, value, layout, layout.parts(None, window), window, scale)


@torch.library.custom_op(
    "trl::tree_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsums, Tensor table, "
    "int? window, float? scale) -> (Tensor, Tensor, Tensor)",
)
def _tree_backward_op(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsums: Tensor, table: Tensor,
    window: int | None, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    layout = _layout_of(table)
    return _gradients(grad, query, key, value, output, logsums, layout, layout.parts(None, window), window, scale)


@_tree_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    one, heads, total, width = query.shape
    logsums = query.new_empty(one, total, heads, dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty(one, total, heads, width), logsums


@_tree_backward_op.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, table, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, table)


def _go_back(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_tree_backward_op(grad, *ctx.saved_tensors, ctx.window, ctx.scale), None, None, None


_tree_op.register_autograd(_go_back, setup_context=_keep)


def compiled_tree_attention(
    layout: TreeLayout, query: Tensor, key: Tensor, value: Tensor, *, window: int | None, scale: float | None
) -> Tensor:
    """`tree_attention` as one operation of a graph, which serves every layout; no query is skipped."""
    return _tree_op(query, key, value, layout.table, window, scale)[0]
