"""How a packed row is cut into segments, and who sees whom."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trl.data.records import Segment


class Part(NamedTuple):
    """Queries that are computed together, and the segments whose keys they see in it."""

    start: int
    end: int
    chain: list[int]
    again: bool = False
    """the queries see more keys in an earlier part"""


class TreeLayout:
    """How the packed tokens are cut into segments, and which segments each one sees."""

    def __init__(self, segments: Sequence[Segment]):
        self.segments = tuple(segments)
        self.sizes = [end - start for start, end, _ in self.segments]
        self._masks: dict[tuple[Any, ...], Any] = {}
        self._narrow: tuple[Any, list[int]] | None = None

    def read_only_at(self, module: Any, positions: Sequence[int]) -> None:
        """Say that what this attention module computes is read at these positions only, given in ascending order."""
        skipped = []
        for start, end, _ in self.segments:
            first = bisect_left(positions, start)
            skipped.append(min(positions[first], end) - start if first < len(positions) else end - start)
        self._narrow = module, skipped

    def skipped(self, module: Any) -> list[int]:
        """How many of its first queries each segment may leave out in this attention module."""
        if self._narrow is not None and self._narrow[0] is module:
            return self._narrow[1]
        return [0] * len(self.segments)

    def parts(self, module: Any, window: int | None) -> list[Part]:
        """The attention of this module, cut so that siblings read what they share together.

        A segment sees its whole chain in one part; siblings that are computed whole see themselves in a part each, and
        what stands above them in one more. A window cuts each row's keys at a place of its own: nothing is shared then.
        """
        found, skipped = [], self.skipped(module)
        order = range(len(self.segments))
        for (parent, whole), run in groupby(order, lambda i: (self.segments[i].parent, not skipped[i])):
            siblings = list(run)
            shared = parent >= 0 and whole and window is None and len(siblings) > 1
            for index in siblings:
                start, end, _ = self.segments[index]
                found.append(Part(start + skipped[index], end, [index] if shared else self.chains[index]))
            if shared:
                start, end = self.segments[siblings[0]].start, self.segments[siblings[-1]].end
                found.append(Part(start, end, self.chains[parent], again=True))
        return [part for part in found if part.start < part.end]

    @cached_property
    def chains(self) -> list[list[int]]:
        """Each segment's ancestors from the root, then itself."""
        chains: list[list[int]] = []
        for index, segment in enumerate(self.segments):
            chains.append([*(chains[segment.parent] if segment.parent >= 0 else []), index])
        return chains

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
        """[queries, keys], True = seen; the queries are the last keys. None: plain causal, nothing to mask besides."""
        if queries == keys and (window is None or keys <= window):
            return None
        key = (queries, keys, window, device)
        if key not in self._masks:
            seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
            self._masks[key] = seen if window is None else seen.triu(keys - queries - window + 1)
        return self._masks[key]

    def bias(self, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor | None:
        """`mask` as numbers to add: 0 where seen, -inf elsewhere, of the kind of `like`."""
        seen = self.mask(queries, keys, window, like.device)
        if seen is None:
            return None
        key = ("bias", queries, keys, window, like.device, like.dtype)
        if key not in self._masks:
            self._masks[key] = like.new_zeros(queries, keys).masked_fill_(~seen, float("-inf"))
        return self._masks[key]

    def dense_mask(self, window: int | None = None) -> Tensor:
        """[N, N], True = seen: the same rule written out, for FlexAttention's blocks and for tests."""
        total = self.segments[-1].end
        seen = torch.zeros(total, total, dtype=torch.bool)
        for index, (start, end, _) in enumerate(self.segments):
            columns = [i for link in self.chains[index] for i in range(*self.segments[link][:2])]
            rows = torch.ones(end - start, len(columns), dtype=torch.bool).tril(len(columns) - (end - start))
            if window is not None:
                rows = rows.triu(len(columns) - (end - start) - window + 1)
            seen[start:end, columns] = rows
        return seen
