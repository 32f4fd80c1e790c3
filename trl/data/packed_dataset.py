"""Packs the sequences of a data set into bins of one length: on Arrow's columns, without lists of numbers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, DatasetInfo, Features, IterableDataset, IterableDatasetDict, List, Value
from datasets.fingerprint import Hasher

from trl.data.formats import column_names
from trl.data.packing import best_fit_bins
from trl.data.tokenize import as_shown
from trl.data.version import code_version

logger = logging.getLogger(__name__)

STRATEGIES = ("bfd", "bfd_split", "wrapped")
BUFFER = 1000
"""rows of a stream that are packed together"""
_OTHER_NAMES = {"bfd-requeue": "bfd_split", "ffd": "bfd"}
_LENGTHS = "seq_lengths"
_BLOCK = 1 << 20
"""numbers that are moved at a time"""
_CHUNK = 1 << 30
"""numbers of one Arrow array, whose offsets have 31 bits"""


class _Pieces(NamedTuple):
    """Parts of rows, in the order in which they stand in the bins."""

    row: np.ndarray
    start: np.ndarray
    """where each begins in its row"""
    length: np.ndarray
    per_bin: np.ndarray
    """how many of them each bin holds"""


def pack_dataset(
    dataset: Any, seq_length: int, strategy: str = "bfd", map_kwargs: Mapping[str, Any] | None = None
) -> Any:
    """The tokenised rows in bins of `seq_length` tokens, with a column `seq_lengths` of the sequences in each bin.

    bfd:       best-fit decreasing over the whole set; sequences stay whole and do not see each other. Longer ones are
               cut at their end.
    bfd_split: the same, and what a longer sequence has left is a sequence of its own.
    wrapped:   one stream of tokens cut every `seq_length`; sequences are split, and see what precedes them.

    Takes a Dataset, a stream, or a dict of them. Every column with a number for each token is packed; other columns
    are left out, and named. A stream is packed in buffers of `map_kwargs["batch_size"]` rows (1,000); for a `Dataset`
    only an explicit one bounds which rows are packed together. Other `map_kwargs` go to a stream's `map`.
    """
    strategy = _OTHER_NAMES.get(strategy, strategy)
    if strategy not in STRATEGIES:
        raise ValueError(f"packing_strategy={strategy!r}: choose 'bfd', 'bfd_split' or 'wrapped'")
    if seq_length < 1:
        raise ValueError(f"seq_length={seq_length}: give a number of tokens >= 1")
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        return type(dataset)({k: pack_dataset(one, seq_length, strategy, map_kwargs) for k, one in dataset.items()})
    options = dict(map_kwargs or {})
    if isinstance(dataset, IterableDataset):
        pack_batch = partial(_packed_batch, seq_length=seq_length, strategy=strategy)
        options = {"batch_size": BUFFER, **options, "batched": True, "remove_columns": column_names(dataset)}
        return dataset.with_format(None).map(pack_batch, **options)
    if not isinstance(dataset, Dataset):
        raise ValueError(f"packing takes a `Dataset` or a stream, got a {type(dataset).__name__}")
    rows = options.get("batch_size") or len(dataset)
    dataset = as_shown(dataset)
    taken = np.arange(len(dataset)) if dataset._indices is None else dataset._indices.column(0).to_numpy()
    parts = [
        _packed(dataset.data.table, taken[start : start + rows], seq_length, strategy)
        for start in range(0, max(len(dataset), 1), max(rows, 1))
    ]
    packed = pa.concat_tables(parts)
    known = {name: dataset.features[name] for name in packed.column_names if name != _LENGTHS}
    key = [dataset._fingerprint, code_version(), seq_length, strategy, rows]
    features = Features({**known, _LENGTHS: List(Value("int32"))})
    return Dataset(packed.cast(features.arrow_schema), DatasetInfo(features=features), fingerprint=Hasher.hash(key))


def _packed_batch(batch: Mapping[str, list[Any]], seq_length: int, strategy: str) -> dict[str, list[Any]]:
    table = pa.table({name: pa.array(values) for name, values in batch.items()})
    packed = _packed(table, np.arange(len(table)), seq_length, strategy)
    return {name: packed.column(name).to_pylist() for name in packed.column_names}


def _packed(table: pa.Table, taken: np.ndarray, seq_length: int, strategy: str) -> pa.Table:
    """The rows `taken` of the table, packed."""
    names = _columns_of(table)
    lengths = _lengths(table, names, taken)
    taken, lengths = _with_whole_pictures(table, taken, lengths, seq_length, strategy)
    pieces = _wrapped(lengths) if strategy == "wrapped" else _binned(lengths, seq_length, strategy == "bfd_split")
    total = int(pieces.length.sum())
    if strategy == "wrapped":
        edges = np.append(np.arange(0, total, seq_length), total) if total else np.zeros(1, np.int64)
        held = np.diff(edges)
        held_offsets = np.arange(len(edges))
    else:
        held, held_offsets = pieces.length, np.append(0, np.cumsum(pieces.per_bin))
        edges = np.append(0, np.cumsum(pieces.length))[held_offsets]
    columns = {name: _lists(_gathered(table.column(name), taken, pieces, total), edges) for name in names}
    return pa.table({**columns, _LENGTHS: _lists(held.astype(np.int32), held_offsets)})


def _with_whole_pictures(
    table: pa.Table, taken: np.ndarray, lengths: np.ndarray, seq_length: int, strategy: str
) -> tuple[np.ndarray, np.ndarray]:
    """The rows and their lengths without those that would be cut and have pictures, whose tokens are below zero."""
    column = table.column("input_ids") if "input_ids" in table.column_names else None
    if column is None or column.type.value_type.bit_width < 64 or _least(pc.list_flatten(column)) >= 0:
        return taken, lengths
    if strategy == "wrapped":
        raise ValueError("packing_strategy='wrapped' cuts rows anywhere, and these have pictures: choose 'bfd'")
    over = np.flatnonzero(lengths > seq_length)
    gone = [at for at in over.tolist() if _least(column[int(taken[at])].values) < 0]
    if not gone:
        return taken, lengths
    if len(gone) == len(taken):
        raise ValueError(
            f"seq_length={seq_length} holds none of the rows: they have pictures, which are not cut; raise it"
        )
    logger.warning("%s rows with pictures are longer than seq_length=%d and are left out", f"{len(gone):,}", seq_length)
    kept = np.ones(len(taken), dtype=bool)
    kept[gone] = False
    return taken[kept], lengths[kept]


def _least(numbers: pa.Array | pa.ChunkedArray) -> int:
    least = pc.min(numbers).as_py()
    return 0 if least is None else int(least)


def _columns_of(table: pa.Table) -> list[str]:
    """The columns with a list of numbers in each row."""
    names = [field.name for field in table.schema if _is_numbers(field.type)]
    others = [name for name in table.column_names if name not in names]
    if not names:
        raise ValueError(f"packing needs a column with a list of numbers; columns found: {', '.join(others)}")
    if others:
        logger.warning("packed rows leave out the columns %s: they hold no number for each token", ", ".join(others))
    return names


def _is_numbers(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    inner = kind.value_type
    return pa.types.is_integer(inner) or pa.types.is_floating(inner) or pa.types.is_boolean(inner)


def _lengths(table: pa.Table, names: list[str], taken: np.ndarray) -> np.ndarray:
    """The number of tokens of each row; ValueError where the columns do not agree."""
    whole: dict[str, np.ndarray] = {}
    for name in names:
        column = table.column(name)
        if column.null_count:
            raise ValueError(f"column '{name}' has no list in {column.null_count:,} rows: packing needs one in each")
        sizes = [_offsets(chunk) for chunk in column.chunks]
        own = np.concatenate([np.diff(one) for one in sizes]) if sizes else np.zeros(0, np.int64)
        whole[name] = own[taken].astype(np.int64)
    first = "input_ids" if "input_ids" in whole else names[0]
    for name, own in whole.items():
        wrong = np.flatnonzero(own != whole[first])
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"row {row}: column '{name}' has {own[row]} entries for {whole[first][row]} in '{first}', and packing "
                "needs one for each token: remove the column, or correct it"
            )
    return whole[first]


def _binned(lengths: np.ndarray, seq_length: int, split: bool) -> _Pieces:
    """Whole sequences in bins, longest first; longer ones are cut, or go on in pieces of their own."""
    if split:
        counts = np.maximum(1, -(-lengths // seq_length))
        row = np.repeat(np.arange(len(lengths)), counts)
        start = (np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)) * seq_length
    else:
        row, start = np.arange(len(lengths)), np.zeros(len(lengths), np.int64)
        over = lengths > seq_length
        if over.any():
            cut = int((lengths[over] - seq_length).sum())
            logger.warning(
                "%s rows are longer than seq_length=%d and are cut to it (%s tokens cut); strategy='bfd_split' keeps "
                "them in pieces", f"{int(over.sum()):,}", seq_length, f"{cut:,}"
            )  # fmt: skip
    length = np.minimum(lengths[row] - start, seq_length)
    order, per_bin = best_fit_bins(length, seq_length)
    return _Pieces(row[order], start[order], length[order], per_bin)


def _wrapped(lengths: np.ndarray) -> _Pieces:
    rows = np.arange(len(lengths))
    return _Pieces(rows, np.zeros_like(rows), lengths, np.zeros(0, np.int64))


def _offsets(chunk: Any) -> np.ndarray:
    return chunk.offsets.to_numpy()


def _gathered(column: pa.ChunkedArray, taken: np.ndarray, pieces: _Pieces, total: int) -> np.ndarray:
    """The column's numbers in the order of the pieces, a block at a time."""
    places = taken[pieces.row]  # of each piece, in the table
    goes_to = np.cumsum(pieces.length) - pieces.length
    by_place = np.argsort(places, kind="stable")
    sorted_places = places[by_place]
    out: np.ndarray | None = None
    first = 0
    for chunk in column.chunks:
        numbers = chunk.values
        if numbers.null_count:
            raise ValueError("packing: a list of numbers has an empty entry (None)")
        values, offsets = numbers.to_numpy(zero_copy_only=False), _offsets(chunk)
        out = np.empty(total, values.dtype) if out is None else out
        start, end = np.searchsorted(sorted_places, [first, first + len(chunk)])
        for some in _blocks(by_place[start:end], pieces.length):
            length = pieces.length[some]
            inside = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
            come_from = offsets[places[some] - first] + pieces.start[some]
            out[np.repeat(goes_to[some], length) + inside] = values[np.repeat(come_from, length) + inside]
        first += len(chunk)
    return np.zeros(0, np.int64) if out is None else out


def _blocks(pieces: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """The pieces in blocks of about a million tokens."""
    ends = np.cumsum(lengths[pieces]) // _BLOCK
    return iter(np.split(pieces, np.flatnonzero(np.diff(ends)) + 1))


def _lists(values: np.ndarray, edges: np.ndarray) -> pa.ChunkedArray:
    """Lists of the values between the edges; several arrays where one could not count them."""
    if len(edges) < 2:
        return pa.chunked_array([pa.array([], pa.list_(pa.from_numpy_dtype(values.dtype)))])
    cuts = np.flatnonzero(np.diff(edges // _CHUNK)) + 1
    arrays = []
    for start, end in pairwise([0, *cuts[cuts < len(edges) - 1].tolist(), len(edges) - 1]):
        own = edges[start : end + 1]
        arrays.append(
            pa.ListArray.from_arrays(pa.array((own - own[0]).astype(np.int32)), pa.array(values[own[0] : own[-1]]))
        )
    return pa.chunked_array(arrays)
