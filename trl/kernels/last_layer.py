"""The last layer at the positions that somebody reads: of the others only keys and values are needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trl.kernels.swapped_forward import stand_in


@dataclass(frozen=True)
class LastLayer:
    """The modules of a decoder's last layer that work on each position by itself, and its attention."""

    by_position: tuple[nn.Module, ...]
    attention: nn.Module | None


def last_layer(network: nn.Module) -> LastLayer | None:
    """The last decoder layer; None where it has no `mlp`, or its activations are computed again later, when the
    positions are no longer known."""
    layer: Any = None
    for module in network.modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module)
            and isinstance(getattr(module[-1], "mlp", None), nn.Module)
        ):
            layer = module[-1]
    if layer is None or getattr(layer, "gradient_checkpointing", False):
        return None
    attention = getattr(layer, "self_attn", None)
    projections: list[Any] = [getattr(attention, name, None) for name in ("q_proj", "o_proj")]
    if not all(isinstance(projection, nn.Module) for projection in projections):
        return LastLayer((layer.mlp,), None)
    return LastLayer((layer.mlp, *projections), attention)


def _narrowed(module: nn.Module, positions: Tensor, total: int) -> Any:
    whole = module.forward

    def narrow(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        part = whole(hidden.index_select(1, positions), *args, **kwargs)
        if not isinstance(part, Tensor):
            raise TypeError(f"{type(module).__name__} returns {type(part).__name__}, not one tensor")
        return part.new_zeros(1, total, part.shape[-1]).index_copy(1, positions, part)

    return narrow


@contextmanager
def only_at(modules: tuple[nn.Module, ...], positions: Tensor, total: int) -> Iterator[None]:
    """Within it the modules compute a packed row [1, N, D] at these positions only; elsewhere they answer 0."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(stand_in(module, _narrowed(module, positions, total)))
        yield
