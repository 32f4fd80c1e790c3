"""The child process of `PythonInterpreterTool`: an interpreter that forks for each program."""

from __future__ import annotations

import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_WORKER = Path(__file__).with_name("python_worker.py")
_TO_START = 60.0
"""seconds"""


class Interpreter:
    """A child process with everything loaded; a program runs in a fork of it, one at a time.

    The fork ends with its program, so nothing that a program does to its interpreter survives. The child itself reads
    no output and runs no program. A program that does not end is killed together with the child, as one process group;
    then this interpreter is not `usable` any more.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """settings: of `python_worker`. RuntimeError if the child does not start."""
        self.owner = os.getpid()
        self.settings = settings
        self._control, theirs = os.pipe()
        flags = ["-s", "-P", "-B", "-W", "ignore", *([] if settings["modules"] else ["-S"])]
        self._child = subprocess.Popen(
            [sys.executable, *flags, str(_WORKER), json.dumps({**settings, "control": theirs})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/", pass_fds=[theirs],
            env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._programs, self._output = self._child.stdin.fileno(), self._child.stdout.fileno()
        self.usable = True
        if not _readable([self._control], _TO_START) or not os.read(self._control, 1):
            said = _drained(self._output, 1000)
            self.close()
            raise RuntimeError(f"the interpreter does not start: {said.decode(errors='replace').strip()[-300:]}")

    def run(self, program: bytes, timeout: float, most: int) -> tuple[bytes, str]:
        """`(output, how it ended)`: at most `most` bytes, and "exited", "timed out", "too long" or a signal's name."""
        deadline = time.monotonic() + timeout
        output = bytearray()
        try:
            os.write(self._programs, struct.pack("<I", len(program)) + program)  # fits into the pipe: never waits
            while True:
                ready = _readable([self._output, self._control], deadline - time.monotonic())
                if self._output in ready:
                    chunk = os.read(self._output, 65536)
                    if not chunk:  # the interpreter itself was killed
                        ended = "SIGKILL"
                        break
                    output += chunk
                elif self._control in ready:
                    status = os.read(self._control, 4)
                    output += _drained(self._output, most + 1 - len(output))  # it is dead: all it said is there
                    ended = _how(status)
                    break
                else:
                    ended = "timed out"
                    break
                if len(output) > most:
                    break
        except BrokenPipeError:
            ended = "SIGKILL"
        if len(output) > most:
            ended = "too long"
        elif ended == "SIGKILL" and time.monotonic() >= deadline:
            ended = "timed out"  # this process was late, so the limit of CPU time came before the clock
        if ended in ("timed out", "too long", "SIGKILL"):
            self.close()
        return bytes(output[:most]), ended

    def close(self) -> None:
        """Kill the child and its fork, and wait until both have ended."""
        if not self.usable:
            return
        self.usable = False
        if self.owner == os.getpid():
            try:
                os.killpg(self._child.pid, signal.SIGKILL)  # not reaped yet: the number is still its own
            except (ProcessLookupError, PermissionError):
                self._child.kill()
            _drained(self._output, 2**62, until_end=True)
            self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()
        os.close(self._control)


def _readable(files: list[int], timeout: float) -> set[int]:
    with selectors.DefaultSelector() as selector:
        for file in files:
            selector.register(file, selectors.EVENT_READ)
        return {key.fd for key, _ in selector.select(max(0.0, timeout))}


def _drained(pipe: int, most: int, until_end: bool = False) -> bytes:
    """What is in the pipe; with `until_end`, wait (2 s at most) for all who could write to be gone, keep nothing."""
    output = bytearray()
    while len(output) < most and _readable([pipe], 2.0 if until_end else 0.0):
        chunk = os.read(pipe, 65536)
        if not chunk:
            break
        output += b"" if until_end else chunk
    return bytes(output)


def _how(status: bytes) -> str:
    if len(status) < 4:
        return "SIGKILL"  # the child is gone too
    code = struct.unpack("<i", status)[0]
    return "exited" if code >= 0 else signal.Signals(-code).name
