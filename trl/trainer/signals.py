"""SIGTERM, which clusters send before they take a machine away: the step is finished, saved, and the process ends."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator

logger = logging.getLogger(__name__)

TERMINATED = 128 + signal.SIGTERM
"""exit code of a process that was asked to end: 143"""


class StopSignal:
    """Whether this process was asked to end. A second signal ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        self._process: int | None = None

    @contextmanager
    def listening(self, wanted: bool) -> Iterator[None]:
        """Within, the first SIGTERM is remembered, if that is wanted; what was done about it before comes back."""
        self.asked = False
        if wanted and threading.current_thread() is not threading.main_thread():
            logger.warning("enable_jit_checkpoint=True: only the main thread hears SIGTERM, and this is another one")
            wanted = False
        if not wanted:
            yield
            return
        self._process = os.getpid()
        before = signal.signal(signal.SIGTERM, self._hear)
        if callable(before):
            logger.warning(
                "SIGTERM: the handler that was set is not called while the run trains, which is saved first; with "
                "enable_jit_checkpoint=False it is"
            )
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process, whatever it is doing
        if os.getpid() != self._process:  # a child that was forked off: the signal is meant for it alone
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self.asked = True
        below, fold = ("\n", "\n ") if os.isatty(2) else ("", "")  # a bar may stand in the terminal's line
        text = "SIGTERM: this step is finished and saved, then the process ends with 143;"
        os.write(2, f"{below}{text}{fold} a second one ends it now\n".encode())

    def on_any(self, accelerator: Accelerator) -> bool:
        """Whether any process of the run was asked to end. Every process calls it."""
        if accelerator.num_processes == 1:
            return self.asked
        return bool(accelerator.reduce(torch.tensor(float(self.asked), device=accelerator.device), "sum").item())
