"""Attention over a token tree on the CPU as one step of autograd: what segments share is kept once, not in each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trl.kernels.tree_layout import Part, TreeLayout

# the kernel behind `scaled_dot_product_attention` on the CPU; it has a name of its own with its backward pass
_forward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `tree_attention` can compute this."""
    same = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    return _backward is not None and same and query.device.type == "cpu" and query.dtype in _DTYPES


def _joined(x: Tensor, layout: TreeLayout, part: Part, heads: int) -> Tensor:
    """What a part sees of keys or values [1, H or fewer, N, D], a head for each query head."""
    parts = [x[:, :, slice(*layout.segments[link][:2])] for link in part.chain]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    repeats = heads // x.shape[1]
    return joined if repeats == 1 else joined.repeat_interleave(repeats, 1)


def _mask(layout: TreeLayout, part: Part, keys: int, window: int | None, query: Tensor) -> tuple[Tensor | None, bool]:
    """What to add to a part's scores, and whether the kernel masks the future by itself."""
    if part.again:  # all of it is past
        return None, False
    bias = layout.bias(part.end - part.start, keys, window, query)
    return bias, bias is None


def _covered(parts: list[Part], total: int) -> bool:
    """Whether every query is computed."""
    return sum(part.end - part.start for part in parts if not part.again) == total


def _merge(output: Tensor, logsum: Tensor, more: Tensor, more_logsum: Tensor) -> None:
    """Attention over some keys, [1, H, Q, D] with [1, H, Q], becomes that over these and more, in place.

    Each half is weighed with its share of the softmax's denominator.
    """
    whole = torch.logaddexp(logsum, more_logsum)
    output.mul_((logsum - whole).exp_()[..., None]).addcmul_(more, (more_logsum - whole).exp_()[..., None])
    logsum.copy_(whole)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, parts: list[Part],
        window: int | None, scale: float | None,
    ) -> Tensor:  # fmt: skip
        _, heads, total, width = query.shape
        output = (query.new_empty if _covered(parts, total) else query.new_zeros)(1, total, heads, width)
        logsums = torch.empty(1, total, heads, dtype=torch.promote_types(query.dtype, torch.float32))
        for part in parts:
            rows = slice(part.start, part.end)
            seen_keys, seen_values = (_joined(x, layout, part, heads) for x in (key, value))
            bias, causal = _mask(layout, part, seen_keys.shape[2], window, query)
            of_part, logsum = _forward(
                query[:, :, rows], seen_keys, seen_values, 0.0, causal, attn_mask=bias, scale=scale
            )
            if part.again:
                _merge(output[:, rows].transpose(1, 2), logsums[:, rows].transpose(1, 2), of_part, logsum)
            else:
                output[:, rows], logsums[:, rows] = of_part.transpose(1, 2), logsum.transpose(1, 2)
        ctx.save_for_backward(query, key, value, output, logsums)
        ctx.layout, ctx.parts, ctx.window, ctx.scale = layout, parts, window, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, output, logsums = ctx.saved_tensors
        layout, heads = ctx.layout, query.shape[1]
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        grad_query = (torch.empty_like if _covered(ctx.parts, query.shape[2]) else torch.zeros_like)(query)
        for part in ctx.parts:
            rows = slice(part.start, part.end)
            seen_keys, seen_values = (_joined(x, layout, part, heads) for x in (key, value))
            bias, causal = _mask(layout, part, seen_keys.shape[2], ctx.window, query)
            # with the whole softmax's output and denominator, the gradient of each part of it is exact by itself
            of_query, *of_seen = _backward(
                grad[:, rows].transpose(1, 2), query[:, :, rows], seen_keys, seen_values,
                output[:, rows].transpose(1, 2), logsums[:, rows].transpose(1, 2), 0.0, causal,
                attn_mask=bias, scale=ctx.scale,
            )  # fmt: skip
            if part.again:
                grad_query[:, :, rows] += of_query
            else:
                grad_query[:, :, rows] = of_query
            for whole, seen in zip((grad_key, grad_value), of_seen, strict=True):
                seen = seen.unflatten(1, (whole.shape[1], -1)).sum(2) if heads != whole.shape[1] else seen
                at = 0
                for first, stop, _ in (layout.segments[link] for link in part.chain):
                    whole[:, :, first:stop] += seen[:, :, at : at + stop - first]
                    at += stop - first
        return grad_query, grad_key, grad_value, None, None, None, None


def tree_attention(
    layout: TreeLayout, module: Any, query: Tensor, key: Tensor, value: Tensor, *,
    window: int | None, scale: float | None,
) -> Tensor:  # fmt: skip
    """Attention of the packed row [1, H, N, D] over [1, H or fewer, N, D], as [1, N, H, D].

    Zeros at the queries that the layout lets `module` skip.
    """
    parts = layout.parts(module, window)
    return _TreeAttention.apply(query, key, value, layout, parts, window, scale)  # type: ignore[no-any-return]
