"""Gradients of embeddings and heads, summed where they end: in `weight.grad`.

Autograd fills fresh memory with zeros for each such gradient, writes into it and adds it to `weight.grad`: for a
vocabulary of 32,000 the system's fresh pages alone take longer than the sums. Within `in_place` the two functions that
know better, the head's and `lookup`, add to `weight.grad` themselves, and its memory is kept from step to step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from trl.kernels.swapped_forward import stand_in

_kept: ContextVar[WeakIdKeyDictionary | None] = ContextVar("kept_gradients", default=None)
UNSHARED = 3
"""references to a tensor that only our dictionary, a local variable and the question itself hold"""


@contextmanager
def in_place(device: torch.device, processes: int) -> Iterator[None]:
    """Within it, gradients of embeddings and heads go straight to `weight.grad`: on the CPU, in a single process.

    For loops that call `backward()`: `torch.autograd.grad` would not see these gradients, nor would the hooks by which
    processes exchange theirs. A step's gradient overwrites the one before, unless somebody still holds that.
    """
    token = _kept.set(WeakIdKeyDictionary() if device.type == "cpu" and processes == 1 else None)
    try:
        yield
    finally:
        _kept.reset(token)


@dataclass(frozen=True)
class Place:
    """Where the gradient of a weight is summed."""

    weight: nn.Parameter
    kept: WeakIdKeyDictionary

    def gradient(self) -> Tensor:
        """`weight.grad`; zeros where it was None."""
        return self.uninitialised() if self.weight.grad is not None else self.uninitialised().zero_()

    def uninitialised(self) -> Tensor:
        """`weight.grad`; memory with anything in it where it was None."""
        if self.weight.grad is None:
            buffer = self.kept.get(self.weight)
            if buffer is None or sys.getrefcount(buffer) > UNSHARED:
                self.kept[self.weight] = buffer = torch.empty_like(self.weight, requires_grad=False)
            self.weight.grad = buffer
        return self.weight.grad


def place_of(weight: Tensor) -> Place | None:
    """Where a gradient of this weight may be added at once; None: it has to go the way of autograd."""
    kept = _kept.get()
    takes = kept is not None and torch.is_grad_enabled() and weight.is_leaf and weight.requires_grad
    watched = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    if kept is None or not takes or watched or not isinstance(weight, nn.Parameter) or weight.device.type != "cpu":
        return None
    return Place(weight, kept)


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
    place = place_of(embedding.weight) if type(embedding) is nn.Embedding else None
    if place is None or embedding.max_norm or embedding.scale_grad_by_freq or embedding.sparse:
        yield
        return

    def forward(ids: Tensor) -> Tensor:
        return _Lookup.apply(embedding.weight, ids, embedding.padding_idx, place)  # type: ignore[no-any-return]

    with stand_in(embedding, forward):
        yield
