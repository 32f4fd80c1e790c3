"""Rows that take turns with their tools, each at its own pace."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from trl.environment.tool_calls import ToolCalls


def take_turns(
    rows: Sequence[int],
    speak: Callable[[list[int]], None],
    answered: Callable[[int, str], bool],
    calls: ToolCalls,
    *,
    apart: bool,
) -> None:
    """Let the rows speak and read answers until none is left.

    speak: a turn of the model for these rows; it starts the `calls` that a row then waits for, a row without a call is
    over. answered: takes a row's answer and says whether the row speaks next. apart: what a row says does not depend
    on the rows that speak with it; otherwise all of them wait for the slowest.
    """
    ready = list(rows)
    while ready or len(calls):
        began = time.monotonic()
        if ready:
            speak(ready)
        # As long as the others could generate, it pays to wait for a fuller batch.
        answers = calls.collect(patience=(time.monotonic() - began) if apart else math.inf)
        ready = [row for row in sorted(answers) if answered(row, answers[row])]
