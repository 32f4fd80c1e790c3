"""Keys and values of the local engine: a prompt's are stored once for all its rows, a row's own grow in place.

Nothing is concatenated. `PromptBlock` holds prompts of similar length, `Suffixes` the tokens that rows have added,
sampled or not: a tool's answer is appended like any other token.
Shape letters: L layer, P prompt slot, R row slot, H key/value heads, N tokens, D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

_SHORTEST = 64


@dataclass(eq=False, slots=True)
class Prompt:
    """A prompt in the cache, and the rows that continue it."""

    ids: Sequence[int]
    """those of its pictures are negative, see `data.pictures`"""
    axes_AN: Tensor | None = None
    """positions of its tokens where those of a picture have axes; None: their places"""
    rows: list[int] = field(default_factory=list)
    """slots of the running rows"""
    waiting: int = 0
    """rows that have not started yet"""
    logits_V: Tensor | None = None
    """logits of the first token; kept while rows wait"""

    @property
    def ahead(self) -> int:
        """How far the positions of tokens that follow are from their places: a picture counts by its longest side."""
        return 0 if self.axes_AN is None else int(self.axes_AN.max()) + 1 - len(self.ids)


class PromptBlock:
    """Keys and values of prompts that are padded to one length: [P, H, length, D] a layer."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.prompts: list[Prompt] = []
        self._stores: dict[int, tuple[Tensor, Tensor]] = {}
        self._room = 0

    def add(self, prompt: Prompt, expected: int) -> int:
        """Give a prompt a slot. `expected`: number of prompts that this call and the next ones will add."""
        self.prompts.append(prompt)
        if len(self.prompts) > self._room:
            self._room = max(len(self.prompts) + expected - 1, self._room * 3 // 2)
        return len(self.prompts) - 1

    def remove(self, prompt: Prompt) -> None:
        """Free a prompt's slot: the last one moves there."""
        slot, last = self.prompts.index(prompt), len(self.prompts) - 1
        if slot != last:
            for keys, values in self._stores.values():
                keys[slot].copy_(keys[last])
                values[slot].copy_(values[last])
            self.prompts[slot] = self.prompts[last]
        self.prompts.pop()

    def write(self, layer: int, slot: int, keys_HND: Tensor, values_HND: Tensor) -> None:
        keys, values = self._store(layer, keys_HND, values_HND)
        keys[slot, :, : keys_HND.shape[1]] = keys_HND
        values[slot, :, : values_HND.shape[1]] = values_HND

    def read(self, layer: int, width: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all prompts, up to the longest of them: [P, H, width, D]."""
        keys, values = self._stores[layer]
        return keys[: len(self.prompts), :, :width], values[: len(self.prompts), :, :width]

    def _store(self, layer: int, keys_HND: Tensor, values_HND: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self._stores or len(self._stores[layer][0]) < self._room:
            old = self._stores.get(layer, (None, None))
            self._stores[layer] = (
                _grown(old[0], keys_HND, self._room, self.length),
                _grown(old[1], values_HND, self._room, self.length),
            )
        return self._stores[layer]


class Prompts:
    """All prompts in the cache, in blocks of similar length: attention over padding costs at most a factor of two."""

    def __init__(self) -> None:
        self._blocks: dict[int, PromptBlock] = {}
        self._home: dict[Prompt, PromptBlock] = {}

    @property
    def blocks(self) -> list[PromptBlock]:
        return [block for block in self._blocks.values() if block.prompts]

    def add(self, prompts: Sequence[Prompt]) -> list[tuple[PromptBlock, int]]:
        """The block and slot of each new prompt."""
        lengths = [_rounded(len(prompt.ids)) for prompt in prompts]
        places = []
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            block = self._blocks.setdefault(length, PromptBlock(length))
            self._home[prompt] = block
            places.append((block, block.add(prompt, lengths[index:].count(length))))
        return places

    def remove(self, prompt: Prompt) -> None:
        block = self._home.pop(prompt)
        block.remove(prompt)
        if not block.prompts:
            del self._blocks[block.length]


class Suffixes:
    """Keys and values that rows have added to their prompts: [R, H, length, D] a layer, `lengths[r]` filled."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self._stores: dict[int, tuple[Tensor, Tensor]] = {}
        self._rows = self._length = 0

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def reserve(self, rows: int, length: int) -> None:
        """Make room for that many rows of that length; must precede `write`. It grows by doubling."""
        if rows > self._rows:
            self._rows = max(rows, min(2 * self._rows, rows + 64))
        if length > self._length:
            self._length = max(length, 2 * self._length, 16)

    def add(self) -> int:
        """The slot of a new row."""
        self.lengths.append(0)
        return len(self.lengths) - 1

    def remove(self, slot: int) -> None:
        """Free a slot: the last row moves there."""
        last = len(self.lengths) - 1
        if slot != last:
            filled = self.lengths[last]
            for keys, values in self._stores.values():
                keys[slot, :, :filled] = keys[last, :, :filled]
                values[slot, :, :filled] = values[last, :, :filled]
            self.lengths[slot] = filled
        self.lengths.pop()

    def write(self, layer: int, row_N: Tensor, place_N: Tensor, keys_NHD: Tensor, values_NHD: Tensor) -> None:
        """Token n belongs to row `row_N[n]` and becomes its `place_N[n]`-th."""
        keys, values = self._store(layer, keys_NHD.transpose(0, 1), values_NHD.transpose(0, 1))
        keys[row_N, :, place_N] = keys_NHD.to(keys.dtype)
        values[row_N, :, place_N] = values_NHD.to(values.dtype)

    def read(self, layer: int, width: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows: [R, H, width, D]."""
        keys, values = self._stores[layer]
        return keys[: len(self.lengths), :, :width], values[: len(self.lengths), :, :width]

    def _store(self, layer: int, keys_HND: Tensor, values_HND: Tensor) -> tuple[Tensor, Tensor]:
        held = self._stores.get(layer)
        if held is None or held[0].shape[0] < self._rows or held[0].shape[2] < self._length:
            old = held or (None, None)
            held = self._stores[layer] = (
                _grown(old[0], keys_HND, self._rows, self._length),
                _grown(old[1], values_HND, self._rows, self._length),
            )
        return held


def _grown(old: Tensor | None, like_HND: Tensor, rows: int, length: int) -> Tensor:
    """A larger store with the old content. The rest is zero: attention multiplies it by zero, so it must be finite."""
    grown = like_HND.new_zeros(rows, like_HND.shape[0], length, like_HND.shape[2])
    if old is not None:
        grown[: old.shape[0], :, : old.shape[2]] = old
    return grown


def _rounded(length: int) -> int:
    return max(_SHORTEST, 1 << (length - 1).bit_length())
