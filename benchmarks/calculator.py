"""Learning to use a calculator: imitate a few dozen traces, most of which guess, then learn from exact answers.

OMP_NUM_THREADS=1 python benchmarks/calculator.py --out docs/results
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import plots
import torch
from characters import character_tokenizer, imitate, parameters
from datasets import Dataset

from trl import GRPOConfig, GRPOTrainer, TextEnvironment
from trl.environment.tools import SimpleCalculatorTool

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")

RESULT = re.compile(r"Result=(-?\d+\.\d+)<submit>")


def question(rng: random.Random) -> tuple[str, float]:
    a, b, operator = rng.randint(10, 99), rng.randint(10, 99), rng.choice("+-")
    return f"{a}{operator}{b}", float(a + b if operator == "+" else a - b)


def traces(rng: random.Random, count: int, with_tool: float) -> list[list[str]]:
    """Questions answered with the tool, or else with a guess."""
    told = []
    for place in range(count):
        asked, answer = question(rng)
        if place < count * with_tool:
            call = f"<request><SimpleCalculatorTool>{asked}<call>"
            told.append([f"{asked}=", call, f"{answer}<response>", f"Result={answer}<submit>"])
        else:
            told.append([f"{asked}=", f"Result={float(rng.randint(-89, 198))}<submit>"])
    return told


def exact_match(responses: list[str], answer: list[float]) -> list[float]:
    """1 for a last segment that submits the right answer."""
    found = [RESULT.search(response) for response in responses]
    return [float(match is not None and float(match[1]) == right) for match, right in zip(found, answer, strict=True)]


class Curves:
    """Reward and tool use of every rollout."""

    def __init__(self) -> None:
        self.reward: list[float] = []
        self.tool_use: list[float] = []

    def __call__(self, responses: list[str], answer: list[float]) -> list[float]:
        rewards = exact_match(responses, answer)
        self.reward.append(sum(rewards) / len(rewards))
        return rewards


class Watched(TextEnvironment):
    """Counts which episodes used the tool without an error."""

    def compute_reward(self, histories, **columns):
        used = ["<response>" in h.text and "error" not in h.text for h in histories]
        self.reward_fn.tool_use.append(sum(used) / len(used))
        return super().compute_reward(histories, **columns)


def one_run(seed: int, arguments: argparse.Namespace) -> dict[str, object]:
    started, rng = time.process_time(), random.Random(seed)
    tokenizer = character_tokenizer(["<SimpleCalculatorTool>", "Result="])
    model = imitate(tokenizer, traces(rng, arguments.traces, arguments.with_tool), seed, arguments.imitation_steps)
    imitated, curves = time.process_time(), Curves()
    questions = [question(rng) for _ in range(4096)]
    rows = Dataset.from_list([{"prompt": f"{asked}=", "answer": answer} for asked, answer in questions])
    environment = Watched(None, tokenizer, [SimpleCalculatorTool()], curves, max_turns=2)
    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch, per_device_train_batch_size=64, gradient_accumulation_steps=arguments.size // 64,
            num_generations=8, max_steps=arguments.steps, learning_rate=arguments.learning_rate,
            lr_scheduler_type="linear", max_completion_length=48, report_to=[], save_strategy="no",
            save_rollouts=False, logging_steps=10, disable_tqdm=True, seed=seed,
        )  # fmt: skip
        GRPOTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer, environment=environment).train()
    done = time.process_time()
    return {
        "seed": seed, "parameters": parameters(model), "reward": curves.reward, "tool_use": curves.tool_use,
        "cpu_seconds": {"imitation": imitated - started, "reinforcement": done - imitated},
    }  # fmt: skip


def plot(results: list[dict], path: Path) -> None:
    colours = plots.by_seed([f"seed {result['seed']}" for result in results])
    panels = [
        plots.lines(title, {f"seed {result['seed']}": result[name] for result in results}, colours, (0, 1.02))
        for name, title in (("reward", "Reward"), ("tool_use", "Episodes that call the tool"))
    ]
    plots.write(path, panels, 2, colours, plots.RAW.format(plots.WINDOW))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--size", type=int, default=128, help="episodes of a step")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--traces", type=int, default=60)
    parser.add_argument("--with-tool", type=float, default=0.5, help="share of the traces that call the tool")
    parser.add_argument("--imitation-steps", type=int, default=200)
    arguments = parser.parse_args()
    results = []
    for seed in arguments.seeds:
        results.append(one_run(seed, arguments))
        shown = {"first": sum(results[-1]["reward"][:3]) / 3, "last": sum(results[-1]["reward"][-5:]) / 5}
        shown |= {"tool_first": results[-1]["tool_use"][0], "tool_last": results[-1]["tool_use"][-1]}
        print({"seed": seed, **shown, **results[-1]["cpu_seconds"]}, flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "calculator.json").write_text(json.dumps(results))
    plot(results, arguments.out / "calculator.svg")


if __name__ == "__main__":
    main()
