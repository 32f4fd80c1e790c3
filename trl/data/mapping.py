"""One pass of a row-making job over any kind of data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher

from trl.data.report import RowFlag, TokenizationReport

Row = dict[str, Any]
IDS = List(Value("int32"))
MASK = List(Value("int8"))
_COUNTS = ("_flags", "_cut", "_tokens", "_learned")


class Made(NamedTuple):
    """One tokenised row and what happened to it."""

    columns: Row
    flags: RowFlag
    cut: int
    """tokens that length limits took away"""
    tokens: int
    learned: int

    @property
    def left_out(self) -> bool:
        return bool(self.flags & (RowFlag.UNLEARNED | RowFlag.ANSWER_CUT))


class RowJob(Protocol):
    """Makes rows in batches; picklable, so that it can run in several processes."""

    @property
    def features(self) -> dict[str, Any]:
        """The columns it makes."""

    def __call__(self, rows: list[Row], indices: Sequence[int]) -> list[Made]: ...

    def key(self) -> str:
        """Everything that its results depend on, as text."""


@contextmanager
def at_row(index: int, name: str) -> Iterator[None]:
    """Say in a ValueError which row it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"row {index} of the {name} data set: {error}") from error


@dataclass
class _BatchedJob:
    """A job as a function of a batch of columns."""

    job: RowJob
    keep: tuple[str, ...]
    counted: bool
    """give the counts as columns and every row; otherwise leave out the rows without anything to learn"""

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        made = self.job(rows, indices)
        kept = [(row, one) for row, one in zip(rows, made, strict=True) if self.counted or not one.left_out]
        columns = {name: [row[name] for row, _ in kept] for name in self.keep}
        columns |= {name: [one.columns[name] for _, one in kept] for name in self.job.features}
        if self.counted:
            counts = [(int(one.flags), one.cut, one.tokens, one.learned) for _, one in kept]
            columns |= {name: list(values) for name, values in zip(_COUNTS, zip(*counts, strict=True), strict=True)}
        return columns


def _count(report: TokenizationReport, made: Sequence[Made]) -> None:
    report.add(
        [one.flags for one in made],
        [one.cut for one in made],
        [one.tokens for one in made],
        [one.learned for one in made],
    )


def _map_list(rows: Sequence[Row], job: RowJob, keep: Sequence[str], report: TokenizationReport) -> list[Row]:
    made = job([dict(row) for row in rows], range(len(rows)))
    _count(report, made)
    pairs = zip(rows, made, strict=True)
    return [{**{n: row[n] for n in keep if n in row}, **one.columns} for row, one in pairs if not one.left_out]


def _map_dataset(
    dataset: Dataset,
    job: RowJob,
    keep: tuple[str, ...],
    report: TokenizationReport,
    num_proc: int | None,
    batch_size: int,
    name: str,
) -> Dataset:
    dataset = dataset.with_format(None)
    features = {column: dataset.features[column] for column in keep} | job.features
    mapped = dataset.map(
        _BatchedJob(job, keep, counted=True),
        with_indices=True,
        batched=True,
        batch_size=batch_size,
        num_proc=num_proc if num_proc and num_proc > 1 else None,
        remove_columns=dataset.column_names,
        features=Features(features | {column: Value("int64") for column in _COUNTS}),
        new_fingerprint=Hasher.hash([dataset._fingerprint, job.key(), keep]),
        desc=f"Tokenizing the {name} data",
    )
    counts = [mapped[column][:] for column in _COUNTS]
    report.add(*counts)
    mapped = mapped.remove_columns(list(_COUNTS))
    if report.left_out and report.left_out < report.rows:
        gone = int(RowFlag.UNLEARNED | RowFlag.ANSWER_CUT)
        mapped = mapped.select([i for i, flags in enumerate(counts[0]) if not flags & gone])
    return mapped


def map_rows(
    dataset: Any,
    job: RowJob,
    *,
    columns: Sequence[str],
    keep: Sequence[str],
    num_proc: int | None,
    batch_size: int,
    name: str,
) -> tuple[Any, TokenizationReport]:
    """The data set with the job's columns and those of `keep` that it has, and the report, logged and checked.

    `columns` are the data set's own. Rows without anything to learn are left out. Of a stream only the first batch is
    looked at for the report.
    """
    report = TokenizationReport()
    kept = tuple(column for column in keep if column in columns and column not in job.features)
    if isinstance(dataset, Dataset):
        mapped: Any = _map_dataset(dataset, job, kept, report, num_proc, batch_size, name)
    elif isinstance(dataset, IterableDataset):
        first = list(islice(dataset, batch_size))
        report.partial = True
        _count(report, job([dict(row) for row in first], range(len(first))))
        batched = _BatchedJob(job, kept, counted=False)
        mapped = dataset.map(
            batched, with_indices=True, batched=True, batch_size=batch_size, remove_columns=list(columns)
        )
    else:
        mapped = _map_list(dataset, job, kept, report)
    report.check(name)
    report.log(name)
    return mapped, report
