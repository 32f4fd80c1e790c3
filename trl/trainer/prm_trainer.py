"""Process reward models: a label for each step of a solution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, TrainingArguments

from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.data.tokenize import tokenize_stepwise
from trl.losses.loss_sum import LossSum
from trl.losses.supervised import stepwise_cross_entropy
from trl.models.scoring import scores_at
from trl.trainer.configuration import as_config
from trl.trainer.objective import ObjectiveTrainer
from trl.trainer.preparation import each_dataset, equip, fitting_length, label_count, labelled, no_collator
from trl.trainer.prm_config import PRMConfig


class StepCollator:
    """Tokenised rows laid end to end, with the packed index and the label of each step's end."""

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
        return {"packed": packed, **{name: torch.tensor(value, dtype=torch.long) for name, value in columns.items()}}


class PRMTrainer(ObjectiveTrainer):
    """Train a token classifier with two labels to judge each step of a solution (arXiv:2211.14275, arXiv:2305.20050).

    Rows: `prompt`, `completions` (a text a step), `labels` (true = the step is right).
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
        *,
        peft_config: Any = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ):
        no_collator(self, data_collator)
        config = as_config(args, PRMConfig)
        model, model_init, tokenizer = equip(
            self,
            model,
            model_init,
            config,
            processing_class=processing_class,
            tokenizer=tokenizer,
            peft_config=peft_config,
            auto_class=AutoModelForTokenClassification,
            dropout=not config.disable_dropout,
            init_kwargs=labelled(config, model, 2),
        )
        if model is not None and label_count(model) != 2:
            raise ValueError(f"num_labels={label_count(model)}: a process reward model has 2, wrong and right")
        length = fitting_length(config, model)

        def tokenised(dataset: Any, name: str) -> Any:
            return tokenize_stepwise(
                dataset,
                tokenizer,
                step_separator=config.step_separator,
                train_on_last_step_only=config.train_on_last_step_only and name == "train",
                max_length=length,
                max_prompt_length=config.max_prompt_length,
                max_completion_length=config.max_completion_length,
                num_proc=config.dataset_num_proc,
                name=name,
            )[0]

        super().__init__(
            model=model,
            args=config,
            data_collator=StepCollator(),
            train_dataset=each_dataset(train_dataset, tokenised, "train"),
            eval_dataset=each_dataset(eval_dataset, tokenised, "eval"),
            processing_class=tokenizer,
            model_init=model_init,
            **kwargs,
        )

    def count(self, batch: dict[str, Any]) -> int:
        return len(batch["step_label"])

    def _logits(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Two logits for each labelled step. [steps, 2]"""
        return scores_at(model, batch["packed"], batch["step_index"], batch["step_row"])

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossSum:
        return stepwise_cross_entropy(self._logits(model, batch), batch["step_label"])

    def predictions(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[LossSum, Tensor | None, Tensor | None]:
        """Each labelled step's logits, [steps, 2], and its label."""
        logits = self._logits(model, inputs)
        return stepwise_cross_entropy(logits, inputs["step_label"]), logits, inputs["step_label"]
