"""Objects of a user's class, of which each episode uses one: made by a factory, reset, asked for rewards, closed."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import math
import random
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from trl.data.columns import shown
from trl.data.user_functions import Begun, accepted, is_async, own, results_of
from trl.environment.tool_calls import is_interrupt

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
Factory = Callable[[], Any]
Said = str | list[dict[str, Any]]
"""what `reset` adds to a prompt: a text, or messages"""

ROUTE = "environment"
"""column that names the factory of a row, where there are several"""
_OURS = ("reset", "get_reward", "close")
"""methods that we call; no tools"""
_PAUSE = 0.01
"""seconds between two looks whether an earlier call has ended"""
_FILLED = (list, dict, set, bytearray)
_PLAIN = (int, float, str, bool, type(None))


class OwnEnvironment:
    """An object of the user's class, which one episode at a time uses; its public methods are tools.

    Its `get_reward()`, or else its attribute `reward`, the sum of the rewards so far, is the reward; a true `done` ends
    the episode. Its methods are called one at a time.
    """

    def __init__(self, factory: Factory, timeout: float | None = None, where: str = "environment_factory") -> None:
        """`timeout`: seconds that a call waits for an earlier one that is late. `where`: the factory, for errors."""
        self.timeout = -1.0 if timeout is None else timeout
        if not callable(factory):
            raise ValueError(
                f"{where}: a {type(factory).__name__} makes no environment; give a class or a function, or a dict of "
                f"them by the names in the column '{ROUTE}'"
            )
        with _no_exit(where):
            self.instance = factory()
        if not callable(getattr(self.instance, "reset", None)):
            raise ValueError(f"{where}: {self.name} has no method reset(); give it one")
        self.factory: str | None = None
        """the name of its factory among several"""
        self._lock = threading.Lock()
        self._unset: set[str] | None = None
        """attributes that the first `reset` did not set; None before that"""
        self._before = self._attributes()
        """as the last `reset` left them, or the constructor"""
        self._constructed = frozenset(self._before)
        self.tools = {name: self._one_at_a_time(method) for name, method in public_methods(self.instance).items()}
        self._credited = 0.0

    @property
    def name(self) -> str:
        return type(self.instance).__name__

    # --- tools ----------------------------------------------------------------------------------------------------

    def _one_at_a_time(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, which begins once an earlier call has ended: one that timed out may still be running."""

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._lock.acquire(timeout=self.timeout):
                raise TimeoutError("an earlier call of this environment still runs")
            try:
                return method(*args, **kwargs)
            finally:
                self._lock.release()

        @functools.wraps(method)
        async def call_async(*args: Any, **kwargs: Any) -> Any:
            while not self._lock.acquire(blocking=False):
                await asyncio.sleep(_PAUSE)
            try:
                return await method(*args, **kwargs)
            finally:
                self._lock.release()

        return call_async if is_async(method) else call

    @property
    def is_busy(self) -> bool:
        """Whether a call of it still runs."""
        return self._lock.locked()

    # --- episodes -------------------------------------------------------------------------------------------------

    def begin(self, row: Row, seed: int | None = None) -> Begun:
        """Call `reset` with those columns of the row that it takes.

        seed: of Python's, NumPy's and torch's global generators while a `reset` that is not async runs.
        """
        reset, self._credited = self.instance.reset, 0.0
        with _no_exit(f"{self.name}.reset()"), drawn_from(seed):
            return Begun(reset, **own(accepted(reset, row)))

    def said(self, begun: Begun) -> Said:
        """What `reset` adds to the prompt: a text, or messages."""
        with _no_exit(f"{self.name}.reset()"):
            said = begun.result()
        self._see_reset()
        if said is None or isinstance(said, str):
            return said or ""
        if isinstance(said, Mapping) and "role" in said:
            said = [said]
        if isinstance(said, list | tuple) and all(isinstance(each, Mapping) and "role" in each for each in said):
            return [dict(message) for message in said]
        raise TypeError(f"{self.name}.reset() gave {type(said).__name__}; give a text, a list of messages, or None")

    def reset(self, row: Row, seed: int | None = None) -> Said:
        """Begin an episode; see `begin` and `said`."""
        return self.said(self.begin(row, seed))

    def _see_reset(self) -> None:
        """What `reset` has set: attributes, among them functions, which are tools like methods."""
        now = self._attributes()
        if self._unset is None:
            self._unset = {name for name, held in self._before.items() if held == now.get(name)}
        self._before = now
        self.tools = {name: self._one_at_a_time(method) for name, method in public_methods(self.instance).items()}
        for name in [name for name in now if name not in self._constructed and name[0] != "_" and name not in _OURS]:
            function = getattr(self.instance, name)
            if inspect.isroutine(function):
                self.tools[name] = self._one_at_a_time(function)

    @property
    def has_played(self) -> bool:
        return self._unset is not None

    def changes(self) -> dict[str, _Held | None]:
        """The attributes that the last episode has changed and the first `reset` did not set, as they are now."""
        now = self._attributes()
        return {name: now.get(name) for name in self._unset or () if self._before.get(name) != now.get(name)}

    def kept(self, changes: Mapping[str, _Held | None]) -> list[str]:
        """Those of the changes that a further `reset` has left as they were."""
        now = self._attributes()
        return sorted(name for name, held in changes.items() if held == now.get(name))

    def _attributes(self) -> dict[str, _Held]:
        return {name: _Held(value) for name, value in getattr(self.instance, "__dict__", {}).items()}

    # --- rewards --------------------------------------------------------------------------------------------------

    @property
    def judges(self) -> bool:
        """Whether it has a method `get_reward`."""
        return callable(getattr(self.instance, "get_reward", None))

    @property
    def gives_rewards(self) -> bool:
        """Whether it has rewards; one that sets `reward` in `reset` has them from then on."""
        return self.judges or hasattr(self.instance, "reward")

    @property
    def done(self) -> bool:
        return bool(getattr(self.instance, "done", False))

    def new_reward(self) -> float:
        """The growth of `reward` since the last call of this method."""
        reward = float(getattr(self.instance, "reward", 0.0))
        grown, self._credited = reward - self._credited, reward
        return grown

    def begin_reward(self, columns: Row) -> Begun:
        """Call `get_reward` with those columns that it takes."""
        get_reward = self.instance.get_reward
        with _no_exit(f"{self.name}.get_reward()"):
            return Begun(get_reward, **own(accepted(get_reward, columns)))

    def reward(self, begun: Begun) -> float:
        """What `get_reward` gave; nan where it gave None: no opinion."""
        with _no_exit(f"{self.name}.get_reward()"):
            value = begun.result()
        try:
            reward = math.nan if value is None else float(value)
        except (TypeError, ValueError):
            raise TypeError(f"{self.name}.get_reward() gave {shown(value)}; give a number, or None") from None
        if value is not None and not math.isfinite(reward):
            raise ValueError(f"{self.name}.get_reward() gave {reward}; give a finite number, or None for no opinion")
        return reward


