"""Processes of a test: how ranks come and go, and how a run is killed."""

import gc
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def on_ranks(work: Callable[..., None], world: int, *args: Any) -> None:
    """`work(rank, world, *args)` in a process of its own for each of `world` ranks, a gloo group if there are more."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, (world, port, work, args), nprocs=world)


def _rank(rank: int, world: int, port: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    if world > 1:
        join_group(rank, world, port)
    work(rank, world, *args)  # its trainer is gone when it returns
    if world > 1:
        leave_group()


def join_group(rank: int, world: int, port: int) -> None:
    """Make this process a rank of a gloo group, on the CPU and with one thread."""
    warnings.simplefilter("ignore")
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1",
    )  # fmt: skip


def leave_group() -> None:
    """Call it once nothing holds the trainer any more.

    Where DDP's reducer is the last to let go of a gloo group, its destructor waits for gloo's thread with the GIL held,
    and that thread may be waiting for the GIL: so the wrapped models go first, then the group.
    """
    gc.collect()
    torch.distributed.destroy_process_group()


def killed_run(module: str, folder: Path, after_step: int, delay: float) -> None:
    """`module.resumable_run(folder)`, killed `delay` seconds behind a step: at once is amid its checkpoint."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent.parent), str(here), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-c", f"from {module} import resumable_run; resumable_run({str(folder)!r})"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": path},
    ) as process:  # fmt: skip
        for line in process.stdout or ():
            if line.strip() == str(after_step):
                time.sleep(delay)
                process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
