"""Runs several reward functions at the same time, each with a time-out."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from trl.data.records import own
from trl.rewards.reward_model import RewardModel

RewardFunction = Callable[..., Any]
"""`f(prompts=, completions=, completion_ids=, **columns) -> one float or None per completion`; may be `async`"""


MOST_LATE = 4
"""calls of a function that may go on after their time-out"""
LARGEST = 1e15
"""size of a reward: statistics square them and sum the squares, in float32, whose numbers end at 3.4e38"""


class RewardError(RuntimeError):
    """A reward function did not give one finite number (or None) per completion."""


@dataclass(frozen=True)
class Verdict:
    """The panel's scores: `scores[f][b]`, NaN where function f gave completion b none."""

    scores: list[list[float]]
    timed_out: list[bool]


def name_of(function: RewardFunction) -> str:
    """The name of a reward function in logs and errors."""
    if isinstance(function, RewardModel):
        path = getattr(function.model.config, "_name_or_path", "")
        return path.rstrip("/").split("/")[-1] or "reward_model"
    if isinstance(function, partial):
        return name_of(function.func)
    return getattr(function, "__name__", type(function).__name__)


class RewardPanel:
    """Reward functions that judge the same completions.

    Each function gets lists and dicts of its own, which it may edit. A `RewardError` names a function that fails, gives
    the wrong number of values, or a value that is neither None nor a number of at most `LARGEST` in size. One that
    times out counts as if it had returned None for every completion; an async function is then cancelled, any other
    keeps running on its thread. `MOST_LATE` calls of one function that still run so are a `RewardError`: threads cannot
    be stopped, and must not pile up. Functions without a time-out run one after the other on the caller's thread; async
    ones run on threads at the same time.

    timeout: seconds, for all or one each; None waits.
    """

    def __init__(self, functions: Sequence[RewardFunction], timeout: float | Sequence[float | None] | None = None):
        if not functions:
            raise ValueError("reward_funcs: give at least one reward function or reward model")
        for function in functions:
            if not callable(function):
                raise ValueError(f"reward_funcs: {function!r} is not a function, a model or a name")
        timeouts = list(timeout) if isinstance(timeout, Sequence) else [timeout] * len(functions)
        if len(timeouts) != len(functions):
            raise ValueError(f"reward_timeout={timeout}: give one for each of the {len(functions)} reward functions")
        self.functions, self.timeouts = list(functions), timeouts
        self.names = _distinct([name_of(function) for function in functions])
        self._late: dict[str, list[_Call]] = {name: [] for name in self.names}

    def __call__(self, count: int, columns: Mapping[str, Any]) -> Verdict:
        for name, late in self._late.items():
            late[:] = [call for call in late if call.is_running]
            if len(late) >= MOST_LATE:
                raise RewardError(
                    f"reward function {name!r}: {len(late)} calls still run after their reward_timeout. A thread "
                    "cannot be stopped: let the function end in time by itself, or work in a process that it can kill"
                )
        calls = [_Call(*each, columns) for each in zip(self.functions, self.timeouts, strict=True)]
        for call in sorted(calls, key=lambda call: not call.threaded):  # threads first: they run meanwhile
            call.start()
        done = [call.join() for call in calls]
        for name, call in zip(self.names, calls, strict=True):
            if call.is_running:
                self._late[name].append(call)
        scores = [
            checked(f"reward function {name!r}", call.result(name), count) if finished else [math.nan] * count
            for name, call, finished in zip(self.names, calls, done, strict=True)
        ]
        return Verdict(scores, [not finished for finished in done])


class _Call:
    """One call of a reward function."""

    def __init__(self, function: RewardFunction, timeout: float | None, columns: Mapping[str, Any]):
        self._function, self._timeout = function, timeout
        self._columns = columns if isinstance(function, RewardModel) else own(dict(columns))
        self._value: Any = None
        self._error: BaseException | None = None
        self._late = False
        self._deadline = math.inf
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def threaded(self) -> bool:
        """Whether it runs in a thread. A reward model does not: the caller's thread owns the device."""
        if isinstance(self._function, RewardModel):
            return False
        return self._timeout is not None or inspect.iscoroutinefunction(self._function)

    def start(self) -> None:
        if not self.threaded:
            self._run()
            return
        self._deadline = time.monotonic() + (math.inf if self._timeout is None else self._timeout)
        self._thread.start()

    def _run(self) -> None:
        try:
            value = self._function(**self._columns)
            self._value = asyncio.run(self._within_time(value)) if inspect.isawaitable(value) else value
        except BaseException as error:  # raised in the caller's thread; SystemExit too, which must not end the run
            if isinstance(error, KeyboardInterrupt) and not self.threaded:
                raise
            self._error = error

    async def _within_time(self, value: Any) -> Any:
        left = None if self._deadline == math.inf else max(0.0, self._deadline - time.monotonic())
        task = asyncio.ensure_future(_without_exit(value))
        done, _ = await asyncio.wait([task], timeout=left)
        if not done:
            self._late = True
            task.cancel()
            return None
        return task.result()

    @property
    def is_running(self) -> bool:
        """Whether its thread is at work."""
        return self._thread.is_alive()

    def join(self) -> bool:
        """Wait for the call; whether it ended in time."""
        if self._thread.ident is not None:
            left = None if self._deadline == math.inf else max(0.0, self._deadline - time.monotonic())
            self._thread.join(left)
        return not self._late and not self._thread.is_alive()

    def result(self, name: str) -> Any:
        if self._error is not None:
            raise RewardError(f"reward function {name!r} failed: {self._error!r}") from self._error
        return self._value


async def _without_exit(value: Any) -> Any:
    """What is awaited; SystemExit, which a task would not keep to itself, as the cause of another exception."""
    try:
        return await value
    except SystemExit as error:
        raise RuntimeError(repr(error)) from error


def checked(who: str, value: Any, count: int) -> list[float]:
    """The values of one function as floats, None as NaN; `RewardError` unless there is one for each completion.

    who: gave them, for the error.
    """
    try:
        values = list(value.tolist() if hasattr(value, "tolist") else value)
    except TypeError:
        raise RewardError(f"{who} gave {value!r}: give a list of numbers, one each") from None
    if len(values) != count:
        raise RewardError(f"{who} gave {len(values)} values for {count} completions: give one each")
    return [math.nan if score is None else _number(who, score, index) for index, score in enumerate(values)]


def _number(who: str, score: Any, index: int) -> float:
    try:
        number = math.nan if isinstance(score, str) else float(score)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if abs(number) <= LARGEST:
        return number
    what = f"a number of at most {LARGEST:g} in size" if math.isfinite(number) else "a finite number"
    raise RewardError(f"{who} gave {score!r} for completion {index}: give {what}, or None for no opinion")


def _distinct(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{index}" for index, name in enumerate(names)]
