"""Kill -9 a run at random moments, resume it each time, and compare its end with that of a run left alone, bit for bit.

    OMP_NUM_THREADS=1 python benchmarks/kill_resume.py --kills 10

Every second kill comes within milliseconds of a step's end, while the checkpoint is being written.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RUNS = {
    "grpo": "from grpo_runs import resumable_run; resumable_run({folder!r}, steps=120)",
    "ppo": "from ppo_runs import resumable_run; resumable_run({folder!r}, steps=120)",
}
"""code of a run that resumes from `folder`, prints a line behind each step and writes its weights to `end.pt`"""


def start(method: str, folder: Path) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "trainer"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", RUNS[method].format(folder=str(folder))],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def kill_one(method: str, folder: Path, steps_more: int, delay: float) -> int | None:
    """Kill a run `delay` seconds behind its `steps_more`-th step; the step, or None if it ended before."""
    process = start(method, folder)
    assert process.stdout is not None
    for count, line in enumerate(process.stdout, 1):
        if count == steps_more:
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            return int(line) if process.wait() == -signal.SIGKILL else None
    process.wait()
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=RUNS, default="ppo")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole, killed = Path(scratch, "whole"), Path(scratch, "killed")
        if start(arguments.method, whole).wait():
            sys.exit("the run that was left alone failed")
        for kill in range(arguments.kills):
            delay = rng.uniform(0, 0.02) if kill % 2 else rng.uniform(0, 0.5)
            step = kill_one(arguments.method, killed, rng.randint(1, 3), delay)
            if step is None:
                sys.exit(f"the run ended by itself before kill {kill + 1}: give it more steps")
            print(f"kill {kill + 1}: {1000 * delay:.0f} ms behind step {step}", flush=True)
        if not (killed / "end.pt").exists() and start(arguments.method, killed).wait():
            sys.exit("the run that was resumed failed")
        ends = [torch.load(folder / "end.pt") for folder in (whole, killed)]
    if not all(torch.equal(one, other) for one, other in zip(*ends, strict=True)):
        sys.exit("the weights differ")
    print(f"{arguments.method}: after {arguments.kills} kills the weights are equal bit for bit")


if __name__ == "__main__":
    main()
