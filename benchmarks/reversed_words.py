"""Spelling words backward: a short imitation, then GRPO on exact answers. Prints and plots both.

OMP_NUM_THREADS=1 python benchmarks/reversed_words.py --out docs/results
"""

from __future__ import annotations

import argparse
import json
import os
import random
import string
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import plots
import torch
from characters import character_model, character_tokenizer
from datasets import Dataset
from transformers import TrainerCallback

from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, set_seed
from trl.generation.local import LocalSampler
from trl.generation.sampler import SamplingParams

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")

QUIET = {"report_to": [], "save_strategy": "no", "disable_tqdm": True}


def words(count: int, rng: random.Random) -> list[str]:
    """Distinct words of 4 to 6 random letters."""
    made: dict[str, None] = {}
    while len(made) < count:
        made["".join(rng.choices(string.ascii_lowercase, k=rng.randint(4, 6)))] = None
    return list(made)


def letters_in_place(completions: list[str], solution: list[str], **columns: object) -> list[float]:
    """Share of the letters that stand where they should; letters too many count as wrong."""
    pairs = zip(completions, solution, strict=True)
    return [sum(map(str.__eq__, text, right)) / max(len(text), len(right)) for text, right in pairs]


class UntilShare(TrainerCallback):
    """Ends the imitation once this share of some of its own words comes out right."""

    def __init__(self, share: float, words: list[str], tokenizer):
        self.share, self.words, self.tokenizer = share, words, tokenizer

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step % 5 == 0:
            model.eval()  # the next step switches back
            control.should_training_stop = exact(model, self.tokenizer, self.words, 1.0) >= self.share


def imitate(tokenizer, known: list[str], seed: int, share: float) -> tuple[torch.nn.Module, int]:
    """A new model that spells about this share of words backward, and the steps that it took."""
    set_seed(seed)
    model = character_model(tokenizer)
    rows = Dataset.from_list([{"prompt": f"{word}=", "completion": word[::-1]} for word in known])
    with tempfile.TemporaryDirectory() as scratch:
        config = SFTConfig(
            output_dir=scratch, per_device_train_batch_size=64, max_steps=400, learning_rate=2e-3, seed=seed,
            logging_strategy="no", lr_scheduler_type="constant", **QUIET,
        )  # fmt: skip
        trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
        trainer.add_callback(UntilShare(share, known[:250], tokenizer))
        trainer.train()
    return model, trainer.state.global_step


def exact(model: torch.nn.Module, tokenizer, unseen: list[str], temperature: float) -> float:
    """Share of the words that are spelt backward to the letter."""
    params = SamplingParams(max_new_tokens=8, temperature=temperature, seed=0)
    groups = LocalSampler(model, tokenizer).sample([tokenizer(f"{word}=")["input_ids"] for word in unseen], params)
    texts = tokenizer.batch_decode([group[0].ids for group in groups], skip_special_tokens=True)
    return sum(text == word[::-1] for text, word in zip(texts, unseen, strict=True)) / len(unseen)


def one_run(seed: int, arguments: argparse.Namespace) -> dict[str, object]:
    started, tokenizer = time.process_time(), character_tokenizer()
    every = words(6500, random.Random(seed))
    known, unseen = every[500:], every[:500]
    model, imitation_steps = imitate(tokenizer, known, seed, arguments.share)
    before = {"sampled": exact(model, tokenizer, unseen, 1.0), "greedy": exact(model, tokenizer, unseen, 0.0)}
    imitated = time.process_time()
    rows = Dataset.from_list([{"prompt": f"{word}=", "solution": word[::-1]} for word in known])
    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch, per_device_train_batch_size=arguments.size, num_generations=8, seed=seed,
            max_steps=arguments.steps, max_completion_length=8, learning_rate=arguments.learning_rate,
            loss_type="dr_grpo", reward_weights=[1.0, 0.5], lr_scheduler_type="linear", entropy_coef=0.002,
            save_rollouts=False, logging_steps=1, **QUIET,
        )  # fmt: skip
        trainer = GRPOTrainer(model, ["exact_match", letters_in_place], config, rows, processing_class=tokenizer)
        trainer.train()
    done = time.process_time()
    return {
        "seed": seed, "imitation_steps": imitation_steps, "before": before,
        "after": {"sampled": exact(model, tokenizer, unseen, 1.0), "greedy": exact(model, tokenizer, unseen, 0.0)},
        "curve": [row["rewards/exact_match_reward/mean"] for row in trainer.state.log_history if "reward" in row],
        "cpu_seconds": {"imitation": imitated - started, "grpo": done - imitated},
    }  # fmt: skip


def plot(results: list[dict], path: Path) -> None:
    curves = {f"seed {result['seed']}": result["curve"] for result in results}
    colours, title = plots.by_seed(list(curves)), "Words spelt backward: exact among a step's samples"
    panel = plots.lines(title, curves, colours, (0, 1.02), [plots.Mark(0.9, "0.9", below=True)], window=20, width=520)
    plots.write(path, [panel], 1, colours, plots.RAW.format(20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--size", type=int, default=128, help="completions of a step")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--share", type=float, default=0.1, help="of words right, at which imitation ends")
    arguments = parser.parse_args()
    results = []
    for seed in arguments.seeds:
        results.append(one_run(seed, arguments))
        print({key: value for key, value in results[-1].items() if key != "curve"}, flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "reversed_words.json").write_text(json.dumps(results))
    plot(results, arguments.out / "reversed_words.svg")


if __name__ == "__main__":
    main()
