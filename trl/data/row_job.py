"""The base of the jobs that turn rows into token ids: tokenizer, limits, chat template, and readers of columns."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from datasets import List, Value

from trl.data.chat import ChatTemplate, Messages, read_tools
from trl.data.encode import Ids, Limits, Span, TextEncoder
from trl.data.formats import Format, RowKind, detect_format
from trl.data.messages import DECODED, JOINED
from trl.data.rendering import THOUGHT_FIELDS, Reading
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
    said: list[list[Span]] = field(default_factory=list)
    """of rendered answers the characters that the assistant says"""


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


def number_of(row: Mapping[str, Any], column: str) -> float:
    """The row's number in that column, which is finite."""
    value = row[column]
    single = value.item() if getattr(value, "shape", None) in ((), (1,)) else value
    if not isinstance(single, Real) or not math.isfinite(single):
        raise ValueError(f"column '{column}' should be a finite number, got {value!r:.80}")
    return float(single)


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
    ends: Sequence[int] = ()
    """the model's end tokens, from its generation config"""
    template_kwargs: Mapping[str, Any] | None = None
    keep: Sequence[str] | None = ()
    """columns of the data set that stay beside the new ones; None: all"""
    format: Format = field(init=False)
    name: str = field(init=False, default="train")
    """which data set it is, for messages"""
    keep_nulls: bool = field(init=False, default=False)
    """the rows are a list, so a None in them was said: Arrow has filled in none"""

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
        job.keep_nulls = isinstance(dataset, list | tuple)
        return dataset, job

    def key(self) -> str:
        """Everything that the rows depend on, as text."""
        kwargs = sorted((self.template_kwargs or {}).items())
        own = (type(self).__name__, self.format, self.limits, kwargs, tuple(self.ends), self.options())
        return repr(own) + self.encoder.fingerprint()

    @cached_property
    def encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer, self.add_bos)

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.encoder.tokenizer, self.template_kwargs, self.ends, self.keep_nulls)

    @cached_property
    def stops(self) -> frozenset[int]:
        """The tokens of which a row should teach one: any that ends a turn, or EOS where rows are no conversations."""
        eos = self.encoder.eos_id
        return self.template.end_ids if self.format.conversational else frozenset([] if eos is None else [eos])

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
        tools = read_tools(row.get("tools"), self.keep_nulls)
        texts = self.template.of_row(row).split(prompt, answers, tools)
        flags = RowFlag.EMPTY_COMPLETION if any(map(says_nothing, answers)) else NO_FLAGS
        flags |= RowFlag.REWRITTEN if texts.rewritten else flags
        for reading in texts.readings:
            flags |= flags_of(reading) & ~RowFlag.REWRITTEN
        return Answered(texts.prompt, texts.answers, flags, texts.spans)


def flags_of(reading: Reading) -> RowFlag:
    """What happened to a conversation when it was rendered."""
    flags = RowFlag.REWRITTEN if reading.rewritten else NO_FLAGS
    flags |= RowFlag.SPELLED_TOOLS if reading.spelled else flags
    flags |= RowFlag.DECODED_ARGUMENTS if reading.met[DECODED] else flags
    flags |= RowFlag.JOINED_PARTS if reading.met[JOINED] else flags
    for role, name in reading.unprinted:
        if name in THOUGHT_FIELDS:
            flags |= RowFlag.UNPRINTED_THOUGHTS
        else:
            told = role not in ("system", "developer", "user", "assistant")
            flags |= RowFlag.UNPRINTED_RESULTS if told else RowFlag.UNPRINTED_TEXT
    return flags
