"""A tiny vision-language model learns scikit-learn's real digits, from nothing: SFT reads them, GRPO compares two, DPO
prefers the right reading. Prints and plots what held-out pictures say, by the model's own plain call.

OMP_NUM_THREADS=1 python benchmarks/vision_digits.py --out docs/results
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import plots
import torch
from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    TrainerCallback,
)  # fmt: skip

from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, set_seed

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")

QUIET: dict[str, Any] = {"report_to": [], "save_strategy": "no", "disable_tqdm": True}
SIZE, PATCH = 8, 4
"""pixels of a side of a digit, and of a patch: a picture has four tokens"""
READ, COMPARE = "which digit ?", "which is larger , the first or the second ?"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def digits_processor() -> LlavaProcessor:
    """LLaVA's own processor over words apart by blanks and pictures of 8 x 8 pixels."""
    marks = ["<pad>", "<end>", "<image>", "<user>", "<assistant>", "<unk>"]
    names = dict.fromkeys([*marks, *map(str, range(10)), *READ.split(), *COMPARE.split()])
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", model_max_length=128
    )
    images = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="full", chat_template=TEMPLATE
    )


def digits_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """165,000 weights: two layers of SigLIP that see, and two of Llama that answer."""
    tokenizer, wide = processor.tokenizer, {"hidden_size": 64, "intermediate_size": 128}
    shape = {**wide, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        "model_type": "llama", **shape, "vocab_size": len(tokenizer), "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
    }  # fmt: skip
    sight = {
        "model_type": "siglip_vision_model", **shape, "image_size": SIZE, "patch_size": PATCH, "vision_use_head": False
    }  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=sight, image_token_index=processor.image_token_id,
        image_seq_length=(SIZE // PATCH) ** 2, vision_feature_select_strategy="full", vision_feature_layer=-1,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


# -- rows -------------------------------------------------------------------------------------


class Digits:
    """Pictures with their digits: 1,297 that are trained on, and 500 that are not."""

    def __init__(self) -> None:
        found = load_digits()
        order = np.random.default_rng(0).permutation(len(found.target))
        self.labels = [int(label) for label in found.target[order]]
        self.pictures = [
            Image.fromarray((own * 255 / 16).astype(np.uint8)).convert("RGB") for own in found.images[order]
        ]
        self.held_out, self.known = range(500), range(500, len(order))

    def reading(self, place: int) -> dict[str, Any]:
        """A picture and the digit on it."""
        return {**asked(READ, [self.pictures[place]]), "solution": str(self.labels[place])}

    def comparison(self, first: int, second: int) -> dict[str, Any]:
        """Two pictures of different digits, and which of them is larger."""
        larger = "first" if self.labels[first] > self.labels[second] else "second"
        return {**asked(COMPARE, [self.pictures[first], self.pictures[second]]), "solution": larger}

    def comparisons(self, places: Sequence[int], count: int, seed: int) -> list[dict[str, Any]]:
        """So many pairs of pictures of different digits."""
        rng, made = random.Random(seed), []
        while len(made) < count:
            first, second = rng.sample(places, 2)
            if self.labels[first] != self.labels[second]:
                made.append(self.comparison(first, second))
        return made


def asked(question: str, pictures: list[Image.Image]) -> dict[str, Any]:
    """A prompt with its pictures before the question."""
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
    return {"prompt": [{"role": "user", "content": content}], "images": pictures}


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def supervised(rows: Sequence[dict[str, Any]]) -> Dataset:
    return Dataset.from_list([{**row, "completion": said(row["solution"])} for row in rows]).remove_columns("solution")


def preferences(rows: Sequence[dict[str, Any]]) -> Dataset:
    """The right digit over each of the others."""
    made = []
    for row in rows:
        right = row["solution"]
        for wrong in (str(digit) for digit in range(10) if str(digit) != right):
            made.append({**row, "chosen": said(right), "rejected": said(wrong)})
    return Dataset.from_list(made).remove_columns("solution")


# -- what is measured -------------------------------------------------------------------------


@torch.no_grad()
def measure(model: torch.nn.Module, processor: LlavaProcessor, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Rows of one question, by transformers alone: how often the likeliest word is right, and how likely right is."""
    text = processor.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True, tokenize=False)
    pictures = [row["images"] for row in rows]
    inputs = processor(text=[text] * len(rows), images=pictures, return_tensors="pt")
    right = processor.tokenizer.convert_tokens_to_ids([row["solution"] for row in rows])
    was_training = model.training
    logps = model.eval()(**inputs).logits[:, -1].log_softmax(-1)
    model.train(was_training)
    exact = (logps.argmax(-1) == torch.tensor(right)).float().mean().item()
    likely = logps.exp()[torch.arange(len(rows)), right].mean().item()
    return {"right": round(exact, 4), "likely": round(likely, 4)}


class Watch(TrainerCallback):
    """Measures held-out rows before training and after so many steps each."""

    def __init__(self, every: int, measured: Callable[[Any], dict[str, float]]) -> None:
        self.every, self.measured = every, measured
        self.curve: list[dict[str, float]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.curve.append({"step": 0, **self.measured(model)})

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step % self.every == 0:
            self.curve.append({"step": state.global_step, **self.measured(model)})


# -- the three tasks --------------------------------------------------------------------------


class Run:
    """One seed: its model, its rows, and the trainings it goes through."""

    def __init__(self, seed: int, digits: Digits) -> None:
        self.seed, self.digits, self.processor = seed, digits, digits_processor()
        self.known = [digits.reading(place) for place in digits.known]
        self.readings = [digits.reading(place) for place in digits.held_out]
        self.comparisons = digits.comparisons(digits.held_out, 500, seed=0)
        set_seed(seed)
        self.model = digits_model(self.processor)

    def imitate(self, rows: Sequence[dict[str, Any]], steps: int, schedule: str = "cosine") -> list[dict[str, float]]:
        """SFT of answers; returns the held-out readings as they went."""
        watch = Watch(20, lambda model: measure(model, self.processor, self.readings))
        settings = SFTConfig(
            scratch(), per_device_train_batch_size=64, max_steps=steps, learning_rate=2e-3, warmup_steps=20,
            lr_scheduler_type=schedule, logging_strategy="no", seed=self.seed, **QUIET,
        )  # fmt: skip
        trainer = SFTTrainer(self.model, settings, train_dataset=supervised(rows), processing_class=self.processor)
        trainer.add_callback(watch)
        trainer.train()
        return watch.curve

    def sft(self, steps: int) -> dict[str, Any]:
        curve = self.imitate(self.known, steps)
        return {"curve": curve, "after": {"readings": curve[-1]}}

    def grpo(self, imitated: int, steps: int, learning_rate: float) -> dict[str, Any]:
        """From a model that reads and compares badly; nothing but the reward says which digit is larger."""
        rows = self.digits.comparisons(self.digits.known, 4000, self.seed)
        mixed = random.Random(self.seed).sample(self.known + rows[: len(self.known)], 2 * len(self.known))
        self.imitate(mixed, imitated, "constant_with_warmup")
        before = self.both()
        watch = Watch(20, lambda model: measure(model, self.processor, self.comparisons))
        settings = GRPOConfig(
            scratch(), per_device_train_batch_size=128, num_generations=8, max_steps=steps, max_completion_length=4,
            learning_rate=learning_rate, lr_scheduler_type="linear", loss_type="dr_grpo", save_rollouts=False,
            logging_steps=1, seed=self.seed, **QUIET,
        )  # fmt: skip
        trainer = GRPOTrainer(
            self.model, "exact_match", settings, Dataset.from_list(rows), processing_class=self.processor
        )
        trainer.add_callback(watch)
        trainer.train()
        rewards = [round(row["reward"], 4) for row in trainer.state.log_history if "reward" in row]
        return {"before": before, "after": self.both(), "curve": watch.curve, "rewards": rewards}

    def dpo(self, imitated: int, steps: int, learning_rate: float, beta: float) -> dict[str, Any]:
        """From a model that reads badly; the pairs say what a picture is and what it is not."""
        self.imitate(self.known, imitated, "constant_with_warmup")
        before = self.both()
        watch = Watch(20, lambda model: measure(model, self.processor, self.readings))
        settings = DPOConfig(
            scratch(), per_device_train_batch_size=64, per_device_eval_batch_size=100, max_steps=steps, beta=beta,
            learning_rate=learning_rate, lr_scheduler_type="linear", logging_strategy="no", seed=self.seed, **QUIET,
        )  # fmt: skip
        trainer = DPOTrainer(
            self.model, args=settings, train_dataset=preferences(self.known),
            eval_dataset=preferences(self.readings), processing_class=self.processor,
        )  # fmt: skip
        trainer.add_callback(watch)
        trainer.train()
        found = trainer.evaluate()
        pairs = {name: round(found[f"eval_rewards/{name}"], 4) for name in ("accuracies", "margins")}
        return {"before": before, "after": {**self.both(), "pairs": pairs}, "curve": watch.curve}

    def both(self) -> dict[str, dict[str, float]]:
        """What held-out pictures say of reading and of comparing."""
        return {name: measure(self.model, self.processor, getattr(self, name)) for name in ("readings", "comparisons")}


def scratch() -> str:
    return tempfile.mkdtemp(prefix="digits-")


JOBS: dict[str, dict[str, Any]] = {
    "sft": {"steps": 300},
    "grpo": {"imitated": 120, "steps": 600, "learning_rate": 5e-4},
    "dpo": {"imitated": 30, "steps": 500, "learning_rate": 7e-4, "beta": 0.1},
}
"""the trainings and their numbers"""


def one_run(job: str, seed: int, digits: Digits) -> dict[str, Any]:
    started = time.process_time()
    found = getattr(Run(seed, digits), job)(**JOBS[job])
    return {"job": job, "seed": seed, **found, "cpu_seconds": round(time.process_time() - started, 1)}


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Held-out answers of every training, a line for each seed."""
    titles = {"sft": "SFT: the digit", "grpo": "GRPO: the larger of two", "dpo": "DPO: the digit"}
    seeds = plots.by_seed([f"seed {seed}" for seed in dict.fromkeys(result["seed"] for result in results)])
    panels = []
    for job, title in titles.items():
        own = [result for result in results if result["job"] == job]
        if not own:
            continue
        curves = {f"seed {result['seed']}": [point["right"] for point in result["curve"]] for result in own}
        every = int(own[0]["curve"][1]["step"])
        panels.append(
            plots.lines(title, curves, seeds, (0, 1.02), window=1, label=f"measured before, then every {every} steps")
        )
    plots.write(path, panels, 3, seeds, "500 held-out pictures or pairs, by transformers alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--jobs", choices=list(JOBS), nargs="+", default=list(JOBS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    results, digits = [], Digits()
    for job in arguments.jobs:
        for seed in arguments.seeds:
            results.append(one_run(job, seed, digits))
            short = {key: value for key, value in results[-1].items() if key not in ("curve", "rewards")}
            print(json.dumps(short), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "vision_digits.json").write_text(json.dumps(results))
    plot(results, arguments.out / "vision_digits.svg")


if __name__ == "__main__":
    main()
