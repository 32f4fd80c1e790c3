"""The base of the jobs that turn rows into token ids: tokenizer, limits, chat template, and readers of columns."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import transformers
from datasets import List, Value

from trl.data.chat import ChatTemplate, Messages, read_tools
from trl.data.columns import UNREADABLE, at_row, ids_of, text_of
from trl.data.encode import Ids, Limits, Span, TextEncoder
from trl.data.formats import CONVERSATION_COLUMNS, Format, RowKind, detect_format
from trl.data.messages import DECODED, JOINED, SPEAKERS
from trl.data.picture_rows import COLUMNS, FLAGS, NUMBERS, Shown, files_of, placed, read_pictures, undecoded
from trl.data.pictures import Album, PictureReader, pictures_among, reader_of, token_of
from trl.data.rendering import THOUGHT_FIELDS, Reading
from trl.data.report import NO_FLAGS, NOTHING_MET, Met, RowFlag
from trl.data.version import code_version

Row = dict[str, Any]
Part = TypeVar("Part", str, Ids)
IDS = List(Value("int32"))
PICTURED_IDS = List(Value("int64"))
"""a picture's tokens are numbers below zero, of 62 bits"""
MASK = List(Value("int8"))


LEFT_OUT = RowFlag.UNLEARNED | RowFlag.ANSWER_CUT | RowFlag.PICTURE_CUT
"""flags of rows that the tokenised data set does not have"""


class Made(NamedTuple):
    """One tokenised row and what happened to it."""

    columns: Row
    flags: RowFlag
    cut: int
    """tokens that length limits took away"""
    tokens: int
    learned: int
    met: Met = NOTHING_MET

    @property
    def left_out(self) -> bool:
        return bool(self.flags & LEFT_OUT)


@dataclass
class Answered(Generic[Part]):
    """A prompt and the answers that continue it, as texts or as ids before length limits."""

    prompt: Part
    answers: list[Part]
    flags: RowFlag = NO_FLAGS
    said: list[list[Span]] = field(default_factory=list)
    """of rendered answers the characters that the assistant says"""
    met: Met = NOTHING_MET
    masks: list[Ids] = field(default_factory=list)
    """of answers as ids, where they are known: 1 for what the assistant says"""
    pictures: list[int] = field(default_factory=list)
    """in their order"""
    hidden: Ids = field(default_factory=list)
    """of a prompt as ids: 1 where pictures stand; empty where there are none"""


def says_nothing(messages: Messages) -> bool:
    """Whether some assistant's message is empty."""
    return any(m["role"] == "assistant" and not (m.get("content") or m.get("tool_calls")) for m in messages)


