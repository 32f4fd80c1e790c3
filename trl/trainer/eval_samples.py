"""Completions of an evaluation batch by the policy and its reference, as a table in Weights & Biases."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from trl.generation import make_sampler
from trl.generation.sampler import SamplingParams

if TYPE_CHECKING:
    from trl.trainer.dpo_trainer import DPOTrainer


def sampled_texts(trainer: DPOTrainer, model: Any, prompts: list[list[int]], seed: int) -> list[str]:
    """One completion of each prompt, decoded."""
    longest = max(map(len, prompts))
    params = SamplingParams(max_new_tokens=max(1, (trainer.args.max_length or 512) - longest), seed=seed)
    sampler = make_sampler(model, trainer.processing_class)
    completions = sampler.sample(prompts, params)
    return trainer.processing_class.batch_decode([group[0].ids for group in completions], skip_special_tokens=True)


def log_samples(trainer: DPOTrainer, dataloader: DataLoader) -> None:
    """Log the table `game_log`: prompt, policy's completion, reference's completion."""
    import wandb

    rows = list(dataloader.dataset)
    chosen = random.Random(trainer.state.global_step).sample(rows, min(len(rows), trainer.args.eval_batch_size))
    prompts = [list(row["prompt_ids"]) for row in chosen]
    policy = sampled_texts(trainer, trainer.model, prompts, trainer.args.seed)
    with trainer.reference.model() as reference:
        other = [""] * len(prompts)
        if reference is not None:
            other = sampled_texts(trainer, reference, prompts, trainer.args.seed)
    texts = trainer.processing_class.batch_decode(prompts, skip_special_tokens=True)
    table = wandb.Table(
        columns=["Prompt", "Policy", "Ref Model"], rows=[list(r) for r in zip(texts, policy, other, strict=True)]
    )
    if wandb.run is not None:
        wandb.log({"game_log": table})
