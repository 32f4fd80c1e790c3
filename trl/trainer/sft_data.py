"""From the rows that `SFTTrainer` is given to tokenised and packed rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset

from trl.data.formats import column_names
from trl.data.packed_dataset import pack_dataset
from trl.data.tokenize import has_rows, tokenize_supervised
from trl.legacy.collators import ConstantLengthDataset, DataCollatorForCompletionOnlyLM
from trl.trainer.sft_config import SFTConfig

ROW_COLUMNS = {"text", "messages", "conversations", "conversation", "prompt", "completion", "input_ids"}
"""columns that say by themselves what a row is"""


@dataclass
class SupervisedData:
    """How `SFTTrainer` prepares each of its data sets."""

    tokenizer: Any
    config: SFTConfig
    max_length: Any
    """int, or None where rows are not packed"""
    formatting_func: Callable[..., Any] | None
    data_collator: Any
    unnamed: bool
    """older call style without `dataset_text_field`"""
    options: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        given = self.config.dataset_kwargs or {}
        self.options = {"add_special_tokens": True, "append_concat_token": True, "skip_prepare_dataset": False} | given

    def prepare(self, dataset: Any, name: str) -> Any:
        """The tokenised rows, packed where asked; torch data sets go through as they are."""
        if dataset is None:
            raise ValueError("The dataset should not be None")
        if self.options["skip_prepare_dataset"] or not has_rows(dataset):
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
        if strategy is not None and not isinstance(dataset, Dataset):
            raise ValueError(
                f"packing=True with packing_strategy={strategy!r}: the {name} data are a "
                f"{type(dataset).__name__}; give a whole `Dataset`, or choose packing_strategy='constant_length'"
            )
        tokenised = self._tokenised(dataset, name, None if strategy == "wrapped" else self.max_length)
        return tokenised if strategy is None else pack_dataset(tokenised, self.max_length, strategy)

    def _shuffled(self, dataset: Any) -> Any:
        seed = self.config.seed if self.config.data_seed is None else self.config.data_seed
        if not isinstance(dataset, Dataset | IterableDataset):
            raise ValueError(f"shuffle_dataset=True: a {type(dataset).__name__} cannot be shuffled; give a `Dataset`")
        return dataset.shuffle(seed=seed)

    def _tokenised(self, dataset: Any, name: str, max_length: int | None) -> Any:
        config = self.config
        # a collator that finds the answer by its template gets the text as it stands
        closes = self.options["append_concat_token"] and not isinstance(
            self.data_collator, DataCollatorForCompletionOnlyLM
        )
        return tokenize_supervised(
            dataset,
            self.tokenizer,
            text_field=config.dataset_text_field,
            completion_only_loss=config.completion_only_loss,
            assistant_only_loss=config.assistant_only_loss,
            max_length=max_length,
            truncation_mode=config.truncation_mode,
            add_eos=closes,
            add_special_tokens=self.options["add_special_tokens"],
            formatting_func=self.formatting_func,
            num_proc=config.dataset_num_proc,
            batch_size=config.dataset_batch_size,
            name=name,
        )[0]

    def _check_named(self, dataset: Any, name: str) -> None:
        """The words of older releases where nothing says what a row is."""
        if self.unnamed and self.formatting_func is None and not ROW_COLUMNS & set(column_names(dataset, name)):
            raise ValueError(
                "You passed `packing=False` to the SFTTrainer, but you didn't pass a `dataset_text_field` or "
                f"`formatting_func` argument. (columns of the {name} data: {', '.join(column_names(dataset, name))})"
            )

    def _constant_length(self, dataset: Any, name: str) -> Any:
        func, columns = self.formatting_func, column_names(dataset, name)
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
