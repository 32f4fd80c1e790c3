"""Token trees laid end to end, and sequences packed into bins."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import takewhile

import torch

from trl.data.records import Branch, PackedBatch, Segment, TokenTree


def shared_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all sequences have in common."""
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False)))


def tree_from_sequences(sequences: Sequence[Sequence[int]], scored: Sequence[Sequence[int]] | None = None) -> TokenTree:
    """Whole sequences as branches below their longest common prefix, whose tokens are then scored in no branch.

    `scored` masks the whole sequences; the prefix ends before the first token that any of them scores.
    """
    prefix = shared_prefix(sequences)
    if scored is not None:
        prefix = min([prefix, *(next((i for i, s in enumerate(mask) if s), prefix) for mask in scored)])
    branches = [
        Branch(ids=ids[prefix:], scored=None if scored is None else scored[row][prefix:])
        for row, ids in enumerate(sequences)
    ]
    return TokenTree(prompt=sequences[0][:prefix], branches=branches)


class _Layout:
    """The growing lists of a packed batch."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.position: list[int] = []
        self.segments: list[Segment] = []
        self.scored: list[int] = []
        self.target: list[int] = []
        self.row: list[int] = []
        self.slot: list[int] = []
        self.last: list[int] = []
        self.row_segment: list[int] = []
        self.prompt_tokens: list[int] = []

    def append_segment(self, ids: Sequence[int], first_position: int, parent: int) -> int:
        start = len(self.ids)
        self.ids += ids
        self.position += range(first_position, first_position + len(ids))
        self.segments.append(Segment(start, start + len(ids), parent))
        return len(self.segments) - 1

    def append_row(self, branch: Branch, start: int, before: int, segment: int, prompt_tokens: int) -> None:
        """A row whose branch stands at packed index `start`; its first token is predicted at `before` (-1: nowhere)."""
        row = len(self.row_segment)
        for slot, token in enumerate(branch.ids):
            predictor = before if slot == 0 else start + slot - 1
            if predictor >= 0 and (branch.scored is None or branch.scored[slot]):
                self.scored.append(predictor)
                self.target.append(token)
                self.row.append(row)
                self.slot.append(slot)
        self.last.append(start + len(branch.ids) - 1 if len(branch.ids) else before)
        self.row_segment.append(segment)
        self.prompt_tokens.append(prompt_tokens)

    def append_tree(self, tree: TokenTree) -> None:
        prompt = list(tree.prompt)
        if len(tree.branches) == 1:  # nothing to share: one causal segment
            segment = self.append_segment(prompt + list(tree.branches[0].ids), 0, -1)
            start = self.segments[segment].start + len(prompt)
            self.append_row(tree.branches[0], start, start - 1 if prompt else -1, segment, len(prompt))
            return
        parent = self.append_segment(prompt, 0, -1) if prompt else -1
        before = len(self.ids) - 1 if prompt else -1
        for branch in tree.branches:
            start = len(self.ids)
            segment = self.append_segment(branch.ids, len(prompt), parent) if len(branch.ids) else parent
            self.append_row(branch, start, before, segment, len(prompt))


def pack(trees: Iterable[TokenTree]) -> PackedBatch:
    """One packed batch of the trees; its rows are their branches in order.

    The first token of a row without a prompt has nothing that predicts it, so it is never scored.
    """
    layout = _Layout()
    widths = [0]
    for tree in trees:
        for branch in tree.branches:
            if not len(tree.prompt) and not len(branch.ids):
                raise ValueError("a row of the batch is empty: it has neither prompt nor completion tokens")
            if branch.scored is not None and len(branch.scored) != len(branch.ids):
                raise ValueError(f"a branch has {len(branch.ids)} tokens but {len(branch.scored)} entries in `scored`")
            widths.append(len(branch.ids))
        layout.append_tree(tree)
    return PackedBatch(
        ids_N=torch.tensor(layout.ids, dtype=torch.long),
        position_N=torch.tensor(layout.position, dtype=torch.long),
        segments=tuple(layout.segments),
        scored_S=torch.tensor(layout.scored, dtype=torch.long),
        target_S=torch.tensor(layout.target, dtype=torch.long),
        row_S=torch.tensor(layout.row, dtype=torch.long),
        slot_S=torch.tensor(layout.slot, dtype=torch.long),
        last_B=torch.tensor(layout.last, dtype=torch.long),
        row_segment=tuple(layout.row_segment),
        prompt_tokens=tuple(layout.prompt_tokens),
        width=max(widths),
    )


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the sequences in each bin: longest first, each into the fullest bin that still holds it.

    Over the whole set at once; a sequence longer than `capacity` is a ValueError.
    """
    bins: list[list[int]] = []
    spaces: list[int] = []  # sorted free spaces, one entry a distinct value
    with_space: dict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"sequence {index} has {length} tokens, more than the bin's {capacity}: truncate it first")
        at = bisect_left(spaces, length)
        if at < len(spaces):
            space = spaces[at]
            home = with_space[space].pop()
            if not with_space[space]:
                spaces.pop(at)
        else:
            space, home = capacity, len(bins)
            bins.append([])
        bins[home].append(index)
        left = space - length
        if left and not with_space[left]:
            insort(spaces, left)
        if left:
            with_space[left].append(home)
    return bins
