"""Reward models from preference pairs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, TrainingArguments

from trl.data.encode import Limits
from trl.data.prompt_rows import PairsJob
from trl.data.row_job import RowJob
from trl.data.tokenize import tokenize
from trl.generation.stopping import end_tokens
from trl.import_utils import lazy_names
from trl.legacy import absent
from trl.losses.loss_sum import LossSum
from trl.losses.supervised import bradley_terry
from trl.models.prepare import context_length, embedding_rows
from trl.models.scoring import label_rewards
from trl.trainer.configuration import OfflineConfig, as_config, require, with_keywords
from trl.trainer.objective import ObjectiveTrainer
from trl.trainer.pair_trainer import PairCollator
from trl.trainer.preparation import asked_length, fitting_length, label_count, label_kwargs, prepare


@dataclass
class RewardConfig(OfflineConfig):
    """`TrainingArguments` with the settings of a Bradley-Terry reward model."""

    learning_rate: float = field(default=1e-4)
    """initial learning rate"""
    max_length: int | None = field(default=None)
    """longest prompt + completion in tokens; None: 1024, or the model's context where that is shorter"""
    center_rewards_coefficient: float | None = field(default=None)
    """weight of (chosen + rejected)^2, which keeps the rewards around 0"""
    disable_dropout: bool = field(default=True)
    """train without dropout"""
    eos_token: str | None = field(default=None)
    """token that ends a completion, where it is not the tokenizer's own"""
    pad_token: str | None = field(default=None)
    """padding token, where it is not the tokenizer's own"""
    chat_template_path: str | None = field(default=None)
    """file with a Jinja chat template for the tokenizer"""

    @property
    def smooths_labels(self) -> bool:
        return False

    def token_settings(self) -> dict[str, str | None]:
        return {
            "eos_token": self.eos_token, "pad_token": self.pad_token, "chat_template_path": self.chat_template_path,
        }  # fmt: skip

    def validate(self) -> None:
        super().validate()
        require(self, "max_length", self.max_length is None or self.max_length > 1, "give a length > 1, or None")
        center = self.center_rewards_coefficient
        require(self, "center_rewards_coefficient", center is None or center >= 0, "give a weight >= 0, or None")


