"""Tool calls of many rows, run at once, each with a time-out; `call_formats` says how a chat model writes them.

What a model writes ends no run: unreadable calls, and whatever a tool raises, become text that the model reads.
"""

from __future__ import annotations

import inspect
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trl.data.user_functions import Awaited, is_async
from trl.environment.call_formats import LONGEST_CALL, JsonCalls, Spoken, ToolCall, ToolParser, call_id

logger = logging.getLogger(__name__)

__all__ = [
    "LONGEST_CALL",
    "FailedCall",
    "JsonCalls",
    "LateCalls",
    "Pending",
    "Spoken",
    "ToolCall",
    "ToolCalls",
    "ToolParser",
    "answer_of",
    "call_id",
    "error_text",
    "is_interrupt",
]


class FailedCall(str):
    """The answer to a call that failed."""


def error_text(error: BaseException) -> FailedCall:
    """What the model reads of an exception of a tool: its text, with its type where that alone says nothing."""
    try:
        said = str(error)
        bare = not said.strip() or isinstance(error, KeyError)  # the text of a KeyError is only the key
        return FailedCall(f"Tool error: {error!r}" if bare else f"Tool error: {said}")
    except Exception:  # its own text cannot be made
        return FailedCall(f"Tool error: {type(error).__name__}")


def is_interrupt(error: BaseException) -> bool:
    """Whether it is the user's Ctrl-C, and not something that a tool raised, such as SystemExit."""
    return isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()


class LateCalls:
    """Keeps count of tool calls that go on after their time-out: a thread cannot be stopped, so it must not pile up.

    A tool with `most` such calls is not called again until one of them has ended: TimeoutError.
    """

    def __init__(self, timeout: float | None, most: int = 4) -> None:
        self.timeout, self.most = timeout, most
        self._began: dict[object, tuple[str, float]] = {}
        self._told: set[str] = set()

    def count(self, tool: str) -> int:
        """How many calls of this tool go on after their time-out."""
        if self.timeout is None:
            return 0
        latest = time.monotonic() - self.timeout
        return sum(name == tool and began <= latest for name, began in list(self._began.values()))

    def begin(self, tool: str) -> object:
        """A call of a tool begins; TimeoutError where too many are late. What it gives is for `end`."""
        late = self.count(tool)
        if late >= self.most:
            if tool not in self._told:
                self._told.add(tool)
                logger.warning(
                    "tool %r: %d calls still run after tool_timeout=%g s, so it is not called until one of them ends; "
                    "the model reads an error instead. A thread cannot be stopped: run such work in a process", tool,
                    late, self.timeout,
                )  # fmt: skip
            raise TimeoutError(f"{late} earlier calls of {tool} still run after their time-out")
        token = object()
        self._began[token] = (tool, time.monotonic())
        return token

    def end(self, token: object) -> None:
        """The call has ended."""
        del self._began[token]

    @contextmanager
    def calling(self, tool: str) -> Iterator[None]:
        """The call of a tool in the block."""
        token = self.begin(tool)
        try:
            yield
        finally:
            self.end(token)


@dataclass(frozen=True)
class Pending:
    """The answer to a call that is awaited on the loop of all async functions."""

    awaited: Awaited
    read: Callable[[Any], str]
    """makes the text of what the tool gives"""

    def text(self, seconds: float | None = None) -> str:
        """The answer, or what the model reads where it does not come within the seconds: it is then cancelled."""
        if not self.awaited.ends_within(seconds):
            return FailedCall(f"Tool error: no answer within {seconds:g} s")
        try:
            value = self.awaited.result()
        except BaseException as error:
            return error_text(error)
        return self.read(value)


def answer_of(late: LateCalls, tool: str, call: Callable[[], Any], read: Callable[[Any], str]) -> str | Pending:
    """The answer to the call of a tool, which has begun where it is awaited. Errors become text that the model reads.

    read: makes the text of what the tool gives.
    """
    awaited, value = None, None
    try:
        token = late.begin(tool)
        try:
            if is_async(call):
                awaited = Awaited(call)
            elif inspect.isawaitable(value := call()):
                awaited = Awaited.of(value)
        finally:
            if awaited is None:
                late.end(token)
    except BaseException as error:  # SystemExit too: a tool must not end the run
        if is_interrupt(error):
            raise
        return error_text(error)
    if awaited is None:
        return read(value)
    awaited.then(lambda: late.end(token))
    return Pending(awaited, read)


