"""What lies between the products of a decoder's layer, one kernel each: for steps of sampling on a GPU.

Such a step has so few rows that the number of kernels decides how long it takes. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trl.kernels import paged_triton
from trl.kernels.layers import computes_rms_norm, own_weight, replaced_rotary, swapped_forward

BLOCK = 1024


def norm_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` along the last axis; what is scaled is rounded to the type of x before the weight comes. [..., D]"""
    x = x.contiguous()
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
    width = x.shape[-1]
    _kernels().rms_norm[(x.numel() // width,)](
        x, weight, y, width, eps, WIDE=paged_triton.power_above(width), num_warps=4
    )
    return y


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each head turned by the angles of its row, a half by the other. x [1, H, R, D]; cos, sin [1, R, D]"""
    _, heads, rows, width = x.shape
    y = torch.empty(rows, heads, width, dtype=torch.promote_types(x.dtype, cos.dtype), device=x.device)
    _kernels().rotate[(rows, heads)](
        x, cos.contiguous(), sin.contiguous(), y, heads, x.stride(1), x.stride(2), HALF=width // 2,
        WIDE=paged_triton.power_above(width // 2), num_warps=1,
    )  # fmt: skip
    return y.transpose(0, 1)[None]


def gated(gates: Tensor, ups: Tensor) -> Tensor:
    """silu(gates) x ups, of one shape."""
    gates, ups = gates.contiguous(), ups.contiguous()
    y = torch.empty_like(gates, dtype=torch.promote_types(gates.dtype, ups.dtype))
    _kernels().gate[(-(-gates.numel() // BLOCK),)](gates, ups, y, gates.numel(), WIDE=BLOCK, num_warps=4)
    return y


@contextmanager
def one_kernel_each(network: nn.Module) -> Iterator[None]:
    """Within it norms, rotary embeddings and gates of a network on a GPU are one kernel each, where they are plain."""
    if not paged_triton.is_available():
        yield
        return
    with ExitStack() as stack:
        for module in network.modules():
            forward = _norm_forward(module) or _mlp_forward(module)
            if forward is not None:
                stack.enter_context(swapped_forward(module, forward))
        stack.enter_context(replaced_rotary(network, _turn_both))
        yield


def _norm_forward(module: Any) -> Callable[[Tensor], Tensor] | None:
    weight, eps = own_weight(module), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    named = type(module).__name__.endswith("RMSNorm") and "forward" not in vars(module)
    if not named or not computes_rms_norm(type(module), eps):
        return None
    return lambda x: norm_rows(x, module.weight, eps)


def _mlp_forward(module: Any) -> Callable[[Tensor], Tensor] | None:
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if "forward" in vars(module) or not all(isinstance(layer, nn.Module) for layer in layers):
        return None
    activation = getattr(module, "act_fn", None)
    if not isinstance(activation, nn.Module) or not _is_gate(type(module), type(activation)):
        return None
    return lambda x: module.down_proj(gated(module.gate_proj(x), module.up_proj(x)))


_gates: dict[tuple[type[nn.Module], type[nn.Module]], bool] = {}
"""classes of MLPs and activations, and whether they compute down(silu(gate(x)) up(x))"""


def _is_gate(kind: type[nn.Module], activation: type[nn.Module]) -> bool:
    if (kind, activation) not in _gates:
        _gates[kind, activation] = _computes_gate(kind, activation)
    return _gates[kind, activation]


def _computes_gate(kind: Any, activation: Any) -> bool:
    """What the class does to a few numbers."""
    x, calls = torch.linspace(-3.0, 3.0, 12).view(1, 3, 4), list[str]()

    def layer(name: str, factor: float) -> Callable[[Tensor], Tensor]:
        def product(x: Tensor) -> Tensor:
            calls.append(name)
            return x * factor + 0.1

        return product

    try:
        one = SimpleNamespace(
            gate_proj=layer("gate", 1.5), up_proj=layer("up", -0.7), down_proj=layer("down", 2.0), act_fn=activation()
        )
        theirs = kind.forward(one, x)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    ours = (F.silu(x * 1.5 + 0.1) * (x * -0.7 + 0.1)) * 2.0 + 0.1
    return sorted(calls) == ["down", "gate", "up"] and torch.allclose(theirs, ours, rtol=1e-6, atol=1e-6)


def _turn_both(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
    """Query and key turned; None for shapes of another kind."""
    plain = query.dim() == 4 and query.shape[0] == 1 and cos.dim() == 3 and cos.shape[0] == 1
    fits = cos.shape[-1] == query.shape[-1] == key.shape[-1] and not query.shape[-1] % 2
    if not plain or not fits or query.stride(-1) != 1 or key.stride(-1) != 1:
        return None
    return rotated(query, cos, sin), rotated(key, cos, sin)


class _Kernels:
    rms_norm: Any
    rotate: Any
    gate: Any


@cache
def _kernels() -> _Kernels:
    from trl.kernels import pointwise_kernels

    found = _Kernels()
    found.rms_norm, found.rotate = pointwise_kernels.rms_norm, pointwise_kernels.rotate
    found.gate = pointwise_kernels.gate
    return found
