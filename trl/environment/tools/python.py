"""Run Python programs that nobody has read: in a process of their own, without files, network or children."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

if os.name != "posix":
    raise ImportError("PythonInterpreterTool needs a POSIX system: there is nothing else to limit a process with")

from trl.environment.tools.python_worker import READY

_WORKER = Path(__file__).with_name("python_worker.py")
_LOCKS_WITHOUT_KERNEL = ("limits", "modules", "hook")
_LOCKS = (*_LOCKS_WITHOUT_KERNEL, "kernel")
_LONGEST_PROGRAM = 60_000  # bytes; fits into a pipe, so that writing it never waits


class PythonInterpreterTool:
    """Answers a program with what it prints, and with the value of its last line as a Python shell would.

    Every program starts afresh, with most of the pure standard library, seeded `random`, and no input. What goes
    wrong, a time-out included, is the last line of the answer. The answer to hostile programs is an error too: see
    `python_worker` for how they are held. `isolation` says what holds them here: "kernel" (seccomp) or "audit hook".
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
        `processes`: programs that run at the same time, the others wait; None: one for each core.
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

    def __call__(self, program: str) -> str:
        """What the program printed."""
        code = program.encode("utf-8", errors="backslashreplace")
        if len(code) > _LONGEST_PROGRAM:
            return f"SyntaxError: the program is longer than {_LONGEST_PROGRAM} bytes"
        with self._places:
            return self._run(code)

    def _run(self, code: bytes) -> str:
        settings = {
            "seconds": math.ceil(self.timeout),
            "memory": self.memory * 2**20,
            "modules": self.modules,
            "locks": self._locks,
        }
        output, ended = _talk(
            _command(settings, with_packages=bool(self.modules)), code, self.timeout, 4 * self.max_output
        )
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


def _command(settings: dict[str, object], with_packages: bool) -> list[str]:
    flags = ["-s", "-P", "-B", "-W", "ignore"] + ([] if with_packages else ["-S"])
    return [sys.executable, *flags, str(_WORKER), json.dumps(settings)]


def _talk(command: list[str], code: bytes, timeout: float, most: int) -> tuple[bytes, str]:
    """`(output, how it ended)`: at most `most` bytes, and "exited", "timed out", "too long" or a signal's name."""
    environment = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        cwd="/", env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + timeout
        try:
            child.stdin.write(code)  # type: ignore[union-attr]
            child.stdin.close()  # type: ignore[union-attr]
        except BrokenPipeError:
            pass
        output, ended = _read(child.stdout.fileno(), deadline, most)  # type: ignore[union-attr]
        if ended == "end of output" and not _has_left(child, deadline):
            ended = "timed out"
    finally:
        _kill(child)
    if ended != "end of output":
        return output, ended
    return output, "exited" if child.returncode >= 0 else signal.Signals(-child.returncode).name


def _read(pipe: int, deadline: float, most: int) -> tuple[bytes, str]:
    output = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(output) <= most:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return bytes(output), "timed out"
            chunk = os.read(pipe, 65536)
            if not chunk:
                return bytes(output), "end of output"
            output += chunk
    return bytes(output[:most]), "too long"


def _has_left(child: subprocess.Popen[bytes], deadline: float) -> bool:
    """Whether the process ends in time. It is not reaped, so that its group's number stays its own."""
    while True:
        if hasattr(os, "waitid"):
            left = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        else:
            left = child.poll() is not None
        if left or time.monotonic() > deadline:
            return left
        time.sleep(0.0005)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill the process and what it may have started, and reap it."""
    if child.returncode is None:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            child.kill()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
    child.wait()


@functools.cache
def _isolation() -> str:
    """What this system can hold a program with; tried once."""
    settings = {"seconds": 60, "memory": 2**28, "modules": [], "locks": _LOCKS}
    output, _ = _talk(_command(settings, with_packages=False), b"", timeout=60, most=1000)
    if output == READY:
        return "kernel"
    warnings.warn(
        "This system cannot filter system calls (seccomp): only rlimits and an audit hook guard the Python tool, which "
        "a determined program may get around. Give it untrusted programs on Linux only."
    )
    return "audit hook"
