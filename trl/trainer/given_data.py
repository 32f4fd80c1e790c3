"""The data sets that a trainer is given, at its construction or later, and the rows that are made of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset

from trl.data.formats import refuse_splits
from trl.data.report import TokenizationReport, reports_kept

Prepare = Callable[[Any, str], Any]
"""`(data set, its name in messages) -> prepared rows`"""


def _as_it_is(dataset: Any, name: str) -> Any:
    return dataset


def _in_rows(dataset: Any, name: str) -> Any:
    """The data set; a table of pandas or of Arrow as a `Dataset`. ValueError for what holds no rows to come back to."""
    if isinstance(dataset, str | os.PathLike):
        raise ValueError(
            f"the {name} data set is the text {str(dataset)!r}: load it first, with `datasets.load_dataset`"
        )
    if isinstance(dataset, Iterator):
        raise ValueError(
            f"the {name} data set is a {type(dataset).__name__}, which can be read only once: pass `list(rows)`, or "
            "`datasets.IterableDataset.from_generator(function)`"
        )
    if isinstance(dataset, pa.Table):
        return Dataset(dataset)
    if type(dataset).__module__.partition(".")[0] == "pandas":
        return Dataset.from_pandas(dataset, preserve_index=False)
    return dataset


class GivenData:
    """Prepares each data set that comes, and knows again what it has prepared.

    A `Dataset` that gets another transform or format later is prepared anew; `datasets` marks it by its fingerprint.
    """

    def __init__(self, prepare: Prepare | None = None):
        self._prepare = prepare or _as_it_is
        self._rows: dict[str, Any] = {}
        """the latest prepared rows of each name"""
        self._given: dict[str, tuple[Dataset, str]] = {}
        """what they were made of, with its fingerprint then"""
        self._reports: dict[str, TokenizationReport] = {}
        """what was met when they were made"""

    def ready(self, dataset: Any, name: str) -> Any:
        """Take the rows as prepared ones: they come back from `of` as they are."""
        self._rows[name] = dataset
        return dataset

    def of(self, dataset: Any, name: str) -> Any:
        """The prepared rows; None and rows that are prepared stay as they are, of a dict each one is prepared."""
        if dataset is None or any(dataset is rows for rows in self._rows.values()):
            return dataset
        if name in ("train", "test"):
            refuse_splits(dataset, name)
        if isinstance(dataset, Mapping):
            return self.ready({key: self.of(one, f"{name} ({key})") for key, one in dataset.items()}, name)
        before = self._given.get(name)
        if before is not None and isinstance(dataset, Dataset) and before == (dataset, dataset._fingerprint):
            return self._rows[name]
        with reports_kept() as met:
            rows = self._prepare(_in_rows(dataset, name), name)
        self._reports |= met
        self._given.pop(name, None)
        if isinstance(dataset, Dataset):
            self._given[name] = (dataset, dataset._fingerprint)
        return self.ready(rows, name)

    def renewed(self, rows: Any, name: str) -> Any:
        """The prepared rows `rows`, made anew where the data set that they were made of has changed since."""
        if isinstance(rows, Mapping):
            return self.ready({key: self.renewed(one, f"{name} ({key})") for key, one in rows.items()}, name)
        given = self._given.get(name)
        if given is None or given[0]._fingerprint == given[1]:
            return rows
        return self.of(given[0], name)

    def facts(self) -> dict[str, dict[str, Any]]:
        """What is known of each data set, for a record of the run: rows, fingerprint, files, what was met in it."""
        return {name: self._facts(name, rows) for name, rows in self._rows.items() if not isinstance(rows, Mapping)}

    def _facts(self, name: str, rows: Any) -> dict[str, Any]:
        given, fingerprint = self._given.get(name, (rows, None))
        report = self._reports.get(name)
        found = data_facts(given) | ({} if fingerprint is None else {"fingerprint": fingerprint})
        if report is not None and report.rows:
            found |= {"tokens": report.tokens, "learned_tokens": report.learned, "met": report.lines(name)}
            found |= {} if report.partial else {"rows": report.rows}
        return found


def data_facts(dataset: Any) -> dict[str, Any]:
    """What a data set says of itself: rows, fingerprint, and the files that it was read from with their sizes."""
    found: dict[str, Any] = {"rows": len(dataset)} if hasattr(dataset, "__len__") else {}
    if isinstance(dataset, Dataset):
        found["fingerprint"] = dataset._fingerprint
        files = getattr(dataset.info, "download_checksums", None) or {}
        sizes = {str(path): one.get("num_bytes") for path, one in files.items() if isinstance(one, Mapping)}
        found |= {"files": sizes} if sizes else {}
    return found


# -- evaluation on several processes ------------------------------------------------------------
# A loader deals batches to the processes in turn, and fills up the last ones with rows from the start of the data, so
# that all processes make equally many steps. Those rows must not count twice.

SHARE = "own_share"
"""key of a batch's `Share`"""


@dataclass(frozen=True)
class Share:
    """The rows of an evaluation batch, before they were collated."""

    rows: list[Any]
    own: int | None
    """how many of them, the first ones, do not repeat others; None: that follows from the number of the batch"""

    def own_at(self, batch: int, rank: int, world: int, size: int, total: int) -> int:
        """How many rows are not repeated in a process's batch of this number; of `total` rows, `size` in a batch."""
        rest = total - (batch * world + rank) * size
        return min(max(rest, 0), len(self.rows)) if self.own is None else self.own


@dataclass(frozen=True)
class WithShare:
    """A collator's batches with their rows beside them."""

    collate: Callable[[list[Any]], Any]
    rank: int
    world: int
    size: int

    def __call__(self, rows: Sequence[Any]) -> Any:
        own = None
        if all(isinstance(row, NumberedRow) for row in rows):
            first = self.rank * self.size
            own = sum(row.number % (self.world * self.size) == first + place for place, row in enumerate(rows))
            rows = [row.row for row in rows]
        batch = self.collate(list(rows))
        batch[SHARE] = Share(list(rows), own)
        return batch


@dataclass(frozen=True)
class NumberedRow:
    number: int
    row: Any


class Numbered(torch.utils.data.IterableDataset[NumberedRow]):
    """The rows of a stream with their numbers, by which those are known that come again at its end."""

    def __init__(self, rows: Any):
        self.rows = rows

    def __iter__(self) -> Iterator[NumberedRow]:
        return (NumberedRow(number, row) for number, row in enumerate(self.rows))
