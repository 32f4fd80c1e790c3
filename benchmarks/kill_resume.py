"""End a run at random moments, resume it each time, and compare its end with that of a run left alone, bit for bit.

    OMP_NUM_THREADS=1 python benchmarks/kill_resume.py --method grpo --kills 10

Every second signal comes within milliseconds of a step's end, while the checkpoint is being written. `--method` is any
run of tests/chaos/chaos_runs.py, where `make test-long` does the same for all of them.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch

from trl.trainer.checkpoints import MANIFEST

ROOT = Path(__file__).parent.parent
FOLDERS = [ROOT, *(ROOT / "tests" / name for name in ("", "trainer", "chaos")), ROOT / "examples"]
"""where the code of runs is imported from"""
SOON = 0.02
"""seconds behind a step's end within which its checkpoint is being written"""
EXIT_CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM}


class RunFailed(RuntimeError):
    """A run that did not come to the end that it should come to."""


class Process(Protocol):
    """A run at work: it prints a line with a step's number when the step is done, before it is saved."""

    @property
    def stdout(self) -> Iterable[str] | None: ...

    def send_signal(self, number: int, /) -> None: ...

    def wait(self) -> int:
        """The exit code."""


Start = Callable[[Path], Process]
"""starts the run in a folder, from its newest checkpoint on; it leaves its weights in `end.pt` there"""


@dataclass(frozen=True)
class Kill:
    """One run that was ended: `delay` seconds behind a step, and whether a checkpoint was being written."""

    step: int
    delay: float
    in_save: bool


def _steps(process: Process) -> Iterator[int]:
    return (int(line) for line in process.stdout or () if line.strip().isdigit())


def left_alone(start: Start, folder: Path) -> float:
    """Let a run come to its end; the median of the seconds between two steps."""
    process = start(folder)
    times = [time.monotonic() for _ in _steps(process)]
    if code := process.wait():
        raise RunFailed(f"the run in {folder} that was left alone ended with {code}")
    return statistics.median([later - sooner for sooner, later in pairwise(times)] or [0.0])


def end_one(start: Start, folder: Path, steps_more: int, delay: float, how: signal.Signals = signal.SIGKILL) -> int:
    """End a run `delay` seconds behind its `steps_more`-th step; the number of that step."""
    process, sent = start(folder), 0
    for count, step in enumerate(_steps(process), 1):
        if count == steps_more:
            time.sleep(delay)
            process.send_signal(how)
            sent = step
    if (code := process.wait()) != EXIT_CODES[how]:
        raise RunFailed(f"the run in {folder} ended with {code}, not with {EXIT_CODES[how]}, behind step {sent}")
    return sent


def is_in_save(folder: Path) -> bool:
    """Whether a run that was killed has left a checkpoint half written."""
    numbered = [path for path in folder.rglob("checkpoint?[0-9]*") if path.is_dir()]
    return any(folder.rglob(".saving-*")) or any(not (path / MANIFEST).exists() for path in numbered)


def same_end(one: Path, other: Path) -> bool:
    """Whether two runs left the same weights, bit for bit."""
    ends = [torch.load(folder / "end.pt") for folder in (one, other)]
    return len(ends[0]) == len(ends[1]) and all(torch.equal(*pair) for pair in zip(*ends, strict=True))


def campaign(
    start: Start, scratch: Path, kills: int, rng: random.Random, how: signal.Signals = signal.SIGKILL,
    steps_more: int = 3,
) -> list[Kill]:  # fmt: skip
    """End a run so many times, each time 1 to `steps_more` steps after it began; `RunFailed` unless its end is that of
    a run left alone."""
    whole, killed = scratch / "whole", scratch / "killed"
    pace = left_alone(start, whole)
    done = []
    for number in range(kills):
        delay = rng.uniform(0, min(SOON, pace) if number % 2 else pace)
        step = end_one(start, killed, rng.randint(1, steps_more), delay, how)
        done.append(Kill(step, delay, is_in_save(killed)))
    if (killed / "end.pt").exists():
        raise RunFailed(f"the run in {killed} ended by itself before its last kill: give it more steps")
    left_alone(start, killed)
    if not same_end(whole, killed):
        raise RunFailed(f"after {done} the weights in {killed} differ")
    return done


def start_process(method: str, steps: int) -> Start:
    """Starts a run of tests/chaos/chaos_runs.py in a new interpreter."""
    path = os.pathsep.join([*map(str, FOLDERS), os.environ.get("PYTHONPATH", "")])

    def start(folder: Path) -> Process:
        code = f"from chaos_runs import run; run({method!r}, {str(folder)!r}, {steps})"
        return subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    return start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="ppo")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    start = start_process(arguments.method, 4 * arguments.kills + 4)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            done = campaign(start, Path(scratch), arguments.kills, random.Random(arguments.seed))
        except RunFailed as error:
            sys.exit(str(error))
    for number, kill in enumerate(done, 1):
        where = ", in its save" if kill.in_save else ""
        print(f"kill {number}: {1000 * kill.delay:.0f} ms behind step {kill.step}{where}")
    print(f"{arguments.method}: after {arguments.kills} kills the weights are equal bit for bit")


if __name__ == "__main__":
    main()
