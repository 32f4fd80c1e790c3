"""Fine-tuning by single calls of `step`, on data that the caller brings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from trl.core import PPODecorators
from trl.data.batches import rows_of_padded
from trl.data.columns import check_embedded, check_text, shown
from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.losses.loss_sum import LossSum
from trl.losses.supervised import nll, smoothed
from trl.models.forward import rows_padded, within_forward
from trl.models.prepare import embedding_rows, is_peft_model, load_model, read_tokenizer
from trl.models.scoring import logits_and_labels, score
from trl.models.unwrap import is_encoder_decoder
from trl.trainer.configuration import (
    PostTrainingConfig,
    as_config,
    choose,
    processing_class_of,
    refuse_unused,
    require,
    with_keywords,
)
from trl.trainer.guard import Piece
from trl.trainer.objective import ObjectiveTrainer
from trl.trainer.settings import BY_STEPS, log_without_effect
from trl.trainer.tally import StepWatch
from trl.trainer.update import leave_zeros, optimizer_step

TRUNCATION_SIDES = {"keep_end": "left", "keep_start": "right"}


@dataclass
class IterativeSFTConfig(PostTrainingConfig):
    """`TrainingArguments` and how a step cuts its sequences."""

    max_length: int | None = field(default=None)
    """longest sequence in tokens; None: never cut"""
    truncation_mode: str = field(default="keep_end")
    """which end of a long sequence stays: keep_end or keep_start"""
    optimize_device_cache: bool = field(default=False)
    """free cached device memory after each step: slower, a little less memory"""

    def validate(self) -> None:
        super().validate()
        require(self, "max_length", self.max_length is None or self.max_length > 0, "give a length > 0, or None")
        choose(self, "truncation_mode", TRUNCATION_SIDES)


class IterativeSFTTrainer(ObjectiveTrainer):
    """Fine-tune with `step(input_ids | texts, ...)`: between steps the caller may sample, filter and score.

    One call is one pass over the given sequences, in shuffled mini-batches of
    `per_device_train_batch_size * gradient_accumulation_steps`, an optimizer and scheduler step each. `max_length`,
    `truncation_mode` and `optimize_device_cache` are keywords of older releases for fields of the config.
    """

    _tag_names = ("trl", "iterative-sft")

    def __init__(
        self,
        model: PreTrainedModel | str | None = None,
        args: TrainingArguments | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        data_collator: Callable[[Any], Mapping[str, Any]] | None = None,
        eval_dataset: Any = None,
        max_length: int | None = None,
        truncation_mode: str | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        optimize_device_cache: bool | None = None,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
    ):
        config = as_config(args, PostTrainingConfig if isinstance(args, PostTrainingConfig) else IterativeSFTConfig)
        cut = _cutting(config, max_length, truncation_mode, optimize_device_cache)
        refuse_unused(config, ("model_init_kwargs",), isinstance(model, str), "a model given by name")
        refuse_unused(config, ("dataset_num_proc", "neftune_noise_alpha"), False, "another trainer")
        refuse_unused(config, ("enable_jit_checkpoint", "overwrite_output_dir"), False, "`train()`")
        log_without_effect(config, BY_STEPS)
        tokenizer = processing_class_of(processing_class, tokenizer)
        if isinstance(model, str):
            tokenizer = read_tokenizer(model) if tokenizer is None else tokenizer
            loaded: Any = load_model(model, AutoModelForCausalLM, config.loading_keywords())
            model = loaded
        assert not isinstance(model, str)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(f"tokenizer must be a PreTrainedTokenizerBase, got {type(tokenizer)}")
        if model is None or not (isinstance(model, PreTrainedModel) or is_peft_model(model)):
            raise ValueError(f"model must be a PreTrainedModel, got {type(model)}")
        if optimizers[1] is None and config.max_steps == -1:
            raise ValueError(
                "When no scheduler is provided, you need to set the total number of training steps to perform "
                "`max_steps`"
            )
        if not model.can_generate():
            warnings.warn(f"{type(model).__name__} cannot generate text", UserWarning, stacklevel=2)
        self.max_length, self.truncation_mode = cut.max_length, cut.truncation_mode
        self.is_encoder_decoder = is_encoder_decoder(model)
        tokenizer.truncation_side = TRUNCATION_SIDES[self.truncation_mode]
        super().__init__(
            model=model,
            args=config,
            data_collator=data_collator or _default_collator(tokenizer, self.is_encoder_decoder),
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            optimizers=optimizers,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.say_memory()
        self._own_collator = data_collator
        self.create_optimizer_and_scheduler(self.args.max_steps)
        self.model, self.optimizer, self.lr_scheduler = self.accelerator.prepare(
            self.model, self.optimizer, self.lr_scheduler
        )
        self.model_wrapped = self.model
        self._embeddings = embedding_rows(model)
        self._order = torch.Generator().manual_seed(self.args.seed)
        PPODecorators.optimize_device_cache = cut.optimize_device_cache

    # -- what came in -------------------------------------------------------------------------

    def _cut(self, ids: Tensor) -> Tensor:
        if self.max_length is None or len(ids) <= self.max_length:
            return ids
        return ids[-self.max_length :] if self.truncation_mode == "keep_end" else ids[: self.max_length]

    def _tokenized(self, texts: Sequence[str]) -> list[Tensor]:
        limit = {"truncation": True, "max_length": self.max_length} if self.max_length is not None else {}
        return [torch.tensor(ids) for ids in self.tokenizer(list(texts), **limit)["input_ids"]]

    def prepare_model_inputs(
        self, input_ids: list[Tensor], attention_mask: list[Tensor] | None, labels: list[Tensor]
    ) -> list[dict[str, Tensor]]:
        """One record a sequence, cut to `max_length`: `input_ids`, `attention_mask`, `labels`."""
        masks = [torch.ones_like(ids) for ids in input_ids] if attention_mask is None else attention_mask
        if not len(input_ids) == len(masks) == len(labels):
            raise ValueError(
                f"{len(input_ids)} sequences, {len(masks)} attention masks and {len(labels)} labels: give equally many"
            )
        return [
            {"input_ids": self._cut(ids), "attention_mask": self._cut(mask), "labels": self._cut(label)}
            for ids, mask, label in zip(input_ids, masks, labels, strict=True)
        ]

    def _checked(
        self, input_ids: Any, attention_mask: Any, labels: Any, texts: Any, texts_labels: Any
    ) -> list[dict[str, Tensor]]:
        if texts is not None:
            texts = _texts(texts, "text")
            texts_labels = None if texts_labels is None else _texts(texts_labels, "text_labels")
        else:
            input_ids, attention_mask, labels = (
                None if value is None else _tensors(value, name)
                for name, value in (("input_ids", input_ids), ("attention_mask", attention_mask), ("labels", labels))
            )
        if texts is not None:
            if input_ids is not None:
                warnings.warn(
                    "Both `input_ids` and `texts` are given: `input_ids` are ignored", UserWarning, stacklevel=4
                )
            input_ids, attention_mask = self._tokenized(texts), None
            labels = labels if texts_labels is None else self._tokenized(texts_labels)
        if labels is None:
            if self.is_encoder_decoder:
                raise ValueError(
                    "No 'labels' or 'text_labels' are provided. When using an encoder-decoder architecture, 'labels' "
                    "or 'text_labels' must be passed."
                )
            warnings.warn("No labels are provided. Setting labels to input_ids", UserWarning, stacklevel=4)
            labels = input_ids
        records = self.prepare_model_inputs(input_ids, attention_mask, labels)
        for row, record in enumerate(records):
            self._check_record(row, record)
        return records

    def _check_record(self, row: int, record: Mapping[str, Tensor]) -> None:
        """ValueError for ids without an embedding, for masks and labels that do not go with them."""
        ids, mask, labels = record["input_ids"], record["attention_mask"], record["labels"]
        check_embedded(ids.tolist(), f"input_ids[{row}]", self._embeddings)
        if mask.shape != ids.shape or bool(((mask != 0) & (mask != 1)).any()):
            raise ValueError(
                f"attention_mask[{row}] should hold 0 or 1 for each of {len(ids)} tokens, it has {len(mask)} entries: "
                f"{shown(mask.tolist())}"
            )
        if not self.is_encoder_decoder and labels.shape != ids.shape:
            raise ValueError(f"labels[{row}] has {len(labels)} entries for {len(ids)} tokens in input_ids[{row}]")
        check_embedded(labels[labels != -100].tolist(), f"labels[{row}]", self._embeddings)

    # -- the step -----------------------------------------------------------------------------

    @PPODecorators.empty_device_cache()
    def step(
        self,
        input_ids: Sequence[Tensor | Sequence[int]] | None = None,
        attention_mask: Sequence[Tensor | Sequence[int]] | None = None,
        labels: Sequence[Tensor | Sequence[int]] | None = None,
        texts: Sequence[str] | None = None,
        texts_labels: Sequence[str] | None = None,
    ) -> None:
        """One pass over the sequences, given as lists, columns of a `Dataset` or arrays; with both `input_ids` and
        `texts`, the texts count."""
        if input_ids is None and texts is None:
            raise ValueError("Step should include `input_ids` or `texts` as keyword arguments.")
        records = self._checked(input_ids, attention_mask, labels, texts, texts_labels)
        self.model.train()
        size = self.args.per_device_train_batch_size
        order = torch.randperm(len(records), generator=self._order).tolist()
        whole = size * self.args.gradient_accumulation_steps
        for start in range(0, len(order), whole):
            chosen = [records[i] for i in order[start : start + whole]]
            pieces = [self._collated(chosen[i : i + size]) for i in range(0, len(chosen), size)]
            self._update(pieces)
        if not self.is_deepspeed_enabled:  # which would add to them
            leave_zeros(self.model.parameters())

    def _update(self, pieces: list[dict[str, Any]]) -> None:
        for piece in pieces:
            self.record_tokens(self.tokens(piece))
        with rows_padded(self.pads_rows):
            means = optimizer_step(
                self.accelerator,
                [self.model],
                self.optimizer,
                pieces,
                lambda piece: within_forward(self.model, lambda inner: self.learned(inner, piece)),
                self.count,
                parameters=list(self.model.parameters()),
                max_grad_norm=self.args.max_grad_norm or None,
                non_finite=lambda watch: self._met_non_finite(watch, pieces),
            )
        self.lr_scheduler.step()
        self.state.global_step += 1
        self.record("loss", means["loss"])
        self._maybe_log_save_evaluate_step()

    def _met_non_finite(self, watch: StepWatch, pieces: Sequence[dict[str, Any]]) -> None:
        named = [Piece(piece, number) for number, piece in enumerate(pieces)]
        self._non_finite.met(self.state.global_step + 1, self.accelerator, watch, [self.model], named)

    def _maybe_log_save_evaluate_step(self) -> None:
        step = self.state.global_step
        if self.args.eval_strategy == "steps" and self.args.eval_steps and step % self.args.eval_steps == 0:
            self.evaluate(self.eval_dataset)
            self.model.train()
        if self.args.logging_strategy == "steps" and step % max(1, int(self.args.logging_steps)) == 0:
            means = self._tallies["train"].means(self.accelerator)
            self.log({"loss": means.pop("loss"), "learning_rate": self.lr_scheduler.get_last_lr()[0]})
        if self.args.save_strategy == "steps" and step % max(1, int(self.args.save_steps)) == 0:
            self.save_model(f"{self.args.output_dir}/checkpoint-{step}")

    def _collated(self, records: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        """One packed batch; a collator that the caller brought may change masks and labels on the way."""
        if self._own_collator is not None:
            records = [_record(row) for row in rows_of_padded(self._own_collator([dict(r) for r in records]))]
        trees = [self._tree(record) for record in records]
        return {"packed": pack(trees).to(self.args.device)}

    def _tree(self, record: Mapping[str, Tensor]) -> TokenTree:
        ids = record["input_ids"][record["attention_mask"].bool()]
        if self.is_encoder_decoder:
            labels = record["labels"]
            return TokenTree(ids.tolist(), [Branch(labels[labels != -100].tolist())])
        labels = record["labels"][record["attention_mask"].bool()]
        if bool(((labels != -100) & (labels != ids)).any()):
            raise ValueError(
                "labels differ from input_ids at learned positions: a causal model learns its own next token"
            )
        return TokenTree([], [Branch(ids.tolist(), (labels != -100).long().tolist())])

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return torch.utils.data.DataLoader(
            eval_dataset if eval_dataset is not None else self.eval_dataset,
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=lambda rows: self._collated([self._evaluation_record(row) for row in rows]),
        )

    @staticmethod
    def _evaluation_record(row: Mapping[str, Any]) -> dict[str, Tensor]:
        ids = torch.as_tensor(row["input_ids"])
        mask, labels = row.get("attention_mask"), row.get("labels")
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids) if mask is None else torch.as_tensor(mask),
            "labels": ids if labels is None else torch.as_tensor(labels),
        }

    def count(self, batch: dict[str, Any]) -> int:
        return len(batch["packed"].row_S)

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossSum:
        packed = batch["packed"]
        factor = self.args.label_smoothing_factor
        scores = score(model, packed, lift=factor > 0)
        return smoothed(nll(scores.logprobs_BT, packed.mask_BT), scores.lift_BT, packed.mask_BT, factor)

    def predictions(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[LossSum, Tensor | None, Tensor | None]:
        """The loss; with `compute_metrics` also the logits of all positions [B, L, V] and the labels [B, L]."""
        result = self.objective(model, inputs)
        if self.compute_metrics is None:
            return result, None, None
        return result, *logits_and_labels(model, inputs["packed"])


def _cutting(
    config: PostTrainingConfig, max_length: int | None, truncation_mode: str | None, optimize_device_cache: bool | None
) -> IterativeSFTConfig:
    """The config with the keywords of older releases; of another trainer's config only the keywords count."""
    own = config if isinstance(config, IterativeSFTConfig) else IterativeSFTConfig(use_cpu=config.use_cpu)
    given = {
        "max_length": max_length, "truncation_mode": truncation_mode, "optimize_device_cache": optimize_device_cache,
    }  # fmt: skip
    return with_keywords(own, given)


