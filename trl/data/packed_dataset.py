"""Packs the sequences of a data set into bins of one length."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from datasets import Dataset

from trl.data.packing import best_fit_decreasing


def _wrapped(columns: dict[str, list[list[Any]]], seq_length: int) -> Iterator[dict[str, list[Any]]]:
    flat = {name: list(chain.from_iterable(rows)) for name, rows in columns.items()}
    for start in range(0, len(flat["input_ids"]), seq_length):
        row = {name: values[start : start + seq_length] for name, values in flat.items()}
        yield {**row, "seq_lengths": [len(row["input_ids"])]}


def pack_dataset(dataset: Dataset, seq_length: int, strategy: str = "bfd") -> Dataset:
    """The tokenised rows in bins of `seq_length` tokens, with a column `seq_lengths` of the sequences in each bin.

    bfd:     best-fit decreasing over the whole set; sequences stay whole and do not see each other.
    wrapped: one stream of tokens cut every `seq_length`; sequences are split, and see what precedes them.
    """
    if strategy not in ("bfd", "wrapped"):
        raise ValueError(f"packing_strategy={strategy!r}: choose 'bfd' or 'wrapped'")
    names = [n for n in dataset.column_names if n in ("input_ids", "loss_mask", "attention_mask", "labels")]
    columns = {name: dataset[name][:] for name in names}
    if strategy == "wrapped":
        return Dataset.from_list(list(_wrapped(columns, seq_length)))
    bins = best_fit_decreasing([len(ids) for ids in columns["input_ids"]], seq_length)
    packed: dict[str, list[list[Any]]] = {
        name: [list(chain.from_iterable(rows[i] for i in bin_)) for bin_ in bins] for name, rows in columns.items()
    }
    packed["seq_lengths"] = [[len(columns["input_ids"][i]) for i in bin_] for bin_ in bins]
    return Dataset.from_dict(packed)
