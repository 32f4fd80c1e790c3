"""What the jobs with SmolLM2-135M-Instruct share: the model with LoRA, GRPO's settings, command line and curves."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from benchmarks import plots
from trl import GRPOConfig, GRPOTrainer
from trl.quickstart.assets import SMOLLM2, fetch

Rewards = Sequence[Callable[..., list[float]]]


def arguments(about: str, argv: Sequence[str] | None, **defaults: Any) -> argparse.Namespace:
    """The command line that both jobs have; `defaults` are the settings that differ."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--model", help="another model's folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=5, help="prompts of a step")
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--tokens", type=int, help="most tokens after a prompt")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--beta", type=float, default=0.0, help="weight of the KL")
    parser.add_argument("--held-out", type=int, default=40, help="rows that are asked before and after")
    parser.add_argument("--last-layers", type=int, default=12, help="layers that get an adapter")
    parser.set_defaults(**defaults)
    return parser.parse_args(argv)


def learn(asked: argparse.Namespace, rows: list[dict[str, Any]], rewards: Rewards, template: str | None = None,
          **more: Any) -> None:  # fmt: skip
    """Train on the rows after the first `held_out`; beside what the trainer writes, the folder gets `report.json`."""
    torch.set_num_threads(1)
    if asked.out.exists():
        raise SystemExit(f"--out: {asked.out} is there already; give a new folder")
    folder = asked.model or str(fetch(SMOLLM2, print))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template or tokenizer.chat_template
    config = GRPOConfig(
        output_dir=str(asked.out), max_steps=asked.steps, per_device_train_batch_size=asked.prompts * asked.group,
        per_device_eval_batch_size=asked.held_out, num_generations=asked.group, num_generations_eval=1,
        max_completion_length=asked.tokens, learning_rate=asked.learning_rate, beta=asked.beta,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, seed=asked.seed,
    )  # fmt: skip
    held_out, train = Dataset.from_list(rows[: asked.held_out]), Dataset.from_list(rows[asked.held_out :])
    trainer = GRPOTrainer(
        folder, rewards, config, train, held_out, tokenizer, peft_config=last_layers(folder, asked.last_layers), **more
    )
    before = trainer.evaluate()
    started, clock = time.process_time(), time.time()
    trainer.train()
    spent, waited = time.process_time() - started, time.time() - clock
    after = trainer.evaluate()
    report = {
        "settings": {name: str(value) if name == "out" else value for name, value in vars(asked).items()},
        "before": before, "after": after, "cpu_seconds": round(spent), "wall_seconds": round(waited),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }  # fmt: skip
    (asked.out / "report.json").write_text(json.dumps(report, indent=1))
    show(asked.out, report)


def last_layers(folder: str, count: int) -> LoraConfig:
    """LoRA on the last layers alone: the gradient need not go down the others."""
    layers = json.loads((Path(folder) / "config.json").read_text())["num_hidden_layers"]
    chosen = list(range(max(layers - count, 0), layers))
    modules = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    return LoraConfig(r=16, lora_alpha=32, target_modules=modules, layers_to_transform=chosen, task_type="CAUSAL_LM")


def curve_of(run: Path) -> list[dict[str, float]]:
    """The rewards of each step."""
    logs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key.split("/")[1]: row[key] for key in row if key.startswith("rewards/") and key.endswith("/mean")}
        for row in logs
        if "loss" in row
    ]


def ends(curve: list[dict[str, float]], name: str) -> tuple[float, float]:
    """A reward's mean over the first 5 steps and over the last 5."""
    values = [row[name] for row in curve]
    return fmean(values[:5]), fmean(values[-5:])


def show(out: Path, report: dict[str, Any]) -> None:
    """Print the rewards of the first and the last 5 steps and of the held-out rows, and some completions."""
    curve = curve_of(out)
    for name in curve[0]:
        first, last = ends(curve, name)
        held_out = " -> ".join(f"{report[when][f'eval_rewards/{name}/mean']:.2f}" for when in ("before", "after"))
        print(f"{name}: {first:.2f} -> {last:.2f}; held out: {held_out}")
    print({name: report[name] for name in ("cpu_seconds", "wall_seconds", "peak_mb")})
    told = load_dataset("parquet", data_files=f"{out}/rollouts/*.parquet", split="train")
    for row in [*told.select(range(3)), *told.select(range(len(told) - 3, len(told)))]:
        print(f"step {row['step']}: {row['completion']!r}")


def gather(runs: Sequence[Path], path: Path) -> None:
    """The curves of several runs in one file, and their chart beside it: a panel for a reward, a line for a run."""
    with path.with_suffix(".jsonl").open("w") as file:
        for run in runs:
            for step, row in enumerate(curve_of(run), 1):
                rewards = {name: round(value, 4) for name, value in row.items()}
                file.write(json.dumps({"run": run.name, "step": step, **rewards}) + "\n")
    draw(path.with_suffix(".jsonl"), path.with_suffix(".svg"))


def draw(found: Path, path: Path) -> None:
    """The chart of a file of curves."""
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("run", "step")]
    colours = plots.by_seed(list(dict.fromkeys(f"seed {row['run'].rsplit('-', 1)[-1]}" for row in rows)))
    panels = []
    for name in names:
        job = next(row["run"].rsplit("-", 1)[0] for row in rows if name in row)
        curves = {
            seed: [row[name] for row in rows if row["run"] == f"{job}-{seed.removeprefix('seed ')}" and name in row]
            for seed in colours
        }
        title = f"{job}: {name.replace('_', ' ')}"
        panels.append(plots.lines(title, curves, colours, (0, 1.02), window=3))
    plots.write(path, panels, 3, colours, f"mean reward of a step; {plots.RAW.format(3)}")


if __name__ == "__main__":  # python -m benchmarks.smollm2 docs/results/real_words RUN...
    gather([Path(run) for run in sys.argv[2:]], Path(sys.argv[1]))
