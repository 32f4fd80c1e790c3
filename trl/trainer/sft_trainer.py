"""Supervised fine-tuning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainingArguments

from trl.data.batches import rows_of_padded, sequence_trees
from trl.data.packing import pack
from trl.data.tokenize import supervised_row
from trl.legacy.collators import DataCollatorForCompletionOnlyLM
from trl.losses.loss_sum import LossSum
from trl.losses.supervised import dft, nll
from trl.models.prepare import activate_neftune
from trl.models.scoring import logits_and_labels, score
from trl.models.unwrap import is_encoder_decoder
from trl.trainer.configuration import as_config, older_style, with_keywords
from trl.trainer.objective import ObjectiveTrainer
from trl.trainer.preparation import each_dataset, equip, fitting_length
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_data import SupervisedData

LOSSES: dict[str, Callable[[Tensor, Tensor], LossSum]] = {"nll": nll, "dft": dft}


class PackingCollator:
    """Tokenised rows, or what another collator made of them, as one packed batch without padding."""

    def __init__(self, inner: Callable[[Any], Mapping[str, Any]] | None = None):
        self.inner = inner

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if self.inner is not None:
            rows = rows_of_padded(self.inner([_for_collator(row) for row in rows]))
        elif "loss_mask" not in rows[0]:
            rows = [supervised_row(row) for row in rows]
        return {"packed": pack(sequence_trees(rows))}


def _for_collator(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tokenised row as the collators of transformers take it: ids and attention mask."""
    if "loss_mask" not in row:
        return row
    return {"input_ids": row["input_ids"], "attention_mask": [1] * len(row["input_ids"])}


class SFTTrainer(ObjectiveTrainer):
    """Fine-tune a causal language model on text, prompt-completion, conversational or tokenised rows.

    Takes the keywords of older releases (`dataset_text_field`, `packing`, `max_seq_length`, ...) and an `SFTConfig`
    in `args`; a keyword that contradicts the config is a ValueError.
    """

    _tag_names = ("trl", "sft")

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
        peft_config: Any = None,
        dataset_text_field: str | None = None,
        packing: bool | None = None,
        formatting_func: Callable[..., Any] | None = None,
        max_seq_length: int | None = None,
        infinite: bool | None = None,
        num_of_sequences: int | None = None,
        chars_per_token: float | None = None,
        dataset_num_proc: int | None = None,
        dataset_batch_size: int | None = None,
        neftune_noise_alpha: float | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
        dataset_kwargs: dict[str, Any] | None = None,
        *,
        processing_class: Any = None,
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        quantization_config: Any = None,
    ):
        given = {
            "packing": packing, "dataset_text_field": dataset_text_field, "max_length": max_seq_length,
            "num_of_sequences": num_of_sequences, "chars_per_token": chars_per_token,
            "dataset_num_proc": dataset_num_proc, "dataset_batch_size": dataset_batch_size,
            "neftune_noise_alpha": neftune_noise_alpha, "model_init_kwargs": model_init_kwargs,
            "dataset_kwargs": dataset_kwargs,
        }  # fmt: skip
        older = older_style(args, SFTConfig, given)
        given["packing_strategy"] = "constant_length" if older and packing else None
        config = with_keywords(as_config(args, SFTConfig), given)
        _warn(config, infinite, dataset_text_field, formatting_func)
        _check_collator(config, data_collator)
        model, model_init, tokenizer = equip(
            self,
            model,
            model_init,
            config,
            processing_class=processing_class,
            tokenizer=tokenizer,
            peft_config=peft_config,
            auto_class=AutoModelForCausalLM,
            quantization_config=quantization_config,
        )
        _check_model(model)
        max_length = fitting_length(config, model)
        if older and max_seq_length is None:
            max_length = _default_length(tokenizer, max_length)
        data = SupervisedData(
            tokenizer, config, max_length, formatting_func, data_collator, older and dataset_text_field is None
        )
        super().__init__(
            model=model,
            args=config,
            data_collator=PackingCollator(data_collator),
            train_dataset=each_dataset(train_dataset, data.prepare, "train"),
            eval_dataset=each_dataset(eval_dataset, data.prepare, "eval"),
            processing_class=tokenizer,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )

    def _trl_activate_neftune(self, model: nn.Module) -> nn.Module:
        """Add NEFTune's noise to the embeddings in training; `model.neftune_hook_handle.remove()` ends it."""
        alpha = self.args.neftune_noise_alpha
        if alpha is None:
            raise ValueError("neftune_noise_alpha=None: set it in the config to activate NEFTune")
        self.neftune_hook_handle = activate_neftune(model, alpha)
        return model

    def count(self, batch: dict[str, Any]) -> int:
        return len(batch["packed"].row_S)

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossSum:
        packed = batch["packed"]
        return LOSSES[self.args.loss_type](score(model, packed).logprobs_BT, packed.mask_BT)

    def predictions(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[LossSum, Tensor | None, Tensor | None]:
        """Whole logits only where `compute_metrics` asks for them. [B, L, V] and labels [B, L]"""
        result = self.objective(model, inputs)
        if self.compute_metrics is None:
            return result, None, None
        return result, *logits_and_labels(model, inputs["packed"])


def _warn(config: SFTConfig, infinite: Any, text_field: str | None, formatting_func: Any) -> None:
    if infinite is not None:
        warnings.warn(
            "`infinite` is deprecated: with `max_steps` > 0 the data starts again by itself",
            FutureWarning,
            stacklevel=3,
        )
    if text_field is not None and formatting_func is not None:
        warnings.warn("`dataset_text_field` has no effect: `formatting_func` makes the texts", stacklevel=3)
    if config.packing and config.packing_strategy == "constant_length" and config.max_steps > 0:
        warnings.warn(
            "You passed `packing=True` to the SFTTrainer, and you are training your model with `max_steps` strategy. "
            "The dataset will be iterated until the `max_steps` are reached.",
            stacklevel=3,
        )


def _check_collator(config: SFTConfig, data_collator: Any) -> None:
    if data_collator is None:
        return
    if config.packing and isinstance(data_collator, DataCollatorForCompletionOnlyLM):
        raise ValueError(
            "You passed a `DataCollatorForCompletionOnlyLM` to the SFTTrainer. This is not compatible with the "
            "`packing` argument."
        )
    for name in ("completion_only_loss", "assistant_only_loss"):
        if getattr(config, name):
            raise ValueError(f"{name}=True: your data_collator decides which tokens are learned; leave one of them out")


def _check_model(model: nn.Module | None) -> None:
    if model is not None and is_encoder_decoder(model):
        kind = type(model).__name__
        raise ValueError(f"{kind} is an encoder-decoder: use IterativeSFTTrainer, SFTTrainer takes causal models")


def _default_length(tokenizer: Any, fitting: int | None) -> int:
    length = min(tokenizer.model_max_length, fitting or 1024)
    warnings.warn(
        f"You didn't pass a `max_seq_length` argument to the SFTTrainer, this will default to {length}", stacklevel=3
    )
    return length
