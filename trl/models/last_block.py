"""The last layer's feed-forward block at the positions that somebody reads: the others end in nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

WORTH_IT = 0.9
"""share of the positions above which all of them are computed"""


def last_block(network: nn.Module) -> nn.Module | None:
    """The `mlp` of the last decoder layer; None where it has no such name, or its activations are computed again
    later, when the positions are no longer known."""
    layer = None
    for module in network.modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module)
            and isinstance(getattr(module[-1], "mlp", None), nn.Module)
        ):
            layer = module[-1]
    if layer is None or getattr(layer, "gradient_checkpointing", False):
        return None
    block = layer.mlp
    return block if isinstance(block, nn.Module) else None


@contextmanager
def only_at(block: nn.Module | None, index_S: Tensor, total: int) -> Iterator[None]:
    """Within it the block computes a packed row [1, N, D] at these positions only; elsewhere it answers 0."""
    positions = index_S.unique()
    if block is None or len(positions) > WORTH_IT * total:
        yield
        return
    whole = block.forward

    def narrow(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        part = whole(hidden.index_select(1, positions), *args, **kwargs)
        if not isinstance(part, Tensor):
            raise TypeError(f"{type(block).__name__} returns {type(part).__name__}, not one tensor")
        return part.new_zeros(1, total, part.shape[-1]).index_copy(1, positions, part)

    own = block.__dict__.get("forward")
    block.forward = narrow  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own  # type: ignore[method-assign]
