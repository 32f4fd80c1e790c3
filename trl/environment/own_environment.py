"""An environment of a row's own: an object of any class with `reset` whose public methods are the row's tools."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any

RESET = "reset"


def public_methods(environment: Any) -> dict[str, Callable[..., Any]]:
    """The methods that a model may call: those without a leading underscore, but for `reset`."""
    names = [name for name, _ in inspect.getmembers(type(environment), inspect.isroutine)]
    return {name: getattr(environment, name) for name in names if not name.startswith("_") and name != RESET}


def accepted(function: Callable[..., Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the columns that the function has a parameter for; all of them if it has `**kwargs`."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return dict(columns)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: value for name, value in columns.items() if name in named}


class OwnEnvironment:
    """An object of the user's class, used by one row; its methods are never called at the same time.

    Its attribute `reward`, where it has one, is the sum of the rewards so far; a true `done` ends the episode.
    """

    def __init__(self, factory: Callable[[], Any]) -> None:
        self.instance = factory()
        if not callable(getattr(self.instance, RESET, None)):
            raise ValueError(f"environment_factory: {type(self.instance).__name__} has no method reset(); give it one")
        self._lock = threading.Lock()
        self.tools = {name: self._one_at_a_time(method) for name, method in public_methods(self.instance).items()}
        self._credited = 0.0

    def _one_at_a_time(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:  # a call that timed out may still be running
                return method(*args, **kwargs)

        return call

    def reset(self, row: Mapping[str, Any]) -> str:
        """Begin an episode with those of the row's columns that `reset` takes; what it says belongs to the prompt."""
        reset = getattr(self.instance, RESET)
        said = reset(**accepted(reset, row))
        if said is not None and not isinstance(said, str):
            raise TypeError(f"{type(self.instance).__name__}.reset() gave {type(said).__name__}; give a text or None")
        return said or ""

    @property
    def gives_rewards(self) -> bool:
        return hasattr(self.instance, "reward")

    @property
    def done(self) -> bool:
        return bool(getattr(self.instance, "done", False))

    def new_reward(self) -> float:
        """What `reward` has grown by since this was asked last."""
        reward = float(getattr(self.instance, "reward", 0.0))
        grown, self._credited = reward - self._credited, reward
        return grown
