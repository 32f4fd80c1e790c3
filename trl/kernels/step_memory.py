"""Memory of a training loop: on the CPU what it keeps from step to step, on a GPU what it holds in main memory.

Gradients of embeddings and heads are summed in `weight.grad`, without a tensor in between. Autograd fills fresh memory
with zeros for each of them, writes into it and adds it to `weight.grad`; for a vocabulary of 32,000 the system's fresh
pages alone take longer than the sums. Within `in_place` the head and the embedding add to `weight.grad` themselves.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

_kept: ContextVar[WeakIdKeyDictionary | None] = ContextVar("kept_gradients", default=None)
_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)


@contextmanager
def in_place(device: torch.device, processes: int, hooked: bool = False) -> Iterator[None]:
    """Within it, gradients of embeddings and heads go straight to `weight.grad`: on the CPU, in a single process.

    For loops that call `backward()`: `torch.autograd.grad` would not see these gradients, nor would the hooks by which
    processes exchange theirs. A step's gradient overwrites the last one, unless somebody still holds its memory.
    hooked: an engine waits for gradients even in a single process (DeepSpeed), so nothing is done.
    """
    takes = device.type == "cpu" and processes == 1 and not hooked
    token = _kept.set(WeakIdKeyDictionary() if takes else None)
    try:
        yield
    finally:
        _kept.reset(token)


class Memory:
    """The memory of a weight's gradient, kept from step to step."""

    def __init__(self, like: Tensor):
        self.tensor = torch.empty_like(like, requires_grad=False)
        self._storage = self.tensor.untyped_storage()._cdata
        self._alone = self._uses()
        self._handles = self._python_handles()

    def is_held(self) -> bool:
        """Whether anybody else uses it: a gradient, a view, an array, its storage; True where torch cannot say."""
        return _use_count is None or self._uses() > self._alone or self._python_handles() > self._handles

    def _uses(self) -> int:
        return 0 if _use_count is None else int(_use_count(self._storage))

    def _python_handles(self) -> int:
        """Those who hold the storage itself, which is one object in Python and does not count as a use."""
        return sys.getrefcount(self.tensor.untyped_storage())


@dataclass(frozen=True)
class Place:
    """Where the gradient of a weight is summed."""

    weight: nn.Parameter
    kept: WeakIdKeyDictionary
    """the `Memory` of each weight"""

    def gradient(self) -> Tensor:
        """`weight.grad`; zeros where it was None."""
        return self.uninitialised() if self.weight.grad is not None else self.uninitialised().zero_()

    def uninitialised(self) -> Tensor:
        """`weight.grad`; where it was None, memory that holds any numbers."""
        if self.weight.grad is None:
            memory = self.kept.get(self.weight)
            if memory is None or memory.is_held():
                self.kept[self.weight] = memory = Memory(self.weight)
            self.weight.grad = memory.tensor.detach()
        return self.weight.grad


def place_of(weight: Tensor) -> Place | None:
    """Where a gradient of this weight may be added at once; None: it has to go the way of autograd."""
    kept = _kept.get()
    takes = kept is not None and torch.is_grad_enabled() and weight.is_leaf and weight.requires_grad
    watched = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    if kept is None or not takes or watched or not isinstance(weight, nn.Parameter) or weight.device.type != "cpu":
        return None
    return Place(weight, kept)


# -- freed memory -----------------------------------------------------------------------------

# parameters of `mallopt`, from glibc's malloc.h, and the values that its thresholds reach after a few large tensors
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST_IN_HEAP, TRIMMED_BEYOND = 2**25, 2**26
KEPT = 2**30


@cache
def _mallopt() -> Any:
    """glibc's `mallopt`; None with another C library, and where the environment has set the allocator up."""
    set_up = any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ)
    if sys.platform != "linux" or set_up or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return None
    return getattr(ctypes.CDLL(None), "mallopt", None)


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Within it glibc keeps freed memory for the next tensor instead of giving it back to the system.

    A fresh page costs more than most of what is done with it: without this a step of DPO takes about 5 % more time.
    Tensors above 32 MiB still come from the system, because aligned blocks of that size would make glibc's heap grow
    with every step. Nothing changes for other devices, C libraries and allocators.
    """
    mallopt = _mallopt() if device.type == "cpu" else None
    if mallopt is None:
        yield
        return
    mallopt(MMAP_THRESHOLD, LARGEST_IN_HEAP)
    mallopt(TRIM_THRESHOLD, KEPT)
    try:
        yield
    finally:
        mallopt(TRIM_THRESHOLD, TRIMMED_BEYOND)


# -- activations in main memory ---------------------------------------------------------------

APART = frozenset({"cuda", "xpu", "npu"})
"""kinds of devices whose memory is not main memory"""
LEAST_MOVED = 2**20
"""bytes of the smallest tensor that is moved"""


class _Moved:
    """A tensor that lies in main memory, and comes back to its device when the backward pass reads it."""

    def __init__(self, tensor: Tensor):
        self.device, self.kept = tensor.device, torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self.kept.copy_(tensor, non_blocking=tensor.is_cuda)
        self._back: Any = None

    def back(self) -> Tensor:
        """The tensor on its device; whoever asks while another one holds it gets the same."""
        found = None if self._back is None else self._back()
        if found is None:
            found = torch.empty_like(self.kept, device=self.device)
            found.copy_(self.kept, non_blocking=True)
            self._back = ref(found)
        return found


class Offload:
    """What autograd saves for the backward pass, but weights and small tensors, lies in main memory until then."""

    def __init__(self, weights: Iterable[Tensor], least: int | None = None):
        self.least, self.bytes = LEAST_MOVED if least is None else least, 0
        """bytes: how many were moved so far"""
        shapes = {tuple(weight.shape) for weight in weights}
        self._weights = shapes | {shape[::-1] for shape in shapes}  # autocast's copies have them too
        self._known: dict[Any, tuple[StorageWeakRef, _Moved]] = {}

    def pack(self, tensor: Tensor) -> Any:
        """The tensor, or where it lies now; several views of one tensor lie there once."""
        size = tensor.numel() * tensor.element_size()
        if tensor.device.type not in APART or size < self.least or tuple(tensor.shape) in self._weights:
            return tensor
        storage = StorageWeakRef(tensor.untyped_storage())
        key = storage.cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version
        known = self._known.get(key)
        if known is not None and not known[0].expired():
            return known[1]
        self._known = {key: pair for key, pair in self._known.items() if not pair[0].expired()}
        moved = _Moved(tensor.detach())
        self._known[key] = storage, moved
        self.bytes += size
        return moved

    @staticmethod
    def unpack(packed: Any) -> Tensor:
        """The tensor on its device."""
        return packed.back() if isinstance(packed, _Moved) else packed  # type: ignore[no-any-return]

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within it forward passes move what they save."""
        with saved_tensors_hooks(self.pack, self.unpack):
            yield
