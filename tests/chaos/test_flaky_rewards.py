"""Rewards that have no opinion, come too late, hang: over many steps nothing grows, and a run that they end goes on."""

import asyncio
import gc
import itertools
import json
import os
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import conformity
import pytest
import torch
from launch import Forked
from transformers import PrinterCallback, TrainerCallback

pytestmark = pytest.mark.slow


class Flaky:
    """Takes turns: a judgement, None for some rows, None for all, too late, a tensor."""

    def __init__(self):
        self.turn = itertools.count()

    def __call__(self, completions, **columns):
        kind = next(self.turn) % 5
        scores = conformity.early_letters(completions)
        if kind == 1:
            return [None if index % 2 else score for index, score in enumerate(scores)]
        if kind == 2:
            return [None] * len(scores)
        if kind == 3:
            time.sleep(0.05)
        return torch.tensor(scores) if kind == 4 else scores


class Hangs:
    """An async reward that does not come back every fourth time: it is cancelled."""

    def __init__(self):
        self.turn = itertools.count()
        self.cancelled = 0

    async def __call__(self, completions, **columns):
        try:
            await asyncio.sleep(60 if next(self.turn) % 4 == 3 else 0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return [float(len(text)) for text in completions]


def held():
    """What this process has: KB of memory, threads, open files, files that the run keeps besides its rollouts."""
    gc.collect()
    status = Path("/proc/self/status").read_text().split()
    return {
        "memory": int(status[status.index("VmRSS:") + 1]),
        "threads": threading.active_count(),
        "native threads": len(os.listdir("/proc/self/task")),
        "open files": len(os.listdir("/proc/self/fd")),
        "objects": len(gc.get_objects()),
    }


def train(folder, steps):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seen, hangs = [], Hangs()

    class Measure(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step in (steps // 3, steps - 1):
                time.sleep(0.1)  # the late ones come to their end
                seen.append(held() | {"files": len([path for path in Path(folder).rglob("*") if path.is_file()])})

    conformity.CASES["flaky"] = replace(
        conformity.CASES["grpo"], arguments=lambda: {"reward_funcs": [Flaky(), hangs, conformity.shortness]}
    )
    trainer = conformity.build(
        "flaky", Path(folder), max_steps=steps, save_strategy="steps", save_steps=5, save_total_limit=2,
        reward_timeout=0.02, save_rollouts=False, logging_steps=10, reward_weights=[1.0, 0.1, 0.1],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Measure())
    trainer.train()
    late = [row["rewards/Flaky/timed_out"] for row in trainer.state.log_history if "rewards/Flaky/timed_out" in row]
    print(json.dumps({"steps": trainer.state.global_step, "cancelled": hangs.cancelled, "late": late, "seen": seen}))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("steps", [60, pytest.param(300, marks=pytest.mark.long)])
def test_nothing_grows(steps, tmp_path, count):
    process = Forked(train, str(tmp_path), steps)
    said = list(process.stdout)
    assert process.wait() == 0, process.errors
    result = json.loads(said[-1])
    first, last = result["seen"]
    assert result["steps"] == steps
    assert result["cancelled"] == steps // 4
    assert sum(result["late"]) > 0
    growth = {name: last[name] - first[name] for name in first}
    assert growth.pop("memory") < 8 * 1024, result  # the allocator's, the same after 60 steps and after 300
    assert growth.pop("objects") < 1000, result  # the log's
    assert not any(growth.values()), result
    count(
        steps=steps, late=result["cancelled"] + steps // 5, **{f"{name} grown": grown for name, grown in growth.items()}
    )
