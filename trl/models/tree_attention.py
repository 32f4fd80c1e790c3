"""Attention over a token tree on the CPU as one step of autograd: what segments share is kept once, not in each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trl.models.layout import TreeLayout

# the kernel behind `scaled_dot_product_attention` on the CPU; it has a name of its own with its backward pass
_forward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `tree_attention` can compute this."""
    same = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    return _backward is not None and same and query.device.type == "cpu" and query.dtype in _DTYPES


def _joined(x: Tensor, layout: TreeLayout, index: int, heads: int) -> Tensor:
    """What segment `index` sees of keys or values [1, H or fewer, N, D], a head for each query head."""
    spans = [layout.segments[link] for link in layout.chains[index]]
    parts = [x[:, :, start:end] for start, end, _ in spans]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    repeats = heads // x.shape[1]
    return joined if repeats == 1 else joined.repeat_interleave(repeats, 1)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, skipped: list[int],
        window: int | None, scale: float | None,
    ) -> Tensor:  # fmt: skip
        _, heads, total, width = query.shape
        empty = query.new_zeros if any(skipped) else query.new_empty
        output = empty(1, total, heads, width)
        logsums: list[Tensor | None] = []
        for index, (begin, end, _) in enumerate(layout.segments):
            start = begin + skipped[index]
            if start == end:
                logsums.append(None)
                continue
            seen_keys, seen_values = (_joined(x, layout, index, heads) for x in (key, value))
            bias = layout.bias(end - start, seen_keys.shape[2], window, query)
            part, logsum = _forward(
                query[:, :, start:end], seen_keys, seen_values, 0.0, bias is None, attn_mask=bias, scale=scale
            )
            output[:, start:end] = part.transpose(1, 2)
            logsums.append(logsum)
        ctx.save_for_backward(query, key, value, output, *logsums)
        ctx.layout, ctx.skipped, ctx.window, ctx.scale = layout, skipped, window, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, output, *logsums = ctx.saved_tensors
        layout, heads = ctx.layout, query.shape[1]
        grad_query = (torch.zeros_like if any(ctx.skipped) else torch.empty_like)(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for index, (begin, end, _) in enumerate(layout.segments):
            start = begin + ctx.skipped[index]
            if start == end:
                continue
            seen_keys, seen_values = (_joined(x, layout, index, heads) for x in (key, value))
            bias = layout.bias(end - start, seen_keys.shape[2], ctx.window, query)
            grad_query[:, :, start:end], *of_seen = _backward(
                grad[:, start:end].transpose(1, 2), query[:, :, start:end], seen_keys, seen_values,
                output[:, start:end].transpose(1, 2), logsums[index], 0.0, bias is None,
                attn_mask=bias, scale=ctx.scale,
            )  # fmt: skip
            for whole, part in zip((grad_key, grad_value), of_seen, strict=True):
                part = part.unflatten(1, (whole.shape[1], -1)).sum(2) if heads != whole.shape[1] else part
                spans = [layout.segments[link] for link in layout.chains[index]]
                pieces = part.split([stop - first for first, stop, _ in spans], 2)
                for (first, stop, _), piece in zip(spans, pieces, strict=True):
                    whole[:, :, first:stop] += piece
        return grad_query, grad_key, grad_value, None, None, None, None


def tree_attention(
    layout: TreeLayout, module: Any, query: Tensor, key: Tensor, value: Tensor, *,
    window: int | None, scale: float | None,
) -> Tensor:  # fmt: skip
    """Attention of the packed row [1, H, N, D] over [1, H or fewer, N, D], as [1, N, H, D].

    Zeros at the queries that the layout lets `module` skip.
    """
    skipped = layout.skipped(module)
    return _TreeAttention.apply(query, key, value, layout, skipped, window, scale)  # type: ignore[no-any-return]
