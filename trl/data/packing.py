"""Token trees laid end to end, and sequences packed into bins."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain, groupby, pairwise
from operator import itemgetter
from typing import Any, NamedTuple

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
    """Where the parts of a packed batch lie: a prompt once, then its branches."""

    def __init__(self) -> None:
        self.size = 0
        self.segments: list[Segment] = []
        self.lengths: list[int] = []
        """tokens of each branch"""
        self.starts: list[int] = []
        """packed index of each branch's first token"""
        self.befores: list[int] = []
        """packed index of the token that predicts it; -1: none"""
        self.row_segment: list[int] = []
        self.prompt_tokens: list[int] = []

    def append_tree(self, prompt_tokens: int, lengths: Sequence[int]) -> None:
        alone, parent = len(lengths) == 1, -1  # a lone branch shares its prompt's segment
        self.size += prompt_tokens
        if prompt_tokens and not alone:
            parent = self._segment(self.size - prompt_tokens, -1)
        before = self.size - 1 if prompt_tokens else -1
        for length in lengths:
            start = self.size
            self.size += length
            segment = parent
            if alone or length:
                segment = self._segment(start - prompt_tokens if alone else start, parent)
            self.lengths.append(length)
            self.starts.append(start)
            self.befores.append(before)
            self.row_segment.append(segment)
            self.prompt_tokens.append(prompt_tokens)

    def _segment(self, start: int, parent: int) -> int:
        self.segments.append(Segment(start, self.size, parent))
        return len(self.segments) - 1

    def predictors(self, row_S: Tensor, slot_S: Tensor) -> Tensor:
        """Packed index of the token that predicts each of these; -1: none. [S]"""
        start_B, before_B = (torch.tensor(x, dtype=torch.long) for x in (self.starts, self.befores))
        return torch.where(slot_S == 0, before_B[row_S], start_B[row_S] + slot_S - 1)

    def batch(self, **columns: Any) -> PackedBatch:
        """The batch, given its tensors."""
        places = zip(self.starts, self.lengths, self.befores, strict=True)
        return PackedBatch(
            segments=tuple(self.segments),
            last_B=torch.tensor([start + n - 1 if n else before for start, n, before in places], dtype=torch.long),
            row_segment=tuple(self.row_segment),
            prompt_tokens=tuple(self.prompt_tokens),
            width=max(self.lengths, default=0),
            **columns,
        )


def pack(trees: Iterable[TokenTree]) -> PackedBatch:
    """One packed batch of the trees; its rows are their branches in order. Parts may be lists or 1-d CPU tensors.

    The first token of a row without a prompt has nothing that predicts it, so it is never scored.
    """
    layout = _Layout()
    parts: list[Ids] = []
    positions: list[int] = []  # of each part's first token in its own sequence
    branches: list[Branch] = []
    for tree in trees:
        _check(tree)
        layout.append_tree(len(tree.prompt), [len(branch.ids) for branch in tree.branches])
        parts += [tree.prompt, *(branch.ids for branch in tree.branches)]
        positions += [0, *(len(tree.prompt) for _ in tree.branches)]
        branches += tree.branches
    part_N, place_N = _places([len(part) for part in parts])
    ids_N = _flat(parts)
    row_C, slot_C = _places(layout.lengths)  # C: the tokens of all branches
    predictor_C = layout.predictors(row_C, slot_C)
    scored_C = predictor_C >= 0
    if any(branch.scored is not None for branch in branches):
        masks = [[1] * len(b.ids) if b.scored is None else b.scored for b in branches]
        scored_C = scored_C & (_flat(masks) > 0)
    row_S, slot_S = row_C[scored_C], slot_C[scored_C]
    return layout.batch(
        ids_N=ids_N,
        position_N=torch.tensor(positions, dtype=torch.long)[part_N] + place_N,
        scored_S=predictor_C[scored_C],
        target_S=ids_N[torch.tensor(layout.starts, dtype=torch.long)[row_S] + slot_S],
        row_S=row_S,
        slot_S=slot_S,
    )


class PackedRow(NamedTuple):
    """A row that was packed alone: what `join` puts a batch together from."""

    prompt_tokens: int
    ids_N: Tensor
    position_N: Tensor
    target_S: Tensor
    slot_S: Tensor


def rows_alone(trees: Sequence[TokenTree]) -> list[PackedRow]:
    """Each tree, which has one branch, packed; all in one pass, of which the rows are slices."""
    packed = pack(trees)
    sizes = [len(tree.prompt) + len(tree.branches[0].ids) for tree in trees]
    scored = packed.row_S.bincount(minlength=len(trees)).tolist()
    return list(
        map(PackedRow, packed.prompt_tokens, packed.ids_N.split(sizes), packed.position_N.split(sizes),
            packed.target_S.split(scored), packed.slot_S.split(scored))
    )  # fmt: skip


def join(rows: Sequence[PackedRow], groups: Sequence[int]) -> PackedBatch:
    """What `pack` makes of the rows, one tree for each run of equal `groups`: those rows have the same prompt."""
    layout = _Layout()
    cuts: list[int] = []  # where the part of each row begins that is its own
    for _, run in groupby(zip(groups, rows, strict=True), key=itemgetter(0)):
        tree = [row for _, row in run]
        prompt_tokens = tree[0].prompt_tokens
        layout.append_tree(prompt_tokens, [len(row.ids_N) - prompt_tokens for row in tree])
        cuts += [0, *(prompt_tokens for _ in tree[1:])]
    slot_S = torch.cat([row.slot_S for row in rows])
    row_S = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row.slot_S) for row in rows]))
    return layout.batch(
        ids_N=torch.cat([row.ids_N[cut:] for row, cut in zip(rows, cuts, strict=True)]),
        position_N=torch.cat([row.position_N[cut:] for row, cut in zip(rows, cuts, strict=True)]),
        scored_S=layout.predictors(row_S, slot_S),
        target_S=torch.cat([row.target_S for row in rows]),
        row_S=row_S,
        slot_S=slot_S,
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
