"""Reward models from preference pairs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, TrainingArguments

from trl.data.tokenize import tokenize_preference
from trl.losses.loss_sum import LossSum
from trl.losses.reward import bradley_terry
from trl.models.prepare import context_length
from trl.models.scoring import rewards
from trl.trainer.configuration import as_config, processing_class_of, with_keywords
from trl.trainer.objective import ObjectiveTrainer
from trl.trainer.pair_trainer import PairCollator
from trl.trainer.preparation import dress_tokenizer, each_dataset, prepare_model, prepare_tokenizer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.statistics import compute_accuracy

SEED_COLUMNS = ("input_ids_chosen", "attention_mask_chosen", "input_ids_rejected", "attention_mask_rejected")


class RewardTrainer(ObjectiveTrainer):
    """Train a sequence classifier with one label to score chosen above rejected (Bradley-Terry).

    Rows: `chosen`/`rejected` (text or conversations, with or without `prompt`), or the tokenised columns
    `input_ids_chosen`, `attention_mask_chosen` and the same of rejected; `margin` is optional.
    """

    _tag_names = ("trl", "reward-trainer")

    def __init__(
        self,
        model: nn.Module | str | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[Any], Mapping[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        tokenizer: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        max_length: int | None = None,
        peft_config: Any = None,
        *,
        processing_class: Any = None,
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
    ):
        if args is not None and not isinstance(args, RewardConfig):
            warnings.warn("pass a `RewardConfig` in `args` instead of TrainingArguments", FutureWarning, stacklevel=2)
        if max_length is not None:
            warnings.warn("set `max_length` in the RewardConfig", FutureWarning, stacklevel=2)
            if isinstance(args, RewardConfig) and args.max_length is not None:
                raise ValueError(
                    "You cannot specify both `max_length` and `args.max_length`. Set it in the RewardConfig."
                )
        config = with_keywords(as_config(args, RewardConfig), {"max_length": max_length})
        tokenizer = dress_tokenizer(prepare_tokenizer(processing_class_of(processing_class, tokenizer), model), config)

        def prepared(given: nn.Module | str) -> nn.Module:
            kwargs = {"num_labels": 1, **(config.model_init_kwargs or {})} if isinstance(given, str) else None
            return prepare_model(
                given,
                config,
                tokenizer,
                peft_config,
                auto_class=AutoModelForSequenceClassification,
                owner=type(self).__name__,
                dropout=not config.disable_dropout,
                init_kwargs=kwargs,
            )

        model = None if model is None else prepared(model)
        limit = None if model is None else context_length(model)
        length = config.max_length or min(1024, limit or 1024)
        if limit is not None and length > limit:
            raise ValueError(f"max_length={length}: the model has {limit} positions; give at most that")

        def tokenised(dataset: Any, name: str) -> Any:
            if set(SEED_COLUMNS) <= set(getattr(dataset, "column_names", None) or ()):
                return dataset.filter(lambda row: max(map(len, (row[SEED_COLUMNS[0]], row[SEED_COLUMNS[2]]))) <= length)
            return tokenize_preference(
                dataset, tokenizer, max_length=length, num_proc=config.dataset_num_proc, name=name
            )[0]

        super().__init__(
            model=model,
            args=config,
            data_collator=PairCollator(data_collator),
            train_dataset=each_dataset(train_dataset, tokenised, "train"),
            eval_dataset=each_dataset(eval_dataset, tokenised, "eval"),
            processing_class=tokenizer,
            model_init=None if model_init is None else lambda *trial: prepared(model_init(*trial)),
            compute_metrics=compute_accuracy if compute_metrics is None else compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )

    def count(self, batch: dict[str, Any]) -> int:
        return batch["packed"].rows // 2

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossSum:
        return self._loss(self._rewards(model, batch), batch)

    def _rewards(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Rewards of chosen and rejected, [pairs, 2]."""
        return rewards(model, batch["packed"], path=None if self.args.padding_free else "padded").view(-1, 2)

    def _loss(self, rewards_P2: Tensor, batch: dict[str, Any]) -> LossSum:
        center = self.args.center_rewards_coefficient or 0.0
        return bradley_terry(rewards_P2[:, 0], rewards_P2[:, 1], batch.get("margin"), center)

    def predictions(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[LossSum, Tensor | None, Tensor | None]:
        """The probability of each side being preferred, [pairs, 2]; the label is always 0, chosen."""
        rewards_P2 = self._rewards(model, inputs)
        logits = rewards_P2.softmax(-1)
        labels = torch.zeros(len(logits), device=logits.device)
        if self.preprocess_logits_for_metrics is not None:
            logits = self.preprocess_logits_for_metrics(logits, labels)
        return self._loss(rewards_P2, inputs), logits, labels
