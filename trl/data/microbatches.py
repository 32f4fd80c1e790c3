"""Batches are cut into pieces with a bounded number of tokens, which bounds the memory of a pass, and made ahead."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

from trl.data.packing import best_fit_decreasing
from trl.data.records import Batch

CPU_TOKENS = 1536
"""tokens of a forward pass on the CPU if the user sets no budget; more tokens take more memory and no less time"""

AHEAD = frozenset({"cuda"})
"""kinds of devices for which batches are made while they compute, unless workers are asked for"""
Row = Mapping[str, Any]
Made = TypeVar("Made")


def unasked_budget(device: torch.device, processes: int, *, mostly_scored: bool = False) -> int | None:
    """Tokens of a forward pass if the user sets no budget; None: no limit, as processes must make equally many passes.

    mostly_scored: most tokens go through the head, like many completions of one prompt. They take twice the memory, and
    passes of half the size are as fast.
    """
    if device.type != "cpu" or processes > 1:
        return None
    return CPU_TOKENS // 2 if mostly_scored else CPU_TOKENS


def _id_columns(row: Row) -> list[str]:
    return [name for name in row if name.endswith("_ids") or name.startswith("input_ids")]


def row_tokens(row: Row) -> int:
    """Tokens of a row: those of all its columns of ids, a shared prompt counted once."""
    columns = _id_columns(row)
    if not columns:
        raise ValueError(f"max_tokens_per_microbatch: rows with {sorted(row)} have no column of token ids to count")
    return sum(len(row[name]) for name in columns)


def is_table(rows: Any) -> bool:
    """Whether it is a `Dataset`. `datasets` takes 80 MB, which a script without a data set does not need."""
    known = sys.modules.get("datasets")
    return known is not None and isinstance(rows, known.Dataset)


def lengths_of(rows: Any, without: Collection[str] = ()) -> np.ndarray | None:
    """Tokens of each row as `row_tokens` counts them, read off a data set's columns; None where it cannot be.

    without: columns that are left out. Of a selection of rows these are the lengths of all rows that it was made of.
    """
    import pyarrow.compute as pc

    if not is_table(rows) or not len(rows) or rows.format["type"] == "custom":
        return None
    table = rows.data
    columns = [
        name
        for name in _id_columns(dict.fromkeys(rows.column_names))
        if name in table.column_names and name not in without
    ]
    if not columns:
        return None
    counts = [pc.fill_null(pc.list_value_length(table.column(name)), 0).to_numpy() for name in columns]
    return np.sum(counts, axis=0)


def balanced_pieces(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of the rows of each piece: as few pieces as best-fit finds, filled evenly, of at most `max_tokens`.

    A longer row is a piece alone. Within a piece rows keep their order.
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


def runs_of_groups(
    groups: Sequence[Any], lengths: Sequence[int], shared: Sequence[int], max_tokens: int
) -> list[range]:
    """Indices of rows in runs of about `max_tokens` tokens, filled evenly; rows of one group stay together.

    A group is a run of equal entries of `groups`. Its tokens: the `lengths` of its rows, and `shared` of one row.
    """
    starts = [i for i in range(len(groups)) if i == 0 or groups[i] != groups[i - 1]]
    ends = [*starts[1:], len(groups)]
    costs = [shared[a] + sum(lengths[a:b]) for a, b in zip(starts, ends, strict=True)]
    wanted = max(1, -(-sum(costs) // max_tokens))
    runs: list[range] = []
    first = done = 0
    for start, cost in zip(starts, costs, strict=True):
        if start > first and done + cost / 2 > sum(costs) * (len(runs) + 1) / wanted:
            runs.append(range(first, start))
            first = start
        done += cost
    return [*runs, range(first, len(groups))]


def collated(collate: Callable[[Any], dict[str, Any]], pieces: Sequence[Any]) -> dict[str, Any]:
    """The pieces' batches under the key `pieces`; of a single piece its batch alone."""
    return collate(pieces[0]) if len(pieces) == 1 else Batch(pieces=[collate(piece) for piece in pieces])


class BudgetCollator:
    """Another collator's batches in pieces of at most `max_tokens` tokens, under the key `pieces`.

    Their rows' places in the batch are under `places`. With `asked` False rows without token ids stay together.
    """

    def __init__(self, collate: Callable[[Sequence[Row]], dict[str, Any]], max_tokens: int, asked: bool = True):
        self.collate, self.max_tokens, self.asked = collate, max_tokens, asked

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        if not self.asked and not all(isinstance(row, Mapping) and _id_columns(row) for row in rows):
            return self.collate(rows)
        pieces = balanced_pieces([row_tokens(row) for row in rows], self.max_tokens)
        batch = collated(self.collate, [[rows[i] for i in piece] for piece in pieces])
        if len(pieces) > 1:
            batch["places"] = pieces
        return batch


# -- ahead ------------------------------------------------------------------------------------


def each_ahead(items: Iterator[Made]) -> Iterator[Made]:
    """The items in their order, each made by a thread while the one before is used; an error is raised at its place.

    The first is made here, together with the draws that begin an epoch.
    """
    end = object()
    item: Any = next(items, end)
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        while item is not end:
            following = thread.submit(next, items, end)
            yield item
            item = following.result()


def loaded_ahead(loader: Any) -> None:
    """Let accelerate's data loader make each batch while the one before is computed: same batches, same order."""
    base = loader.base_dataloader
    iterate = type(base).__iter__
    base.__iter__ = lambda: each_ahead(iterate(base))  # accelerate asks the loader itself for it


def may_be_ahead(rows: Any, collate: Any, kind: str, workers: int) -> bool:
    """Whether a thread may make batches of these rows: nothing of a user's runs in it, which could draw numbers."""
    while type(collate) is BudgetCollator:
        collate = collate.collate
    ours = type(collate).__module__.startswith("trl.") and getattr(collate, "inner", None) is None
    plain = is_table(rows) and rows.format["type"] != "custom"
    return kind in AHEAD and not workers and ours and plain
