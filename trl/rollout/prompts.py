"""Prompts: their endless shuffled order, which ranks share, and the tokens of a row's prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trl.data.chat import ChatTemplate
from trl.data.columns import at_row, check_embedded, ids_of, shown, text_of, unwrapped
from trl.data.encode import Ids
from trl.data.messages import Messages, messages_of
from trl.data.pictures import PictureReader, plain_ids, reader_of

if TYPE_CHECKING:
    from datasets import IterableDataset


def is_stream(rows: Any) -> bool:
    """Whether it is an `IterableDataset`. `datasets` takes 80 MB, which a script without a data set does not need."""
    known = sys.modules.get("datasets")
    return known is not None and isinstance(rows, known.IterableDataset)


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
        if is_stream(self.rows):
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
        if is_stream(self.rows):
            return self._next(position, wanted)
        return [self.rows[self._place(position + i)] for i in range(wanted)]

    def _next(self, position: int, wanted: int) -> list[dict[str, Any]]:
        """The rows of an `IterableDataset`, which is read from its start where they lie behind."""
        if self._reader is None or position < self._read:
            self._reader, self._read = passes(self.rows), 0
        skipped, self._read = position - self._read, position + wanted
        return list(islice(self._reader, skipped, skipped + wanted))

    def check(self, position: int, count: int, tokenizer: Any, embeddings: int | None = None) -> None:
        """ValueError where one of the rows from `position` on has no prompt that the model can read."""
        for i in range(count):
            place = self._place(position + i)
            with at_row(place, "train"):
                prompt_of(self.rows[place], tokenizer, embeddings)

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


def part_of(place: int, parts: int, wanted: int) -> range:
    """The part at `place` of `wanted` things that `parts` share, in their order and as evenly as can be.

    >>> [list(part_of(place, 3, 5)) for place in range(3)]
    [[0, 1], [2, 3], [4]]
    """
    return range(-(-place * wanted // parts), -(-(place + 1) * wanted // parts))


TEXT_COLUMNS = ("prompt", "query")
"""columns that may hold the text of a prompt, where a row has no `input_ids`"""


def prompt_of(row: Mapping[str, Any], tokenizer: Any, embeddings: int | None = None) -> str | Messages | Ids:
    """A row's `input_ids`, else its `prompt` or `query` (a text or a conversation).

    ValueError for another, and for an id beyond the `embeddings` that the model has.
    """
    if "input_ids" in row:
        given = {"input_ids": _flat(row["input_ids"])}
        ids = ids_of(given, "input_ids", pictured=reader_of(tokenizer) is not None)
        if not ids:
            raise ValueError("column 'input_ids' is empty: give at least one token, such as BOS")
        check_embedded(ids, "column 'input_ids'", embeddings, pictured=reader_of(tokenizer) is not None)
        return ids
    name = next((name for name in TEXT_COLUMNS if name in row), None)
    if name is None:
        raise ValueError(f"a row of the data set has columns {list(row)}: give it `input_ids`, `prompt` or `query`")
    value = unwrapped(row[name])
    if isinstance(value, str):
        return text_of(row, name)
    if not isinstance(value, list | tuple | Mapping) or not value:
        raise ValueError(f"column '{name}' should be a text or a conversation, got {shown(value)}: give one of them")
    if not tokenizer.chat_template:
        raise ValueError(f"{name} is a conversation, and the tokenizer has no chat_template: set it, or give texts")
    return messages_of(row, name)


def _flat(ids: Any) -> Any:
    """A row of one batch [1, P], as tokenizers return it, as [P]."""
    return ids.flatten() if hasattr(ids, "flatten") else ids


def prompt_ids(row: Mapping[str, Any], tokenizer: Any) -> Tensor:
    """The tokens of a row's prompt; those of its pictures are below zero. [P]"""
    if "input_ids" not in row and (reader := reader_of(tokenizer)) is not None:
        return torch.tensor(_pictured_ids(row, tokenizer, reader), dtype=torch.long)
    prompt: Any = prompt_of(row, tokenizer)
    if isinstance(prompt, str):
        prompt = tokenizer(prompt)["input_ids"]
        if not prompt:
            raise ValueError("a prompt of the data set has no tokens: give a text, or the BOS token")
    elif isinstance(prompt[0], Mapping):
        prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    return torch.tensor(prompt, dtype=torch.long)


@lru_cache(maxsize=2)
def _template(tokenizer: Any, source: str) -> ChatTemplate:
    return ChatTemplate(tokenizer)


def _pictured_ids(row: Mapping[str, Any], tokenizer: Any, reader: PictureReader) -> Ids:
    """The tokens of a prompt for a model that reads pictures, those of its columns and of the prompt's own parts."""
    from trl.data.picture_rows import NUMBERS, placed, read_pictures

    read = read_pictures(row, TEXT_COLUMNS)
    prompt: Any = prompt_of(read, tokenizer)
    numbers = read[NUMBERS]
    if not isinstance(prompt, str):
        prompt, numbers = placed(prompt, numbers, reader.placeholder)
        prompt = _template(tokenizer, str(tokenizer.chat_template)).render(prompt, open_turn=True)
        ids = tokenizer(reader.expand(prompt, (), numbers).text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(reader.expand(prompt, (), numbers).text)["input_ids"]
    if not ids:
        raise ValueError("a prompt of the data set has no tokens: give a text, or the BOS token")
    return reader.tokens(ids, numbers)


def with_opened_pictures(columns: dict[str, list[Any]], tokenizer: Any) -> dict[str, list[Any]]:
    """The columns as reward functions read them: pictures are PIL's, in whatever form the data set holds them."""
    names = [name for name in ("images", "image") if name in columns]
    if not names or reader_of(tokenizer) is None:
        return columns
    from trl.data.picture_files import opened_pictures

    known: dict[int, Any] = {}  # completions of one prompt share the row's value
    for name in names:
        values = columns[name]
        known |= {key: opened_pictures(value, name) for key, value in {id(v): v for v in values}.items()}
        columns = {**columns, name: [known[id(value)] for value in values]}
    return columns


def decoded(tokenizer: Any, ids: Sequence[int], **how: Any) -> str:
    """The text of a row's ids; a picture among them is the token that stands for one."""
    plain = list(ids) if min(ids, default=0) >= 0 else plain_ids(tokenizer, ids)
    return str(tokenizer.decode(plain, **how))


def with_prompts(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """The rows with `prompt_ids`, and with `prompt` as reward functions read it: the given one, or decoded tokens."""
    whole = []
    for row in rows:
        ids = prompt_ids(row, tokenizer)
        given = next((row[name] for name in TEXT_COLUMNS if name in row), None)
        prompt = decoded(tokenizer, ids.tolist(), skip_special_tokens=True) if given is None else given
        whole.append({**row, "prompt": prompt, "prompt_ids": ids.tolist()})
    return whole
