"""Tool calls of many rows at once, each with a time-out, answered as they come in."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

Answer = Callable[[], str]


@dataclass(frozen=True, slots=True)
class _Running:
    row: int
    deadline: float


class ToolCalls:
    """Calls that run in threads, at most `workers` at a time; with `timeout=None` in the calling thread, in order.

    A thread cannot be stopped: a call that has timed out is forgotten and its late answer dropped. Work that may
    never end belongs into a process of its own.
    """

    def __init__(self, timeout: float | None, workers: int) -> None:
        self.timeout = timeout
        self.workers = workers
        self._waiting: deque[tuple[int, Answer]] = deque()
        self._running: dict[int, _Running] = {}
        self._answered: queue.SimpleQueue[tuple[int, str | BaseException]] = queue.SimpleQueue()
        self._started = 0

    def __len__(self) -> int:
        """Calls without an answer yet."""
        return len(self._waiting) + len(self._running)

    def start(self, row: int, answer: Answer) -> None:
        """Ask for the answer to `row`."""
        self._waiting.append((row, answer))
        if self.timeout is not None:
            self._fill_workers()

    def collect(self, patience: float) -> dict[int, str]:
        """`{row: answer}` of what is answered: at least one, all of those that come within `patience` seconds.

        What a tool raises is raised here.
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
        return dict.fromkeys(expired.values(), f"Tool error: no answer within {self.timeout:g} s")
