"""Tool calls of many rows, run at once, each with a time-out; `call_formats` says how a chat model writes them.

What a model writes ends no run: unreadable calls, and whatever a tool raises, become text that the model reads.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from trl.environment.call_formats import LONGEST_CALL, JsonCalls, Spoken, ToolCall, ToolParser, call_id

logger = logging.getLogger(__name__)

__all__ = [
    "LONGEST_CALL",
    "FailedCall",
    "JsonCalls",
    "LateCalls",
    "Spoken",
    "ToolCall",
    "ToolCalls",
    "ToolParser",
    "call_id",
    "error_text",
    "is_interrupt",
]


class FailedCall(str):
    """The answer to a call that failed."""


def error_text(error: BaseException) -> FailedCall:
    """What the model reads of an exception of a tool."""
    try:
        return FailedCall(f"Tool error: {error}")
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

    @contextmanager
    def calling(self, tool: str) -> Iterator[None]:
        """The call of a tool in the block."""
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
        try:
            yield
        finally:
            del self._began[token]


Answer = Callable[[], str]


@dataclass(frozen=True, slots=True)
class _Running:
    row: int
    deadline: float


class ToolCalls:
    """Runs calls in at most `workers` threads; with `timeout=None` in the calling thread, one after the other.

    A thread cannot be stopped: a call that times out keeps running, and its late answer is dropped (`LateCalls` bounds
    how many do). Work that may never end belongs in a separate process.
    """

    def __init__(self, timeout: float | None, workers: int) -> None:
        self.timeout = timeout
        self.workers = workers
        self._waiting: deque[tuple[int, Answer]] = deque()
        self._running: dict[int, _Running] = {}
        self._answered: queue.SimpleQueue[tuple[int, str | BaseException]] = queue.SimpleQueue()
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
            answers = {row: answer() for row, answer in self._waiting}
            self._waiting.clear()
            return answers
        answers = {}
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
            call = self._running.pop(ticket, None)
            if call is None:
                continue
            if isinstance(outcome, BaseException):
                raise outcome
            answers[call.row] = outcome
        return answers

    def _fill_workers(self) -> None:
        assert self.timeout is not None
        while self._waiting and len(self._running) < self.workers:
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
            del self._running[ticket]
        return dict.fromkeys(expired.values(), FailedCall(f"Tool error: no answer within {self.timeout:g} s"))
