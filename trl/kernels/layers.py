"""Faster forwards for some layers of a network, for the length of one pass over a packed row.

`fast` is the door: a pass inside it computes the same numbers. Norms, rotary embeddings and the embedding are one step
of autograd each, and the last layer and the final norm leave out positions that nobody reads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trl.data.records import PackedBatch, moved_ahead
from trl.kernels.onednn import between, leads, times
from trl.kernels.step_memory import Place, place_of
from trl.kernels.tree_attention import TreeLayout

WORTH_IT = 0.9
"""share of positions that are read above which the last layer computes all of them"""


@dataclass
class Reading:
    """The positions of a packed row whose states a head reads."""

    index_S: Tensor
    selected: bool = False
    """whether the final norm has computed these positions alone, in this order"""

    def states(self, hidden: Tensor) -> Tensor:
        """The states that are read, [S, D], of those that reach the head: [1, N, D], or [1, S, D] where selected."""
        return hidden[0] if self.selected else hidden[0].index_select(0, self.index_S)


@contextmanager
def fast(network: Any, packed: PackedBatch, reading: Reading, *, narrow: bool, early: bool) -> Iterator[TreeLayout]:
    """Within it `network` computes this batch faster; yields the layout that its attention takes as `tree`.

    narrow: the last layer's output may be wrong where it is not read. early: the final norm selects what is read.
    """
    layout, total = TreeLayout(packed.segments, packed.kept, packed.piece), len(packed.ids_N)
    compiled = is_compiled(network)
    if compiled or selects(network):
        layout.tabulated()
    with ExitStack() as stack:
        if not compiled and getattr(network, "peft_config", None):
            from trl.kernels.adapters import fused_adapters

            stack.enter_context(fused_adapters(network))
        if not compiled:
            stack.enter_context(faster_products(network))
        if narrow and not compiled:
            listed, positions = _positions(packed, reading.index_S)
            layer = last_layer(network) if len(listed) <= WORTH_IT * total else None
            if layer is not None:
                stack.enter_context(computed_at(layer.by_position, positions, total))
                if layer.attention is not None and packed.piece is None:
                    layout.read_only_at(layer.attention, listed)
        if not compiled:
            stack.enter_context(fused_norms(network))
        norm = final_norm(network) if early else None
        if norm is not None and not is_compiled(norm):
            stack.enter_context(selected_by(norm, reading))
        if not compiled:
            stack.enter_context(fused_rotary(network))
            stack.enter_context(lookup(network.get_input_embeddings()))
        yield layout


def _positions(packed: PackedBatch, index_S: Tensor) -> tuple[list[int], Tensor]:
    """These positions of the batch in ascending order, each once, for the host and for the device of the batch.

    Those that the batch itself names are found on the host, once.
    """
    key = ("positions", packed.named(index_S), index_S.device)
    if key not in packed.kept:
        found = packed.on_host(index_S).unique()
        pair = found.tolist(), moved_ahead(found, index_S.device)
        if not packed.named(index_S):
            return pair
        packed.kept[key] = pair
    return packed.kept[key]  # type: ignore[no-any-return]


@contextmanager
def swapped_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it a call of the module, hooks included, runs `forward` instead of the module's own."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


def is_hooked(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def is_watched(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class does."""
    return "forward" in vars(module) or is_hooked(module)


def own_weight(module: nn.Module) -> nn.Parameter | None:
    """A module's weight as it lies there: amid a pass `module.weight` would gather it under DeepSpeed ZeRO-3."""
    return module._parameters.get("weight")


def computes_again(network: nn.Module) -> bool:
    """Whether layers are computed again in the backward pass, when a swapped forward would be gone."""
    return any(getattr(module, "gradient_checkpointing", False) for module in network.modules())


def selects(network: nn.Module) -> bool:
    """Whether checkpoints of its layers choose which operations to keep: attention has to be one of them then."""
    found = (getattr(module, "_gradient_checkpointing_func", None) for module in network.modules())
    return any("context_fn" in getattr(function, "keywords", ()) for function in found)


def is_compiled(network: nn.Module) -> bool:
    """Whether torch compiles a module of it, whose graph must not change from pass to pass."""
    return any(
        vars(module).get("_compiled_call_impl") is not None or "_orig_mod" in module._modules
        for module in network.modules()
    )


