"""Rows of a batch in pieces of bounded length, so that memory follows tokens and not rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl.data.packing import best_fit_decreasing

Row = Mapping[str, Any]


def row_tokens(row: Row) -> int:
    """Tokens of a row: those of all its columns of ids, a shared prompt counted once."""
    columns = [name for name in row if name.endswith("_ids") or name.startswith("input_ids")]
    if not columns:
        raise ValueError(f"max_tokens_per_microbatch: rows with {sorted(row)} have no column of token ids to count")
    return sum(len(row[name]) for name in columns)


def balanced_pieces(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of the rows of each piece: as few pieces of `max_tokens` as best-fit finds, and those equally full.

    A row that is longer stands alone. Within a piece rows keep their order.
    """
    bins = best_fit_decreasing([min(length, max_tokens) for length in lengths], max_tokens)
    loads = [0] * len(bins)
    spread: list[list[int]] = [[] for _ in bins]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        least = loads.index(min(loads))
        spread[least].append(index)
        loads[least] += lengths[index]
    fits = all(load <= max_tokens or len(piece) == 1 for load, piece in zip(loads, spread, strict=True))
    return [sorted(piece) for piece in (spread if fits else bins)]


class BudgetCollator:
    """Another collator's batches in pieces of at most `max_tokens` tokens, under the key `pieces`."""

    def __init__(self, collate: Callable[[Sequence[Row]], dict[str, Any]], max_tokens: int):
        self.collate, self.max_tokens = collate, max_tokens

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        pieces = balanced_pieces([row_tokens(row) for row in rows], self.max_tokens)
        return {"pieces": [self.collate([rows[i] for i in piece]) for piece in pieces]}
