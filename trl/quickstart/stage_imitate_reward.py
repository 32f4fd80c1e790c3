"""The first two stages of the quickstart, imitation and reward model, written as a user would write them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.quickstart.language_model import adapters
from trl.quickstart.progress import Progress, StageCallback
from trl.quickstart.recipe import Recipe
from trl.quickstart.results import Imitation, Preference
from trl.quickstart.reviews import Reviews, rating_pairs
from trl.reports.intervals import Interval, share_interval
from trl.rewards.reward_model import RewardModel
from trl.rewards.sentiment import sentiment

CLEAR_RATINGS = 0.5
"""least difference of the ratings in a held-out pair: with less, people do not agree on the order"""
HELDOUT_LINES = 64
"""number of lines that the imitation is measured on"""


def imitate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reviews: Reviews,
    recipe: Recipe,
    seed: int,
    scratch: Path,
    progress: Progress,
) -> tuple[PreTrainedModel, Imitation]:
    """Fine-tune on critics' lines; the adapter is merged into the weights."""
    train, heldout = ({"text": [r.text for r in part]} for part in (reviews.imitate, reviews.heldout[:HELDOUT_LINES]))
    with progress.stage("Imitate", recipe.imitation_steps) as stage:
        watch = StageCallback(stage, {"loss": "loss", "eval_loss": "held-out"})
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=str(scratch / "imitate"),
                max_steps=recipe.imitation_steps,
                per_device_train_batch_size=recipe.imitation_lines,
                per_device_eval_batch_size=2 * recipe.imitation_lines,
                learning_rate=recipe.imitation_rate,
                max_length=recipe.line_tokens,
                **_common(seed),
            ),
            train_dataset=Dataset.from_dict(train),
            eval_dataset=Dataset.from_dict(heldout),
            tokenizer=tokenizer,
            peft_config=adapters(model, recipe.lora_share),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    trained: Any = trainer.model
    return (trained.merge_and_unload() if recipe.lora_share else trained), Imitation(watch.losses, before, after)


def learn_reward(
    base: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    reviews: Reviews,
    recipe: Recipe,
    seed: int,
    scratch: Path,
    progress: Progress,
) -> tuple[RewardModel, Preference]:
    """Train a reward model on pairs of lines that people rated."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    freeze_lower(model, recipe.trained_layers)
    pairs = rating_pairs(reviews.rated, recipe.rating_gap, seed, recipe.reward_pairs)
    with progress.stage("Reward", math.ceil(len(pairs) / recipe.reward_batch)) as stage:
        watch = StageCallback(stage, {"loss": "loss", "accuracy": "accuracy"})
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(
                output_dir=str(scratch / "reward-run"),
                num_train_epochs=1,
                per_device_train_batch_size=recipe.reward_batch,
                learning_rate=recipe.reward_rate,
                max_length=2 * recipe.line_tokens,
                **_common(seed),
            ),
            train_dataset=Dataset.from_list(pairs),
            tokenizer=tokenizer,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        reward = RewardModel(model, tokenizer, max_length=2 * recipe.line_tokens)
        heldout = rating_pairs(reviews.heldout, CLEAR_RATINGS, seed, recipe.accuracy_pairs)
        accuracy = pair_accuracy(reward.raw, heldout)
        judge_accuracy = pair_accuracy(lambda texts: [sentiment(text) for text in texts], heldout)
        stage.advance(0, {"held-out accuracy": accuracy.mean})
    return reward, Preference(watch.losses, len(pairs), accuracy, judge_accuracy)


def pair_accuracy(score: Any, pairs: Sequence[dict[str, str]]) -> Interval:
    """Share of pairs whose chosen text scores higher; a tie counts half."""
    chosen, rejected = (score([pair[side] for pair in pairs]) for side in ("chosen", "rejected"))
    wins = sum((c > r) + 0.5 * (c == r) for c, r in zip(chosen, rejected, strict=True))
    return share_interval(round(wins), len(pairs))


def freeze_lower(model: PreTrainedModel, layers: int) -> None:
    """Freeze all but the top layers, the modules above them and the score head."""
    backbone = model.base_model
    stack = next(module for module in backbone.modules() if isinstance(module, torch.nn.ModuleList) and len(module) > 1)
    embeddings = model.get_input_embeddings()
    for module in (embeddings, *list(stack)[: max(0, len(stack) - layers)]):
        module.requires_grad_(False)


def _common(seed: int) -> dict[str, Any]:
    """Settings that both stages share: a short warm-up, a log at each step, no files, no trackers."""
    return {
        "lr_scheduler_type": "linear", "warmup_steps": 5, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "seed": seed, "data_seed": seed, "max_grad_norm": 1.0,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }  # fmt: skip
