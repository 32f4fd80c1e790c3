"""Prompts: their endless shuffled order, which ranks share, and the tokens of a row's prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor


@lru_cache(maxsize=4)
def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@dataclass(eq=False)
class PromptStream:
    """Reads the rows over and over, in another order each time; those of an `IterableDataset` in its own order.

    The order is a function of the position alone, so a run can resume anywhere.
    """

    rows: Any
    """a data set"""
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        self._read = 0
        """rows of an `IterableDataset` that were read"""
        self._reader: Iterator[dict[str, Any]] | None = None
        if isinstance(self.rows, IterableDataset):
            return
        if isinstance(self.rows, Mapping):
            raise ValueError(f"train_dataset: a dict of data sets ({', '.join(self.rows)}); pass one of them")
        if not hasattr(self.rows, "__len__") or not hasattr(self.rows, "__getitem__"):
            raise ValueError(
                f"train_dataset: prompts are drawn by their place, a {type(self.rows).__name__} has none; give a "
                "`Dataset`, a list of rows, or an `IterableDataset`"
            )
        if not len(self.rows):
            raise ValueError("train_dataset: it has no rows; give prompts")

    def take(self, position: int, wanted: int) -> list[dict[str, Any]]:
        """The rows from `position` on."""
        if isinstance(self.rows, IterableDataset):
            return self._next(position, wanted)
        return [self.rows[self._place(position + i)] for i in range(wanted)]

    def _next(self, position: int, wanted: int) -> list[dict[str, Any]]:
        """The rows of an `IterableDataset`, which is read from its start where they lie behind."""
        if self._reader is None or position < self._read:
            self._reader, self._read = passes(self.rows), 0
        skipped, self._read = position - self._read, position + wanted
        return list(islice(self._reader, skipped, skipped + wanted))

    def _place(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.rows))
        return int(_order(len(self.rows), self.seed * 1_000_003 + epoch)[offset]) if self.shuffle else offset


def passes(rows: IterableDataset) -> Iterator[dict[str, Any]]:
    """The rows of an `IterableDataset` over and over; each pass is its next epoch, which may have another order."""
    for epoch in count():
        rows.set_epoch(epoch)
        empty = True
        for row in rows:
            empty = False
            yield row
        if empty:
            raise ValueError("train_dataset: it has no rows; give prompts")


def places_of(rank: int, world: int, wanted: int, stretch: int) -> list[int]:
    """Which of the next `world * wanted` prompts of the stream this rank takes, in stretches of `stretch` prompts.

    With the prompts of an optimizer step as the stretch, a step learns from the same prompts whatever the number of
    ranks. Two ranks with 4 prompts each, 2 of them for each step: the first step learns from prompts 0 to 3.

    >>> places_of(rank=0, world=2, wanted=4, stretch=2)
    [0, 1, 4, 5]
    >>> places_of(rank=1, world=2, wanted=4, stretch=2)
    [2, 3, 6, 7]
    >>> places_of(rank=0, world=1, wanted=4, stretch=2)
    [0, 1, 2, 3]
    """
    return [(i // stretch * world + rank) * stretch + i % stretch for i in range(wanted)]


TEXT_COLUMNS = ("prompt", "query")
"""columns that may hold the text of a prompt, where a row has no `input_ids`"""


def prompt_ids(row: Mapping[str, Any], tokenizer: Any) -> Tensor:
    """The tokens of a row's prompt: its `input_ids`, else its `prompt` or `query` (a text or a conversation). [P]"""
    if "input_ids" in row:
        return torch.as_tensor(row["input_ids"], dtype=torch.long).flatten()
    for name in TEXT_COLUMNS:
        if name in row and isinstance(row[name], str):
            return torch.tensor(tokenizer(row[name])["input_ids"], dtype=torch.long)
        if name in row:
            if not isinstance(row[name], list | tuple):
                raise ValueError(f"a row of the data set has {name}={row[name]!r}: give a text or a conversation")
            if not tokenizer.chat_template:
                raise ValueError(
                    f"{name} is a conversation, and the tokenizer has no chat_template: set it, or give texts"
                )
            ids = tokenizer.apply_chat_template(row[name], add_generation_prompt=True, return_dict=False)
            return torch.tensor(ids, dtype=torch.long)
    raise ValueError(f"a row of the data set has columns {list(row)}: give it `input_ids`, `prompt` or `query`")


def with_prompts(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """The rows with `prompt_ids`, and with `prompt` as reward functions read it: the given one, or decoded tokens."""
    whole = []
    for row in rows:
        ids = prompt_ids(row, tokenizer)
        given = next((row[name] for name in TEXT_COLUMNS if name in row), None)
        prompt = tokenizer.decode(ids, skip_special_tokens=True) if given is None else given
        whole.append({**row, "prompt": prompt, "prompt_ids": ids.tolist()})
    return whole
