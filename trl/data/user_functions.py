"""Calls of functions that a user gave: the keywords they take, values of their own, one loop for what is async."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import os
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Set
from typing import Any, TypeVar

T = TypeVar("T")
_PLAIN = frozenset({int, float, str, bool, bytes, type(None)})
_LIVE = (type, type(os), type(len), type(lambda: 0), threading.Thread)
"""what a copy would make nothing of"""


def accepted(function: Callable[..., Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that the function has a parameter for; all of them if it has `**kwargs`, or does not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return dict(columns)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return dict(columns)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: value for name, value in columns.items() if name in named}


def needed(function: Callable[..., Any]) -> set[str]:
    """The names of the parameters that a call by keywords must give; none where the function does not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {each.name for each in parameters if each.kind in by_name and each.default is each.empty}


def own(value: Any) -> Any:
    """A value that its taker may change: lists, dicts, arrays, images are copied; what cannot be copied is shared.

    Two places of a list that hold one object get a copy each.
    """
    kind = type(value)
    if kind in _PLAIN or isinstance(value, _LIVE):
        return value
    if kind is list:
        return [each if type(each) in _PLAIN else own(each) for each in value]
    if kind is dict:
        return {name: own(each) for name, each in value.items()}
    if kind is tuple:
        return tuple(own(each) for each in value)
    try:
        return copy.deepcopy(value)
    except Exception:  # a connection, a lock, a generator
        return value


def in_order(value: Any) -> list[Any]:
    """The values that a function gave, one after the other; TypeError for what has no order or holds no values."""
    if isinstance(value, Mapping | Set | str | bytes):
        raise TypeError(f"a {type(value).__name__}; give a list, in the order of what was asked")
    listed = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(listed, Iterable) and not hasattr(listed, "__getitem__"):
        what = "None" if value is None else f"one {type(value).__name__}"
        raise TypeError(f"{what}; give a list, with a value each")
    return list(listed)


# --- async --------------------------------------------------------------------------------------------------------


def is_async(function: Callable[..., Any]) -> bool:
    """Whether it is a coroutine function, a partial of one, or an object whose `__call__` is one."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isclass(function):
        return False
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


class Awaited:
    """What is awaited on the event loop that all async functions of this process share, whoever calls them.

    So a semaphore or a client of theirs belongs to one loop, also in a notebook, whose own loop runs.
    """

    def __init__(self, make: Callable[[], Awaitable[Any]]) -> None:
        """make: is called on the loop, and gives what to await."""
        self._loop, self._ended = _loop(), threading.Event()
        self._task: asyncio.Task[Any] | None = None
        self._loop.call_soon_threadsafe(self._begin, make)

    @classmethod
    def of(cls, awaitable: Awaitable[Any]) -> Awaited:
        """Await what a function gave; ValueError for a future of another loop, which does not run meanwhile."""
        if asyncio.isfuture(awaitable) and awaitable.get_loop() is not _loop():
            raise ValueError("it gave a future of another event loop, which does not run now; make it an `async def`")
        return cls(lambda: awaitable)

    def _begin(self, make: Callable[[], Awaitable[Any]]) -> None:
        self._task = self._loop.create_task(_awaited(make))
        self._task.add_done_callback(lambda _: self._ended.set())

    def then(self, call: Callable[[], None]) -> None:
        """Have something called on the loop once it has ended."""

        def ask() -> None:
            assert self._task is not None
            self._task.add_done_callback(lambda _: call())

        self._loop.call_soon_threadsafe(ask)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for its end; whether it came within the seconds."""
        return self._ended.wait(seconds)

    def ends_within(self, seconds: float | None) -> bool:
        """Wait for its end; what does not come within the seconds, or before Ctrl-C, is cancelled."""
        ended = False
        try:
            ended = self.wait(seconds)
        finally:
            if not ended:
                self.cancel()
        return ended

    @property
    def is_running(self) -> bool:
        return not self._ended.is_set()

    def cancel(self) -> None:
        """Ask it to end."""
        self._loop.call_soon_threadsafe(lambda: self._task is not None and self._task.cancel())

    def result(self) -> Any:
        """What it gave, once it has ended; raises what it raised."""
        self._ended.wait()
        assert self._task is not None
        return self._task.result()


class Begun:
    """A call of a function, async or not, that has begun: it has ended, or is awaited on the loop."""

    def __init__(self, function: Callable[..., Any], **given: Any) -> None:
        self._value: Any = None
        self._awaited: Awaited | None = None
        if is_async(function):
            self._awaited = Awaited(lambda: function(**given))
            return
        value = function(**given)
        if inspect.isawaitable(value):
            self._awaited = Awaited.of(value)
        else:
            self._value = value

    def result(self, seconds: float | None = None) -> Any:
        """What it gives; TimeoutError where it does not come within the seconds. It is then cancelled."""
        if self._awaited is None:
            return self._value
        if not self._awaited.ends_within(seconds):
            raise TimeoutError(f"no answer within {seconds:g} s")
        return self._awaited.result()

    def cancel(self) -> None:
        """Ask what is awaited to end."""
        if self._awaited is not None:
            self._awaited.cancel()


def results_of(calls: Iterable[Callable[[], Begun]], read: Callable[[int, Begun], T]) -> list[T]:
    """What `read(place, begun)` makes of calls, in their order: all of them begin, then all are awaited.

    Where one fails, the others are cancelled.
    """
    begun: list[Begun] = []
    try:
        for call in calls:
            begun.append(call())
        return [read(place, each) for place, each in enumerate(begun)]
    except BaseException:
        for each in begun:
            each.cancel()
        raise


async def _awaited(make: Callable[[], Awaitable[Any]]) -> Any:
    """What is awaited; SystemExit, which a task would not keep to itself, as the cause of another exception."""
    try:
        return await make()
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(repr(error)) from error


_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}
"""by process: a fork has no thread of its parent's"""


def _loop() -> asyncio.AbstractEventLoop:
    with _lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=_run, args=(loop,), name="async functions", daemon=True).start()
        return loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    while True:
        try:
            loop.run_forever()
        except (SystemExit, KeyboardInterrupt):  # of a task that a function made; who awaits it gets it too
            continue