class _Held:
    """What an attribute holds: the same object of the same length is the same; of numbers and texts, equal ones."""

    def __init__(self, value: Any) -> None:
        self.value, self.length = value, len(value) if type(value) in _FILLED else 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Held) or self.length != other.length:
            return False
        plain = type(self.value) is type(other.value) and type(self.value) in _PLAIN
        return self.value is other.value or (plain and bool(self.value == other.value))

    __hash__ = None  # type: ignore[assignment]


class Factories:
    """The objects that an `environment_factory` has made; more are made when more episodes run than ever before.

    Objects are used again: `reset` begins their next episode. Where it leaves what the last episode has changed, each
    episode gets an object of its own, and a line says so. A class that has an attribute `reusable` (True or False)
    decides that by itself. `close` calls their methods `close`, where there are any; the end of the program does too.
    """

    def __init__(self, given: Factory | Mapping[str, Factory], timeout: float | None) -> None:
        """given: a factory, or factories by the names in the column `environment` of the rows."""
        self._timeout = timeout
        self._given: dict[Any, Factory] = dict(given) if isinstance(given, Mapping) else {None: given}
        if not self._given:
            raise ValueError("environment_factory={}: give at least one class or function")
        self._made: dict[Any, list[OwnEnvironment]] = {name: [] for name in self._given}
        self._over: list[OwnEnvironment] = []
        """objects that are not used again, and not closed yet"""
        self._once: set[Any] = set()
        """names of the factories whose objects serve one episode"""
        self._labels: dict[Any, str] = {}
        weakref.finalize(self, _close_all, self._made, self._over, timeout)

    @property
    def names(self) -> list[str]:
        """The names of several factories; none of a single one."""
        return [name for name in self._given if name is not None]

    def firsts(self) -> dict[Any, OwnEnvironment]:
        """An object of each factory by its name, which is None for a single one."""
        return {name: (made or [self._make(name)])[0] for name, made in self._made.items()}

    def labels(self) -> dict[Any, str]:
        """Under what the rewards of each factory are logged: its class, or its name where several make that class."""
        if not self._labels:
            classes = {name: made.name for name, made in self.firsts().items()}
            known = list(classes.values())
            self._labels = {name: str(name) if known.count(kind) > 1 else kind for name, kind in classes.items()}
        return self._labels

    def name_of(self, row: Row) -> Any:
        """The name of a row's factory; ValueError for one that is not there."""
        if None in self._given or (len(self._given) == 1 and ROUTE not in row):
            return next(iter(self._given))
        known = ", ".join(map(repr, self._given))
        if ROUTE not in row:
            raise ValueError(f"column '{ROUTE}' is missing: give one of the names in environment_factory, {known}")
        name = row[ROUTE]
        if not isinstance(name, str) or name not in self._given:
            raise ValueError(f"column '{ROUTE}' is {shown(name)}: environment_factory has {known}")
        return name

    def begin(self, rows: Sequence[Row], seeds: Sequence[int | None]) -> tuple[list[OwnEnvironment], list[Said]]:
        """An object for each row, reset for it, and what it said; see `OwnEnvironment.begin` for the seeds."""
        names = [self.name_of(row) for row in rows]
        objects = self._take(names)
        before = [each.changes() for each in objects]
        said = _reset(objects, rows, seeds)
        spoilt = [i for i, name in enumerate(names) if self._keeps(name, objects[i], before[i])]
        if spoilt:
            for i in spoilt:
                self._retire(names[i], objects[i])
                objects[i] = self._make(names[i])
            again = _reset([objects[i] for i in spoilt], [rows[i] for i in spoilt], [seeds[i] for i in spoilt])
            for i, own_said in zip(spoilt, again, strict=True):
                said[i] = own_said
        return objects, said

    def _keeps(self, name: Any, used: OwnEnvironment, before: Mapping[str, _Held | None]) -> bool:
        """Whether `reset` has left in an object what its last episode changed."""
        kept = [] if hasattr(used.instance, "reusable") else used.kept(before)
        if kept and name not in self._once:
            self._once.add(name)
            logger.warning(
                "environment_factory: %s.reset() leaves %s as the last episode left it, so each episode gets a new "
                "object; let reset() set it, or say `reusable = True` in the class", used.name, ", ".join(kept),
            )  # fmt: skip
        return bool(kept)

    def _take(self, names: Sequence[Any]) -> list[OwnEnvironment]:
        """The objects of the next episodes. All that are there are free, but for those in which a late call runs."""
        for name, made in self._made.items():
            for each in list(made):
                if each.is_busy or (name in self._once and each.has_played):
                    self._retire(name, each)
        self.close_some()
        free = {name: iter(list(made)) for name, made in self._made.items()}
        return [next(free[name], None) or self._make(name) for name in names]

    def _make(self, name: Any) -> OwnEnvironment:
        where = "environment_factory" if name is None else f"environment_factory[{name!r}]"
        made = OwnEnvironment(self._given[name], self._timeout, where)
        made.factory = name
        self._made[name].append(made)
        if not getattr(made.instance, "reusable", True):
            self._once.add(name)
        return made

    def _retire(self, name: Any, used: OwnEnvironment) -> None:
        self._made[name].remove(used)
        self._over.append(used)

    # --- the end --------------------------------------------------------------------------------------------------

    def close_some(self) -> None:
        """Close the objects that are not used again, but for those in which a late call runs."""
        ready = [each for each in self._over if not each.is_busy]
        self._over[:] = [each for each in self._over if each.is_busy]
        _close(ready, self._timeout)

    def close(self) -> None:
        """Close all objects; episodes that follow get new ones."""
        _close_all(self._made, self._over, self._timeout)


