"""Runs in processes of their own. They are forked off a server that has imported everything, so they start at once."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Callable
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

from chaos_runs import Trouble, run

from benchmarks.kill_resume import FOLDERS, Start

os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, FOLDERS), os.environ.get("PYTHONPATH", "")])  # the server's
server = mp.get_context("forkserver")
server.set_forkserver_preload(["chaos_runs"])


class Forked:
    """A process that does `work(*arguments)`. What it prints can be read, and its errors when it has ended."""

    def __init__(self, work: Callable[..., None], *arguments: Any):
        pipes = [server.Pipe(duplex=False) for _ in range(2)]
        self._process = server.Process(target=_child, args=([writer for _, writer in pipes], work, arguments))
        self._process.start()
        self.stdout, stderr = (os.fdopen(os.dup(reader.fileno()), errors="replace") for reader, _ in pipes)
        for end in chain(*pipes):
            end.close()
        self.errors: list[str] = []
        """lines, without empty ones"""
        self._listener = threading.Thread(target=self._listen, args=(stderr,))
        self._listener.start()

    def _listen(self, stderr: TextIO) -> None:
        with stderr:
            self.errors += [line.rstrip() for line in stderr if line.strip()]

    def send_signal(self, number: int, /) -> None:
        os.kill(self._process.pid or 0, number)

    def wait(self, seconds: float | None = None) -> int:
        """The exit code. After so many seconds the process is killed, and the code is that of a kill."""
        if seconds is not None:
            self._process.join(seconds)
            if self._process.is_alive():
                self.send_signal(signal.SIGKILL)
        with self.stdout:
            for _ in self.stdout:
                pass
        self._process.join()
        self._listener.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def _child(writers: list[Connection], work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    for number, writer in enumerate(writers, 1):
        os.dup2(writer.fileno(), number)
        writer.close()
    work(*arguments)


def starter(name: str, steps: int, **settings: Any) -> Start:
    """Starts one of the runs in a folder, for `benchmarks.kill_resume`."""
    return lambda folder: attempt(name, folder, steps, **settings)


def attempt(name: str, folder: Path, steps: int, trouble: Trouble | None = None, **settings: Any) -> Forked:
    """One of the runs, in a folder, from its newest checkpoint on."""
    return Forked(run, name, str(folder), steps, trouble, settings)
