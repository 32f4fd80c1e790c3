"""Keys and values of the captured engine, in pages: a prompt's once for all its rows, a row's own as they come.

Shape letters: L layer, N tokens, H key/value heads, D head width, C pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trl.data.records import Completion
from trl.generation.kv_cache import Prompt
from trl.generation.rows import Row
from trl.kernels.paged_attention import PAGE

SHARE = 0.8
"""of the free memory of a device that pages may take"""
NOWHERE = 0
"""the page into which rows write that do not run"""


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE)


class Pages:
    """The pages of all layers, of which the same numbers are free in each."""

    def __init__(self, kept: dict[int, tuple[Tensor, Tensor]], wanted: int):
        """kept: each layer's keys and values of some tokens, [H, N, D], which say what a page holds. wanted: pages."""
        one = sum(PAGE * x.shape[0] * x.shape[2] * x.element_size() for pair in kept.values() for x in pair)
        self.count = 1 + min(wanted, self.most(one, next(iter(kept.values()))[0].device))
        self.layers = {
            layer: tuple(x.new_zeros(self.count, PAGE, x.shape[0], x.shape[2]) for x in pair)
            for layer, pair in kept.items()
        }
        self._free = list(range(self.count - 1, NOWHERE, -1))
        self.promised = 0
        """pages that running rows will still ask for"""

    @staticmethod
    def most(size: int, device: torch.device) -> int:
        """How many pages of so many bytes there is room for."""
        if device.type != "cuda":
            return 2**62
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((free + unused) * SHARE) // size

    @property
    def unpromised(self) -> int:
        """Pages that nobody has or will ask for."""
        return len(self._free) - self.promised

    def take(self, count: int) -> list[int]:
        """So many pages, none of which is in use."""
        assert count <= len(self._free), "more pages than were promised"
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: Sequence[int]) -> None:
        self._free.extend(pages)

    def write(self, kept: dict[int, tuple[Tensor, Tensor]], source_N: Tensor, target_N: Tensor) -> None:
        """Copy tokens of a pass to places in pages: page times PAGE plus the place in it."""
        for layer, pair in kept.items():
            for store, new_HND in zip(self.layers[layer], pair, strict=True):
                store.view(-1, *store.shape[2:])[target_N] = new_HND.transpose(0, 1)[source_N].to(store.dtype)


@dataclass(eq=False)
class PagedPrompt(Prompt):
    """A prompt whose keys and values lie in pages."""

    pages: list[int] = field(default_factory=list)


@dataclass(eq=False)
class PagedRow:
    """A row that runs: its pages, and the prompt that it continues."""

    row: Row
    prompt: PagedPrompt
    pages: list[int] = field(default_factory=list)

    @property
    def added(self) -> int:
        """Its tokens in the cache: the last one is not there yet."""
        return len(self.row.ids) - 1

    @property
    def owed(self) -> int:
        """Pages that it will still ask for."""
        return pages_for(self.row.limit) - len(self.pages)

    def completion(self) -> Completion:
        return self.row.completion()
