"""One pass of batched tokenisation: a job makes rows of token ids, and a report says what it met.

Takes a Dataset, a streamed IterableDataset or a list of rows; another object (a torch Dataset) is passed through. Rows
that have nothing to learn (the answer was cut away whole, or everything is masked) are left out; when that is true of
all, it is a ValueError.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch.utils.data
from datasets import Dataset, DatasetInfo, Features, IterableDataset, Value
from datasets.fingerprint import Hasher, generate_random_fingerprint

from trl.data.columns import unwrapped
from trl.data.formats import Format, check_rows, column_names, first_row, refuse_splits
from trl.data.picture_rows import types_of
from trl.data.report import Met, RowNote, TokenizationReport
from trl.data.row_job import LEFT_OUT, Made, Row, RowJob

logger = logging.getLogger(__name__)

_COUNTS = ("_flags", "_cut", "_tokens", "_learned", *(f"_{name}" for name in Met._fields))


def has_rows(dataset: Any, name: str = "train") -> bool:
    """Whether it is a data set whose rows we read, not one that a user has prepared (a torch Dataset)."""
    if dataset is None:
        raise ValueError("The dataset should not be None")
    refuse_splits(dataset, name)
    return isinstance(dataset, Dataset | IterableDataset | list | tuple)


def unprepared(dataset: Any, tokenised: Sequence[tuple[str, ...]]) -> Any:
    """A torch Dataset with none of these sets of columns as a list of rows; every other data set as it is."""
    others = Dataset | torch.utils.data.IterableDataset | Mapping | list | tuple
    sized = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not sized or isinstance(dataset, others) or not len(dataset):
        return dataset
    row = dataset[0]
    if not isinstance(row, Mapping) or any(row.keys() >= set(columns) for columns in tokenised):
        return dataset
    return [dataset[index] for index in range(len(dataset))]


def tokenize(
    dataset: Any, job: RowJob, *, name: str = "train", num_proc: int | None = None, batch_size: int = 1000
) -> tuple[Any, TokenizationReport]:
    """The data set with the job's columns and those that the job keeps; and the report, logged and checked.

    A list of rows becomes a `Dataset`, but where the job keeps all columns: those can hold anything. `name` says which
    data set it is in messages. Of a stream the report sees only the first batch.
    """
    report = TokenizationReport()
    dataset = unprepared(dataset, job.tokenised)
    if not has_rows(dataset, name):
        return dataset, report
    check_rows(dataset, name)
    given = as_shown(dataset, name)
    dataset, job = job.reading(given, name)
    columns = column_names(dataset, name)
    keep = tuple(c for c in (columns if job.keep is None else job.keep) if c in columns and c not in job.features)
    if isinstance(dataset, Dataset):
        mapped: Any = _map_dataset(dataset, job, types_of(dataset, given, keep), report, num_proc, batch_size, name)
    elif isinstance(dataset, IterableDataset):
        first = list(islice(dataset, batch_size))
        report.partial = True
        _count(report, _made(job, [dict(row) for row in first], range(len(first))))
        batched = _BatchedJob(job, keep, counted=False)
        mapped = dataset.map(
            batched, with_indices=True, batched=True, batch_size=batch_size, remove_columns=list(columns)
        )
    else:
        mapped = _map_list(dataset, job, keep, report, batch_size)
    report.unread = _unread(columns, job)
    report.check(name)
    report.check_prompts(name, _texts(report.unread, dataset, name), job.asks_prompt(), job.no_prompt)
    report.log(name)
    return mapped, report


class Noted(NamedTuple):
    """A data set as a job reads it."""

    notes: Iterator[RowNote]
    """what the report counts, row by row; each row is tokenised when it is asked for"""
    format: Format
    unread: list[str]
    """columns that no one reads"""


def noted(dataset: Any, job: RowJob, *, name: str = "train", most: int | None = None) -> Noted:
    """How the job reads the data set, for an inspector; `most`: its first so many rows."""
    if not has_rows(dataset, name):
        raise ValueError(f"the {name} data set is a {type(dataset).__name__}, whose rows are not read here")
    check_rows(dataset, name)
    dataset, job = job.reading(as_shown(dataset, name), name)
    return Noted(_notes(islice(dataset, most), job), job.format, _unread(column_names(dataset, name), job))


def notes(dataset: Any, job: RowJob, *, name: str = "train", most: int | None = None) -> Iterator[RowNote]:
    """What the report counts, row by row, with the tokenised row; `most`: of so many rows at the start."""
    return noted(dataset, job, name=name, most=most).notes


def _notes(rows: Iterable[Row], job: RowJob) -> Iterator[RowNote]:
    for index, row in enumerate(rows):
        (one,) = _made(job, _whole([row], job, index), [index])
        yield RowNote(index, one.columns, one.tokens, one.learned, one.cut, one.left_out, one.flags, one.met)


def _unread(columns: Sequence[str], job: RowJob) -> list[str]:
    read = job.reads()
    return [] if read is None else [column for column in columns if column not in read]


def as_shown(dataset: Any, name: str = "train") -> Any:
    """The rows as indexing shows them, without a format: a transform is applied, hidden columns are left out."""
    if isinstance(dataset, IterableDataset):
        return dataset.with_format(None)
    if not isinstance(dataset, Dataset):
        return dataset
    if dataset.format["type"] == "custom":
        logger.warning("the transform of the %s data set is applied once, before training", name)
        return dataset.map(
            _as_it_is, batched=True, remove_columns=dataset.column_names, desc=f"Transforming the {name} data"
        ).with_format(None)
    shown = dataset.format["columns"]
    if set(shown) != set(dataset.column_names) and not dataset.format["output_all_columns"]:
        dataset = dataset.select_columns(list(shown))
    return dataset.with_format(None)


def list_codes(dataset: Dataset, column: str) -> np.ndarray:
    """A number for each row: the same for rows with the same list of numbers in the column. [R]"""
    lists = as_shown(dataset).with_format("arrow")[column][:].combine_chunks()
    lists = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    values = lists.values
    width = values.type.bit_width // 8
    offsets = pa.array(lists.offsets.to_numpy() * width, pa.int64())
    buffers = [None, offsets.buffers()[1], values.buffers()[1]]
    whole = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(lists), buffers, offset=0)
    return np.asarray(whole.dictionary_encode().indices.to_numpy(), dtype=np.int64)


def _as_it_is(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: list(values) for name, values in batch.items()}


def _texts(columns: Sequence[str], dataset: Any, name: str) -> list[str]:
    """Those of the columns that hold text or messages, by the first row."""
    row = first_row(dataset, name) if columns else {}
    return [column for column in columns if _is_text(row.get(column))]


def _is_text(value: Any) -> bool:
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, str | dict)


def _whole(rows: Sequence[Row], job: RowJob, start: int, keep: Sequence[str] = ()) -> list[Row]:
    """Copies of the rows from `start` on, with None for columns of `keep` that only other rows of a list have.

    A row without a column that makes up the format is a ValueError.
    """
    for index, row in enumerate(rows, start):
        missing = [column for column in job.format.columns if column not in row]
        if missing:
            lacking = ", ".join(map(repr, missing))
            raise ValueError(
                f"row {index} of the {job.name} data set: column {lacking} is missing, which other rows have; "
                f"this one has {', '.join(row) or 'none'}: make all rows alike"
            )
    return [{**dict.fromkeys(keep), **row} for row in rows]


def _made(job: RowJob, rows: list[Row], indices: Sequence[int]) -> list[Made]:
    made = job(rows, indices)
    for index, one in zip(indices, made, strict=True):
        with job.at_row(index):
            job.check_ids(one)
    return made


@dataclass
class _BatchedJob:
    """A job as a function of a batch of columns."""

    job: RowJob
    keep: tuple[str, ...]
    counted: bool
    """give the counts as columns and every row; otherwise leave out the rows without anything to learn"""

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        made = _made(self.job, rows, indices)
        kept = [(row, one) for row, one in zip(rows, made, strict=True) if self.counted or not one.left_out]
        columns = {name: [row[name] for row, _ in kept] for name in self.keep}
        columns |= {name: [one.columns[name] for _, one in kept] for name in self.job.features}
        if self.counted:
            counts = zip(*(_counts(one) for _, one in kept), strict=True)
            columns |= {name: list(values) for name, values in zip(_COUNTS, counts, strict=True)}
        return columns


def _counts(one: Made) -> tuple[int, ...]:
    return (int(one.flags), one.cut, one.tokens, one.learned, *one.met)


def _count(report: TokenizationReport, made: Sequence[Made]) -> None:
    if made:
        report.add(*zip(*map(_counts, made), strict=True))


def _map_list(
    rows: Sequence[Row], job: RowJob, keep: Sequence[str], report: TokenizationReport, batch_size: int
) -> Dataset | list[Row]:
    kept: list[Row] = []
    tables = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        made = _made(job, _whole(batch, job, start, keep), range(start, start + len(batch)))
        _count(report, made)
        pairs = [(row, one.columns) for row, one in zip(batch, made, strict=True) if not one.left_out]
        if job.keep is None:
            kept += [{**{n: row.get(n) for n in keep}, **columns} for row, columns in pairs]
            continue
        arrays = {name: pa.array([unwrapped(own.get(name, row.get(name))) for row, own in pairs]) for name in keep}
        types = Features(job.features).arrow_schema
        arrays |= {name: pa.array([own[name] for _, own in pairs], types.field(name).type) for name in job.features}
        tables.append(pa.table(arrays))
    if job.keep is None or not tables:
        return kept
    table = pa.concat_tables(tables, promote_options="permissive")
    features = Features({**Features.from_arrow_schema(table.schema), **job.features})
    return Dataset(table, DatasetInfo(features=features), fingerprint=generate_random_fingerprint())


def _map_dataset(
    dataset: Dataset,
    job: RowJob,
    types: Mapping[str, Any],
    report: TokenizationReport,
    num_proc: int | None,
    batch_size: int,
    name: str,
) -> Dataset:
    """The data set with the job's columns, and those that it keeps, which have these types."""
    keep, features = tuple(types), {**types, **job.features}
    mapped = dataset.map(
        _BatchedJob(job, keep, counted=True),
        with_indices=True,
        batched=True,
        batch_size=batch_size,
        num_proc=num_proc if num_proc and num_proc > 1 else None,
        remove_columns=dataset.column_names,
        features=Features(features | {column: Value("int64") for column in _COUNTS}),
        new_fingerprint=Hasher.hash([dataset._fingerprint, job.key(), keep, *job.files(dataset)]),
        desc=f"Tokenizing the {name} data",
    )
    counts = [np.asarray(mapped.with_format("numpy", columns=[column])[column][:]) for column in _COUNTS]
    report.add(*counts)
    mapped = mapped.remove_columns(list(_COUNTS))
    if report.left_out and report.left_out < report.rows:
        mapped = mapped.select(np.flatnonzero((counts[0].astype(np.int64) & int(LEFT_OUT)) == 0))
    return mapped
