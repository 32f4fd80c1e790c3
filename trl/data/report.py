"""A report of tokenisation: it counts what was cut, left out or odd, row by row, and is logged before training."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any, NamedTuple

import numpy as np

logger = logging.getLogger(__name__)

Numbers = Sequence[int] | np.ndarray


class RowFlag(IntFlag):
    """What happened to one row. Cached data sets hold the numbers, so none changes its meaning."""

    TRUNCATED = 1
    DOUBLE_BOS = 2
    MISSING_EOS = 8
    STOP_MASKED = 16
    ANSWER_CUT = 32
    EMPTY_COMPLETION = 64
    UNLEARNED = 128
    REWRITTEN = 256
    IDENTICAL = 512
    SPELLED_TOOLS = 1024
    UNPRINTED_THOUGHTS = 2048
    UNPRINTED_RESULTS = 4096
    UNPRINTED_TEXT = 8192
    DECODED_ARGUMENTS = 16384
    JOINED_PARTS = 32768
    EMPTY_PROMPT = 65536
    UNREAD_WEIGHTS = 131072
    PICTURE_CUT = 262144
    ANIMATED = 524288
    UNREAD_DETAILS = 1048576


NO_FLAGS = RowFlag(0)


class Met(NamedTuple):
    """What was met in the messages of a row, or of all rows."""

    messages: int = 0
    thoughts: int = 0
    """messages whose reasoning the template does not print"""
    results: int = 0
    """results of tools that it does not print"""
    texts: int = 0
    """messages of which it does not print something else"""
    decoded: int = 0
    """arguments of tool calls that were JSON text"""
    joined: int = 0
    """contents in parts whose texts were joined"""
    pictures: int = 0

    def plus(self, other: Sequence[int]) -> Met:
        return Met(*(int(a) + int(b) for a, b in zip(self, other, strict=True)))


NOTHING_MET = Met()
_WORDS = {
    RowFlag.DOUBLE_BOS: "rows brought a BOS token that would have stood twice: one was taken away",
    RowFlag.MISSING_EOS: "rows have no EOS token, so nothing teaches the model to stop there",
    RowFlag.STOP_MASKED: "rows have an EOS token but it is masked, so nothing teaches the model to stop there",
    RowFlag.ANSWER_CUT: "rows lost their whole answer to truncation and are left out",
    RowFlag.PICTURE_CUT: "rows would have lost a part of a picture to truncation and are left out",
    RowFlag.EMPTY_PROMPT: "rows have an empty prompt",
    RowFlag.EMPTY_COMPLETION: "rows have an empty completion",
    RowFlag.UNLEARNED: "rows have no learned token and are left out",
    RowFlag.REWRITTEN: "rows have turns that the chat template renders in another way than it prompts for them",
    RowFlag.IDENTICAL: "pairs have the same chosen and rejected tokens, so they teach nothing",
    RowFlag.UNREAD_WEIGHTS: "rows have assistant's messages with `weight: 0`, which are learned with all the rest: "
    "`assistant_only_loss=True` leaves those messages out",
    RowFlag.ANIMATED: "rows have a file with several pictures (an animation), of which the first is taken",
    RowFlag.UNREAD_DETAILS: "rows have pictures with fields that no one reads (`detail`, `min_pixels` or others): the "
    "processor's own settings hold",
    RowFlag.SPELLED_TOOLS: "rows have tools that the chat template does not know: they were spelled out as text",
}
_UNPRINTED = {
    "thoughts": "the reasoning of",
    "results": "the results of tools in",
    "texts": "contents (a system message, part of an answer) of",
}
_CHANGED = {
    "decoded": "arguments of tool calls were JSON text and were decoded",
    "joined": "contents were lists of parts: the chat template reads text only, so their texts were joined",
}


def words_of(flags: RowFlag, met: Met) -> list[str]:
    """What happened to one row, in words."""
    return [words for kind, words in _WORDS.items() if flags & kind] + _met_words(met)


def _met_words(met: Met) -> list[str]:
    found = []
    for name, words in _UNPRINTED.items():
        count = getattr(met, name)
        if count:
            found.append(f"the chat template does not print {words} {count:,} of {met.messages:,} messages")
    return found + [f"{getattr(met, name):,} {words}" for name, words in _CHANGED.items() if getattr(met, name)]


@dataclass(frozen=True)
class RowNote:
    """What the report counts, of one row; for an inspector."""

    index: int
    """its place in the data set"""
    columns: dict[str, Any]
    """the tokenised row"""
    tokens: int
    learned: int
    cut: int
    """tokens that length limits took away"""
    left_out: bool
    flags: RowFlag
    met: Met

    @property
    def findings(self) -> list[str]:
        """What happened to the row, in words."""
        cut = [f"truncated ({self.cut:,} tokens cut)"] if self.flags & RowFlag.TRUNCATED else []
        return cut + words_of(self.flags, self.met)


@dataclass
class TokenizationReport:
    """Counts over one data set; a row can be in several of them."""

    rows: int = 0
    tokens: int = 0
    learned: int = 0
    """tokens that the objective learns from"""
    truncated: int = 0
    """rows that lost tokens to a length limit"""
    tokens_cut: int = 0
    double_bos: int = 0
    missing_eos: int = 0
    stop_masked: int = 0
    answer_cut: int = 0
    empty_prompt: int = 0
    empty_completion: int = 0
    unlearned: int = 0
    """rows that never had a learned token; those of `answer_cut` are not among them"""
    rewritten: int = 0
    identical: int = 0
    spelled_tools: int = 0
    unprinted_thoughts: int = 0
    """rows with reasoning that the chat template does not print; `met` counts the messages"""
    unprinted_results: int = 0
    unprinted_text: int = 0
    decoded_arguments: int = 0
    joined_parts: int = 0
    unread_weights: int = 0
    picture_cut: int = 0
    animated: int = 0
    unread_details: int = 0
    pictured: int = 0
    """rows with pictures; `met` counts the pictures"""
    met: Met = NOTHING_MET
    """what was met in the messages of all rows"""
    unread: list[str] = field(default_factory=list)
    """columns that no one reads"""
    partial: bool = False
    """True when only the first rows of a stream were looked at"""

    @property
    def left_out(self) -> int:
        """Rows without anything to learn, or with half a picture, which the tokenised data set no longer has."""
        return self.answer_cut + self.unlearned + self.picture_cut

    def add(self, flags: Numbers, cut: Numbers, tokens: Numbers, learned: Numbers, *met: Numbers) -> None:
        """Count rows by their flags, tokens cut, tokens kept and learned tokens, and what was met in their messages."""
        bits = np.asarray(flags, dtype=np.int64)
        self.rows += len(bits)
        self.tokens += int(np.sum(tokens))
        self.learned += int(np.sum(learned))
        self.tokens_cut += int(np.sum(cut))
        for kind in RowFlag:
            name = str(kind.name).lower()
            setattr(self, name, getattr(self, name) + int(np.count_nonzero(bits & int(kind))))
        if met:
            self.met = self.met.plus([int(np.sum(one)) for one in met])
            self.pictured += int(np.count_nonzero(met[Met._fields.index("pictures")]))

    def _count(self, kind: RowFlag) -> int:
        return int(getattr(self, str(kind.name).lower()))

    @property
    def findings(self) -> list[str]:
        """One line for each thing that somebody should know before training."""
        found = [f"{self._count(kind):,} {words}" for kind, words in _WORDS.items() if self._count(kind)]
        if self.truncated:
            found.insert(0, f"{self.truncated:,} rows were truncated ({self.tokens_cut:,} tokens cut)")
        found += _met_words(self.met)
        if self.unread:
            found.append(f"{self.unread_words()}")
        return found

    def unread_words(self) -> str:
        """The columns that no one reads, in words."""
        names, many = ", ".join(f"'{name}'" for name in self.unread), len(self.unread) > 1
        pictures = any(name in ("image", "images") for name in self.unread)
        hint = " (pictures are read where the model's processor is the `processing_class`)" if pictures else ""
        return f"no one reads the column{'s' if many else ''} {names}{hint}"

    def lines(self, name: str = "train") -> list[str]:
        """The summary, and a line for each finding."""
        seen = "first rows" if self.partial else "rows"
        learned = f", {self.learned:,} learned" if self.learned != self.tokens else ""
        pictures = f", {self.met.pictures:,} pictures in {self.pictured:,} rows" if self.pictured else ""
        return [f"{name} data: {self.rows:,} {seen}, {self.tokens:,} tokens{learned}{pictures}", *self.findings]

    def log(self, name: str = "train") -> None:
        """Log the report on the main process: a warning when something was found, otherwise for information.

        Python shows warnings only unless it is told otherwise, so a report without findings goes to a handler of its
        own then.
        """
        kept = _kept.get()
        if kept is not None:
            kept[name] = self
        if not self.rows or int(os.environ.get("RANK", "0")) != 0:
            return
        line = "; ".join(self.lines(name))
        if self.findings or logger.isEnabledFor(logging.INFO):
            logger.log(logging.WARNING if self.findings else logging.INFO, line)
        elif logger.isEnabledFor(logging.WARNING) and logging.lastResort is not None:
            logging.lastResort.handle(logger.makeRecord(logger.name, logging.INFO, "", 0, line, (), None))

    def check(self, name: str = "train") -> None:
        """ValueError when training on these rows would be meaningless."""
        if not self.rows:
            raise ValueError(f"the {name} data set is empty")
        seen = self.seen()
        if self.left_out == self.rows:
            cause = f"{self.answer_cut:,} lost their whole answer to truncation" if self.answer_cut else ""
            none = f"{self.unlearned:,} have nothing that the loss mask lets through" if self.unlearned else ""
            part = f"{self.picture_cut:,} would lose a part of a picture to truncation" if self.picture_cut else ""
            reasons = " and ".join(filter(None, (cause, part, none)))
            way_out = "raise `max_length`" if self.answer_cut else "look at the masks and at what each row is"
            if self.picture_cut:
                way_out = "raise the limits on lengths, or set the processor to fewer tokens for a picture"
            raise ValueError(f"{seen} rows of the {name} data set are without a learned token: {reasons}; {way_out}")
        if self.identical == self.rows:
            raise ValueError(f"{seen} pairs of the {name} data set have the same chosen and rejected tokens")

    def check_prompts(self, name: str, unread_texts: Sequence[str], given: bool, way_out: str) -> None:
        """ValueError when the rows have no prompt; one that only some rows lack is a matter of the report.

        unread_texts: columns with text that no one reads. given: the rows have a column for the prompt, or need one.
        """
        unread = ", ".join(f"'{column}'" for column in unread_texts)
        if unread and 2 * self.empty_prompt > self.rows:
            raise ValueError(
                f"{self.empty_prompt:,} of {self.rows:,} rows of the {name} data set have an empty prompt, and no one "
                f"reads the columns {unread}: give the prompt in a column 'prompt' (rename, or join them), or remove "
                "these columns"
            )
        if given and self.empty_prompt == self.rows:
            raise ValueError(f"{self.seen()} rows of the {name} data set have an empty prompt: {way_out}")

    def seen(self) -> str:
        """How many rows were looked at, in words."""
        return f"the first {self.rows:,}" if self.partial else f"all {self.rows:,}"


_kept: ContextVar[dict[str, TokenizationReport] | None] = ContextVar("kept", default=None)


@contextmanager
def reports_kept() -> Iterator[dict[str, TokenizationReport]]:
    """The reports that are logged within the block, by the names of their data sets."""
    kept: dict[str, TokenizationReport] = {}
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)
