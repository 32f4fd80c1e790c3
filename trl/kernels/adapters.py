"""Linear layers with LoRA, and frozen ones beside them, in one step of autograd: W x + s B A x (arXiv:2106.09685).

The base product is made once, the low-rank one is added to it in place, and the scale goes into its [N, r] middle. A
feed-forward block whose three layers are such layers is one step, too: it keeps its gate and its values, and computes
their product again. PEFT's modules stay as they are: within `fused_adapters` a call of them computes this, where it is
what they compute. On a CPU in float32 the products with frozen weights are oneDNN's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trl.kernels.layers import LARGE, computes_again, is_hooked, is_plain_linear, is_watched, swapped_forward
from trl.kernels.onednn import suits, times, with_room

CAST = (torch.float32, torch.float16, torch.bfloat16)
"""what autocast casts"""
PEFT_LINEAR = ("peft.tuners.lora.layer", "Linear")
"""file and name of PEFT's class for a linear layer with LoRA"""


@dataclass(frozen=True)
class Layer:
    """The weights of a linear layer that does not learn, and of the adapter on it: W x + bias + scale B A x."""

    weight: Tensor
    """[O, D]"""
    bias: Tensor | None = None
    a: Tensor | None = None
    """[r, D]; None: no adapter"""
    b: Tensor | None = None
    """[O, r]"""
    scale: float = 1.0
    dropout: nn.Dropout | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.a, self.b

    @property
    def rate(self) -> float:
        """The rate of dropout in this call."""
        return self.dropout.p if self.dropout is not None and self.dropout.training else 0.0

    @property
    def is_large(self) -> bool:
        """Whether oneDNN multiplies by it."""
        return suits(self.weight, LARGE)

    def takes(self, x: Tensor) -> bool:
        """Whether these are the inputs of a step: the precision of the weights, or autocast, which says what to do."""
        if not x.numel() or x.device != self.weight.device:
            return False
        if torch.is_autocast_enabled(x.device.type):
            return x.dtype in CAST
        return all(x.dtype == each.dtype for each in self.tensors if each is not None)

    def cast(self, dtype: torch.dtype) -> Layer:
        weight, bias, a, b = (None if each is None else each.to(dtype) for each in self.tensors)
        assert weight is not None
        return replace(self, weight=weight, bias=bias, a=a, b=b)

    # -- products, on rows [N, D] ---------------------------------------------------------------

    def forward(self, rows: Tensor, masked: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The output [N, O], and the scaled middle [N, r] of the adapter. masked: the rows that the adapter sees."""
        out = times(rows, self.weight, self.bias)
        if self.a is None or self.b is None:
            return out, None
        low = times(rows if masked is None else masked, self.a).mul_(self.scale)
        return out.addmm_(low, self.b.T), low

    def low_gradient(self, grad: Tensor) -> Tensor | None:
        """The gradient of A x: [N, O] -> [N, r]."""
        return None if self.b is None else times(grad, self.b.T).mul_(self.scale)

    def backward(self, grad: Tensor, low_grad: Tensor | None, kept: Tensor | None = None) -> Tensor:
        """The gradient of the rows, [N, O] -> [N, D]. kept: where the adapter saw them."""
        out = times(grad, self.weight.T)
        if low_grad is None or self.a is None:
            return out
        if kept is None:
            return out.addmm_(low_grad, self.a)
        return out.add_((low_grad @ self.a).mul_(kept))


def _precision(x: Tensor, layer: Layer) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else layer.weight.dtype


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype).contiguous()


def _like(rows: Tensor, x: Tensor) -> Tensor:
    """The rows in the shape of x; no view for autograd, so that it may be written to."""
    return rows.view(*x.shape[:-1], -1).detach()


class _Adapted(torch.autograd.Function):
    """kept_ND: the places that dropout left to the adapter, whose scale then makes up for the others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept_ND: Tensor | None, layer: Layer, a: Any, b: Any) -> Tensor:
        ctx.dtype, ctx.like, ctx.scale = _precision(x, layer), x.dtype, layer.scale
        with torch.autocast(x.device.type, enabled=False):
            rows = _rows(x, ctx.dtype)
            out, low = layer.cast(ctx.dtype).forward(rows, _kept(rows, kept_ND))
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, kept_ND, low, layer.weight, a, b)
        return _like(out, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, kept_ND, low, weight, a, b = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            layer, grad_NO = Layer(weight, None, a, b, ctx.scale).cast(ctx.dtype), _rows(grad, ctx.dtype)
            low_grad = layer.low_gradient(grad_NO)
            rows = None if x is None else _kept(_rows(x, ctx.dtype), kept_ND)
            found = _of_adapter(low_grad, rows, low, grad_NO)
            of_x = None
            if ctx.needs_input_grad[0]:
                of_x = _like(layer.backward(grad_NO, low_grad, kept_ND), grad).to(ctx.like)
        return of_x, None, None, *_as_weights(found, (a, b), ctx.needs_input_grad[3:])


def _kept(rows: Tensor, kept_ND: Tensor | None) -> Tensor:
    return rows if kept_ND is None else rows * kept_ND


def _of_adapter(low_grad: Tensor | None, rows: Tensor | None, low: Tensor | None, grad: Tensor) -> tuple[Any, Any]:
    """The gradients of A, where its rows were kept, and of B."""
    of_a = None if low_grad is None or rows is None else low_grad.T @ rows
    return of_a, None if low is None else (low.T @ grad).T


def _as_weights(found: Sequence[Any], weights: Sequence[Any], needed: Sequence[bool]) -> list[Tensor | None]:
    """Those gradients that are needed, in the precision of their weights."""
    of_each = zip(found, weights, needed, strict=True)
    return [of.to(weight.dtype) if wanted and of is not None else None for of, weight, wanted in of_each]


def adapted(x: Tensor, layer: Layer) -> Tensor:
    """The layer's output. [..., D] -> [..., O]"""
    kept_ND, rate = None, layer.rate
    if rate and layer.a is not None:
        ones = torch.ones(x.shape, dtype=layer.a.dtype, device=x.device)
        kept_ND = F.dropout(ones, rate).bool().flatten(0, -2)  # the random numbers that PEFT would draw
        layer = replace(layer, scale=layer.scale / (1 - rate))
    return _Adapted.apply(x, kept_ND, layer, layer.a, layer.b)  # type: ignore[no-any-return, no-untyped-call]


# -- the feed-forward block -------------------------------------------------------------------

_gated: dict[type[nn.Module], bool] = {}
"""classes of feed-forward blocks, and whether they compute `gated`"""


class _Gated(torch.autograd.Function):
    """Keeps what enters the block, its gates and its values; silu(gates) * values is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: tuple[Layer, Layer, Layer], *adapters: Any) -> Tensor:
        ctx.dtype, ctx.like, ctx.scales = _precision(x, layers[0]), x.dtype, [layer.scale for layer in layers]
        with torch.autocast(x.device.type, enabled=False):
            rows, (gate, up, down) = _rows(x, ctx.dtype), [layer.cast(ctx.dtype) for layer in layers]
            (gates, low_gate), (values, low_up) = gate.forward(rows), up.forward(rows)
            inner = F.silu(with_room(gates)).mul_(with_room(values))[: len(rows)]
            out, low_down = down.forward(inner)
        needs_rows = ctx.needs_input_grad[2] or ctx.needs_input_grad[4]
        weights = [layer.weight for layer in layers]
        lows = low_gate, low_up, low_down
        ctx.save_for_backward(rows if needs_rows else None, gates, values, *lows, *weights, *adapters)
        return _like(out, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, gates, values, low_gate, low_up, low_down, *weights = ctx.saved_tensors
        adapters = weights[3:]
        of_each = zip(weights[:3], adapters[::2], adapters[1::2], ctx.scales, strict=True)
        with torch.autocast(grad.device.type, enabled=False):
            gate, up, down = (Layer(weight, None, a, b, scale).cast(ctx.dtype) for weight, a, b, scale in of_each)
            grad_ND, count, of_x = _rows(grad, ctx.dtype), len(gates), None
            gates, values = with_room(gates), with_room(values)
            opened, low_grad = F.silu(gates), down.low_gradient(grad_ND)
            of_down = _of_adapter(low_grad, (opened * values)[:count], low_down, grad_ND)
            of_inner = with_room(down.backward(grad_ND, low_grad))
            of_values = opened.mul_(of_inner)[:count]
            of_gates = torch.ops.aten.silu_backward(of_inner.mul_(values), gates)[:count]
            low_gates, low_values = gate.low_gradient(of_gates), up.low_gradient(of_values)
            of_gate = _of_adapter(low_gates, rows, low_gate, of_gates)
            of_up = _of_adapter(low_values, rows, low_up, of_values)
            if ctx.needs_input_grad[0]:
                of_x = gate.backward(of_gates, low_gates).add_(up.backward(of_values, low_values))
                of_x = _like(of_x, grad).to(ctx.like)
        return of_x, None, *_as_weights((*of_gate, *of_up, *of_down), adapters, ctx.needs_input_grad[2:])


def gated(x: Tensor, gate: Layer, up: Layer, down: Layer) -> Tensor:
    """down(silu(gate(x)) * up(x)): arXiv:2002.05202, eq. 6. No dropout. [..., D] -> [..., D]"""
    adapters = [weight for layer in (gate, up, down) for weight in (layer.a, layer.b)]
    return _Gated.apply(x, (gate, up, down), *adapters)  # type: ignore[no-any-return, no-untyped-call]


# -- modules ----------------------------------------------------------------------------------


@contextmanager
def fused_adapters(network: nn.Module) -> Iterator[None]:
    """Within it the layers of a network with LoRA, and its frozen ones where oneDNN is faster, are `adapted`.

    Layers that are computed again in the backward pass, learn themselves, are quantised, sharded or watched keep their
    own forward; so do adapters of other kinds, and several at a time.
    """
    if computes_again(network):
        yield
        return
    with ExitStack() as stack:
        layers: dict[nn.Module, Layer] = {}
        below: set[nn.Module] = set()
        for module in network.modules():
            layer = None if module in below else _layer_of(module)
            if layer is not None and (layer.a is not None or layer.is_large):
                layers[module] = layer
                below.update(module.modules())
                stack.enter_context(swapped_forward(module, _forward(module, layer)))
        for module in network.modules():
            three = _gated_children(module)
            if three and all(child in layers and layers[child].bias is None for child in three):
                stack.enter_context(swapped_forward(module, _gated_forward(module, three, layers)))
        yield


def _forward(module: nn.Module, layer: Layer) -> Callable[..., Any]:
    own = module.forward

    def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not isinstance(x, Tensor) or not layer.takes(x):
            return own(x, *args, **kwargs)
        return adapted(x, layer)

    return forward


def _gated_forward(
    module: nn.Module, three: tuple[nn.Module, ...], layers: dict[nn.Module, Layer]
) -> Callable[..., Any]:
    own, (gate, up, down) = module.forward, (layers[child] for child in three)

    def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
        takes = isinstance(x, Tensor) and all(layer.takes(x) and not layer.rate for layer in (gate, up, down))
        if args or kwargs or not takes or any(map(is_hooked, three)):  # PEFT's hooks come and go with a call
            return own(x, *args, **kwargs)
        return gated(x, gate, up, down)

    return forward


def _layer_of(module: Any) -> Layer | None:
    """The weights of a linear layer, with its adapter; None where a call of it may compute anything else."""
    if type(module) is nn.Linear:
        return _frozen(module)
    kind = type(module)
    if (kind.__module__, kind.__name__) != PEFT_LINEAR or "forward" in vars(module):
        return None
    base = _frozen(module.base_layer)
    if base is None or module.disable_adapters or module.merged:
        return None if module.disable_adapters and module.merged else base
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) != 1 or active[0] in module.lora_variant:
        return base if not active else None
    a, b, dropout = (each[active[0]] for each in (module.lora_A, module.lora_B, module.lora_dropout))
    if any(not is_plain_linear(each) or each.bias is not None for each in (a, b)) or is_watched(dropout):
        return None
    if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.p >= 1 or dropout.inplace):
        return None
    known = dropout if type(dropout) is nn.Dropout else None
    return replace(base, a=a.weight, b=b.weight, scale=float(module.scaling[active[0]]), dropout=known)


def _frozen(linear: Any) -> Layer | None:
    """A linear layer that does not learn."""
    if not is_plain_linear(linear) or any(each.requires_grad for each in linear.parameters()):
        return None
    return Layer(linear.weight, linear.bias)


def _gated_children(module: Any) -> tuple[nn.Module, ...]:
    """The three layers of a feed-forward block that computes `gated`; () of any other module."""
    children = module._modules
    if not {"gate_proj", "up_proj", "down_proj", "act_fn"} <= children.keys() or is_watched(module):
        return ()
    three = tuple(children[name] for name in ("gate_proj", "up_proj", "down_proj"))
    if type(module) not in _gated:
        _gated[type(module)] = _computes_gated(type(module))
    silu = type(children["act_fn"]).__name__ in ("SiLU", "SiLUActivation")
    return three if silu and _gated[type(module)] else ()


@torch.no_grad()
def _computes_gated(kind: type[nn.Module]) -> bool:
    """Asks the class with other layers."""
    x, shift = torch.linspace(-1.0, 2.0, 8).view(1, 2, 4), torch.linspace(0.5, -1.5, 4)
    layers = {"gate_proj": lambda t: t + shift, "up_proj": lambda t: t * shift, "down_proj": lambda t: t.flip(-1)}
    try:
        theirs = kind.forward(SimpleNamespace(**layers, act_fn=F.silu), x)  # type: ignore[arg-type]
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    return isinstance(theirs, Tensor) and torch.allclose(theirs, (F.silu(x + shift) * (x * shift)).flip(-1))