Answer = Callable[[], str | Pending]


@dataclass(slots=True)
class _Running:
    row: int
    deadline: float
    pending: Pending | None = None
    """once it is awaited; it needs no thread then"""


class ToolCalls:
    """Runs calls in at most `workers` threads; with `timeout=None` in the calling thread, one after the other.

    Those that are awaited run beside these, all at once. A thread cannot be stopped: a call that times out keeps
    running, and its late answer is dropped (`LateCalls` bounds how many do). Work that may never end belongs in a
    separate process.
    """

    def __init__(self, timeout: float | None, workers: int) -> None:
        self.timeout = timeout
        self.workers = workers
        self._waiting: deque[tuple[int, Answer]] = deque()
        self._running: dict[int, _Running] = {}
        self._answered: queue.SimpleQueue[tuple[int, str | Pending | BaseException | None]] = queue.SimpleQueue()
        self._started = 0

    def __len__(self) -> int:
        """The number of calls that have no answer yet."""
        return len(self._waiting) + len(self._running)

    def start(self, row: int, answer: Answer) -> None:
        """Start the call whose answer `row` waits for, or queue it if all workers are busy."""
        self._waiting.append((row, answer))
        if self.timeout is not None:
            self._fill_workers()

    def collect(self, patience: float) -> dict[int, str]:
        """`{row: answer}`: waits for the first answer, and for those that follow within `patience` seconds.

        An exception of a tool is raised here.
        """
        if self.timeout is None:
            begun = [(row, answer()) for row, answer in self._waiting]
            self._waiting.clear()
            return {row: answer.text() if isinstance(answer, Pending) else answer for row, answer in begun}
        answers: dict[int, str] = {}
        enough = time.monotonic() + patience
        while len(self):
            self._fill_workers()
            deadline = min(call.deadline for call in self._running.values())
            until = min(deadline, enough) if answers else deadline
            try:
                ticket, outcome = self._answered.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                answers |= self._expire()
                if answers and time.monotonic() >= enough:
                    break
                continue
            if ticket in self._running:
                self._take(ticket, outcome, answers)
            elif isinstance(outcome, Pending):  # it began after its time
                outcome.awaited.cancel()
        return answers

    def _take(self, ticket: int, outcome: str | Pending | BaseException | None, answers: dict[int, str]) -> None:
        """What a thread gave; None: what is awaited has ended."""
        call = self._running[ticket]
        if isinstance(outcome, Pending):
            call.pending = outcome
            outcome.awaited.then(lambda: self._answered.put((ticket, None)))
            return
        del self._running[ticket]
        if isinstance(outcome, BaseException):
            raise outcome
        if outcome is None and call.pending is not None:
            outcome = call.pending.text()
        answers[call.row] = outcome or ""

    def _fill_workers(self) -> None:
        assert self.timeout is not None
        while self._waiting and sum(call.pending is None for call in self._running.values()) < self.workers:
            row, answer = self._waiting.popleft()
            self._started += 1
            self._running[self._started] = _Running(row, time.monotonic() + self.timeout)
            threading.Thread(target=self._answer, args=(self._started, answer), daemon=True).start()

    def _answer(self, ticket: int, answer: Answer) -> None:
        try:
            self._answered.put((ticket, answer()))
        except BaseException as error:
            self._answered.put((ticket, error))

    def _expire(self) -> dict[int, str]:
        now = time.monotonic()
        expired = {ticket: call.row for ticket, call in self._running.items() if call.deadline <= now}
        for ticket in expired:
            late = self._running.pop(ticket).pending
            if late is not None:
                late.awaited.cancel()
        return dict.fromkeys(expired.values(), FailedCall(f"Tool error: no answer within {self.timeout:g} s"))
