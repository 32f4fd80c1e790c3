"""A device that is pretended on the CPU, and what makes the host wait for it.

Tensors that a model owns, those that are moved, and those that are made with a device named are *on the device*, and
so is what is computed of them. Counted is what a GPU would stop the host for: numbers that are read, shapes that follow
from numbers, and tensors made of numbers of the host.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import trl

ROOT = str(Path(trl.__file__).parent)
aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.equal, aten.is_nonzero}
SHAPES = {
    aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount,
    aten.repeat_interleave,
}  # fmt: skip
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
TO_HOST = {Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.item, Tensor.__array__}
FROM_HOST = {torch.tensor, torch.as_tensor, Tensor.new_tensor}


class Syncs:
    """Counts them, by the line of `trl` that asks."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.counting = False
        self._there = WeakIdKeyDictionary()
        self._inside = 0

    def put(self, x: Any) -> None:
        """Say that the tensors in it are on the device."""
        for tensor in tree_leaves(x):
            if isinstance(tensor, Tensor):
                self._there[tensor.untyped_storage()] = True

    def is_there(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.untyped_storage() in self._there

    def met(self, what: str) -> None:
        if not self.counting or self._inside:
            return
        lines = [f for f in traceback.extract_stack() if f.filename.startswith(ROOT)]
        where = f"{Path(lines[-1].filename).name}:{lines[-1].lineno} {lines[-1].line}" if lines else "outside"
        self.found[f"{what} {where}"] += 1

    @contextmanager
    def counted(self, what: str) -> Iterator[None]:
        """A call that waits once, whatever it does inside."""
        self.met(what)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1


class Functions(TorchFunctionMode):
    def __init__(self, syncs: Syncs):
        super().__init__()
        self.syncs = syncs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, syncs = kwargs or {}, self.syncs
        if func in TO_HOST and syncs.is_there(args[0]):
            with syncs.counted(func.__name__):
                return func(*args, **kwargs).clone() if func is Tensor.cpu else func(*args, **kwargs)
        named = kwargs.get("device") is not None or func is Tensor.new_tensor
        if func in FROM_HOST and named and not any(map(syncs.is_there, args)):
            if not isinstance(args[-1], Tensor):
                syncs.met(func.__name__)
            result = func(*args, **kwargs)
            syncs.put(result)
            return result
        result = func(*args, **kwargs)
        if named and isinstance(result, Tensor):
            syncs.put(result)
        return result


class Operations(TorchDispatchMode):
    def __init__(self, syncs: Syncs):
        super().__init__()
        self.syncs = syncs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, syncs = kwargs or {}, self.syncs
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(map(syncs.is_there, tensors)):
            return func(*args, **kwargs)
        packet = func.overloadpacket
        indices = args[1] if packet in INDEXED else ()
        if packet in READS or (packet in SHAPES and kwargs.get("output_size") is None):
            syncs.met(packet.__name__)
        elif any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices):
            syncs.met(f"{packet.__name__} by a mask")
        result = func(*args, **kwargs)
        if packet not in READS:
            syncs.put(result)
        return result


@contextmanager
def pretended_device(monkeypatch: Any, *models: torch.nn.Module) -> Iterator[Syncs]:
    """Within it `models` are on the device, and what is for the CPU alone is left out."""
    from trl.data import records
    from trl.kernels import layers
    from trl.models import attention, scoring
    from trl.trainer import tally

    syncs, plain = Syncs(), records.TensorRecord.to
    for model in models:
        syncs.put([*model.parameters(), *model.buffers()])

    def moved(record: Any, *args: Any, **kwargs: Any) -> Any:
        result = plain(record, *args, **kwargs)
        there = {name: field.clone() for name, field in vars(result).items() if isinstance(field, Tensor)}
        syncs.put(list(there.values()))
        return replace(result, **there)

    monkeypatch.setattr(records.TensorRecord, "to", moved)
    monkeypatch.setattr(attention, "takes", lambda *qkv: False)
    monkeypatch.setattr(layers, "_is_plain_norm", lambda module: False)
    monkeypatch.setattr(layers, "_takes_rotary", lambda *tensors: False)
    monkeypatch.setattr(tally, "_is_elsewhere", syncs.is_there)
    for module in (layers, scoring):
        monkeypatch.setattr(module, "place_of", lambda weight: None)
    with ExitStack() as stack:
        stack.enter_context(Functions(syncs))
        stack.enter_context(Operations(syncs))
        yield syncs
