"""One pass of batched tokenisation: a job makes rows of token ids, and a report says what it met.

Takes a Dataset, a streamed IterableDataset or a list of rows, and gives back its like; another object (a torch Dataset)
is passed through. Rows that have nothing to learn (the answer was cut away whole, or everything is masked) are left
out; when that is true of all, it is a ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value
from datasets.fingerprint import Hasher

from trl.data.formats import column_names
from trl.data.report import RowFlag, TokenizationReport
from trl.data.row_job import Made, Row, RowJob

_COUNTS = ("_flags", "_cut", "_tokens", "_learned")


def has_rows(dataset: Any) -> bool:
    """Whether it is a data set whose rows we read, not one that a user has prepared (a torch Dataset)."""
    if dataset is None:
        raise ValueError("The dataset should not be None")
    return isinstance(dataset, Dataset | IterableDataset | list | tuple)


def tokenize(
    dataset: Any, job: RowJob, *, name: str = "train", num_proc: int | None = None, batch_size: int = 1000
) -> tuple[Any, TokenizationReport]:
    """The data set with the job's columns and those that the job keeps; and the report, logged and checked.

    `name` says which data set it is in messages. Of a stream the report sees only the first batch.
    """
    report = TokenizationReport()
    if not has_rows(dataset):
        return dataset, report
    dataset, job = job.reading(dataset, name)
    columns = column_names(dataset, name)
    keep = tuple(c for c in (columns if job.keep is None else job.keep) if c in columns and c not in job.features)
    if isinstance(dataset, Dataset):
        mapped: Any = _map_dataset(dataset, job, keep, report, num_proc, batch_size, name)
    elif isinstance(dataset, IterableDataset):
        first = list(islice(dataset, batch_size))
        report.partial = True
        _count(report, job([dict(row) for row in first], range(len(first))))
        batched = _BatchedJob(job, keep, counted=False)
        mapped = dataset.map(
            batched, with_indices=True, batched=True, batch_size=batch_size, remove_columns=list(columns)
        )
    else:
        mapped = _map_list(dataset, job, keep, report)
    report.check(name)
    report.log(name)
    return mapped, report


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
