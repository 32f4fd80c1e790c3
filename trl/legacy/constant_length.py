"""A stream of texts cut into sequences of one length."""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset


class ConstantLengthDataset(IterableDataset[dict[str, Tensor]]):
    """Texts joined by the end token and cut into `input_ids` and `labels` of `seq_length` tokens.

    Texts are taken in buffers of about `seq_length * num_of_sequences` tokens (estimated by `chars_per_token`); what is
    left over at the end of a buffer is dropped, and the sequences of a buffer are shuffled with `random`.
    `eos_token_id` joins texts when the tokenizer has no EOS. `len` is the number of texts.
    """

    def __init__(
        self,
        tokenizer: Any,
        dataset: Any,
        dataset_text_field: str | None = None,
        formatting_func: Callable[[Any], str] | None = None,
        infinite: bool = False,
        seq_length: int = 1024,
        num_of_sequences: int = 1024,
        chars_per_token: float = 3.6,
        eos_token_id: int = 0,
        shuffle: bool = True,
        append_concat_token: bool = True,
        add_special_tokens: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            warnings.warn(
                "The passed tokenizer does not have an EOS token. We will use the passed eos_token_id instead which "
                f"corresponds to {eos_token_id}. If this is not the correct EOS token, make sure to pass the correct "
                "eos_token_id."
            )
        self.concat_token_id = eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self.dataset = dataset
        self.seq_length = seq_length
        self.infinite = infinite
        self.current_size = 0
        self.max_buffer_size = seq_length * chars_per_token * num_of_sequences
        self.shuffle = shuffle
        self.append_concat_token = append_concat_token
        self.add_special_tokens = add_special_tokens
        self.formatting_func = self._text_of(dataset_text_field, formatting_func)

    @staticmethod
    def _text_of(field: str | None, formatting_func: Callable[[Any], str] | None) -> Callable[[Any], str]:
        if formatting_func is None:
            if field is None:
                raise ValueError("ConstantLengthDataset needs `dataset_text_field` or `formatting_func`")
            return lambda row: str(row[field])
        if len(inspect.signature(formatting_func).parameters) > 1:
            warnings.warn(
                "The passed formatting_func has more than one argument. Usually that function should have a single "
                "argument `example` which corresponds to the dictionary returned by each element of the dataset. Make "
                "sure you know what you are doing."
            )
        return formatting_func

    def __len__(self) -> int:
        return len(self.dataset)

    def _buffers(self) -> Iterator[list[str]]:
        """Lists of texts that reach `max_buffer_size` characters; the last one may hold less."""
        buffer: list[str] = []
        size = 0
        while True:
            seen = 0
            for row in self.dataset:
                seen += 1
                buffer.append(self.formatting_func(row))
                size += len(buffer[-1])
                if size >= self.max_buffer_size:
                    yield buffer
                    buffer, size = [], 0
            if not (self.infinite and seen):
                break
            warnings.warn("The dataset reached end and the iterator is reset to the start.")
        if buffer:
            yield buffer

    def _sequences(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(texts, add_special_tokens=self.add_special_tokens, truncation=False, verbose=False)
        joined: list[int] = []
        for ids in encoded["input_ids"]:
            joined += ids
            if self.append_concat_token:
                joined.append(self.concat_token_id)
        whole = len(joined) // self.seq_length * self.seq_length
        return [joined[start : start + self.seq_length] for start in range(0, whole, self.seq_length)]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for texts in self._buffers():
            sequences = self._sequences(texts)
            if self.shuffle:
                random.shuffle(sequences)
            for sequence in sequences:
                self.current_size += 1
                ids = torch.tensor(sequence, dtype=torch.long)
                yield {"input_ids": ids, "labels": ids.clone()}
