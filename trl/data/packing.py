"""Token trees laid end to end, and sequences packed into bins."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor

from trl.data.records import Branch, Ids, PackedBatch, Segment, TokenTree


def _flat(parts: Sequence[Ids]) -> Tensor:
    """The parts laid end to end, as integers. [N]"""
    if any(isinstance(part, Tensor) for part in parts):
        return torch.cat([torch.as_tensor(part, dtype=torch.long) for part in parts])
    return torch.tensor(list(chain.from_iterable(parts)), dtype=torch.long)


def _places(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """For parts laid end to end: which part each element belongs to, and its place in that part. [N], [N]"""
    sizes = torch.tensor(lengths, dtype=torch.long)
    part_N = torch.arange(len(sizes)).repeat_interleave(sizes)
    return part_N, torch.arange(len(part_N)) - (sizes.cumsum(0) - sizes)[part_N]


def _check(tree: TokenTree) -> None:
    for branch in tree.branches:
        if not len(tree.prompt) and not len(branch.ids):
            raise ValueError("a row of the batch is empty: it has neither prompt nor completion tokens")
        if branch.scored is not None and len(branch.scored) != len(branch.ids):
            raise ValueError(f"a branch has {len(branch.ids)} tokens but {len(branch.scored)} entries in `scored`")


class _Layout:
    """The parts of a packed batch in order: a prompt once, then its branches."""

    def __init__(self) -> None:
        self.size = 0
        self.parts: list[Ids] = []
        self.positions: list[int] = []
        """position of each part's first token in its own sequence"""
        self.segments: list[Segment] = []
        self.branches: list[Branch] = []
        self.starts: list[int] = []
        """packed index of each branch's first token"""
        self.befores: list[int] = []
        """packed index of the token that predicts it; -1: none"""
        self.row_segment: list[int] = []
        self.prompt_tokens: list[int] = []

    def _append(self, ids: Ids, position: int) -> None:
        self.parts.append(ids)
        self.positions.append(position)
        self.size += len(ids)

    def append_tree(self, tree: TokenTree) -> None:
        prompt_tokens, alone = len(tree.prompt), len(tree.branches) == 1  # a lone branch shares its prompt's segment
        parent = -1
        if prompt_tokens:
            self._append(tree.prompt, 0)
            if not alone:
                parent = self._segment(self.size - prompt_tokens, -1)
        before = self.size - 1 if prompt_tokens else -1
        for branch in tree.branches:
            start = self.size
            self._append(branch.ids, prompt_tokens)
            segment = parent
            if alone or len(branch.ids):
                segment = self._segment(start - prompt_tokens if alone else start, parent)
            self.branches.append(branch)
            self.starts.append(start)
            self.befores.append(before)
            self.row_segment.append(segment)
            self.prompt_tokens.append(prompt_tokens)

    def _segment(self, start: int, parent: int) -> int:
        self.segments.append(Segment(start, self.size, parent))
        return len(self.segments) - 1


def pack(trees: Iterable[TokenTree]) -> PackedBatch:
    """One packed batch of the trees; its rows are their branches in order. Parts may be lists or 1-d CPU tensors.

    The first token of a row without a prompt has nothing that predicts it, so it is never scored.
    """
    layout = _Layout()
    for tree in trees:
        _check(tree)
        layout.append_tree(tree)
    part_N, place_N = _places([len(part) for part in layout.parts])
    ids_N = _flat(layout.parts)
    lengths = [len(branch.ids) for branch in layout.branches]
    row_C, slot_C = _places(lengths)  # C: the tokens of all branches
    start_B, before_B, length_B = (torch.tensor(x, dtype=torch.long) for x in (layout.starts, layout.befores, lengths))
    index_C = start_B[row_C] + slot_C
    predictor_C = torch.where(slot_C == 0, before_B[row_C], index_C - 1)
    scored_C = predictor_C >= 0
    if any(branch.scored is not None for branch in layout.branches):
        masks = [[1] * len(b.ids) if b.scored is None else b.scored for b in layout.branches]
        scored_C = scored_C & (_flat(masks) > 0)
    return PackedBatch(
        ids_N=ids_N,
        position_N=torch.tensor(layout.positions, dtype=torch.long)[part_N] + place_N,
        segments=tuple(layout.segments),
        scored_S=predictor_C[scored_C],
        target_S=ids_N[index_C[scored_C]],
        row_S=row_C[scored_C],
        slot_S=slot_C[scored_C],
        last_B=torch.where(length_B > 0, start_B + length_B - 1, before_B),
        row_segment=tuple(layout.row_segment),
        prompt_tokens=tuple(layout.prompt_tokens),
        width=max(lengths, default=0),
    )


def best_fit_bins(lengths: Sequence[int] | np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """The sequences in the order of their bins, and how many each bin holds: longest first, each into the fullest bin
    that still holds it.

    Over the whole set at once; a sequence longer than `capacity` is a ValueError. Sequences of one length are placed
    together: the fullest bin takes as many as fit, then the next one does.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    if len(sizes) and sizes[order[0]] > capacity:
        index = int(order[0])
        raise ValueError(
            f"sequence {index} has {sizes[index]} tokens, more than the bin's {capacity}: truncate it first"
        )
    bin_of = np.empty(len(sizes), dtype=np.int64)
    bins = _Bins(capacity)
    edges = [0, *(np.flatnonzero(np.diff(sizes[order])) + 1).tolist(), len(sizes)]
    for start, end in pairwise(edges if len(sizes) else []):
        at, length = start, int(sizes[order[start]])
        while at < end:
            homes = bins.place(length, end - at)
            bin_of[at : at + len(homes)] = homes
            at += len(homes)
    return order[np.argsort(bin_of, kind="stable")], np.bincount(bin_of, minlength=bins.count)


class _Bins:
    """Bins by the space that is left in them."""

    def __init__(self, capacity: int):
        self.capacity, self.count = capacity, 0
        self.spaces: list[int] = []  # sorted, one entry a distinct value
        self.with_space: dict[int, list[int]] = defaultdict(list)

    def place(self, length: int, count: int) -> np.ndarray:
        """The bins that some of `count` sequences of that length go to: all that fit into bins of one space."""
        at = bisect_left(self.spaces, length)
        space = self.spaces[at] if at < len(self.spaces) else self.capacity
        each = space // length if length else count
        wanted = -(-count // each)
        if at < len(self.spaces):
            homes = self.with_space[space][: -wanted - 1 : -1]
            del self.with_space[space][-len(homes) :]
            if not self.with_space[space]:
                self.spaces.pop(at)
        else:
            homes = list(range(self.count, self.count + wanted))
            self.count += wanted
        placed = min(count, each * len(homes))
        last = placed - each * (len(homes) - 1)
        self._leave(space - each * length, homes[:-1])
        self._leave(space - last * length, homes[-1:])
        return np.repeat(homes, each)[:placed]

    def _leave(self, space: int, homes: list[int]) -> None:
        if space and homes:
            if not self.with_space[space]:
                insort(self.spaces, space)
            self.with_space[space] += homes


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the sequences in each bin, as `best_fit_bins` fills them."""
    order, sizes = best_fit_bins(lengths, capacity)
    return [bin_.tolist() for bin_ in np.split(order, np.cumsum(sizes)[:-1])] if len(sizes) else []
