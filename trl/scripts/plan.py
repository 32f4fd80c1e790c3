"""`trl plan`, and `--dry_run` of a training command: does the run fit, and how long will it take?

Two optimizer steps are really made, of at most two micro-batches each, on the longest rows; nothing is kept of them.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import tempfile
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from trl.data.microbatches import lengths_of, row_tokens
from trl.models.memory import MARGIN, held
from trl.models.precision import optimizer_states, size_text
from trl.models.unwrap import below_accelerate
from trl.scripts.jobs import JOBS
from trl.trainer.objective import ObjectiveTrainer
from trl.trainer.rollout_trainer import RolloutTrainer
from trl.trainer.run_folder import PLAN
from trl.trainer.run_record import peak_device_memory, peak_memory, write_whole
from trl.trainer.step_line import duration, short

if TYPE_CHECKING:
    from trl.trainer.ppo_trainer import PPOTrainer

COLUMNS = 80
"""of a terminal"""
MOST_ROWS = 100_000
"""rows that are counted one by one, where their lengths cannot be read off a column"""


def command(
    context: typer.Context,
    job: Annotated[str, typer.Argument(help="Training command that is to be planned: sft, dpo, grpo, ...")],
) -> int:
    """Say what `trl JOB` would need: memory, seconds, disk. Two steps are made on the longest rows, and not kept.

    Takes --model, --data and every setting of the training command.
    """
    if job not in JOBS:
        raise ValueError(f"{job}: no training command of that name; choose one of {', '.join(JOBS)}")
    from trl.scripts.training import command as train

    return train(job, JOBS[job], [*context.args, "--dry_run"])


@dataclass
class Schedule:
    """How the whole run is made of steps."""

    steps: int
    accumulation: int
    mean: float
    """tokens of a row; 0 where that is not known"""
    longest: float
    """tokens of a row of those that were tried"""
    of_rollout: int = 0
    """optimizer steps on each rollout; 0: nothing is sampled"""


class Stopwatch(TrainerCallback):
    """Seconds of each step and of its optimizer, of the CPU and by the clock."""

    def __init__(self, device: torch.device):
        self.device = device
        self.steps: list[tuple[float, float]] = []
        self.optimizer: list[tuple[float, float]] = []
        self._began = self._at = self.now()

    def now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time(), time.perf_counter()

    def since(self, before: tuple[float, float]) -> tuple[float, float]:
        now = self.now()
        return now[0] - before[0], now[1] - before[1]

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = self.now()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._at = self.now()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.optimizer.append(self.since(self._at))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(self.since(self._began))
        self._began = self.now()


def rehearse(config: Any, make: Callable[[Any], Any]) -> str:
    """Make a trainer by a copy of the config, try two steps, print what the whole run needs; returns the folder.

    make: `(config) -> trainer`.
    """
    folder = Path(str(config.output_dir))
    with tempfile.TemporaryDirectory() as aside:
        trainer = make(_unrecorded(config, aside))
        schedule = _schedule(trainer, config)
        watch = Stopwatch(trainer.args.device if isinstance(trainer, ObjectiveTrainer) else trainer.current_device)
        for printer in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printer)
        trainer.add_callback(watch)
        before = trainer.plan_memory() if isinstance(trainer, ObjectiveTrainer) else None
        trainer.train()
    found = _found(schedule, watch, trainer, config, before)
    if int(os.environ.get("RANK", 0)) == 0:
        for line in lines_of(found):
            print(line)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / PLAN, json.dumps(found, indent=1) + "\n")
        print(f"wrote {folder / PLAN}")
    return str(folder)


def _unrecorded(config: Any, folder: str) -> Any:
    """A copy of the config that saves, evaluates and reports nothing, and makes few steps."""
    own = copy.copy(config)
    changed = {
        "output_dir": folder, "save_strategy": SaveStrategy.NO, "eval_strategy": IntervalStrategy.NO, "do_eval": False,
        "report_to": [], "push_to_hub": False, "load_best_model_at_end": False, "eval_on_start": False,
        "resume_from_checkpoint": None, "disable_tqdm": True, "save_steps": None, "logging_steps": 10**9,
    }  # fmt: skip
    if hasattr(own, "total_episodes"):  # PPO makes its steps when it is made
        changed |= {"max_steps": 2, "total_episodes": None}
    for name, value in changed.items():
        if hasattr(own, name):
            setattr(own, name, value)
    return own


def _schedule(trainer: ObjectiveTrainer | PPOTrainer, config: Any) -> Schedule:
    """Read off the steps of the whole run, then leave two of them, on the longest rows."""
    accumulation = int(config.gradient_accumulation_steps)
    if not isinstance(trainer, ObjectiveTrainer):
        return Schedule(_steps_of_ppo(trainer, config), accumulation, 0.0, 0.0, 1)
    args, rows = trainer.args, int(trainer.args.per_device_train_batch_size)
    sized = hasattr(trainer.train_dataset, "__len__")
    each = -(-len(trainer.get_train_dataloader()) // accumulation) if sized else 0  # type: ignore[arg-type]
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * each)
    if isinstance(trainer, RolloutTrainer):
        of_rollout = max(1, trainer.rollouts.shape.passes // accumulation)
        args.max_steps = 2 * of_rollout if of_rollout < 3 else of_rollout
        _take_longest(trainer, 2 * trainer.rollouts.shape.rows // trainer.rollouts.shape.num_generations)
        return Schedule(steps, accumulation, 0.0, 0.0, of_rollout)
    args.max_steps, args.gradient_accumulation_steps = 2, min(2, accumulation)
    mean, longest = _take_longest(trainer, 2 * rows * args.gradient_accumulation_steps * args.world_size)
    return Schedule(steps, accumulation, mean, longest)


def _steps_of_ppo(trainer: PPOTrainer, config: Any) -> int:
    if config.max_steps > 0:
        return int(config.max_steps)
    episodes = config.total_episodes or config.num_train_epochs * len(trainer.dataset)
    return math.ceil(episodes / (trainer.config.batch_size * trainer.accelerator.num_processes))


def _take_longest(trainer: ObjectiveTrainer, count: int) -> tuple[float, float]:
    """Leave the trainer its longest rows; the mean length of all, and of these. (0, 0) where that is not known."""
    rows = trainer.train_dataset
    lengths = lengths_of(rows)
    if lengths is None or len(lengths) != len(rows):
        if not hasattr(rows, "select") or len(rows) > MOST_ROWS:
            return 0.0, 0.0
        lengths = np.array([row_tokens(row) for row in rows])
    order = np.argsort(-lengths, kind="stable")[:count]
    trainer.train_dataset = trainer.given.ready(rows.select(order.tolist()), "train")
    return float(lengths.mean()), float(lengths[order].mean())


def _found(
    schedule: Schedule, watch: Stopwatch, trainer: ObjectiveTrainer | PPOTrainer, config: Any, before: Any
) -> dict[str, Any]:
    """What the run is expected to need."""
    on_gpu = watch.device.type == "cuda"
    peak = peak_device_memory() if on_gpu else peak_memory()
    cpu, wall = (_seconds(schedule, watch, kind) for kind in (0, 1))
    model = below_accelerate(trainer.model)
    learned = held(weight for weight in model.parameters() if weight.requires_grad)
    saved = learned if hasattr(model, "peft_config") else held(model.parameters())
    states = optimizer_states(getattr(trainer, "optimizer", None) or getattr(config, "optim", "adamw"))
    return {
        "steps": schedule.steps,
        "memory": {"measured": peak, "formula": None if before is None else round(before.memory.total),
                   "room": None if before is None or before.room is None else round(before.room)},
        "cpu_seconds_a_step": None if on_gpu else round(cpu, 3),
        "seconds_a_step": round(wall, 3),
        "cpu_seconds": None if on_gpu else round(cpu * schedule.steps, 1),
        "seconds": round(wall * schedule.steps, 1),
        "tokens_of_a_pass": None if before is None else before.load.tokens,
        "tokens_that_fit": None if before is None or not peak else _most_tokens(before, peak),
        "checkpoints": {"bytes": round(saved + (2.0 if states is None else states) * learned),
                        "count": _checkpoints(config, schedule.steps)},
        "model": saved,
        "free_disk": _free_disk(Path(str(config.output_dir))),
        "device": str(watch.device),
    }  # fmt: skip


def _seconds(schedule: Schedule, watch: Stopwatch, kind: int) -> float:
    """Seconds of a step of the whole run."""
    steps, optimizer = ([pair[kind] for pair in pairs] for pairs in (watch.steps, watch.optimizer))
    if schedule.of_rollout > 1:
        last = steps[-schedule.of_rollout :]
        return sum(last) / len(last)
    if schedule.of_rollout or not optimizer:  # completions are as long as they come
        return steps[-1]
    passes = max(0.0, steps[-1] - optimizer[-1]) * schedule.accumulation / min(2, schedule.accumulation)
    return passes * (schedule.mean / schedule.longest if schedule.longest else 1.0) + optimizer[-1]


def _most_tokens(plan: Any, peak: int) -> int | None:
    """Tokens of a pass for which there is room beside the rest."""
    if plan.room is None or not plan.load.tokens:
        return None
    each = (plan.memory.activations + plan.memory.holes) / plan.load.tokens
    return max(0, int(plan.load.tokens + (plan.room / MARGIN - peak) / each))


def _checkpoints(config: Any, steps: int) -> int:
    """How many checkpoints lie in the folder at the end."""
    strategy, every = (
        str(getattr(getattr(config, "save_strategy", ""), "value", "")),
        getattr(config, "save_steps", None),
    )
    if strategy == "no" or not every:
        return 0
    if strategy == "epoch":
        count = math.ceil(config.num_train_epochs)
    else:
        count = max(1, int(steps // (every if every >= 1 else max(1, every * steps))))
    limit = getattr(config, "save_total_limit", None)
    return min(count, limit) if limit else count


def _free_disk(folder: Path) -> int | None:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with suppress(OSError):
        return shutil.disk_usage(folder).free
    return None


def lines_of(found: dict[str, Any]) -> list[str]:
    """What was found, for a terminal of 80 columns."""
    memory, disk, count = found["memory"], found["checkpoints"], found["checkpoints"]["count"]
    where = "on the GPU" if found["device"].startswith("cuda") else "in main memory"
    there = f"; {size_text(memory['room'])} there" if memory["room"] else ""
    formula = f" (by formula {size_text(memory['formula'])})" if memory["formula"] else ""
    lines = [f"memory   {size_text(memory['measured'] or 0)} {where}{formula}{there}"]
    if memory["room"] and (memory["measured"] or 0) > memory["room"]:
        lines.append("         that does not fit: an adapter (--lora_rank 16), a lower --max_length")
    speed = f"{short(found['seconds_a_step'])} s a step"
    if found["cpu_seconds_a_step"] is not None:
        speed = f"{short(found['cpu_seconds_a_step'])} CPU s a step, {short(found['seconds_a_step'])} s by the clock"
    if found["steps"]:
        speed += f"; {found['steps']:,} steps: {duration(found['seconds'])}"
        if found["cpu_seconds"] is not None:
            speed += f", {short(round(found['cpu_seconds']))} CPU s"
    lines.append(f"time     {speed}, without evaluations and checkpoints")
    if found["tokens_that_fit"] is not None:
        most = found["tokens_that_fit"] // 64 * 64
        lines.append(f"passes   {found['tokens_of_a_pass']:,} tokens at most; there is room for about {most:,}")
    total = disk["bytes"] * count + found["model"]
    free = f"; {size_text(found['free_disk'])} free" if found["free_disk"] is not None else ""
    each = f"{count:,} x {size_text(disk['bytes'])} of checkpoints" if count else "no checkpoint"
    lines.append(f"disk     {each}, the model {size_text(found['model'])}{free}")
    if found["free_disk"] is not None and total > found["free_disk"]:
        lines.append("         that does not fit: --save_total_limit 1, --save_only_model True take less")
    return [part for line in lines for part in textwrap.wrap(line, COLUMNS, subsequent_indent=" " * 9)]
