"""Guess a number by 'higher' and 'lower': a game of several turns with a known ceiling, learned from middling players.

A number from 1 to 7 is guessed in at most 3 turns. Halving the range always finds it, and nothing needs fewer turns:
3 guesses tell at most 1 + 2 + 4 numbers apart. The score is the share of games in which it is found, over that ceiling.

OMP_NUM_THREADS=1 python benchmarks/guess_number.py --out docs/results
"""

from __future__ import annotations

import argparse
import json
import os
import random
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
from trl.environment.turns import SampledTurns
from trl.generation import make_sampler
from trl.generation.sampler import SamplingParams

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")

HIGHEST, TURNS = 7, 3
CEILING = (2**TURNS - 1) / HIGHEST


class GuessNumber:
    """Knows a number; found: a reward of 1."""

    def __init__(self) -> None:
        self.reward, self.done = 0.0, False

    def reset(self, number: int) -> None:
        self.number = number

    def guess(self, text: str) -> str:
        guess = int(text)
        if guess == self.number:
            self.reward, self.done = 1.0, True
            return "found"
        return "higher" if guess < self.number else "lower"


def trace(rng: random.Random, heed: float) -> list[str]:
    """Random guesses; a share `heed` of them is among the numbers that the answers so far leave."""
    number, lowest, highest = rng.randint(1, HIGHEST), 1, HIGHEST
    pieces = ["?"]
    for _ in range(TURNS):
        game = GuessNumber()
        game.reset(number)
        guess = rng.randint(lowest, highest) if rng.random() < heed else rng.randint(1, HIGHEST)
        answer = game.guess(str(guess))
        pieces += [f"<request><guess>{guess}<call>", f"{answer}<response>"]
        if game.done:
            break
        lowest = max(lowest, guess + 1) if answer == "higher" else lowest
        highest = min(highest, guess - 1) if answer == "lower" else highest
    return pieces


def uniform() -> float:
    """How often random guesses find it."""
    return 1 - (1 - 1 / HIGHEST) ** TURNS


def game() -> TextEnvironment:
    return TextEnvironment(environment_factory=GuessNumber, max_turns=TURNS)


def score(model: torch.nn.Module, tokenizer: object, seed: int, each: int = 20) -> float:
    """The share of the ceiling, over `each` games for every number."""
    environment = game()
    environment.tokenizer = tokenizer
    rows = [{"prompt_ids": tokenizer("?")["input_ids"], "number": n + 1} for n in range(HIGHEST) for _ in range(each)]
    turns = SampledTurns(make_sampler(model, tokenizer), SamplingParams(max_new_tokens=64), 256)
    rollout = environment.rollout(rows, turns, range(seed * 2**20, seed * 2**20 + len(rows)), 64)
    return sum(rollout.rewards) / len(rows) / CEILING


def one_run(seed: int, arguments: argparse.Namespace) -> dict[str, object]:
    started, rng = time.process_time(), random.Random(seed)
    tokenizer = character_tokenizer(["<guess>", "higher", "lower", "found", *(str(n) for n in range(10, HIGHEST + 1))])
    traces = [trace(rng, arguments.heed) for _ in range(arguments.traces)]
    model = imitate(
        tokenizer, traces, seed, arguments.imitation_steps, learning_rate=2e-3, weight_decay=0.1, width=64,
        spread=0.08, dropout=0.0,
    )  # fmt: skip
    imitated, first = time.process_time(), score(model, tokenizer, seed)
    rows = Dataset.from_list([{"prompt": "?", "number": number} for number in range(1, HIGHEST + 1)])
    curve: list[float] = []

    class Watched(TextEnvironment):
        def compute_reward(self, histories, **columns):
            super().compute_reward(histories, **columns)
            curve.append(sum(history.reward for history in histories) / len(histories) / CEILING)
            return histories

    environment = Watched(environment_factory=GuessNumber, max_turns=TURNS)
    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch, per_device_train_batch_size=32 * HIGHEST, num_generations=32, max_steps=arguments.steps,
            learning_rate=arguments.learning_rate, lr_scheduler_type="constant", max_completion_length=64,
            scale_rewards="none", report_to=[], save_strategy="no", save_rollouts=False,
            logging_steps=50, disable_tqdm=True, seed=seed,
        )  # fmt: skip
        GRPOTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer, environment=environment).train()
    done = time.process_time()
    return {
        "seed": seed, "parameters": parameters(model), "curve": curve, "imitated": first,
        "final": score(model, tokenizer, seed + 1, each=60), "uniform": uniform() / CEILING,
        "cpu_seconds": {"imitation": imitated - started, "reinforcement": done - imitated},
    }  # fmt: skip


def plot(results: list[dict], path: Path) -> None:
    curves = {f"seed {result['seed']}": result["curve"] for result in results}
    colours, marks = (
        plots.by_seed(list(curves)),
        [plots.Mark(1, "ceiling"), plots.Mark(results[0]["uniform"], "at random")],
    )
    panel = plots.lines("Guess a number: share of the ceiling", curves, colours, (0, 1.08), marks, width=520)
    plots.write(path, [panel], 1, colours, plots.RAW.format(plots.WINDOW))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--traces", type=int, default=500)
    parser.add_argument("--imitation-steps", type=int, default=200)
    parser.add_argument("--heed", type=float, default=0.5)
    arguments = parser.parse_args()
    results = []
    for seed in arguments.seeds:
        results.append(one_run(seed, arguments))
        print({key: value for key, value in results[-1].items() if key != "curve"}, flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "guess_number.json").write_text(json.dumps(results))
    plot(results, arguments.out / "guess_number.svg")


if __name__ == "__main__":
    main()
