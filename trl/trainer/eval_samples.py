"""Completions of evaluation prompts by the policy and its reference, as a table in Weights & Biases."""

from __future__ import annotations

import random
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from trl.generation import make_sampler
from trl.generation.sampler import SamplingParams
from trl.models.prepare import context_length

if TYPE_CHECKING:
    from trl.trainer.pair_trainer import PairTrainer


def sampled_texts(trainer: PairTrainer, model: Any, prompts: list[list[int]], seed: int) -> list[str]:
    """One completion of each prompt, up to `max_length` together, decoded."""
    limits = [limit for limit in (trainer.args.max_length, context_length(model)) if limit is not None]
    room = max(1, min(limits, default=512) - max(map(len, prompts)))
    if trainer.args.max_completion_length is not None:
        room = min(room, trainer.args.max_completion_length)
    sampler = make_sampler(model, trainer.processing_class)
    completions = sampler.sample(prompts, SamplingParams(max_new_tokens=room, seed=seed))
    return trainer.processing_class.batch_decode([group[0].ids for group in completions], skip_special_tokens=True)


def random_prompts(trainer: PairTrainer, dataset: Any) -> list[list[int]]:
    """The prompts of one random evaluation batch; of a stream, the first ones."""
    size = trainer.args.eval_batch_size
    if not hasattr(dataset, "__len__"):
        return [list(row["prompt_ids"]) for row in islice(dataset, size)]
    picked = random.Random(trainer.state.global_step).sample(range(len(dataset)), min(len(dataset), size))
    return [list(dataset[index]["prompt_ids"]) for index in picked]


def log_samples(trainer: PairTrainer, dataloader: DataLoader) -> None:
    """Log the table `game_log`: prompt, policy's completion, reference's completion (empty without a reference)."""
    prompts = random_prompts(trainer, dataloader.dataset)
    policy = sampled_texts(trainer, trainer.model, prompts, trainer.args.seed)
    reference = getattr(trainer, "reference", None)
    with nullcontext() if reference is None else reference.model() as model:
        other = [""] * len(prompts) if model is None else sampled_texts(trainer, model, prompts, trainer.args.seed)
    if not trainer.accelerator.is_main_process:
        return
    import wandb

    texts = trainer.processing_class.batch_decode(prompts, skip_special_tokens=True)
    rows = [list(row) for row in zip(texts, policy, other, strict=True)]
    table = wandb.Table(columns=["Prompt", "Policy", "Ref Model"], rows=rows)
    if wandb.run is not None:
        wandb.log({"game_log": table})