class RewardTrainer(ObjectiveTrainer):
    """Train a sequence classifier to score chosen above rejected (Bradley-Terry).

    Rows: `chosen`/`rejected` (text or conversations, with or without `prompt`), or the tokenised columns
    `input_ids_chosen` and `input_ids_rejected`, `chosen_ids` and `rejected_ids` (with or without `prompt_ids`), or
    `chosen_input_ids` and `rejected_input_ids`; `margin` is optional. A model has one label; with several, each label's
    loss is averaged and the reward is their mean, as in release 0.7.7.
    """

    _tag_names = ("trl", "reward-trainer")
    branches_per_row = 2

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
        quantization_config: Any = None,
    ):
        config = self._config(args, max_length)
        model, model_init, tokenizer = prepare(
            self,
            model,
            model_init,
            config,
            processing_class=processing_class,
            tokenizer=tokenizer,
            peft_config=peft_config,
            auto_class=AutoModelForSequenceClassification,
            dropout=not config.disable_dropout,
            init_kwargs=label_kwargs(config, model, 1),
            quantization_config=quantization_config,
        )
        _warn_of_labels(model)
        job = self.row_job(tokenizer, config, model)
        whole = config.eval_do_concat_batches and not config.batch_eval_metrics  # else `accuracy` is that of the loss

        def tokenised(dataset: Any, name: str) -> Any:
            return tokenize(dataset, job, name=name, num_proc=config.dataset_num_proc)[0]

        super().__init__(
            model=model,
            args=config,
            data_collator=PairCollator(data_collator),
            rows=tokenised,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            model_init=model_init,
            compute_metrics=compute_accuracy if compute_metrics is None and whole else compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )

    @staticmethod
    def row_job(tokenizer: Any, config: RewardConfig, model: nn.Module | None) -> RowJob:
        length = _length(config, model)
        return PairsJob(
            tokenizer=tokenizer,
            limits=Limits(length, asked_length=asked_length(config, length)),
            ends=end_tokens(model, tokenizer),
            embeddings=embedding_rows(model),
            needs_prompt=False,
            learn_tool_results=True,
        )

    @staticmethod
    def _config(args: TrainingArguments | None, max_length: int | None) -> RewardConfig:
        if args is not None and not isinstance(args, RewardConfig):
            warnings.warn("pass a `RewardConfig` in `args` instead of TrainingArguments", FutureWarning, stacklevel=3)
        if max_length is not None:
            warnings.warn("set `max_length` in the RewardConfig", FutureWarning, stacklevel=3)
            if isinstance(args, RewardConfig) and args.max_length is not None:
                raise ValueError(
                    "You cannot specify both `max_length` and `args.max_length`. Set it in the RewardConfig."
                )
        return with_keywords(as_config(args, RewardConfig), {"max_length": max_length})

    def count(self, batch: dict[str, Any]) -> int:
        return batch["packed"].rows // 2

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossSum:
        return self._loss(self._rewards(model, batch), batch)

    def _rewards(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Rewards of chosen and rejected by each label, [pairs, 2, labels]."""
        rewards_BC = label_rewards(model, batch["packed"])
        return rewards_BC.view(-1, 2, rewards_BC.shape[-1])

    def _loss(self, rewards_P2C: Tensor, batch: dict[str, Any]) -> LossSum:
        def loss_of(rewards_P2: Tensor) -> LossSum:
            center = self.args.center_rewards_coefficient or 0.0
            return bradley_terry(rewards_P2[:, 0], rewards_P2[:, 1], batch.get("margin"), center)

        whole = loss_of(rewards_P2C.mean(-1))
        if rewards_P2C.shape[-1] == 1:
            return whole
        return replace(whole, total=torch.stack([loss_of(one).total for one in rewards_P2C.unbind(-1)]).mean())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """With `return_outputs` also `rewards_chosen` and `rewards_rejected`, [pairs, labels] each."""
        if not return_outputs:
            return super().compute_loss(model, inputs, False, num_items_in_batch)
        rewards_P2C = self._rewards(model, inputs)
        outputs = {"rewards_chosen": rewards_P2C[:, 0], "rewards_rejected": rewards_P2C[:, 1]}
        return self._loss(rewards_P2C, inputs).mean, outputs

    def predictions(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[LossSum, Tensor | None, Tensor | None]:
        """The probability of each side being preferred, [pairs, 2]; the label is always 0, chosen."""
        rewards_P2C = self._rewards(model, inputs)
        labels = torch.zeros(len(rewards_P2C), device=rewards_P2C.device)
        return self._loss(rewards_P2C, inputs), rewards_P2C.mean(-1).softmax(-1), labels


def _warn_of_labels(model: nn.Module | None) -> None:
    if model is not None and label_count(model) != 1:
        warnings.warn(
            f"num_labels={label_count(model)}: a reward model usually has 1 (load it with num_labels=1); each label "
            "learns the pairs, and the reward is the mean over the labels"
        )


def _length(config: RewardConfig, model: nn.Module | None) -> int:
    """The longest sequence: as in the config; by default 1024, or the model's context if that is shorter."""
    limit = None if model is None else context_length(model)
    return fitting_length(config, model) or min(1024, limit or 1024)


def compute_accuracy(eval_pred: tuple[ArrayLike, ArrayLike]) -> dict[str, float]:
    """`{"accuracy"}`: how often the label is the index of the largest prediction; labels of -100 do not count.

    Predictions [B, K] with labels [B], or [B, L, K] with [B, L].
    """
    predictions, labels = (np.asarray(part) for part in eval_pred)
    counted = labels.reshape(-1) != -100
    predictions = predictions.reshape(-1, predictions.shape[-1])[counted]
    labels = labels.reshape(-1)[counted]
    equal = int((predictions[:, 0] == predictions[:, 1]).sum())
    if equal > 0:
        warnings.warn(
            f"There are {equal} out of {len(predictions)} instances where the predictions for both options are equal. "
            "As a consequence the accuracy can be misleading."
        )
    if not len(labels):
        return {"accuracy": float("nan")}
    return {"accuracy": float((np.argmax(predictions, axis=1) == labels).mean())}


__getattr__ = lazy_names(__name__, {}, absent.refuse)[0]