def _default_collator(tokenizer: Any, encoder_decoder: bool) -> Callable[[Any], Mapping[str, Any]]:
    kind = "DataCollatorForSeq2Seq" if encoder_decoder else "DataCollatorForLanguageModeling"
    warnings.warn(f"No data collator is provided. Using '{kind}'.", UserWarning, stacklevel=3)
    if encoder_decoder:
        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100, pad_to_multiple_of=8)
    return DataCollatorForLanguageModeling(tokenizer, mlm=False)


def _record(row: Mapping[str, Any]) -> dict[str, Tensor]:
    ids, mask = torch.tensor(row["input_ids"]), torch.tensor(row["loss_mask"])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(mask == 0, -100)}


def _rows(column: Any, name: str, kind: str) -> list[Any]:
    """The rows of a list, tuple, array or column of a `Dataset`; ValueError for what holds no rows."""
    if isinstance(column, str | bytes | Mapping) or not hasattr(column, "__len__") or not hasattr(column, "__iter__"):
        raise ValueError(f"{name} must be a list of {kind} - got {type(column)}")
    return list(column)


def _texts(column: Any, name: str) -> list[str]:
    rows = _rows(column, f"'{name}'", "strings")
    for row, text in enumerate(rows):
        if not isinstance(text, str):
            raise ValueError(f"Elements in '{name}' must be strings - got {type(text)} in row {row}")
        check_text(text, f"row {row} of '{name}'")
    return rows


def _tensors(column: Any, name: str) -> list[Tensor]:
    """Each row as a tensor [L] of whole numbers, from a tensor, an array or a list."""
    tensors = []
    for place, row in enumerate(_rows(column, name, "tensors")):
        try:
            tensor = None if isinstance(row, str | bytes) else torch.as_tensor(row)
        except (TypeError, ValueError, RuntimeError, OverflowError, RecursionError):
            tensor = None
        if tensor is None or tensor.dim() != 1 or tensor.is_meta or (len(tensor) and not _whole(tensor, name)):
            shape = "" if tensor is None else f" of {tensor.dtype}, shape {tuple(tensor.shape)}"
            raise ValueError(
                f"Elements in {name} must be tensors - got {type(row)}{shape} in row {place}: give token ids, one row "
                "each"
            )
        tensors.append(tensor.long())
    return tensors


def _whole(tensor: Tensor, name: str) -> bool:
    """Whether it holds whole numbers; a mask may hold true and false."""
    if tensor.dtype is torch.bool:
        return name == "attention_mask"
    return not (tensor.is_floating_point() or tensor.is_complex())
