"""Steps of SFT, DPO or GRPO with random weights: seconds of a step, tokens/s, share of the card's peak, memory.

It runs beside this project's `trl` and beside another release of that name alike, by what both document.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from common import (
    CUDA,
    SETTINGS,
    TINY,
    Clock,
    Inside,
    attempt,
    folder,
    forward_flops,
    fresh_peak,
    model,
    peak_gib,
    record,
    text,
    tokenizer,
)
from datasets import Dataset
from transformers import TrainerCallback

import trl

METHOD, NAME = SETTINGS["method"], SETTINGS["model"]
STEPS, WARM = (3, 1) if TINY else (SETTINGS.get("steps", 8), 3)
ROWS, LENGTH, ANSWER = (2, 24, 8) if TINY else (SETTINGS["rows"], SETTINGS["length"], SETTINGS.get("answer", 0))
GROUP = 2 if TINY else 8
ROLLOUT = 2 if TINY else 4
"""optimizer steps on each rollout of GRPO: the first of them has the sampling in it, the others none"""
PEAK = 989e12
"""dense bfloat16 operations a second of an H100 or H200, from its data sheet"""


def arguments(**more: Any) -> dict[str, Any]:
    return {
        "output_dir": folder(), "report_to": "none", "max_steps": STEPS + 1, "learning_rate": 1e-6, "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "seed": 0, "bf16": CUDA, "lr_scheduler_type": "constant",
        "per_device_train_batch_size": ROWS, "gradient_checkpointing": bool(SETTINGS.get("checkpointing")),
        **SETTINGS.get("settings", {}), **more,
    }  # fmt: skip


class Watch(TrainerCallback):
    """Marks the end of each step, and looks at one more from inside."""

    def __init__(self) -> None:
        self.clock, self.peak, self.seen = Clock(), 0.0, dict[str, Any]()
        self._inside: Inside | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.mark()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != STEPS:
            return
        self.peak = peak_gib()
        if SETTINGS.get("profile", True):
            with attempt("profile"):
                self._inside = Inside()
                self._inside.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._inside is not None:
            with attempt("profile"):
                self.seen = self._inside.stop()
        elif state.global_step <= STEPS:
            self.clock.mark()


def even_words(completions: list[Any], **columns: Any) -> list[float]:
    """The share of words with an even number: cheap, and different for every completion."""
    found = [str(completion).split() for completion in completions]
    return [sum(word[-1] in "02468" for word in each) / max(1, len(each)) for each in found]


def supervised() -> tuple[Any, float, float]:
    rows = [{"text": text(LENGTH - 1, seed)} for seed in range(ROWS * (STEPS + 1))]
    config = trl.SFTConfig(**arguments(max_length=LENGTH))
    trainer = trl.SFTTrainer(
        model=model(NAME), args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
    )
    return trainer, ROWS * LENGTH, 3 * forward_flops(NAME, [(LENGTH, 0)] * ROWS, ROWS * (LENGTH - 1))


def answer(seed: int) -> str:
    return " " + text(ANSWER - 1, seed)


def preferences() -> tuple[Any, float, float]:
    rows = [
        dict(
            zip(
                ("prompt", "chosen", "rejected"), (text(LENGTH, n), answer(n + 10_000), answer(n + 20_000)), strict=True
            )
        )
        for n in range(ROWS * (STEPS + 1))
    ]
    config = trl.DPOConfig(**arguments(max_length=LENGTH + ANSWER))
    trainer = trl.DPOTrainer(
        model=model(NAME), ref_model=model(NAME), args=config, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )  # fmt: skip
    once = [(LENGTH, 0), (ANSWER, LENGTH), (ANSWER, LENGTH)] * ROWS
    return trainer, 2 * ROWS * (LENGTH + ANSWER), 4 * forward_flops(NAME, once, 2 * ROWS * ANSWER)


def groups() -> tuple[Any, float, float]:
    rows = [{"prompt": text(LENGTH, n)} for n in range(ROWS * (STEPS + 1))]
    config = trl.GRPOConfig(
        **arguments(
            per_device_train_batch_size=ROWS * GROUP, num_generations=GROUP, max_completion_length=ANSWER, beta=0.0,
            steps_per_generation=ROLLOUT,
        )
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=model(NAME),
        reward_funcs=even_words,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    once = ([(LENGTH, 0)] + [(ANSWER, LENGTH)] * GROUP) * ROWS
    return trainer, ROWS * GROUP * (LENGTH + ANSWER), 3 * forward_flops(NAME, once, ROWS * GROUP * ANSWER)


def measure() -> None:
    trainer, tokens, flops = {"sft": supervised, "dpo": preferences, "grpo": groups}[METHOD]()
    record("release", getattr(trl, "__version__", "?"))
    watch = Watch()
    trainer.add_callback(watch)
    fresh_peak()
    trainer.train()
    seconds = watch.clock.seconds()
    record("losses", [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    record("steps", [round(each, 4) for each in seconds])
    record("peak_gib", watch.peak)
    later = seconds[WARM:]
    if METHOD == "grpo":
        drawing = [
            each for number, each in enumerate(seconds) if number % ROLLOUT == 0 and number >= min(WARM, ROLLOUT)
        ]
        later = [each for number, each in enumerate(seconds) if number % ROLLOUT and number >= WARM] or later
        update = median(later)
        if drawing:
            spent = median(drawing) - update
            record("sampling", {"seconds": spent, "tokens_s": ROLLOUT * ROWS * GROUP * ANSWER / max(spent, 1e-9)})
    step = median(later)
    record(
        "step",
        {"seconds": step, "tokens_s": tokens / step, "flops": flops, "mfu": flops / step / PEAK if CUDA else None},
    )
    if watch.seen:
        record("profile", watch.seen)


measure()
