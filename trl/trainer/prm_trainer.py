"""Process reward models: a label for each step of a solution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, TrainingArguments

from trl.data.encode import Limits
from trl.data.packing import pack
from trl.data.prompt_rows import StepwiseJob
from trl.data.records import Batch, Branch, TokenTree
from trl.data.tokenize import tokenize
from trl.generation.stopping import end_tokens
from trl.losses.loss_sum import LossSum
from trl.losses.supervised import stepwise_cross_entropy
from trl.models.prepare import embedding_rows
from trl.models.scoring import scores_at
from trl.trainer.configuration import OfflineConfig, as_config, require
from trl.trainer.objective import ObjectiveTrainer
from trl.trainer.preparation import (
    asked_length,
    fitting_length,
    label_count,
    label_kwargs,
    prepare,
    refuse_collator,
)
from trl.trainer.reward_trainer import compute_accuracy


@dataclass
class PRMConfig(OfflineConfig):
    """`TrainingArguments` with the settings of a process reward model."""

    learning_rate: float = field(default=1e-5)
    """initial learning rate"""
    max_length: int | None = field(default=1024)
    """longest prompt + steps in tokens; None: never cut"""
    max_prompt_length: int | None = field(default=512)
    """longest prompt in tokens; None: never cut"""
    max_completion_length: int | None = field(default=None)
    """longest run of steps in tokens; None: never cut"""
    disable_dropout: bool = field(default=True)
    """train without dropout"""
    step_separator: str = field(default="\n")
    """text after each step; the label is read at its last token"""
    train_on_last_step_only: bool = field(default=False)
    """learn the last step's label only: an outcome reward model"""

    def validate(self) -> None:
        super().validate()
        for name in ("max_length", "max_prompt_length", "max_completion_length"):
            value = getattr(self, name)
            require(self, name, value is None or value > 0, "give a length > 0, or None")
        require(self, "step_separator", bool(self.step_separator), "give a text that ends a step")


class StepCollator:
    """Packs tokenised rows, and lists the packed index and the label of each step's last token."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        packed = pack([TokenTree([], [Branch(row["input_ids"])]) for row in rows])
        index, of_row, labels, start = [], [], [], 0
        for number, row in enumerate(rows):
            for offset, label in enumerate(row["step_labels"]):
                if label != -100:
                    index.append(start + offset)
                    of_row.append(number)
                    labels.append(label)
            start += len(row["input_ids"])
        columns = {"step_index": index, "step_row": of_row, "step_label": labels}
        return Batch(packed=packed, **{name: torch.tensor(value, dtype=torch.long) for name, value in columns.items()})


class PRMTrainer(ObjectiveTrainer):
    """Train a token classifier with two labels to judge each step of a solution (arXiv:2211.14275, arXiv:2305.20050).

    Rows: `prompt`, `completions` (a text a step), `labels` (true = the step is right); or tokenised ones: `input_ids`
    with `labels` of 0, 1 or -100 for each token. Evaluation logs `eval_accuracy` over the labelled steps.
    """

    _tag_names = ("trl", "prm")

    def __init__(
        self,
        model: nn.Module | str | None = None,
        args: TrainingArguments | None = None,
        data_collator: None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        *,
        peft_config: Any = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ):
        refuse_collator(self, data_collator)
        config = as_config(args, PRMConfig)
        model, model_init, tokenizer = prepare(
            self,
            model,
            model_init,
            config,
            processing_class=processing_class,
            tokenizer=tokenizer,
            peft_config=peft_config,
            auto_class=AutoModelForTokenClassification,
            dropout=not config.disable_dropout,
            init_kwargs=label_kwargs(config, model, 2),
        )
        if model is not None and label_count(model) != 2:
            raise ValueError(f"num_labels={label_count(model)}: a process reward model has 2, wrong and right")
        job = self.row_job(tokenizer, config, model)

        def tokenised(dataset: Any, name: str) -> Any:
            job.train_on_last_step_only = config.train_on_last_step_only and name == "train"
            return tokenize(dataset, job, name=name, num_proc=config.dataset_num_proc)[0]

        super().__init__(
            model=model,
            args=config,
            data_collator=StepCollator(),
            rows=tokenised,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            model_init=model_init,
            compute_metrics=compute_accuracy if compute_metrics is None else compute_metrics,
            **kwargs,
        )

    @staticmethod
    def row_job(tokenizer: Any, config: PRMConfig, model: nn.Module | None) -> StepwiseJob:
        length = fitting_length(config, model)
        lengths = (length, config.max_prompt_length, config.max_completion_length)
        return StepwiseJob(
            tokenizer=tokenizer,
            limits=Limits(*lengths, asked_length=asked_length(config, length)),
            step_separator=config.step_separator,
            train_on_last_step_only=config.train_on_last_step_only,
            ends=end_tokens(model, tokenizer),
            embeddings=embedding_rows(model),
        )

    def count(self, batch: dict[str, Any]) -> int:
        return len(batch["step_label"])

    def _logits(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Two logits for each labelled step. [steps, 2]"""
        return scores_at(model, batch["packed"], batch["step_index"], batch["step_row"])

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossSum:
        return self._loss(self._logits(model, batch), batch)

    def _loss(self, logits_SC: Tensor, batch: dict[str, Any]) -> LossSum:
        return stepwise_cross_entropy(logits_SC, batch["step_label"], smoothing=self.args.label_smoothing_factor)

    def predictions(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[LossSum, Tensor | None, Tensor | None]:
        """Logits [rows, most steps, 2] and labels [rows, most steps] of each row's labelled steps, padded with -100."""
        logits, labels, row_S = self._logits(model, inputs), inputs["step_label"], inputs["step_row"]
        steps_B = row_S.bincount(minlength=inputs["packed"].rows)
        slot_S = torch.arange(len(row_S), device=row_S.device) - (steps_B.cumsum(0) - steps_B)[row_S]
        shape = len(steps_B), int(steps_B.max())
        logits_BTC, label_BT = logits.new_full((*shape, 2), -100.0), labels.new_full(shape, -100)
        logits_BTC[row_S, slot_S], label_BT[row_S, slot_S] = logits, labels
        return self._loss(logits, inputs), logits_BTC, label_BT
