"""Two programs that do the same work, run in turn as whole processes, and what is known afterwards."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

TOLERANCE = 1e-3
NOTHING = 1e-3
"""numbers below it are compared as if they were as large"""
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}


@dataclass
class Run:
    """One process: what it cost as a whole, and what it says of its own steps."""

    cpu: float = 0.0
    """user + system seconds of the process and its children"""
    wall: float = 0.0
    memory_mb: float = 0.0
    """largest resident size"""
    report: dict[str, Any] = field(default_factory=dict)
    """written by the job: `gate`, `step_cpu`, `step_wall`, ... ; empty after a crash"""
    error: str = ""
    """the end of its output, where it did not end well"""

    @property
    def gate(self) -> dict[str, list[float]]:
        return self.report.get("gate", {})

    def cost(self, per_unit: bool) -> float:
        """CPU seconds of a step, or of one unit of its work."""
        return self.report["step_cpu"] / (self.report["units"] if per_unit else 1)


def run_process(
    command: Sequence[str], job: Path, folder: Path, settings: Mapping[str, Any], python_path: str = ""
) -> Run:
    """Run `command JOB FOLDER OUT SETTINGS` to its end and measure it; a crash is a result, too."""
    with tempfile.TemporaryDirectory() as scratch:
        out, log = Path(scratch) / "report.json", Path(scratch) / "log"
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ONE_THREAD
        if python_path:
            environment["PYTHONPATH"] = python_path
        began = time.perf_counter()
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, str(job), str(folder), str(out), json.dumps(dict(settings))],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=scratch,
                env=environment,
            )
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        run = Run(usage.ru_utime + usage.ru_stime, time.perf_counter() - began, usage.ru_maxrss / 1024)
        if process.returncode == 0 and out.exists():
            run.report = json.loads(out.read_text())
        else:
            last = log.read_text(errors="replace").strip().splitlines()[-3:]
            run.error = f"exit code {process.returncode}: " + " / ".join(last)
        return run


def touch_memory(share: float = 0.7) -> None:
    """Write to most of the free memory once: a virtual machine gets each page from its host at the first touch, which
    costs several times what a later one does and would make the first rows slower than the rest."""
    size = int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * share)
    subprocess.run([sys.executable, "-c", f"bytes([1]) * {size}"], check=True)


def difference(ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]], tolerance: float) -> str:
    """Where the two reports of the work disagree; empty where they do not."""
    if ours.keys() != theirs.keys():
        return f"one reports {sorted(ours)}, the other {sorted(theirs)}"
    for name, values in ours.items():
        if len(values) != len(theirs[name]):
            return f"{name}: {len(values)} numbers against {len(theirs[name])}"
        for ours_one, theirs_one in zip(values, theirs[name], strict=True):
            size = max(abs(ours_one), abs(theirs_one), NOTHING)
            if not abs(ours_one - theirs_one) <= tolerance * size:  # NaN does not pass
                return f"{name}: {ours_one:.6g} against {theirs_one:.6g}"
    return ""


@dataclass
class Pair:
    """Ours and theirs, one after the other."""

    ours: Run
    theirs: Run | None
    void: str = ""
    """why the pair does not count"""


@dataclass
class Outcome:
    """All pairs of a row."""

    pairs: list[Pair]
    per_unit: bool = False

    @property
    def counted(self) -> list[Pair]:
        return [pair for pair in self.pairs if not pair.void]

    @property
    def void(self) -> str:
        """Why the row has no figures: a single pair that fails voids all of them."""
        if not self.pairs:
            return "not run"
        return next((pair.void for pair in self.pairs if pair.void), "")

    def ratios(self, measure: Callable[[Run], float]) -> list[float]:
        """Theirs over ours, of each pair."""
        return [measure(pair.theirs) / measure(pair.ours) for pair in self.counted if pair.theirs is not None]

    @property
    def step_ratio(self) -> float:
        return median(self.ratios(lambda run: run.cost(self.per_unit)))

    @property
    def later_ratio(self) -> float | None:
        """Of the steps after the first, where there are any."""
        if not all("later_cpu" in run.report for pair in self.counted for run in (pair.ours, pair.theirs) if run):
            return None
        return median(self.ratios(lambda run: run.report["later_cpu"]))

    @property
    def process_ratio(self) -> float:
        return median(self.ratios(lambda run: run.cpu))

    @property
    def wall_ratio(self) -> float:
        units = (lambda run: run.report["units"]) if self.per_unit else (lambda run: 1.0)
        return median(self.ratios(lambda run: run.report["step_wall"] / units(run)))

    @property
    def memory_ratio(self) -> float:
        return median(self.ratios(lambda run: run.memory_mb))

    def median_of(self, side: str, measure: Callable[[Run], float]) -> float:
        return median(measure(getattr(pair, side)) for pair in self.counted)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Outcome":
        pairs = [
            Pair(Run(**pair["ours"]), Run(**pair["theirs"]) if pair["theirs"] else None, pair["void"])
            for pair in saved["pairs"]
        ]
        return cls(pairs, saved["per_unit"])


def judge(ours: Run, theirs: Run | None, tolerance: float = TOLERANCE, compares: Sequence[str] | None = None) -> Pair:
    """The pair, void where a side crashed or the two did different work, as far as the gate `compares` it."""
    for name, run in (("ours", ours), ("theirs", theirs)):
        if run is not None and run.error:
            return Pair(ours, theirs, f"{name} crashed: {run.error}")
    gates = [
        {name: run.gate[name] for name in run.gate if compares is None or name in compares} if run else {}
        for run in (ours, theirs)
    ]
    wrong = "" if theirs is None else difference(gates[0], gates[1], tolerance)
    return Pair(ours, theirs, f"not the same work: {wrong}" if wrong else "")


def in_turn(
    ours: Callable[[int], Run],
    theirs: Callable[[int], Run] | None,
    pairs: int,
    *,
    tolerance: float = TOLERANCE,
    compares: Sequence[str] | None = None,
    said: Callable[[Pair], None] = lambda pair: None,
) -> list[Pair]:
    """A B A B ...; ends early at a pair that is void, for it voids the row. Each side is told the pair's number."""
    found: list[Pair] = []
    for number in range(pairs):
        pair = judge(ours(number), None if theirs is None else theirs(number), tolerance, compares)
        found.append(pair)
        said(pair)
        if pair.void:
            break
    return found


def printed_by(code: str) -> str:
    """What Python code prints in a process of its own with one thread; SystemExit with its errors where it fails."""
    command, one_thread = [sys.executable, "-W", "ignore", "-c", code], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=one_thread, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout
