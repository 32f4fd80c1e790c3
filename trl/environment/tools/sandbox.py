"""Where programs of a model run: the protocol of a sandbox, and the one of this machine."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from trl.environment.tools.python_process import Interpreter

_LOCKS_WITHOUT_KERNEL = ("limits", "modules", "hook")
_LOCKS = (*_LOCKS_WITHOUT_KERNEL, "kernel")
_LONGEST_PROGRAM = 60_000  # bytes; with its length it fits into a pipe, so that writing it never waits
_READY = b"\x06"  # `python_worker.READY`, a script that only POSIX systems can import
_WAYS_OUT = "use Linux on x86_64 or aarch64, or give `sandbox=` a container or another machine (docs/security.md)"


@dataclass(frozen=True)
class Ran:
    """What a program printed, and how it ended: "exited", "timed out", "too long", or what killed it."""

    output: str
    ended: str = "exited"


class Sandbox(Protocol):
    """Runs programs that nobody has read: in a container, on another machine, or as `LocalSandbox` does."""

    def run(self, program: str, *, timeout: float, memory: int, max_output: int) -> Ran | str:
        """What the program prints, its error message included; a text alone is that of a program that has exited.

        It is called from several threads at once, and has to return soon after `timeout` seconds. `memory`: MiB that
        the program may take. `max_output`: characters that will be read; it may return more.
        """
        ...


class LocalSandbox:
    """Runs each program in a fresh fork of an interpreter of this machine, behind the locks of `python_worker`.

    `isolation` is what holds programs: "kernel" (seccomp), or only an "audit hook" where the system has no seccomp.
    Then a determined program gets around it, so that it takes `unsafe=True` to run any; RuntimeError without.
    """

    def __init__(self, modules: Sequence[str] = (), processes: int | None = None, *, unsafe: bool = False) -> None:
        """
        `modules`: further modules that programs can import, such as numpy or sympy.
        `processes`: how many programs run at the same time; None: one for each core.
        `unsafe`: run programs also where the kernel cannot hold them; it changes nothing where it can.
        """
        for module in modules:
            if importlib.util.find_spec(module) is None:
                raise ValueError(f"modules: {module!r} is not installed here; install it, or leave it out")
        if os.name != "posix":
            raise RuntimeError(f"this system has no rlimits to hold programs with: {_WAYS_OUT}")
        refused = _refusal()
        if refused and not unsafe:
            raise RuntimeError(
                f"the kernel of this system cannot hold programs ({refused}): {_WAYS_OUT}; or `unsafe=True`, for "
                "programs that you would run yourself"
            )
        if refused:
            warnings.warn(
                f"unsafe=True: the kernel of this system cannot hold programs ({refused}). A program that means harm "
                "can delete your files and read the memory of your processes."
            )
        self.modules = list(modules)
        self.isolation = "audit hook" if refused else "kernel"
        self._locks = _LOCKS_WITHOUT_KERNEL if refused else _LOCKS
        self._places = threading.BoundedSemaphore(processes or os.cpu_count() or 1)
        self._idle: list[Interpreter] = []
        weakref.finalize(self, _close_all, self._idle)

    def run(self, program: str, *, timeout: float, memory: int, max_output: int) -> Ran:
        """What the program printed. RuntimeError if it could not be locked up."""
        code = program.encode("utf-8", errors="backslashreplace")
        if len(code) > _LONGEST_PROGRAM:
            return Ran(f"SyntaxError: the program is longer than {_LONGEST_PROGRAM} bytes")
        # The limit of CPU time holds even if this process is gone.
        settings = {"seconds": math.ceil(timeout) + 1, "memory": memory * 2**20, "modules": self.modules}
        settings["locks"] = self._locks
        with self._places:
            output, ended = self._run_once(settings, code, timeout, 4 * max_output)
            if not output and ended == "SIGKILL":  # an idle interpreter was killed, for example for its memory
                output, ended = self._run_once(settings, code, timeout, 4 * max_output)
        if output.startswith(_READY):
            return Ran(output[len(_READY) :].decode("utf-8", errors="replace"), ended)
        if ended == "timed out":
            return Ran(f"TimeoutError: not started within {timeout:g} s")
        raise RuntimeError(f"the interpreter could not be locked: {output.decode(errors='replace').strip()[-300:]}")

    def _run_once(self, settings: dict[str, object], code: bytes, timeout: float, most: int) -> tuple[bytes, str]:
        interpreter = self._interpreter(settings)
        try:
            output, ended = interpreter.run(code, timeout, most)
        except BaseException:
            interpreter.close()
            raise
        if interpreter.usable:
            self._idle.append(interpreter)
        return output, ended

    def _interpreter(self, settings: dict[str, object]) -> Interpreter:
        """An idle interpreter that this process started with these settings, or a new one."""
        while True:
            try:
                interpreter = self._idle.pop()
            except IndexError:  # other threads pop too, so asking for the length first would not help
                return Interpreter(settings)
            if interpreter.owner == os.getpid() and interpreter.settings == settings:
                return interpreter
            interpreter.close()


def _close_all(interpreters: list[Interpreter]) -> None:
    while interpreters:
        interpreters.pop().close()


@functools.cache
def _refusal() -> str:
    """Why the kernel of this system cannot hold a program; empty where it can. Tried once."""
    interpreter = Interpreter({"seconds": 60, "memory": 2**28, "modules": [], "locks": _LOCKS})
    output, _ = interpreter.run(b"", timeout=60, most=1000)
    interpreter.close()
    said = output.decode(errors="replace").strip().splitlines()
    return "" if output == _READY else said[-1][-200:] if said else "it does not start"
