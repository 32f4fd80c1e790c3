"""Several reward functions asked at once, each with its weight and its time-out."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trl.rewards.reward_model import RewardModel

RewardFunction = Callable[..., Any]
"""`f(prompts=, completions=, completion_ids=, **columns) -> one float or None per completion`; may be `async`"""


class RewardError(RuntimeError):
    """A reward function did not give one finite number (or None) per completion."""


@dataclass(frozen=True)
class Verdict:
    """What the panel said: `scores[f][b]`, NaN where function f had no opinion of completion b."""

    scores: list[list[float]]
    timed_out: list[bool]


def name_of(function: RewardFunction) -> str:
    """What a reward function is called in logs."""
    if isinstance(function, RewardModel):
        path = getattr(function.model.config, "_name_or_path", "")
        return path.rstrip("/").split("/")[-1] or "reward_model"
    return getattr(function, "__name__", type(function).__name__)


class RewardPanel:
    """Reward functions by themselves or by name of a reward model's folder.

    A function that raises, gives the wrong number of values or a value that is not finite is a RewardError that names
    it. One that is not done after `timeout` seconds has no opinion of this batch, as if it had returned None.
    """

    def __init__(self, functions: Sequence[RewardFunction], timeout: float | None = None):
        if not functions:
            raise ValueError("reward_funcs: give at least one reward function or reward model")
        self.functions, self.timeout = list(functions), timeout
        self.names = _distinct([name_of(function) for function in functions])

    def __call__(self, count: int, columns: dict[str, Any]) -> Verdict:
        calls = [_Call(function, columns) for function in self.functions]
        for call in calls:
            call.start()
        scores, timed_out = [], []
        for name, call in zip(self.names, calls, strict=True):
            done = call.join(self.timeout)
            timed_out.append(not done)
            scores.append(_checked(name, call.result(name), count) if done else [math.nan] * count)
        return Verdict(scores, timed_out)


class _Call:
    """One function at work on its own thread; a reward model stays on ours, which owns the device."""

    def __init__(self, function: RewardFunction, columns: dict[str, Any]):
        self._function, self._columns = function, columns
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if isinstance(self._function, RewardModel):
            self._run()
            return
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            value = self._function(**self._columns)
            self._value = asyncio.run(_awaited(value)) if inspect.isawaitable(value) else value
        except Exception as error:  # reported by the thread that asked
            self._error = error

    def join(self, timeout: float | None) -> bool:
        if self._thread is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def result(self, name: str) -> Any:
        if self._error is not None:
            raise RewardError(f"reward function {name!r} failed: {self._error!r}") from self._error
        return self._value


async def _awaited(value: Any) -> Any:
    return await value


def _checked(name: str, value: Any, count: int) -> list[float]:
    values = list(value.tolist() if hasattr(value, "tolist") else value or [])
    if len(values) != count:
        raise RewardError(f"reward function {name!r} gave {len(values)} values for {count} completions: give one each")
    scores = []
    for index, score in enumerate(values):
        if score is None:
            scores.append(math.nan)
        elif not isinstance(score, bool | int | float) or not math.isfinite(score):
            raise RewardError(
                f"reward function {name!r} gave {score!r} for completion {index}: give a finite number, or None for no "
                "opinion"
            )
        else:
            scores.append(float(score))
    return scores


def _distinct(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{index}" for index, name in enumerate(names)]
