"""Rotary position embeddings on the CPU as one step of autograd: half the passes, and neither argument is kept."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trl.kernels.swapped_forward import computes_again

NAME = "apply_rotary_pos_emb"
"""what transformers' model files call it; they look it up in their own file at each call"""
_inside: ContextVar[bool] = ContextVar("fused_rotary", default=False)
_seen: set[str] = set()
"""model files that have been looked at"""


class _Rotate(torch.autograd.Function):
    """(x1, x2) -> (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2), halves of the last axis: arXiv:2104.09864, eq. 34."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        (x1, x2), (sin1, sin2) = x.chunk(2, -1), sin.chunk(2, -1)
        turned = x * cos
        first, second = turned.chunk(2, -1)
        first.addcmul_(x2, sin1, value=-1)
        second.addcmul_(x1, sin2)
        return turned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        (of_first, of_second), (sin1, sin2) = grad.chunk(2, -1), sin.chunk(2, -1)
        back = grad * cos
        first, second = back.chunk(2, -1)
        first.addcmul_(of_second, sin2)
        second.addcmul_(of_first, sin1, value=-1)
        return back, None, None


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key turned by the angles of their positions. [B, H, N, D] with [B, N, D]; no gradient of the angles."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _Rotate.apply(query, cos, sin), _Rotate.apply(key, cos, sin)  # type: ignore[no-untyped-call]


@contextmanager
def fused_rotary(network: nn.Module) -> Iterator[None]:
    """Within it a network on the CPU in float32 turns by `rotate`, where its own function does the same."""
    if computes_again(network):
        yield
        return
    for file in {type(module).__module__ for module in network.modules()} - _seen:
        _seen.add(file)
        original = getattr(sys.modules.get(file), NAME, None)
        if original is not None and _is_plain(original):
            setattr(sys.modules[file], NAME, _either(original))
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


def _is_plain(original: Callable[..., Any]) -> bool:
    query, key = torch.linspace(-1.0, 2.0, 48).view(1, 2, 3, 8), torch.linspace(3.0, -2.0, 24).view(1, 1, 3, 8)
    angles = torch.linspace(0.1, 3.0, 24).view(1, 3, 8)
    try:
        theirs = original(query, key, angles.cos(), angles.sin())
        ours = rotate(query, key, angles.cos(), angles.sin())
        return all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(theirs, ours, strict=True))
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False


def _either(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if _inside.get() and not args and not kwargs and _takes(q, k, cos, sin):
            return rotate(q, k, cos, sin)
        return original(q, k, cos, sin, *args, **kwargs)  # type: ignore[no-any-return]

    return apply_rotary_pos_emb


def _takes(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    plain = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in (query, key, cos, sin))
    shapes = query.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == query.shape[-1] == key.shape[-1]
    return plain and shapes and not cos.requires_grad and not torch.is_autocast_enabled("cpu")
