"""Length limits: which tokens of a row stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MODES = ("keep_start", "keep_end")


def cut(tokens: Sequence[Any], limit: int, mode: str, pinned: int = 0) -> list[Any]:
    """At most `limit` tokens from the start or the end; keep_end also keeps the first `pinned` ones (BOS)."""
    if len(tokens) <= limit:
        return list(tokens)
    if mode == "keep_start":
        return list(tokens[:limit])
    pinned = min(pinned, limit)
    return [*tokens[:pinned], *tokens[len(tokens) - (limit - pinned) :]]


@dataclass(frozen=True)
class Limits:
    """`max_length` bounds a whole row, the others its parts; None: no bound."""

    max_length: int | None = None
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_mode: str = "keep_start"

    def __post_init__(self) -> None:
        if self.truncation_mode not in MODES:
            raise ValueError(f"truncation_mode={self.truncation_mode!r}: choose 'keep_start' or 'keep_end'")
        for name in ("max_length", "max_prompt_length", "max_completion_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: should be at least 1, or None for no limit")

    def fit_row(self, ids: list[int], mask: list[int], pinned: int) -> tuple[list[int], list[int]]:
        """A row and its mask within `max_length`."""
        if self.max_length is None:
            return ids, mask
        limit, mode = self.max_length, self.truncation_mode
        return cut(ids, limit, mode, pinned), cut(mask, limit, mode, pinned)

    def fit_answers(
        self, prompt: list[int], answers: Sequence[list[int]], pinned: int
    ) -> tuple[list[int], list[list[int]]]:
        """A prompt and the answers that share it, each whole within the limits.

        Prompt and answers are first cut to their own limits, answers at their end. Where a whole is still too long,
        keep_start cuts the answers at their end; keep_end cuts the prompt at its start, and answers only when no
        prompt is left.
        """
        mode = self.truncation_mode
        if self.max_prompt_length is not None:
            prompt = cut(prompt, self.max_prompt_length, mode, pinned)
        if self.max_completion_length is not None:
            answers = [answer[: self.max_completion_length] for answer in answers]
        if self.max_length is not None:
            longest = max(map(len, answers))
            if mode == "keep_end":
                prompt = cut(prompt, max(0, self.max_length - longest), mode, pinned)
            answers = [answer[: max(0, self.max_length - len(prompt))] for answer in answers]
            prompt = prompt[: self.max_length]
        return prompt, [list(answer) for answer in answers]
