"""Supervised fine-tuning: its config, the preparation of its data, and its trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainingArguments

from trl.data.batches import rows_of_padded, sequence_trees
from trl.data.chat import ChatTemplate, read_tools
from trl.data.encode import TRUNCATION_MODES, Limits
from trl.data.formats import column_names, maybe_convert_to_chatml
from trl.data.messages import messages_of
from trl.data.packed_dataset import STRATEGIES, pack_dataset
from trl.data.packing import pack
from trl.data.records import ROWS, Batch
from trl.data.row_job import RowJob
from trl.data.supervised_rows import SupervisedJob, supervised_row
from trl.data.tokenize import has_rows, tokenize, unprepared
from trl.generation.stopping import end_tokens
from trl.import_utils import lazy_names
from trl.legacy import absent
from trl.legacy.collators import DataCollatorForCompletionOnlyLM
from trl.legacy.constant_length import ConstantLengthDataset
from trl.losses.loss_sum import LossSum
from trl.losses.supervised import dft, nll, smoothed
from trl.models.prepare import activate_neftune, embedding_rows
from trl.models.scoring import logits_and_labels, score
from trl.models.unwrap import is_encoder_decoder
from trl.trainer.configuration import (
    OfflineConfig,
    as_config,
    choose,
    older_style,
    refuse_unused,
    require,
    with_keywords,
)
from trl.trainer.objective import ObjectiveTrainer
from trl.trainer.preparation import asked_length, fitting_length, prepare
from trl.trainer.settings import accepted, rename

PACKING_STRATEGIES = (*STRATEGIES, "constant_length")
UNCUT = ("wrapped", "bfd_split")
"""strategies that cut no row before it is packed"""
DATASET_KWARGS = ("add_special_tokens", "append_concat_token", "skip_prepare_dataset")
ROW_COLUMNS = {"text", "messages", "conversations", "conversation", "prompt", "completion", "input_ids"}
"""each of these columns alone shows what a row is"""
LOSSES: dict[str, Callable[..., LossSum]] = {"nll": nll, "chunked_nll": nll, "dft": dft}


@dataclass
class SFTConfig(OfflineConfig):
    """`TrainingArguments` with the settings of supervised fine-tuning."""

    learning_rate: float = field(default=2e-5)
    """initial learning rate"""
    dataset_text_field: str = field(default="text")
    """column of plain text"""
    max_length: int | None = field(default=1024)
    """longest sequence in tokens; longer ones are cut and counted; None: never cut"""
    truncation_mode: str = field(default="keep_start")
    """which end of a long sequence stays: keep_start or keep_end"""
    completion_only_loss: bool | None = field(default=None)
    """learn the completion only; None: yes where rows have a prompt"""
    assistant_only_loss: bool = field(default=False)
    """learn the assistant's turns only (conversational rows)"""
    learn_tool_results: bool = field(default=False)
    """learn what tools and users say inside a completion too (conversational rows with a prompt)"""
    loss_type: str = field(default="nll")
    """nll (also called chunked_nll: it always comes in chunks), or dft (each token weighs its own probability)"""
    packing: bool = field(default=False)
    """fill rows of `max_length` tokens with whole sequences, so that every batch has the same size"""
    packing_strategy: str = field(default="bfd")
    """bfd (best-fit decreasing), bfd_split (the same, longer rows go on in others), wrapped (one stream, cut),
    constant_length (a `ConstantLengthDataset`)"""
    eval_packing: bool | None = field(default=None)
    """the same for evaluation; None: as `packing`"""
    shuffle_dataset: bool = field(default=False)
    """shuffle the training rows once before they are packed"""
    eos_token: str | None = field(default=None)
    """token that ends a turn, where it is not the tokenizer's own"""
    pad_token: str | None = field(default=None)
    """padding token, where it is not the tokenizer's own"""
    chat_template_path: str | None = field(default=None)
    """file with a Jinja chat template for the tokenizer"""
    dataset_kwargs: dict[str, Any] | None = field(default=None)
    """`add_special_tokens`, `append_concat_token` (the end token after each text; True both), `skip_prepare_dataset`"""
    dataset_batch_size: int = field(default=1000)
    """rows tokenised at a time"""
    num_of_sequences: int = field(default=1024)
    """constant_length only: sequences that the buffer holds"""
    chars_per_token: float = field(default=3.6)
    """constant_length only: estimated characters per token, from which the size of the buffer follows"""
    max_seq_length: int | None = accepted("max_seq_length")

    def translate(self) -> None:
        super().translate()
        rename(self, "max_seq_length", "max_length")
        self.max_seq_length = None

    def json_fields(self) -> tuple[str, ...]:
        return (*super().json_fields(), "dataset_kwargs")

    @property
    def smooths_labels(self) -> bool:
        return self.loss_type != "dft"

    def token_settings(self) -> dict[str, str | None]:
        return {
            "eos_token": self.eos_token, "pad_token": self.pad_token, "chat_template_path": self.chat_template_path,
        }  # fmt: skip

    def validate(self) -> None:
        super().validate()
        choose(self, "truncation_mode", TRUNCATION_MODES)
        choose(self, "loss_type", LOSSES)
        choose(self, "packing_strategy", PACKING_STRATEGIES)
        require(self, "max_length", self.max_length is None or self.max_length > 1, "give a length > 1, or None")
        parts = not self.assistant_only_loss and self.completion_only_loss is not False
        refuse_unused(self, ("learn_tool_results",), parts, "the loss on completions alone")
        unknown = set(self.dataset_kwargs or {}) - set(DATASET_KWARGS)
        require(self, "dataset_kwargs", not unknown, f"choose among {list(DATASET_KWARGS)}")
        require(self, "dataset_batch_size", self.dataset_batch_size > 0, "give a number of rows > 0")
        self._validate_packing()

    def _validate_packing(self) -> None:
        packs = self.packing or bool(self.eval_packing)
        fills = "packing fills rows of `max_length`: set it"
        require(self, "max_length", not packs or self.max_length is not None, fills)
        refuse_unused(self, ("packing_strategy",), packs, "packing=True")
        stream = packs and self.packing_strategy == "constant_length"
        refuse_unused(self, ("num_of_sequences", "chars_per_token"), stream, "packing_strategy='constant_length'")
        masks = ("completion_only_loss", "assistant_only_loss", "learn_tool_results", "dataset_batch_size")
        refuse_unused(self, masks, not stream, "another packing_strategy: constant_length learns all of a text stream")
        cuts = not packs or self.packing_strategy == "bfd" or not (self.packing and self.eval_packing in (None, True))
        refuse_unused(self, ("truncation_mode",), cuts, f"truncation: {self.packing_strategy} rows are never cut short")