def compile_layers(network: nn.Module, backend: str, mode: str | None = None) -> int:
    """Have torch compile each of the decoder's layers, for rows of every length; returns how many it has.

    One graph serves all layers of a kind. Layers that are compiled already stay as they are.
    """
    decoder, _ = _around_last_layer(network)
    if decoder is None:
        return 0
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    layers = [layer for child in lists for layer in child if isinstance(getattr(layer, "mlp", None), nn.Module)]
    for layer in layers:
        if vars(layer).get("_compiled_call_impl") is None:
            layer.compile(dynamic=True, backend=backend, mode=mode)
    return len(layers)


@contextmanager
def uncompiled(network: nn.Module) -> Iterator[None]:
    """Within it compiled layers run as they are written: for passes of another kind, which would compile anew."""
    if not is_compiled(network):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


# -- the last layer ---------------------------------------------------------------------------


@dataclass(frozen=True)
class LastLayer:
    """The modules of a decoder's last layer that compute each position separately, and its attention."""

    by_position: tuple[nn.Module, ...]
    attention: nn.Module | None


def last_layer(network: nn.Module) -> LastLayer | None:
    """The last decoder layer; None where it has no `mlp`, or checkpoints its activations.

    A checkpointed layer is computed again in the backward pass, when the positions are no longer known.
    """
    _, layer = _around_last_layer(network)
    if layer is None or getattr(layer, "gradient_checkpointing", False):
        return None
    attention = getattr(layer, "self_attn", None)
    projections: list[Any] = [getattr(attention, name, None) for name in ("q_proj", "o_proj")]
    if not all(isinstance(projection, nn.Module) for projection in projections):
        return LastLayer((layer.mlp,), None)
    return LastLayer((layer.mlp, *projections), attention)


def _around_last_layer(network: nn.Module) -> tuple[nn.Module | None, Any]:
    """The module that holds the decoder's layers, and the last of them; (None, None) where it has no `mlp`."""
    found: tuple[nn.Module | None, Any] = (None, None)
    for module in network.modules():
        for child in module.children():
            if (
                isinstance(child, nn.ModuleList)
                and len(child)
                and isinstance(getattr(child[-1], "mlp", None), nn.Module)
            ):
                found = module, child[-1]
    return found


def final_norm(network: nn.Module) -> nn.Module | None:
    """The norm that stands beside the decoder's list of layers, the last if there are several; a probe tries it."""
    decoder, _ = _around_last_layer(network)
    beside = [] if decoder is None else list(decoder.children())
    return next((module for module in reversed(beside) if type(module).__name__.lower().endswith("norm")), None)


@contextmanager
def selected_by(norm: nn.Module, reading: Reading) -> Iterator[None]:
    """Within it the norm takes a packed row [1, N, D] and returns what is read of it, [1, S, D].

    The caller of the head holds the norm's output as long as the head computes: it is then no longer than what is read.
    """
    whole = norm.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        reading.selected = True
        return whole(hidden.index_select(1, reading.index_S), *args, **kwargs)  # type: ignore[no-any-return]

    with swapped_forward(norm, forward):
        yield


