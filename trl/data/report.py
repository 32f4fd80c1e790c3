"""A report of tokenisation: it counts what was cut, left out or odd, row by row, and is logged before training."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag

logger = logging.getLogger(__name__)


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


NO_FLAGS = RowFlag(0)

_WORDS = {
    RowFlag.DOUBLE_BOS: "rows brought a BOS token that would have stood twice: one was taken away",
    RowFlag.MISSING_EOS: "rows have no EOS token, so nothing teaches the model to stop there",
    RowFlag.STOP_MASKED: "rows have an EOS token but it is masked, so nothing teaches the model to stop there",
    RowFlag.ANSWER_CUT: "rows lost their whole answer to truncation and are left out",
    RowFlag.EMPTY_COMPLETION: "rows have an empty completion",
    RowFlag.UNLEARNED: "rows have no learned token and are left out",
    RowFlag.REWRITTEN: "rows have turns that the chat template renders in another way than it prompts for them",
    RowFlag.IDENTICAL: "pairs have the same chosen and rejected tokens, so they teach nothing",
    RowFlag.SPELLED_TOOLS: "rows have tools that the chat template does not know: they were spelled out as text",
}


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
    empty_completion: int = 0
    unlearned: int = 0
    """rows that never had a learned token; those of `answer_cut` are not among them"""
    rewritten: int = 0
    identical: int = 0
    spelled_tools: int = 0
    partial: bool = False
    """True when only the first rows of a stream were looked at"""

    @property
    def left_out(self) -> int:
        """Rows without anything to learn, which the tokenised data set no longer has."""
        return self.answer_cut + self.unlearned

    def add(self, flags: Iterable[int], cut: Iterable[int], tokens: Iterable[int], learned: Iterable[int]) -> None:
        """Count rows by their flags, tokens cut, tokens kept and learned tokens."""
        for flag, row_cut, row_tokens, row_learned in zip(flags, cut, tokens, learned, strict=True):
            self.rows += 1
            self.tokens += row_tokens
            self.learned += row_learned
            self.tokens_cut += row_cut
            for kind in RowFlag(flag):
                name = str(kind.name).lower()
                setattr(self, name, getattr(self, name) + 1)

    def _count(self, kind: RowFlag) -> int:
        return int(getattr(self, str(kind.name).lower()))

    @property
    def findings(self) -> list[str]:
        """One line for each thing that somebody should know before training."""
        found = [f"{self._count(kind):,} {words}" for kind, words in _WORDS.items() if self._count(kind)]
        if self.truncated:
            found.insert(0, f"{self.truncated:,} rows were truncated ({self.tokens_cut:,} tokens cut)")
        return found

    def lines(self, name: str = "train") -> list[str]:
        """The summary, and a line for each finding."""
        seen = "first rows" if self.partial else "rows"
        learned = f", {self.learned:,} learned" if self.learned != self.tokens else ""
        return [f"{name} data: {self.rows:,} {seen}, {self.tokens:,} tokens{learned}", *self.findings]

    def log(self, name: str = "train") -> None:
        """Log the report on the main process: a warning when something was found, otherwise for information."""
        if self.rows and int(os.environ.get("RANK", "0")) == 0:
            level = logging.WARNING if self.findings else logging.INFO
            logger.log(level, "; ".join(self.lines(name)))

    def check(self, name: str = "train") -> None:
        """ValueError when training on these rows would be meaningless."""
        if not self.rows:
            raise ValueError(f"the {name} data set is empty")
        seen = f"the first {self.rows:,}" if self.partial else f"all {self.rows:,}"
        if self.left_out == self.rows:
            cause = f"{self.answer_cut:,} lost their whole answer to truncation" if self.answer_cut else ""
            none = f"{self.unlearned:,} have nothing that the loss mask lets through" if self.unlearned else ""
            reasons = " and ".join(filter(None, (cause, none)))
            way_out = "raise `max_length`" if self.answer_cut else "look at the masks and at what each row is"
            raise ValueError(f"{seen} rows of the {name} data set are without a learned token: {reasons}; {way_out}")
        if self.identical == self.rows:
            raise ValueError(f"{seen} pairs of the {name} data set have the same chosen and rejected tokens")