def _reset(objects: Sequence[OwnEnvironment], rows: Sequence[Row], seeds: Sequence[int | None]) -> list[Said]:
    """Reset the objects, async ones together."""
    calls = [functools.partial(each.begin, row, seed) for each, row, seed in zip(objects, rows, seeds, strict=True)]
    return results_of(calls, lambda place, begun: objects[place].said(begun))


def _close_all(made: Mapping[Any, list[OwnEnvironment]], over: list[OwnEnvironment], seconds: float | None) -> None:
    listed = [each for kind in (*made.values(), over) for each in kind]
    for kind in (*made.values(), over):
        kind.clear()
    _close(listed, seconds)


def _close(objects: Sequence[OwnEnvironment], seconds: float | None) -> None:
    """Call `close` of those that have it; a line says what goes wrong. seconds: that an async one may take."""
    begun: list[tuple[OwnEnvironment, Begun]] = []
    for each in objects:
        close = getattr(each.instance, "close", None)
        if callable(close):
            with _told(each):
                begun.append((each, Begun(close)))
    for each, own_begun in begun:
        with _told(each):
            own_begun.result(seconds)


@contextmanager
def _told(used: OwnEnvironment) -> Iterator[None]:
    """A line instead of the exception that `close` raises: others are closed too, and a run keeps its own error."""
    try:
        yield
    except BaseException as error:
        if is_interrupt(error):
            raise
        logger.warning("environment_factory: %s.close() failed: %r", used.name, error)


@contextmanager
def drawn_from(seed: int | None) -> Iterator[None]:
    """Python's, NumPy's and torch's global generators begin at the seed, and go on behind the block as before it."""
    if seed is None:
        yield
        return
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


@contextmanager
def _no_exit(what: str) -> Iterator[None]:
    """RuntimeError where the code of an environment asks the program to end."""
    try:
        yield
    except (SystemExit, RuntimeError) as error:
        asked = error.__cause__ if isinstance(error, RuntimeError) else error  # the event loop hands it on as a cause
        if not isinstance(asked, SystemExit):
            raise
        raise RuntimeError(f"{what} asked the program to end: {asked!r}; raise another exception instead") from asked


def public_methods(environment: Any) -> dict[str, Callable[..., Any]]:
    """The methods that a model may call, by name: those without a leading underscore that are none of ours."""
    names = [name for name, _ in inspect.getmembers(type(environment), inspect.isroutine)]
    return {name: getattr(environment, name) for name in names if not name.startswith("_") and name not in _OURS}