@dataclass
class SupervisedData:
    """How `SFTTrainer` prepares each of its data sets."""

    tokenizer: Any
    config: SFTConfig
    max_length: Any
    """int, or None where rows are not packed"""
    formatting_func: Callable[..., Any] | None
    data_collator: Any
    ends: Sequence[int]
    """the model's end tokens"""
    embeddings: int | None
    """rows of the model's embedding"""
    unnamed: bool
    """whether the call has the older style and no `dataset_text_field`"""
    options: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        given = self.config.dataset_kwargs or {}
        self.options = {"add_special_tokens": True, "append_concat_token": True, "skip_prepare_dataset": False} | given

    def prepare(self, dataset: Any, name: str) -> Any:
        """The tokenised rows, packed where asked; torch data sets of tokenised rows go through as they are."""
        dataset = unprepared(dataset, SupervisedJob.tokenised)
        if not has_rows(dataset, name) or self.options["skip_prepare_dataset"]:
            self._check_unprepared(dataset, name)
            if isinstance(dataset, ConstantLengthDataset) and name == "train":
                dataset.infinite = self.config.max_steps > 0
            return dataset
        training = name == "train"
        packs = self.config.packing if training or self.config.eval_packing is None else self.config.eval_packing
        if training and self.config.shuffle_dataset:
            dataset = self._shuffled(dataset)
        strategy = self.config.packing_strategy if packs else None
        if strategy == "constant_length":
            return self._constant_length(dataset, name)
        self._check_named(dataset, name)
        tokenised = self._tokenised(dataset, name, None if strategy in UNCUT else self.max_length)
        if strategy is None or "seq_lengths" in column_names(tokenised, name):  # not packed, or packed already
            return tokenised
        return pack_dataset(tokenised, self.max_length, strategy)

    def _check_unprepared(self, dataset: Any, name: str) -> None:
        """ValueError for rows that nothing tokenises."""
        columns = column_names(dataset, name) if isinstance(dataset, Dataset) else ["input_ids"]
        if self.data_collator is None and "input_ids" not in columns:
            raise ValueError(
                f"skip_prepare_dataset=True: the {name} data set has no column 'input_ids', but {', '.join(columns)}; "
                "leave it out, and the rows are tokenised, their pictures too"
            )

    def _shuffled(self, dataset: Any) -> Any:
        seed = self.config.seed if self.config.data_seed is None else self.config.data_seed
        if not isinstance(dataset, Dataset | IterableDataset):
            raise ValueError(f"shuffle_dataset=True: a {type(dataset).__name__} cannot be shuffled; give a `Dataset`")
        return dataset.shuffle(seed=seed)

    def job(self, max_length: int | None) -> SupervisedJob:
        config = self.config
        # a collator that finds the answer by its template gets the text as it stands
        closes = self.options["append_concat_token"] and not isinstance(
            self.data_collator, DataCollatorForCompletionOnlyLM
        )
        return SupervisedJob(
            tokenizer=self.tokenizer,
            limits=Limits(
                max_length, truncation_mode=config.truncation_mode, asked_length=asked_length(config, max_length)
            ),
            text_field=config.dataset_text_field,
            completion_only_loss=config.completion_only_loss,
            assistant_only_loss=config.assistant_only_loss,
            learn_tool_results=config.learn_tool_results,
            ends=self.ends,
            embeddings=self.embeddings,
            add_eos=closes,
            add_special_tokens=self.options["add_special_tokens"],
            formatting_func=self.formatting_func,
        )

    def _tokenised(self, dataset: Any, name: str, max_length: int | None) -> Any:
        job, workers, rows = self.job(max_length), self.config.dataset_num_proc, self.config.dataset_batch_size
        return tokenize(dataset, job, name=name, num_proc=workers, batch_size=rows)[0]

    def _check_named(self, dataset: Any, name: str) -> None:
        """Raise the error of older releases if no column shows what a row is."""
        if self.unnamed and self.formatting_func is None and not ROW_COLUMNS & set(column_names(dataset, name)):
            raise ValueError(
                "You passed `packing=False` to the SFTTrainer, but you didn't pass a `dataset_text_field` or "
                f"`formatting_func` argument. (columns of the {name} data: {', '.join(column_names(dataset, name))})"
            )

    def _rendered(self, columns: Sequence[str]) -> Callable[[Mapping[str, Any]], str] | None:
        """Makes the text of a conversation by the chat template; None where no column holds conversations."""
        column = next((name for name in ("messages", "conversations", "conversation") if name in columns), None)
        if column is None:
            return None
        template = ChatTemplate(self.tokenizer, ends=self.ends)

        def text_of(row: Mapping[str, Any]) -> str:
            said = messages_of(maybe_convert_to_chatml({"messages": row[column]}), "messages")
            return template.of_row(row).render(said, read_tools(row.get("tools")))

        return text_of

    def _constant_length(self, dataset: Any, name: str) -> Any:
        func, columns = self.formatting_func, column_names(dataset, name)
        if func is None and self.config.dataset_text_field not in columns:
            func = self._rendered(columns)
        if func is None and self.config.dataset_text_field not in columns:
            raise ValueError(
                "You need to pass a `dataset_text_field` or `formatting_func` argument to the SFTTrainer if you want "
                "to use the `ConstantLengthDataset`."
            )
        stream = isinstance(dataset, IterableDataset)
        constant = ConstantLengthDataset(
            self.tokenizer,
            dataset,
            dataset_text_field=None if func is not None else self.config.dataset_text_field,
            formatting_func=func,
            seq_length=self.max_length,
            infinite=stream and name == "train" and self.config.max_steps > 0,
            num_of_sequences=self.config.num_of_sequences,
            chars_per_token=self.config.chars_per_token,
            eos_token_id=self.tokenizer.eos_token_id,
            append_concat_token=self.options["append_concat_token"],
            add_special_tokens=self.options["add_special_tokens"],
        )
        if stream:
            return constant
        rows = [{column: value.tolist() for column, value in row.items()} for row in constant]
        if not rows:
            raise ValueError(
                "Error occurred while packing the dataset. Make sure that your dataset has enough samples to at least "
                "yield one packed sequence."
            )
        return Dataset.from_list(rows)


