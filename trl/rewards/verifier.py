"""Compares answers by `math-verify`, in child processes: a huge power is computed by code that only a kill can stop."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trl.data.any_text import encodable
from trl.import_utils import pip_install

SECONDS = 5.0
"""of CPU time that one completion may take"""

logger = logging.getLogger(__name__)
_WORKER = Path(__file__).with_name("math_worker.py")
_EACH = 16
"""pairs that are worth a further process"""
_MOST = 4
_KEPT = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_SIGPROF = int(getattr(signal, "SIGPROF", 27))
_verdicts = {"right": True, "wrong": False, "none": None}


def same_answers(pairs: Sequence[tuple[str, str]], seconds: float = SECONDS) -> list[bool | None]:
    """For each `(text, solution)` whether the answers are equal; None where the solution cannot be parsed.

    What takes more than `seconds` of CPU time is stopped: False, or None where it was the solution that took so long.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds={seconds}: give a finite number above 0")
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError(f"math rewards need math-verify: {pip_install('math-verify[antlr4_13_2]')}")
    unique = list(dict.fromkeys((encodable(text), encodable(solution)) for text, solution in pairs))
    places = min(_MOST, os.cpu_count() or 1, math.ceil(len(unique) / _EACH))
    compare = functools.partial(_compare, seconds=seconds)
    if places > 1:
        with ThreadPoolExecutor(places) as pool:
            found = dict(zip(unique, pool.map(compare, unique), strict=True))
    else:
        found = {pair: compare(pair) for pair in unique}
    verdicts = [found[encodable(text), encodable(solution)] for text, solution in pairs]
    late = sum(stopped for _, stopped in verdicts)
    if late:
        logger.warning(
            "math-verify: %d of %d completions took more than %g s, or ended their process, and count as wrong (as "
            "unparsed where the solution did so)", late, len(pairs), seconds,
        )  # fmt: skip
    return [same for same, _ in verdicts]


class _Child:
    """A process that verifies one answer after the other until it is stopped."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.is_ready = self.is_late = False
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-B", "-W", "ignore", str(_WORKER)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
            cwd=_WORKER.anchor,  # the directory of now may be removed one day
            env={**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUTF8": "1"},
        )  # fmt: skip

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, pair: tuple[str, str], seconds: float) -> list[str]:
        """The lines of the answer; one whose last is no verdict means that the process has ended.

        `is_late`: because its time was over. `is_ready`: it has begun at all.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # CPU time decides, which a busy machine does not change. The clock is for a process that computes nothing.
        clock = threading.Timer(seconds if os.name == "nt" else 4 * seconds + 30, self._stop)
        clock.daemon = True
        clock.start()
        lines = []
        try:
            self._process.stdin.write(json.dumps([*pair, seconds]) + "\n")
            self._process.stdin.flush()
            while line := self._process.stdout.readline().strip():
                if line == "ready":
                    self.is_ready = True
                    continue
                lines.append(line)
                if line in _verdicts:
                    return lines
        except BrokenPipeError:
            pass
        finally:
            clock.cancel()
            clock.join()
        self.is_late |= self._process.wait() == -_SIGPROF
        return lines

    def _stop(self) -> None:
        self.is_late = True
        self._process.kill()

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def close(self) -> None:
        if self.owner == os.getpid():
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:
                pass


_idle: list[_Child] = []


def _compare(pair: tuple[str, str], seconds: float) -> tuple[bool | None, bool]:
    """The verdict, and whether it was stopped. RuntimeError if no process starts.

    A process may be killed for a reason of its own (the memory of the machine): its answer gets another one.
    """
    lines: list[str] = []
    for _ in range(2):
        child = _child()
        try:
            lines = child.ask(pair, seconds)
        except BaseException:
            child.close()
            raise
        if lines and lines[-1] in _verdicts:
            _idle.append(child)
            return _verdicts[lines[-1]], False
        child.close()
        if child.is_late:
            break
    if not (child.is_ready or child.is_late):
        raise RuntimeError(
            f"math-verify: its process does not start (exit code {child.exit_code}); `{sys.executable} {_WORKER}` says "
            "why"
        )
    return (False if "read" in lines else None), True


def _child() -> _Child:
    while True:
        try:
            child = _idle.pop()
        except IndexError:  # other threads pop too
            return _Child()
        if child.owner == os.getpid() and child.is_alive:
            return child
        child.close()


@atexit.register
def _close_all() -> None:
    while _idle:
        _idle.pop().close()