@contextmanager
def computed_at(modules: tuple[nn.Module, ...], positions: Tensor, total: int) -> Iterator[None]:
    """Within it the modules compute a packed row [1, N, D] at these positions only; elsewhere they return 0."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(swapped_forward(module, _narrowed(module, positions, total)))
        yield


def _narrowed(module: nn.Module, positions: Tensor, total: int) -> Any:
    whole = module.forward

    def narrow(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        part = whole(hidden.index_select(1, positions), *args, **kwargs)
        if not isinstance(part, Tensor):
            raise TypeError(f"{type(module).__name__} returns {type(part).__name__}, not one tensor")
        return part.new_zeros(1, total, part.shape[-1]).index_copy(1, positions, part)

    return narrow


# -- the embedding ----------------------------------------------------------------------------


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, ids: Tensor, padding: int | None, place: Place) -> Tensor:
        ctx.ids, ctx.padding, ctx.place = ids, padding, place
        return weight_VD[ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        ids_N, grad_ND = ctx.ids.flatten(), grad.flatten(0, -2)
        if ctx.padding is not None:
            learned = ids_N != ctx.padding
            ids_N, grad_ND = ids_N[learned], grad_ND[learned]
        ctx.place.gradient().index_add_(0, ids_N, grad_ND)
        return None, None, None, None


@contextmanager
def lookup(embedding: Any) -> Iterator[None]:
    """Within it a plain `nn.Embedding` that learns adds its gradient in place, where that is allowed."""
    weight = own_weight(embedding) if type(embedding) is nn.Embedding else None
    place = None if weight is None else place_of(weight)
    if place is None or embedding.max_norm or embedding.scale_grad_by_freq or embedding.sparse:
        yield
        return

    def forward(ids: Tensor) -> Tensor:
        return _Lookup.apply(embedding.weight, ids, embedding.padding_idx, place)  # type: ignore[no-any-return]

    with swapped_forward(embedding, forward):
        yield


# -- linear layers ----------------------------------------------------------------------------

LARGE = 2**16
"""elements of a weight from which oneDNN multiplies"""


def is_plain_linear(linear: Any) -> bool:
    """Whether it is an `nn.Linear` with its weights lying there whole, and nobody looks on."""
    if type(linear) is not nn.Linear or is_watched(linear):
        return False
    weight, weights = own_weight(linear), [each for each in linear._parameters.values() if each is not None]
    whole = weight is not None and weight.shape == (linear.out_features, linear.in_features)
    return whole and all(type(each) is nn.Parameter and not hasattr(each, "ds_id") for each in weights)


class _Linear(torch.autograd.Function):
    """`F.linear` whose three products are oneDNN's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return times(x.flatten(0, -2).contiguous(), weight, bias).view(*x.shape[:-1], -1).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x, weight), grad_NO = ctx.saved_tensors, grad.flatten(0, -2).contiguous()
        of_x = times(grad_NO, weight.T).view(*grad.shape[:-1], -1).detach() if ctx.needs_input_grad[0] else None
        of_weight = None if x is None else between(grad_NO, x.flatten(0, -2).contiguous())
        return of_x, of_weight, grad_NO.sum(0) if ctx.needs_input_grad[2] else None


@contextmanager
def faster_products(network: nn.Module) -> Iterator[None]:
    """Within it large linear layers in float32 multiply by oneDNN, on processors where that is much faster."""
    linears = ((each, own_weight(each)) for each in network.modules() if type(each) is nn.Linear)
    large = [(each, weight) for each, weight in linears if weight is not None and weight.numel() >= LARGE]
    if not large or computes_again(network) or not leads():
        yield
        return
    with ExitStack() as stack:
        for module, weight in large:
            if is_plain_linear(module) and weight.dtype == torch.float32 and weight.device.type == "cpu":
                stack.enter_context(swapped_forward(module, _linear_forward(module)))
        yield


