"""Context parallelism: several ranks compute one packed row together, each the positions that it holds.

Embeddings, layers and the head see a rank's own positions alone. Attention needs the keys and values of all of them
(`gathered`), and what is read of a pass is summed over the ranks (`summed`), so that each has the whole of it and
computes the same loss. Gradients of weights are then those of the own positions, and their sum over the ranks is whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trl.data.records import PackedBatch, Segment
from trl.kernels.block_mask import BLOCK


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a packed row of N positions: two runs of N / (2 ranks), one of the head and one of the tail.

    A causal row's tail sees more keys than its head, so all ranks have about as much to do.
    """

    group: Any
    """the ranks' process group"""
    rank: int
    ranks: int
    total: int
    """N"""

    @property
    def run(self) -> int:
        """Positions of a run."""
        return self.total // (2 * self.ranks)

    @property
    def starts(self) -> tuple[int, int]:
        """The first positions of the two runs."""
        return self.rank * self.run, (2 * self.ranks - 1 - self.rank) * self.run

    def holds(self, position: int) -> bool:
        """Whether this rank computes the position."""
        return any(start <= position < start + self.run for start in self.starts)

    def positions(self, device: Any) -> Tensor:
        """The positions that are held, in their order here. [n]"""
        return torch.cat([torch.arange(start, start + self.run, device=device) for start in self.starts])

    def places(self, index_S: Tensor) -> tuple[Tensor, Tensor]:
        """Which of these positions are held, and where in the order of here. [S] bool, [held]"""
        run = index_S // max(self.run, 1)
        head, tail = run == self.rank, run == 2 * self.ranks - 1 - self.rank
        here = index_S % max(self.run, 1) + tail * self.run
        return head | tail, here[head | tail]

    def gathered(self, *held: Tensor) -> tuple[Tensor, ...]:
        """Keys, values and the like of all positions, of those that are held; differentiable. [1, H, n, D] each"""
        return _Gathered.apply(self, *held)  # type: ignore[no-any-return, no-untyped-call]

    def whole(self, held_nD: Tensor) -> Tensor:
        """The numbers of all positions, for a term of the loss that every rank computes; differentiable. [N, D]"""
        return _Whole.apply(held_nD, self)  # type: ignore[no-any-return, no-untyped-call]

    def summed(self, part: Tensor) -> Tensor:
        """The sum over the ranks, for a loss that every rank computes; differentiable."""
        return _Summed.apply(part, self)  # type: ignore[no-any-return, no-untyped-call]

    def in_order(self, held_nD: Tensor) -> Tensor:
        """The rows of all ranks in the order of the packed row. [N, D]"""
        ranks_ND = held_nD.new_empty(self.total, held_nD.shape[1])
        dist.all_gather_into_tensor(ranks_ND, held_nD.contiguous(), group=self.group)
        runs = ranks_ND.view(self.ranks, 2, self.run, -1)
        return torch.cat([runs[:, 0], runs[:, 1].flip(0)]).view(self.total, -1)

    def summed_own(self, of_all_ND: Tensor) -> Tensor:
        """Of the sum of all ranks' rows those that are held: the transpose of `in_order`. [n, D]"""
        runs = of_all_ND.view(2, self.ranks, self.run, -1)
        by_rank = torch.stack([runs[0], runs[1].flip(0)], 1).view(self.total, -1)
        own_nD = by_rank.new_empty(2 * self.run, by_rank.shape[1])
        dist.reduce_scatter_tensor(own_nD, by_rank, group=self.group)
        return own_nD


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, piece: Piece, *held: Tensor) -> tuple[Tensor, ...]:
        ctx.piece, ctx.shapes = piece, [(x.shape[1], x.shape[3]) for x in held]
        flat_ND = piece.in_order(torch.cat([_by_position(x) for x in held], 1))
        return _by_head(flat_ND, ctx.shapes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        own_nD = ctx.piece.summed_own(torch.cat([_by_position(grad) for grad in grads], 1))
        return None, *_by_head(own_nD, ctx.shapes)


def _by_position(x: Tensor) -> Tensor:
    """[1, H, n, D] as [n, H * D]"""
    return x.squeeze(0).transpose(0, 1).flatten(1)


def _by_head(flat_ND: Tensor, shapes: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    parts = flat_ND.split([heads * width for heads, width in shapes], 1)
    return tuple(part.unflatten(1, shape).transpose(0, 1)[None] for part, shape in zip(parts, shapes, strict=True))


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, held_nD: Tensor, piece: Piece) -> Tensor:
        ctx.piece = piece
        return piece.in_order(held_nD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.piece.positions(grad.device)], None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, piece: Piece) -> Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=piece.group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None  # each rank's own loss is the whole loss


def own_part(packed: PackedBatch, group: Any, unit: int | None = None) -> PackedBatch:
    """What this rank of the group computes of a batch that all of them have; made once a batch, on the host.

    Its ids, positions and scored tokens are those that are held; its rows, and so `[B, T]`, are those of the whole.
    A few tokens that belong to no row fill the packed row up, so that each run is a multiple of `unit`; by default of
    the blocks that a GPU computes, elsewhere of one token.
    """
    ranks, rank, device = dist.get_world_size(group), dist.get_rank(group), packed.ids_N.device
    unit = unit or (BLOCK if device.type == "cuda" else 1)
    key = ("own part", rank, ranks, unit, device)
    if key not in packed.kept:
        part = _part(packed.kept.get("host", packed), group, rank, ranks, unit)
        packed.kept[key] = part if part.ids_N.device == device else part.to(device)
    return packed.kept[key]  # type: ignore[no-any-return]


def _part(packed: PackedBatch, group: Any, rank: int, ranks: int, unit: int) -> PackedBatch:
    count = len(packed.ids_N)
    filler = -count % (2 * ranks * unit)
    piece = Piece(group, rank, ranks, count + filler)
    held_n = piece.positions(packed.ids_N.device)
    is_here_S, scored_S = piece.places(packed.scored_S)
    segments = [*packed.segments, *([Segment(count, count + filler, -1)] if filler else [])]
    ids_N, position_N = (torch.nn.functional.pad(x, (0, filler))[held_n] for x in (packed.ids_N, packed.position_N))
    parts, last = _cut(segments, piece.run)
    return replace(
        packed, ids_N=ids_N, position_N=position_N, segments=tuple(parts), scored_S=scored_S,
        target_S=packed.target_S[is_here_S], row_S=packed.row_S[is_here_S], slot_S=packed.slot_S[is_here_S],
        row_segment=tuple(last[segment] for segment in packed.row_segment), piece=piece, kept={},
    )  # fmt: skip


def _cut(segments: list[Segment], run: int) -> tuple[list[Segment], list[int]]:
    """The segments, cut where a run ends, and the number of each one's last part.

    The second part of a segment has the first one for its parent, and so sees it whole.
    """
    found: list[Segment] = []
    last: list[int] = []
    for start, end, parent in segments:
        before = last[parent] if parent >= 0 else -1
        edges = [start, *range((start // run + 1) * run, end, run), end]
        for first, stop in pairwise(edges):
            found.append(Segment(first, stop, before))
            before = len(found) - 1
        last.append(before)
    return found, last
