"""Measure this tree against an older commit of it: `python -m benchmarks.commits COMMIT [NAME ...]`.

Both run each row's job in turn as whole processes on one thread. Printed for each row: the median, over the pairs, of
this tree's CPU seconds a step over the older one's, the spread of those ratios, and the largest memory of both.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.environments import CACHE, OURS, prepare_materials, python_of
from benchmarks.harness import Outcome, Run, in_turn, run_process
from benchmarks.table import BY_NAME

JOBS = Path(__file__).parent / "jobs"
NAMES = ("dpo", "sft", "reward", "grpo", "ppo-step")


def compare(name: str, older: Path, pairs: int, folder: Path) -> Outcome:
    """The row's job by this tree ("ours") and by the older one ("theirs")."""
    row = BY_NAME[name]

    def runs(tree: Path) -> Run:
        return run_process([python_of(None)], JOBS / f"{row.job}.py", folder, row.ours, str(tree))

    found = in_turn(lambda _: runs(OURS), lambda _: runs(older), pairs, tolerance=row.tolerance, compares=row.compares)
    return Outcome(found)


def line(name: str, outcome: Outcome) -> str:
    """One row of the table, as Markdown."""
    if outcome.void:
        return f"| {name} | void: {outcome.void} | | |"
    ratios = sorted(1 / ratio for ratio in outcome.ratios(lambda run: run.cost(False)))
    seconds = [f"{outcome.median_of(side, lambda run: run.cost(False)):.2f}" for side in ("ours", "theirs")]
    memory = [f"{outcome.median_of(side, lambda run: run.memory_mb):,.0f}" for side in ("ours", "theirs")]
    spread = f"{median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    return f"| {name} | {spread} | {' / '.join(seconds)} | {' / '.join(memory)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the older commit")
    parser.add_argument("names", nargs="*", default=NAMES, help=f"rows of `benchmarks.run` (default {' '.join(NAMES)})")
    parser.add_argument("--pairs", type=int, default=5, help="how often each side runs (default 5)")
    options = parser.parse_args()
    folder = CACHE / "materials"
    prepare_materials(folder, any(BY_NAME[name].real for name in options.names))
    with tempfile.TemporaryDirectory() as scratch:
        older = Path(scratch) / "older"
        git = ["git", "-C", str(OURS), "worktree"]
        subprocess.run([*git, "add", "--detach", str(older), options.commit], check=True, capture_output=True)
        try:
            print("| row | CPU s a step, this over older: median (least to most) | CPU s, this / older | MB |")
            print("| --- | --- | --- | --- |")
            for name in options.names:
                print(line(name, compare(name, older, options.pairs, folder)), flush=True)
        finally:
            subprocess.run([*git, "remove", "--force", str(older)], check=True, capture_output=True)


if __name__ == "__main__":
    main()
