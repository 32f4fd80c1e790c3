"""Runs untrusted Python programs in a separate process, without files, network or child processes."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import threading
import warnings
import weakref
from collections.abc import Sequence

if os.name != "posix":
    raise ImportError("PythonInterpreterTool needs a POSIX system: there is nothing else to limit a process with")

from trl.environment.tools.python_process import Interpreter
from trl.environment.tools.python_worker import READY

_LOCKS_WITHOUT_KERNEL = ("limits", "modules", "hook")
_LOCKS = (*_LOCKS_WITHOUT_KERNEL, "kernel")
_LONGEST_PROGRAM = 60_000  # bytes; with its length it fits into a pipe, so that writing it never waits


class PythonInterpreterTool:
    """Answers a program with what it prints, and with the value of its last line as a Python shell would.

    Every program runs in a fresh fork of an interpreter, with most of the pure standard library, seeded `random`, and
    no input. An error or a time-out is the last line of the answer. Hostile programs get an error too: `python_worker`
    says how they are confined. `isolation` is what confines them on this system: "kernel" (seccomp) or "audit hook".
    """

    def __init__(
        self,
        timeout: float = 5.0,
        memory: int = 256,
        max_output: int = 4000,
        modules: Sequence[str] = (),
        processes: int | None = None,
    ) -> None:
        """
        `timeout`: seconds on the clock. `memory`: MiB that a program may take. `max_output`: characters.
        `modules`: further modules that programs can import, such as numpy or sympy.
        `processes`: how many programs run at the same time; None: one for each core.
        """
        for field, value in (("timeout", timeout), ("memory", memory), ("max_output", max_output)):
            if value <= 0:
                raise ValueError(f"{field}={value}: give more than 0")
        for module in modules:
            if importlib.util.find_spec(module) is None:
                raise ValueError(f"modules: {module!r} is not installed here; install it, or leave it out")
        self.timeout = timeout
        self.memory = memory
        self.max_output = max_output
        self.modules = list(modules)
        self.isolation = _isolation()
        self._locks = _LOCKS if self.isolation == "kernel" else _LOCKS_WITHOUT_KERNEL
        self._places = threading.BoundedSemaphore(processes or os.cpu_count() or 1)
        self._idle: list[Interpreter] = []
        weakref.finalize(self, _close_all, self._idle)

    def __call__(self, program: str) -> str:
        """What the program printed."""
        code = program.encode("utf-8", errors="backslashreplace")
        if len(code) > _LONGEST_PROGRAM:
            return f"SyntaxError: the program is longer than {_LONGEST_PROGRAM} bytes"
        with self._places:
            return self._run(code)

    def _run(self, code: bytes) -> str:
        output, ended = self._run_once(code)
        if not output and ended == "SIGKILL":  # an idle interpreter was killed, for example for its memory
            output, ended = self._run_once(code)
        if not output.startswith(READY):
            if ended == "timed out":
                return f"TimeoutError: not started within {self.timeout:g} s"
            raise RuntimeError(f"the interpreter could not be locked: {output.decode(errors='replace').strip()[-300:]}")
        text = output[len(READY) :].decode("utf-8", errors="replace")
        if ended == "too long" or len(text) > self.max_output:
            return f"{text[: self.max_output]}\nOutput cut after {self.max_output} characters."
        if ended == "timed out":
            return f"{text}TimeoutError: stopped after {self.timeout:g} s"
        return text.rstrip("\n") if ended == "exited" else f"{text}The process died: {ended}"

    def _run_once(self, code: bytes) -> tuple[bytes, str]:
        interpreter = self._interpreter()
        try:
            output, ended = interpreter.run(code, self.timeout, 4 * self.max_output)
        except BaseException:
            interpreter.close()
            raise
        if interpreter.usable:
            self._idle.append(interpreter)
        return output, ended

    def _interpreter(self) -> Interpreter:
        """An idle interpreter that this process started, or a new one."""
        while True:
            try:
                interpreter = self._idle.pop()
            except IndexError:  # other threads pop too, so asking for the length first would not help
                break
            if interpreter.owner == os.getpid():
                return interpreter
            interpreter.close()
        seconds = math.ceil(self.timeout) + 1  # of CPU time: it holds even if this process is gone
        settings = {"seconds": seconds, "memory": self.memory * 2**20, "modules": self.modules}
        return Interpreter({**settings, "locks": self._locks})


def _close_all(interpreters: list[Interpreter]) -> None:
    while interpreters:
        interpreters.pop().close()


@functools.cache
def _isolation() -> str:
    """How this system can confine a program; tried once."""
    settings = {"seconds": 60, "memory": 2**28, "modules": [], "locks": _LOCKS}
    interpreter = Interpreter(settings)
    output, _ = interpreter.run(b"", timeout=60, most=1000)
    interpreter.close()
    if output == READY:
        return "kernel"
    warnings.warn(
        "This system cannot filter system calls (seccomp): only rlimits and an audit hook guard the Python tool, which "
        "a determined program may get around. Give it untrusted programs on Linux only."
    )
    return "audit hook"
