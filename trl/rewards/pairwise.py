"""Turns judges of pairs into reward functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trl.rewards.panel import RewardError

Judge = Callable[[list[Any], list[list[Any]]], Sequence[int]]
"""`f(prompts, pairs) -> 0 (the first is better), 1 (the second) or -1 (no opinion), one for each pair`"""


def pairwise(judge: Judge | Any) -> Callable[..., list[float | None]]:
    """A reward function on groups of two: 1 for the better completion, 0 for the other, None for both if undecided.

    judge: a function of the type `Judge`, or an object whose method `judge` is one.
    """
    decide = getattr(judge, "judge", judge)
    if not callable(decide):
        raise ValueError(
            f"judge={judge!r}: give a function (prompts, pairs) -> choices, or an object with one, `judge`"
        )

    def judged(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        pairs = [list(completions[i : i + 2]) for i in range(0, len(completions), 2)]
        choices = list(decide(list(prompts[::2]), pairs))
        if len(choices) != len(pairs) or not set(choices) <= {-1, 0, 1}:
            raise RewardError(f"the judge gave {choices} for {len(pairs)} pairs: give 0, 1 or -1 (no opinion) for each")
        return [score for choice in choices for score in (SCORES[choice])]

    judged.__name__ = getattr(judge, "__name__", type(judge).__name__)
    return judged


SCORES: dict[int, tuple[float | None, float | None]] = {0: (1.0, 0.0), 1: (0.0, 1.0), -1: (None, None)}
