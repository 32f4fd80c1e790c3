"""Runs several reward functions at the same time, each with a time-out."""

from __future__ import annotations

import inspect
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from trl.data.user_functions import Awaited, accepted, in_order, is_async, needed, own
from trl.rewards.reward_model import RewardModel

RewardFunction = Callable[..., Any]
"""`f(prompts=, completions=, completion_ids=, **columns) -> one float or None per completion`; may be `async`"""


MOST_LATE = 4
"""calls of a function that may go on after their time-out"""
LARGEST = 1e15
"""size of a reward: statistics square them and sum the squares, in float32, whose numbers end at 3.4e38"""
TAKEN = ("step", "prompt", "completion", "completion_ids", "advantage")
"""columns of the table of completions that `log_extra` cannot have; nor those that begin with `reward_`"""


class RewardError(RuntimeError):
    """A reward function did not give one finite number (or None) per completion."""


class Logs:
    """What reward functions log by their keywords `log_extra(column, values)` and `log_metric(name, value)`.

    count: completions, of which a column has a value each.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.extra: dict[str, list[Any]] = {}
        self.metrics: dict[str, list[float]] = {}

    def log_extra(self, column: str, values: Any) -> None:
        """A column of the table and the file of completions."""
        if column in TAKEN or column.startswith("reward_"):
            raise ValueError(f"log_extra: {column!r} is a column of the table already; give it another name")
        listed = in_order(values)
        if len(listed) != self.count:
            raise ValueError(f"log_extra: {column!r} has {len(listed)} values for {self.count} completions")
        self.extra[column] = listed

    def log_metric(self, name: str, value: Any) -> None:
        """A number of the next log, which is the mean of all that are given until then."""
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"log_metric: {name!r} is {number}; give a finite number")
        self.metrics.setdefault(name, []).append(number)

    def add(self, other: Logs, name: str) -> None:
        """Take what the function `name` has logged."""
        for column, values in other.extra.items():
            if column in self.extra:
                raise RewardError(f"reward function {name!r}: log_extra({column!r}) is another function's column too")
            self.extra[column] = values
        for metric, numbers in other.metrics.items():
            self.metrics.setdefault(metric, []).extend(numbers)


@dataclass(frozen=True)
class Verdict:
    """The panel's scores: `scores[f][b]`, NaN where function f gave completion b none."""

    scores: list[list[float]]
    timed_out: list[bool]
    logs: Logs = field(default_factory=lambda: Logs(0))


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

    Each is called with the columns that it has parameters for, and may change what it gets; `log_extra` and
    `log_metric` are among them (see `Logs`). A `RewardError` names a function that fails, gives the wrong number of
    values, or a value that is neither None nor a finite number of at most `LARGEST`. One that times out counts as if it
    had returned None for every completion; an async function is then cancelled, any other keeps running on its thread.
    `MOST_LATE` calls of one function that still run so are a `RewardError`: threads cannot be stopped, and must not
    pile up. Functions without a time-out run one after the other on the caller's thread; async ones run meanwhile, all
    on one event loop as long as the process lives.

    timeout: seconds, for all or one each; None waits. names: of the functions in logs; None: their own.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        timeout: float | Sequence[float | None] | None = None,
        names: Sequence[str] | None = None,
    ):
        if not functions:
            raise ValueError("reward_funcs: give at least one reward function or reward model")
        for function in functions:
            if not callable(function):
                raise ValueError(f"reward_funcs: {function!r} is not a function, a model or a name")
        timeouts = list(timeout) if isinstance(timeout, Sequence) else [timeout] * len(functions)
        if len(timeouts) != len(functions):
            raise ValueError(f"reward_timeout={timeout}: give one for each of the {len(functions)} reward functions")
        self.functions, self.timeouts = list(functions), timeouts
        self.names = list(names) if names else _distinct([name_of(function) for function in functions])
        self._late: dict[str, list[_Call]] = {name: [] for name in self.names}

    def __call__(self, count: int, columns: Mapping[str, Any], live: Mapping[str, Any] | None = None) -> Verdict:
        """columns: values for each completion, and others; a function gets copies. live: objects that it gets."""
        for name, late in self._late.items():
            late[:] = [call for call in late if call.is_running]
            if len(late) >= MOST_LATE:
                raise RewardError(
                    f"reward function {name!r}: {len(late)} calls still run after their reward_timeout. A thread "
                    "cannot be stopped: let the function end in time by itself, or work in a process that it can kill"
                )
        _refuse_missing(self.names, self.functions, {**columns, **(live or {})})
        calls = [_Call(*each, count, columns, live or {}) for each in zip(self.functions, self.timeouts, strict=True)]
        for call in sorted(calls, key=lambda call: not call.runs_aside):  # these first: they run meanwhile
            call.start()
        done = [call.join() for call in calls]
        for name, call in zip(self.names, calls, strict=True):
            if call.is_running:
                self._late[name].append(call)
        scores, logs = [], Logs(count)
        for name, call, finished in zip(self.names, calls, done, strict=True):
            who = f"reward function {name!r}"
            scores.append(checked(who, call.result(name), count) if finished else [math.nan] * count)
            if finished:
                logs.add(call.logs, name)
        return Verdict(scores, [not finished for finished in done], logs)


