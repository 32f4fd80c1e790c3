"""Supervised fine-tuning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainingArguments

from trl.data.batches import rows_of_padded, sequence_trees
from trl.data.collators import ConstantLengthDataset, DataCollatorForCompletionOnlyLM
from trl.data.packing import pack, pack_dataset
from trl.data.tokenize import tokenize_supervised
from trl.losses.loss_sum import LossSum
from trl.losses.supervised import dft, nll
from trl.models.prepare import activate_neftune
from trl.models.scoring import is_encoder_decoder, padded_inputs, score
from trl.trainer.configuration import as_config, processing_class_of, with_keywords
from trl.trainer.objective import ObjectiveTrainer
from trl.trainer.preparation import dress_tokenizer, each_dataset, fitting_length, prepare_model, prepare_tokenizer
from trl.trainer.sft_config import SFTConfig

LOSSES: dict[str, Callable[[Tensor, Tensor], LossSum]] = {"nll": nll, "dft": dft}
READY_DATASETS = (torch.utils.data.IterableDataset, ConstantLengthDataset)


class PackingCollator:
    """Tokenised rows, or what another collator made of them, as one packed batch without padding."""

    def __init__(self, inner: Callable[[Any], Mapping[str, Any]] | None = None):
        self.inner = inner

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if self.inner is not None:
            rows = rows_of_padded(self.inner(rows))
        elif "loss_mask" not in rows[0]:
            rows = [{**row, "loss_mask": _mask_of(row)} for row in rows]
        return {"packed": pack(sequence_trees(rows))}


def _mask_of(row: Mapping[str, Any]) -> list[int]:
    labels = row.get("labels")
    return [1] * len(row["input_ids"]) if labels is None else [int(label != -100) for label in labels]


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
    ):
        if infinite is not None:
            warnings.warn(
                "`infinite` is deprecated: with `max_steps` > 0 the data starts again by itself",
                FutureWarning,
                stacklevel=2,
            )
        older = packing is not None and not isinstance(args, SFTConfig)
        config = with_keywords(
            as_config(args, SFTConfig),
            {
                "packing_strategy": "constant_length" if older and packing else None,
                "packing": packing,
                "dataset_text_field": dataset_text_field,
                "max_length": max_seq_length,
                "num_of_sequences": num_of_sequences,
                "chars_per_token": chars_per_token,
                "dataset_num_proc": dataset_num_proc,
                "dataset_batch_size": dataset_batch_size,
                "neftune_noise_alpha": neftune_noise_alpha,
                "model_init_kwargs": model_init_kwargs,
                "dataset_kwargs": dataset_kwargs,
            },
        )
        self._check_packing(config, data_collator)
        tokenizer = dress_tokenizer(prepare_tokenizer(processing_class_of(processing_class, tokenizer), model), config)

        def prepared(given: nn.Module | str) -> nn.Module:
            return prepare_model(
                given, config, tokenizer, peft_config, auto_class=AutoModelForCausalLM, owner=type(self).__name__
            )

        if model is not None:
            model = prepared(model)
            if is_encoder_decoder(model):
                kind = type(model).__name__
                raise ValueError(
                    f"{kind} is an encoder-decoder: use IterativeSFTTrainer, SFTTrainer takes causal models"
                )
            config.max_length = fitting_length(config, model)

        def tokenised(dataset: Any, name: str) -> Any:
            return self._prepare_dataset(dataset, tokenizer, config, formatting_func, data_collator, name)

        super().__init__(
            model=model,
            args=config,
            data_collator=PackingCollator(data_collator),
            train_dataset=each_dataset(train_dataset, tokenised, "train"),
            eval_dataset=each_dataset(eval_dataset, tokenised, "eval"),
            processing_class=tokenizer,
            model_init=None if model_init is None else lambda *trial: prepared(model_init(*trial)),
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        # NEFTune's noise depends on the width of a row, so it is honest on padded rows only
        self._path = None if config.padding_free and config.neftune_noise_alpha is None else "padded"
        if isinstance(self.train_dataset, ConstantLengthDataset):
            self.train_dataset.infinite = config.max_steps > 0

    @staticmethod
    def _check_packing(config: SFTConfig, data_collator: Any) -> None:
        if config.packing and isinstance(data_collator, DataCollatorForCompletionOnlyLM):
            raise ValueError(
                "You passed a `DataCollatorForCompletionOnlyLM` to the SFTTrainer. This is not compatible with the "
                "`packing` argument."
            )

    def _prepare_dataset(
        self, dataset: Any, tokenizer: Any, config: SFTConfig, func: Any, collator: Any, name: str
    ) -> Any:
        """The tokenised rows, packed where asked; tokenised or torch data sets go through as they are."""
        if dataset is None:
            raise ValueError("The dataset should not be None")
        options = {"add_special_tokens": True, "append_concat_token": True, **(config.dataset_kwargs or {})}
        if options.pop("skip_prepare_dataset", False) or isinstance(dataset, READY_DATASETS):
            return dataset
        training = name == "train"
        packs = config.packing if training or config.eval_packing is None else config.eval_packing
        if packs and config.packing_strategy == "constant_length":
            return self._constant_length(dataset, tokenizer, config, func, options)
        if training and config.shuffle_dataset:
            dataset = dataset.shuffle(seed=config.data_seed if config.data_seed is not None else config.seed)
        tokenised, _ = tokenize_supervised(
            dataset,
            tokenizer,
            text_field=config.dataset_text_field,
            completion_only_loss=config.completion_only_loss,
            assistant_only_loss=config.assistant_only_loss,
            max_length=None if packs and config.packing_strategy == "wrapped" else config.max_length,
            truncation_mode=config.truncation_mode,
            # a collator that finds the answer by its template gets the text as it stands
            add_eos=not isinstance(collator, DataCollatorForCompletionOnlyLM),
            add_special_tokens=options["add_special_tokens"],
            formatting_func=func,
            num_proc=config.dataset_num_proc,
            batch_size=config.dataset_batch_size,
            name=name,
        )
        if packs:
            return pack_dataset(tokenised, config.max_length, config.packing_strategy)
        return tokenised if collator is None else _for_collator(tokenised)

    @staticmethod
    def _constant_length(dataset: Any, tokenizer: Any, config: SFTConfig, func: Any, options: dict[str, Any]) -> Any:
        if func is None and config.dataset_text_field not in dataset.column_names:
            raise ValueError(
                "You need to pass a `dataset_text_field` or `formatting_func` argument to the SFTTrainer if you want "
                "to use the `ConstantLengthDataset`."
            )
        constant = ConstantLengthDataset(
            tokenizer,
            dataset,
            dataset_text_field=None if func is not None else config.dataset_text_field,
            formatting_func=func,
            seq_length=config.max_length,
            infinite=False,
            num_of_sequences=config.num_of_sequences,
            chars_per_token=config.chars_per_token,
            eos_token_id=tokenizer.eos_token_id,
            **options,
        )
        rows = [{name: value.tolist() for name, value in row.items()} for row in constant]
        if not rows:
            raise ValueError(
                "Error occurred while packing the dataset. Make sure that your dataset has enough samples to at least "
                "yield one packed sequence."
            )
        return datasets.Dataset.from_list(rows)

    def _trl_activate_neftune(self, model: nn.Module) -> nn.Module:
        """Add NEFTune's noise to the embeddings in training; `model.neftune_hook_handle.remove()` ends it."""
        alpha = self.args.neftune_noise_alpha
        if alpha is None:
            raise ValueError("neftune_noise_alpha=None: set it in the config to activate NEFTune")
        activate_neftune(model, alpha)
        return model

    def count(self, batch: dict[str, Any]) -> int:
        return len(batch["packed"].row_S)

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossSum:
        packed = batch["packed"]
        return LOSSES[self.args.loss_type](score(model, packed, path=self._path).logprobs_BT, packed.mask_BT)

    def predictions(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[LossSum, Tensor | None, Tensor | None]:
        """Whole logits only where `compute_metrics` asks for them. [B, L, V] and labels [B, L]"""
        result = self.objective(model, inputs)
        if self.compute_metrics is None:
            return result, None, None
        packed = inputs["packed"]
        padded = padded_inputs(packed)
        labels = torch.full_like(padded["input_ids"], -100)
        labels[packed.row_S, packed.position_N[packed.scored_S] + 1] = packed.target_S
        logits = model(**padded, use_cache=False).logits
        if self.preprocess_logits_for_metrics is not None:
            logits = self.preprocess_logits_for_metrics(logits, labels)
        return result, logits, labels


def _for_collator(tokenised: Any) -> Any:
    """Rows as the collators of transformers take them: ids and attention mask."""
    columns = [name for name in tokenised.column_names if name != "input_ids"]
    return tokenised.map(
        lambda row: {"attention_mask": [1] * len(row["input_ids"])}, remove_columns=columns, desc="for the collator"
    )