def asks_nothing(messages: Messages) -> bool:
    """Whether the messages of a prompt are all blank, but for a system message."""
    asked = [m for m in messages if m.get("role") not in ("system", "developer")]
    return not any(_says_something(m) for m in asked or messages)


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return bool(message.get("tool_calls") or (content.strip() if isinstance(content, str) else content))


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
    embeddings: int | None = None
    """rows of the model's embedding; None: not known. A row with an id beyond them is a ValueError"""
    format: Format = field(init=False)
    name: str = field(init=False, default="train")
    """which data set it is, for messages"""
    pictures: PictureReader | None = field(init=False, default=None)
    """what reads the pictures of the rows; None: nothing does"""
    keep_nulls: bool = field(init=False, default=False)
    """the rows are a list, so a None in them was said: Arrow has filled in none"""

    accepts: ClassVar[tuple[RowKind, ...]]
    """formats that it reads, the preferred one first"""
    tokenised: ClassVar[tuple[tuple[str, ...], ...]] = (("input_ids",),)
    """sets of columns that make a row tokenised"""

    no_prompt: ClassVar[str] = "give texts without a prompt as a column 'text', or the BOS token as the prompt"
    """the way out where no row has a prompt"""

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

    def reads(self) -> set[str] | None:
        """The columns that rows are made of; None: all of them are read or kept."""
        if self.keep is None or self.format.kind is RowKind.TOKENIZED:
            return None
        own = {"tools", "chat_template_kwargs"} if self.format.conversational else set()
        own |= set() if self.pictures is None else {*COLUMNS, NUMBERS, FLAGS}
        return own | set(self.format.columns) | set(self.keep)

    def asks_prompt(self) -> bool:
        """Whether rows have, or should have, a prompt."""
        return "prompt" in self.format.columns

    def reading(self, dataset: Any, name: str) -> tuple[Any, RowJob]:
        """The data set, converted where that is needed, and a copy of this job for its format."""
        job = copy.copy(self)
        job.format, job.name = detect_format(dataset, self.accepts, tokenised=self.tokenised, name=name), name
        return job.opened(dataset), job

    def opened(self, dataset: Any) -> Any:
        """The data set as this job's rows are read from it, which knows its format."""
        self.keep_nulls = isinstance(dataset, list | tuple)
        self.pictures = reader_of(self.encoder.tokenizer)
        return dataset if self.pictures is None else undecoded(dataset)

    def key(self) -> str:
        """Everything that the rows depend on, as text."""
        kwargs = sorted((self.template_kwargs or {}).items())
        own = (type(self).__name__, self.format, self.limits, kwargs, tuple(self.ends), self.options())
        pictures = "" if self.pictures is None else self.pictures.fingerprint() + transformers.__version__
        return repr((code_version(), self.embeddings, *own)) + self.encoder.fingerprint() + pictures

    @contextmanager
    def at_row(self, index: int) -> Iterator[None]:
        """Say in an error which row it is about, and its columns."""
        with at_row(index, self.name, self.format.columns):
            yield

    def check_ids(self, made: Made) -> None:
        """ValueError where a row has an id for which the model has no embedding."""
        for column in self.features:
            ids = made.columns[column]
            if self.pictures is not None and column.endswith("_ids") and self.pictures.image_token_id in ids:
                token = self.encoder.tokenizer.convert_ids_to_tokens(self.pictures.image_token_id)
                raise ValueError(
                    f"the row has the token {token!r}, which stands for a part of a picture, and no picture there: "
                    f"give the picture in a column 'images' and {self.pictures.placeholder!r} where it stands, or take "
                    "the token out"
                )
            if self.embeddings is not None and column.endswith("_ids") and ids and max(ids) >= self.embeddings:
                token = self.encoder.tokenizer.convert_ids_to_tokens(max(ids))
                known = "a token of no tokenizer" if token is None else repr(token)
                raise ValueError(
                    f"{known} has the id {max(ids)}, and the model's embedding has {self.embeddings} rows: take the "
                    "token out of the row, or call `model.resize_token_embeddings(len(tokenizer))`"
                )

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

    # --- pictures ---

    @property
    def ids(self) -> Any:
        """The type of a column of token ids."""
        return IDS if self.pictures is None else PICTURED_IDS

    def with_numbers(self, row: Row) -> Row:
        """The row whose pictures are in the album, see `read_pictures`."""
        return row if self.pictures is None else read_pictures(row, CONVERSATION_COLUMNS)

    def placed(self, row: Row, messages: Messages) -> tuple[Messages, list[int]]:
        """The messages with the row's pictures in them, and the pictures in their order."""
        return (messages, []) if self.pictures is None else placed(messages, row[NUMBERS], self.pictures.placeholder)

    def files(self, dataset: Any) -> list[Any]:
        """The pictures' files that the data set names, and their states, and the album's: cached rows are of these."""
        return [] if self.pictures is None else [Album.stamp(), *files_of(dataset, (*COLUMNS, *CONVERSATION_COLUMNS))]

    def counted(self, row: Row, one: Answered[str], numbers: list[int]) -> Answered[str]:
        """The prompt and answers of a row with these pictures, and with what was met in them."""
        one.pictures, one.met = numbers, one.met._replace(pictures=len(numbers))
        one.flags |= RowFlag(row.get(FLAGS, 0))
        return one

    def shown(self, text: str, numbers: Sequence[int], spans: Sequence[Span] = ()) -> Shown:
        """The text with these pictures as the processor writes them, where its placeholders stand."""
        if self.pictures is None:
            return Shown(text, spans)
        mark, count = self.pictures.placeholder, text.count(self.pictures.placeholder)
        if count != len(numbers) and self.format.conversational:
            way = f"take {mark!r} out of the texts" if count > len(numbers) else "set the template of the processor"
            raise ValueError(
                f"the chat template prints {count} pictures ({mark!r}) of a conversation that has {len(numbers)}: {way}"
            )
        for place, number in enumerate(numbers):
            try:
                self.pictures.text_of(number)
            except (ValueError, RuntimeError, OSError, *UNREADABLE) as error:
                raise ValueError(
                    f"the processor cannot read picture {place} ({error}): change its size, or leave the row out"
                ) from error
        return Shown(*self.pictures.expand(text, spans, numbers), numbers)

    def pictured(
        self, texts: Sequence[Shown], ids: Sequence[Ids], indices: Sequence[int], continuing: bool = False
    ) -> list[tuple[Ids, Ids]]:
        """The ids of the texts with the tokens of their pictures, and 1 where pictures stand; empty: there are none.

        continuing: the texts continue others.
        """
        some = [one for one in texts if one.numbers]
        if not some or self.pictures is None:
            return [(own, []) for own in ids]
        masking = self.encoder.continuations_with_masks if continuing else self.encoder.encode_with_masks
        hidden = iter(masking([one.text for one in some], [one.hidden for one in some]))
        made = []
        for index, one, own in zip(indices, texts, ids, strict=True):
            with self.at_row(index):
                filled = self.pictures.tokens(own, one.numbers) if one.numbers else own
            made.append((filled, next(hidden)[1] if one.numbers else []))
        return made

    def tokenised_ids(self, row: Mapping[str, Any], column: str) -> Ids:
        """The token ids in a column of a row that is tokenised already."""
        ids = ids_of(row, column, pictured=self.pictures is not None)
        for number in pictures_among(ids):
            if not Album.path(number).exists():
                place = ids.index(token_of(number))
                raise ValueError(
                    f"column '{column}' has {token_of(number)} at entry {place}: ids are 0 or more, or those of "
                    "pictures that this machine has read; tokenise the row again"
                )
        return ids

    def pinned(self, ids: Ids) -> int:
        """How many ids at the start stay when the start is cut: a BOS."""
        return int(bool(ids) and ids[0] == self.encoder.bos_id)

    def plain(self, row: Row, answers: Sequence[str]) -> Answered[str]:
        """The row's prompt and the texts in the columns `answers`."""
        texts = [text_of(row, answer) for answer in answers]
        flags = RowFlag.EMPTY_COMPLETION if any(not text.strip() for text in texts) else NO_FLAGS
        prompt = text_of(row, "prompt")
        flags |= RowFlag.EMPTY_PROMPT if not prompt.strip() else NO_FLAGS
        return Answered(prompt, texts, flags)

    def rendered(self, row: Row, prompt: Messages, answers: Sequence[Messages]) -> Answered[str]:
        """A prompt and its answers as the row's chat template renders them."""
        tools = read_tools(row.get("tools"), self.keep_nulls)
        texts = self.template.of_row(row).split(prompt, answers, tools)
        flags = RowFlag.EMPTY_COMPLETION if any(map(says_nothing, answers)) else NO_FLAGS
        flags |= RowFlag.REWRITTEN if texts.rewritten else flags
        flags |= RowFlag.EMPTY_PROMPT if asks_nothing(prompt) else flags
        met = NOTHING_MET
        for number, (reading, answer) in enumerate(zip(texts.readings, answers, strict=True)):
            own = met_of(reading, len(prompt) + len(answer), len(prompt) if number else 0)
            flags |= flags_of(reading, own) & ~RowFlag.REWRITTEN
            met = met.plus(own)
        return Answered(texts.prompt, texts.answers, flags, texts.spans, met)


