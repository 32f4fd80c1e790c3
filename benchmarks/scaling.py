"""How the cost of ours grows with lengths, group size and vocabulary, and what share of the processor it uses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environments import OURS
from benchmarks.flops import Tree, step_gflop
from benchmarks.harness import run_process

LENGTHS = [
    {"prompts": 4, "group": 2, "prompt": prompt, "completion": completion, "vocabulary": 32_000}
    for prompt in (50, 200, 800)
    for completion in (20, 60, 200)
]
GROUPS = [
    {"prompts": max(1, 32 // group), "group": group, "prompt": 200, "completion": 60, "vocabulary": 32_000}
    for group in (1, 2, 8, 32)
]
VOCABULARIES = [
    {"prompts": 8, "group": 2, "prompt": 200, "completion": 60, "vocabulary": vocabulary}
    for vocabulary in (32_000, 150_000)
]
POINTS = [*LENGTHS, *GROUPS, *VOCABULARIES]


def useful_gflop(point: Mapping[str, Any]) -> float:
    """What the mathematics of a point's step needs."""
    tree = Tree(point["prompt"], [point["completion"]] * point["group"])
    return step_gflop([tree] * point["prompts"], reference=True, vocabulary=point["vocabulary"])


def measure_scaling(folder: Path, command: Sequence[str]) -> list[dict[str, Any]]:
    """A process for each point, so that each has its own peak of memory."""
    found = []
    for shape in POINTS:
        job = Path(__file__).parent / "jobs" / "scaling.py"
        run = run_process(command, job, folder, {**shape, "steps": 2}, str(OURS))
        found.append({**shape, **run.report, "memory_mb": run.memory_mb, "error": run.error})
        print("scaling", shape, run.error or f"{run.report['step_cpu']:.2f} s of CPU a step", flush=True)
    return found