class PackingCollator:
    """Packs tokenised rows, or the batch of another collator, into one batch without padding."""

    def __init__(self, inner: Callable[[Any], Mapping[str, Any]] | None = None):
        self.inner = inner

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if self.inner is not None:
            name = f"the data collator {type(self.inner).__name__}"
            rows = rows_of_padded(self._collated(rows, name), name)
        elif "loss_mask" not in rows[0]:
            rows = [supervised_row(row) for row in rows]
        return Batch(packed=pack(sequence_trees(rows)))

    def _collated(self, rows: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
        """The batch of the other collator; ValueError where it looks for what prepared rows do not have."""
        assert self.inner is not None
        given = [_for_collator(row) for row in rows]
        try:
            return self.inner(given)
        except KeyError as error:
            if "loss_mask" not in rows[0] or error.args[:1] in [(own,) for own in given[0]]:
                raise
            raise ValueError(
                f"{name} looks for {error} in rows that are tokenised already (they have {', '.join(given[0])}): leave "
                "it out, since the trainer reads texts and pictures itself, or set dataset_kwargs="
                "{'skip_prepare_dataset': True} for one of texts"
            ) from error


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
        compute_loss_func: Callable[..., Tensor] | None = None,
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
        model, model_init, tokenizer = prepare(
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
            tokenizer,
            config,
            max_length,
            formatting_func,
            data_collator,
            end_tokens(model, tokenizer),
            embedding_rows(model),
            unnamed=older and dataset_text_field is None,
        )
        self._formatting_func = formatting_func
        super().__init__(
            model=model,
            args=config,
            data_collator=PackingCollator(data_collator),
            rows=data.prepare,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            compute_loss_func=compute_loss_func,
        )
        if compute_loss_func is not None:
            self._take_loss_func()

    def _take_loss_func(self) -> None:
        if self.owns("compute_loss"):
            raise ValueError("compute_loss_func: compute_loss is overridden too; give one of them")
        self.compute_loss = self._by_func  # type: ignore[method-assign, assignment]
        self._take_own_methods()

    def _by_func(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None) -> Tensor:
        """The loss by `compute_loss_func(outputs, labels, num_items_in_batch=)`, of padded rows with whole logits."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return self.compute_loss_func(outputs, inputs["labels"], num_items_in_batch=num_items_in_batch)  # type: ignore[misc, no-any-return]

    packed_way_out = "set padding_free=False in SFTConfig, and inputs are input_ids, attention_mask and labels"

    def handed(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch if self.args.padding_free else {name: batch[name] for name in ROWS}

    def taken_back(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The batch at hand; where its padded rows were changed, a batch of the changed ones."""
        if dict.get(inputs, "packed") is not None:  # type: ignore[call-overload]
            return super().taken_back(inputs)
        before = {name: self._at_hand[name] for name in ROWS}
        rows = before | {name: inputs[name] for name in ROWS if name in inputs}
        if all(torch.equal(rows[name], before[name]) for name in ROWS):
            return self._at_hand  # type: ignore[no-any-return]
        trees = sequence_trees(rows_of_padded(rows, "compute_loss"))
        return Batch(packed=pack(trees).to(self.args.device))

    def outputs(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        if self._at_hand is None or self.args.padding_free:
            return super().outputs(model, inputs)
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])

    @staticmethod
    def row_job(tokenizer: Any, config: SFTConfig, model: nn.Module) -> RowJob:
        ends, rows = end_tokens(model, tokenizer), embedding_rows(model)
        data = SupervisedData(tokenizer, config, fitting_length(config, model), None, None, ends, rows, unnamed=False)
        return data.job(None if config.packing and config.packing_strategy in UNCUT else data.max_length)

    def not_with_shared_rows(self) -> dict[str, bool]:
        func = "compute_loss_func reads the logits of whole rows"
        return {**super().not_with_shared_rows(), func: self.compute_loss_func is not None}

    def prepared_columns(self) -> frozenset[str]:
        return frozenset({"input_ids", "loss_mask"})

    def preparing(self) -> dict[str, Any]:
        config = self.args
        return {
            **super().preparing(), "packing": config.packing, "formatting_func": self._formatting_func,
            "dataset_text_field": config.dataset_text_field, "max_seq_length": config.max_length,
        }  # fmt: skip

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
        factor = self.args.label_smoothing_factor
        scores = score(model, packed, entropy=True, tops=True, lift=factor > 0)
        loss = LOSSES[self.args.loss_type]
        result = loss(scores.logprobs_BT, packed.mask_BT, scores.entropy_BT, scores.top_BT)
        return smoothed(result, scores.lift_BT, packed.mask_BT, factor)

    def predictions(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[LossSum, Tensor | None, Tensor | None]:
        """The loss; with `compute_metrics` also the logits of all positions [B, L, V] and the labels [B, L]."""
        result = self.objective(model, inputs)
        if self.compute_metrics is None:
            return result, None, None
        return result, *logits_and_labels(model, inputs["packed"])


def _warn(config: SFTConfig, infinite: Any, text_field: str | None, formatting_func: Any) -> None:
    if infinite is not None:
        warnings.warn(
            "`infinite` is deprecated: with `max_steps` > 0 the data are repeated anyway",
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


__getattr__ = lazy_names(__name__, {}, absent.refuse)[0]