class _Call:
    """One call of a reward function."""

    def __init__(
        self,
        function: RewardFunction,
        timeout: float | None,
        count: int,
        columns: Mapping[str, Any],
        live: Mapping[str, Any],
    ):
        self._function, self._timeout, self.logs = function, timeout, Logs(count)
        logging = {"log_extra": self.logs.log_extra, "log_metric": self.logs.log_metric}
        asked = accepted(function, {**logging, **columns, **live})
        self._columns = {
            name: value if name in live or name in logging else own(value) for name, value in asked.items()
        }
        self._value: Any = None
        self._error: BaseException | None = None
        self._deadline = math.inf
        self._awaited: Awaited | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def runs_aside(self) -> bool:
        """Whether it runs beside the caller's thread. A reward model does not: that thread owns the device."""
        return not isinstance(self._function, RewardModel) and (self._timeout is not None or is_async(self._function))

    def start(self) -> None:
        if not self.runs_aside:
            self._run()
            return
        self._deadline = time.monotonic() + (math.inf if self._timeout is None else self._timeout)
        if is_async(self._function):
            self._awaited = Awaited(lambda: self._function(**self._columns))
        else:
            self._thread.start()

    def _run(self) -> None:
        try:
            value = self._function(**self._columns)
            if inspect.isawaitable(value):
                self._awaited = Awaited.of(value)
            else:
                self._value = value
        except BaseException as error:  # raised in the caller's thread; SystemExit too, which must not end the run
            if isinstance(error, KeyboardInterrupt) and not self.runs_aside:
                raise
            self._error = error

    @property
    def is_running(self) -> bool:
        """Whether it is at work."""
        return self._thread.is_alive() or (self._awaited is not None and self._awaited.is_running)

    def join(self) -> bool:
        """Wait for the call; whether it ended in time."""
        if self._thread.ident is not None:
            self._thread.join(self._left())
        if self._thread.is_alive():
            return False
        return self._awaited is None or self._wait(self._awaited)

    def _wait(self, awaited: Awaited) -> bool:
        ended = False
        try:
            ended = awaited.wait(self._left())
        finally:
            if not ended:  # late, or Ctrl-C
                awaited.cancel()
        return ended

    def _left(self) -> float | None:
        """Seconds until the time-out."""
        return None if self._deadline == math.inf else max(0.0, self._deadline - time.monotonic())

    def result(self, name: str) -> Any:
        try:
            if self._error is not None:
                raise self._error
            return self._value if self._awaited is None else self._awaited.result()
        except BaseException as error:
            said = f"{type(error).__name__}({str(error)!r})" if isinstance(error, OSError) else repr(error)  # its file
            raise RewardError(f"reward function {name!r} failed: {said}") from error


def _refuse_missing(names: Sequence[str], functions: Sequence[RewardFunction], columns: Mapping[str, Any]) -> None:
    """`RewardError` for a function that needs what nobody gives."""
    for name, function in zip(names, functions, strict=True):
        missing = needed(function) - columns.keys() - {"log_extra", "log_metric"}
        if missing:
            raise RewardError(
                f"reward function {name!r} needs {', '.join(sorted(missing))}; there are the columns "
                f"{', '.join(columns)}: add one, or give the parameter a default"
            )


def checked(who: str, value: Any, count: int) -> list[float]:
    """The values of one function as floats, None as NaN; `RewardError` unless there is one for each completion.

    who: gave them, for the error.
    """
    if value is None or isinstance(value, int | float):
        raise RewardError(f"{who} gave {value!r}: give a list of numbers, one each")
    if getattr(value, "ndim", 1) == 2 and value.shape[1] == 1:
        value = value[:, 0]  # a column, as reward models give it
    try:
        values = in_order(value)
    except TypeError as error:
        raise RewardError(f"{who} gave {error}") from None
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
    raise RewardError(
        f"{who} gave {score!r} for completion {index}: give a finite number of at most {LARGEST:g} in size, or None "
        "for no opinion"
    )


def _distinct(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{index}" for index, name in enumerate(names)]
