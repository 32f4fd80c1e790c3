"""The base of the jobs that turn rows into token ids: tokenizer, limits, chat template, and readers of columns."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from datasets import List, Value

from trl.data.chat import ChatTemplate, Messages, read_tools
from trl.data.encode import Ids, Limits, TextEncoder
from trl.data.formats import Format, RowKind, detect_format
from trl.data.report import NO_FLAGS, RowFlag

Row = dict[str, Any]
Part = TypeVar("Part", str, Ids)
IDS = List(Value("int32"))
MASK = List(Value("int8"))


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


@dataclass
class Answered(Generic[Part]):
    """A prompt and the answers that continue it, as texts or as ids before length limits."""

    prompt: Part
    answers: list[Part]
    flags: RowFlag = NO_FLAGS


@contextmanager
def at_row(index: int, name: str) -> Iterator[None]:
    """Say in a ValueError which row it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"row {index} of the {name} data set: {error}") from error


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The row's text in that column."""
    value = row.get(column)
    if not isinstance(value, str):
        raise ValueError(f"column '{column}' should be a text, got {value!r:.80}")
    return value


def messages_of(row: Mapping[str, Any], column: str) -> Messages:
    """The row's conversation in that column."""
    value = row.get(column)
    if not isinstance(value, list | tuple) or not all(isinstance(m, Mapping) and m.get("role") for m in value):
        raise ValueError(f"column '{column}' should be a list of messages with `role` and `content`, got {value!r:.80}")
    return [dict(message) for message in value]


def ids_of(row: Mapping[str, Any], column: str) -> Ids:
    """The row's token ids in that column."""
    value = row.get(column)
    if value is None or isinstance(value, str) or not all(isinstance(i, Integral) for i in list_of(value)):
        raise ValueError(f"column '{column}' should be a list of token ids, got {value!r:.80}")
    return [int(i) for i in list_of(value)]


def list_of(value: Any) -> list[Any]:
    """A list, from a tensor or an array too."""
    return list(value.tolist() if hasattr(value, "tolist") else value)


def says_nothing(messages: Messages) -> bool:
    """Whether some assistant's message is empty."""
    return any(m["role"] == "assistant" and not (m.get("content") or m.get("tool_calls")) for m in messages)


def needs_closing(encoder: TextEncoder, ids: Ids, text: str) -> bool:
    """Whether the row lacks an EOS at its end; blanks after an EOS do not count."""
    if ids[-len(encoder.tail) :] == encoder.tail:
        return False
    eos = encoder.tokenizer.eos_token
    return not (isinstance(eos, str) and text.rstrip().endswith(eos))


@dataclass(kw_only=True)
class RowJob(ABC):
    """Makes rows of token ids in batches; picklable, so that it can run in several processes.

    `tokenize` hands it a data set with `reading`; before that the job knows no format.
    """

    tokenizer: Any
    limits: Limits = field(default_factory=Limits)
    add_bos: bool | None = None
    """None does as the tokenizer does, True puts BOS first wherever there is one, False never"""
    template_kwargs: Mapping[str, Any] | None = None
    keep: Sequence[str] | None = ()
    """columns of the data set that stay beside the new ones; None: all"""
    format: Format = field(init=False)
    name: str = field(init=False, default="train")
    """which data set it is, for messages"""

    accepts: ClassVar[tuple[RowKind, ...]]
    """formats that it reads, the preferred one first"""
    tokenised: ClassVar[tuple[tuple[str, ...], ...]] = (("input_ids",),)
    """sets of columns that make a row tokenised"""

    @property
    @abstractmethod
    def features(self) -> dict[str, Any]:
        """The columns that it makes."""

    @abstractmethod
    def __call__(self, rows: list[Row], indices: Sequence[int]) -> list[Made]:
        """The tokenised rows; `indices` are their places in the data set."""

    @abstractmethod
    def options(self) -> tuple[Any, ...]:
        """The fields of a subclass that its rows depend on."""

    def reading(self, dataset: Any, name: str) -> tuple[Any, RowJob]:
        """The data set, converted where that is needed, and a copy of this job for its format."""
        job = copy.copy(self)
        job.format, job.name = detect_format(dataset, self.accepts, tokenised=self.tokenised, name=name), name
        return dataset, job

    def key(self) -> str:
        """Everything that the rows depend on, as text."""
        kwargs = sorted((self.template_kwargs or {}).items())
        own = (type(self).__name__, self.format, self.limits, kwargs, self.options())
        return repr(own) + self.encoder.fingerprint()

    @cached_property
    def encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer, self.add_bos)

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.encoder.tokenizer, self.template_kwargs)

    def pinned(self, ids: Ids) -> int:
        """How many ids at the start stay when the start is cut: a BOS."""
        return int(bool(ids) and ids[0] == self.encoder.bos_id)

    def plain(self, row: Row, answers: Sequence[str]) -> Answered[str]:
        """The row's prompt and the texts in the columns `answers`."""
        texts = [text_of(row, answer) for answer in answers]
        empty = RowFlag.EMPTY_COMPLETION if any(not text.strip() for text in texts) else NO_FLAGS
        return Answered(text_of(row, "prompt"), texts, empty)

    def rendered(self, row: Row, prompt: Messages, answers: Sequence[Messages]) -> Answered[str]:
        """A prompt and its answers as the row's chat template renders them."""
        tools, template = read_tools(row.get("tools")), self.template.of_row(row)
        texts = template.split(prompt, answers, tools)
        flags = RowFlag.REWRITTEN if texts.rewritten else NO_FLAGS
        if any(map(says_nothing, answers)):
            flags |= RowFlag.EMPTY_COMPLETION
        if any(template.needs_spelling([*prompt, *answer], tools) for answer in answers):
            flags |= RowFlag.SPELLED_TOOLS
        return Answered(texts.prompt, texts.answers, flags)