def met_of(reading: Reading, messages: int, first: int = 0) -> Met:
    """What was met in the messages from `first` on; `messages`: how many the conversation has."""
    silent: dict[str, set[int]] = {"thoughts": set(), "results": set(), "texts": set()}
    for at, role, name in reading.missing:
        kind = "thoughts" if name in THOUGHT_FIELDS else "texts" if role in SPEAKERS else "results"
        silent[kind].add(at)
    counts = {kind: sum(at >= first for at in places) for kind, places in silent.items()}
    for name, kind in (("decoded", DECODED), ("joined", JOINED)):
        counts[name] = sum(n for (at, own), n in reading.changed.items() if own == kind and at >= first)
    return Met(messages - first, **counts)


def flags_of(reading: Reading, met: Met) -> RowFlag:
    """What happened to a conversation when it was rendered."""
    flags = RowFlag.REWRITTEN if reading.rewritten else NO_FLAGS
    flags |= RowFlag.SPELLED_TOOLS if reading.spelled else flags
    flags |= RowFlag.DECODED_ARGUMENTS if met.decoded else flags
    flags |= RowFlag.JOINED_PARTS if met.joined else flags
    flags |= RowFlag.UNPRINTED_THOUGHTS if met.thoughts else flags
    flags |= RowFlag.UNPRINTED_RESULTS if met.results else flags
    return flags | (RowFlag.UNPRINTED_TEXT if met.texts else flags)