def _linear_forward(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    own = module.forward

    def forward(x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.dim() < 2 or not x.numel() or torch.is_autocast_enabled("cpu"):
            return own(x)
        return _Linear.apply(x, module.weight, module.bias)  # type: ignore[no-any-return, no-untyped-call]

    return forward


# -- root-mean-square norms -------------------------------------------------------------------

_plain_norms: dict[type[nn.Module], bool] = {}
"""classes of norms, and whether they compute `rms_norm`"""


class _RMSNorm(torch.autograd.Function):
    """y = w x r with r = (mean x^2 + eps)^(-1/2): arXiv:1910.07467, eq. 4."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        scaled = x * inverse
        both = grad * scaled
        of_weight = both.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        share = (both @ weight)[..., None].mul_(inverse)
        return (grad * weight).mul_(inverse).addcmul_(scaled, share, value=-1 / x.shape[-1]), of_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x over its root mean square along the last axis, times the weight. [..., D]"""
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return]


@contextmanager
def fused_norms(network: nn.Module) -> Iterator[None]:
    """Within it the norms of a network on the CPU in float32 are `rms_norm`, where that is what they compute."""
    if computes_again(network):
        yield
        return
    with ExitStack() as stack:
        for module in network.modules():
            if type(module).__name__.endswith("RMSNorm") and _is_plain_norm(module):
                stack.enter_context(swapped_forward(module, _norm_forward(module)))
        yield


def _is_plain_norm(module: Any) -> bool:
    weight, eps = own_weight(module), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or not isinstance(eps, float) or "forward" in vars(module):
        return False
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.dim() != 1:
        return False
    return computes_rms_norm(type(module), eps)


def computes_rms_norm(kind: type[nn.Module], eps: float) -> bool:
    """Whether a class of norms computes `rms_norm`; it is tried once."""
    if kind not in _plain_norms:
        _plain_norms[kind] = _is_rms_norm(kind, eps)
    return _plain_norms[kind]


@torch.no_grad()
def _is_rms_norm(kind: type[nn.Module], eps: float) -> bool:
    """Asks the class with other numbers: a call of the module would gather its weights where they are sharded."""
    x, weight = torch.linspace(-1.0, 2.0, 16).view(2, 8), torch.linspace(0.5, -1.5, 8)
    try:
        theirs = kind.forward(SimpleNamespace(weight=weight, variance_epsilon=eps), x)  # type: ignore[arg-type]
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    return torch.allclose(theirs, rms_norm(x, weight, eps), rtol=1e-5, atol=1e-6)


def _norm_forward(module: Any) -> Callable[[Tensor], Tensor]:
    own = module.forward

    def forward(x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return own(x)
        return rms_norm(x, module.weight, module.variance_epsilon)

    return forward


# -- rotary position embeddings ---------------------------------------------------------------

ROTARY = "apply_rotary_pos_emb"
"""the name of the function in transformers' model files, which look it up in their own file at each call"""
Turn = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor] | None]
"""query, key, cos and sin -> both turned; None where it does not take them"""
_turning: ContextVar[Turn | None] = ContextVar("turn", default=None)
_plain_rotary: dict[Callable[..., Any], bool] = {}
"""functions of this name, and whether they compute `rotate`"""


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
    with replaced_rotary(network, _rotate_in_float32):
        yield


@contextmanager
def replaced_rotary(network: nn.Module, turn: Turn) -> Iterator[None]:
    """Within it a network turns by `turn`, where its own function is plain and `turn` takes what it is given.

    The function is replaced in the network's model files, and put back at the end; other threads keep their own.
    """
    replaced = []
    for file in {type(module).__module__ for module in network.modules()}:
        original = getattr(sys.modules.get(file), ROTARY, None)
        if original is not None and not hasattr(original, "of_trl") and _is_plain_rotary(original):
            setattr(sys.modules[file], ROTARY, _turn_or(original))
            replaced.append((file, original))
    token = _turning.set(turn)
    try:
        yield
    finally:
        _turning.reset(token)
        for file, original in replaced:
            setattr(sys.modules[file], ROTARY, original)


def _is_plain_rotary(original: Callable[..., Any]) -> bool:
    if original not in _plain_rotary:
        _plain_rotary[original] = _computes_rotate(original)
    return _plain_rotary[original]


def _computes_rotate(original: Callable[..., Any]) -> bool:
    query, key = torch.linspace(-1.0, 2.0, 48).view(1, 2, 3, 8), torch.linspace(3.0, -2.0, 24).view(1, 1, 3, 8)
    angles = torch.linspace(0.1, 3.0, 24).view(1, 3, 8)
    try:
        theirs = original(query, key, angles.cos(), angles.sin())
        ours = rotate(query, key, angles.cos(), angles.sin())
        return all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(theirs, ours, strict=True))
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False


def _turn_or(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        turn = _turning.get()
        turned = turn(q, k, cos, sin) if turn is not None and not args and not kwargs else None
        return original(q, k, cos, sin, *args, **kwargs) if turned is None else turned

    apply_rotary_pos_emb.of_trl = True  # type: ignore[attr-defined]
    return apply_rotary_pos_emb


def _rotate_in_float32(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
    return rotate(query, key, cos, sin) if _takes_rotary(query, key, cos, sin) else None


def _takes_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    plain = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in (query, key, cos, sin))
    shapes = query.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == query.shape[-1] == key.shape[-1]
    return plain and shapes and not cos.requires_grad and not torch.is_autocast_enabled("cpu")
