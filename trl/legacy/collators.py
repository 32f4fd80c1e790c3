"""The collators of release 0.7.7: they pad rows of token ids to one batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForLanguageModeling


def pad_to_length(tensor: Tensor, length: int, pad_value: int | float, dim: int = -1) -> Tensor:
    """The tensor padded on the right of `dim` to `length`; a longer one is returned as it is."""
    missing = length - tensor.size(dim)
    if missing <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_full(shape, pad_value)], dim=dim)


def _occurrences(ids: Sequence[int], pattern: Sequence[int]) -> Iterator[int]:
    """Where the pattern begins in the ids, in order."""
    for start in range(len(ids) - len(pattern) + 1):
        if ids[start] == pattern[0] and list(ids[start : start + len(pattern)]) == list(pattern):
            yield start


class DataCollatorForCompletionOnlyLM(DataCollatorForLanguageModeling):
    """Labels that keep only what follows the response template, up to the next instruction template if one is given.

    Templates are texts or ids. A row in which one is not found is left out of the loss, with a warning.
    """

    def __init__(
        self,
        response_template: str | Sequence[int],
        instruction_template: str | Sequence[int] | None = None,
        *args: Any,
        mlm: bool = False,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, mlm=mlm, **kwargs)  # type: ignore[misc]  # args[0] is the tokenizer at most
        self.response_template = response_template
        self.instruction_template = instruction_template
        self.ignore_index = ignore_index
        self.response_token_ids = self._ids(response_template, "response_template")
        self.instruction_token_ids: list[int] | None = None
        if instruction_template is not None:
            self.instruction_token_ids = self._ids(instruction_template, "instruction_template")
            if not self.mlm and self.tokenizer.pad_token_id == self.tokenizer.eos_token_id:
                warnings.warn(
                    "The pad_token_id and eos_token_id values of this tokenizer are identical. If you are planning for "
                    "multi-turn training, it can result in the model continuously generating questions and answers "
                    "without eos token. To avoid this, set the pad_token_id to a different value."
                )

    def _ids(self, template: str | Sequence[int], name: str) -> list[int]:
        ids: Any = self.tokenizer.encode(template, add_special_tokens=False) if isinstance(template, str) else template
        if not len(ids):
            raise ValueError(f"{name}={template!r} has no tokens, so it can be found nowhere")
        return [int(i) for i in ids]

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        """A padded batch of `input_ids`, `attention_mask` and `labels`."""
        batch: dict[str, Any] = super().torch_call(examples)
        for row, labels in enumerate(batch["labels"]):
            ids = batch["input_ids"][row].tolist()
            responses = [start + len(self.response_token_ids) for start in _occurrences(ids, self.response_token_ids)]
            if not responses:
                self._ignore(labels, "response", self.response_template, ids)
            elif self.instruction_token_ids is None:
                labels[: responses[-1]] = self.ignore_index
            else:
                instructions = list(_occurrences(ids, self.instruction_token_ids))
                if instructions:
                    self._mask_instructions(labels, instructions, responses)
                else:
                    self._ignore(labels, "instruction", self.instruction_template, ids)
        return batch

    def _mask_instructions(self, labels: Tensor, instructions: list[int], responses: list[int]) -> None:
        for turn, (start, end) in enumerate(zip(instructions, responses, strict=False)):
            labels[start if turn else 0 : end] = self.ignore_index
        if len(responses) < len(instructions):
            labels[instructions[-1] :] = self.ignore_index

    def _ignore(self, labels: Tensor, key: str, template: Any, ids: list[int]) -> None:
        warnings.warn(
            f"Could not find {key} key `{template}` in the following instance: {self.tokenizer.decode(ids)} This "
            "instance will be ignored in loss calculation. Note, if this happens often, consider increasing the "
            "`max_seq_length`."
        )
        labels[:] = self.ignore_index


@dataclass
class RewardDataCollatorWithPadding:
    """Chosen and rejected rows, each padded by the tokenizer; a `margin` becomes a tensor."""

    tokenizer: Any
    padding: bool | str = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __call__(self, features: list[Mapping[str, Any]]) -> dict[str, Any]:
        keys = ("input_ids_chosen", "attention_mask_chosen", "input_ids_rejected", "attention_mask_rejected")
        batch: dict[str, Any] = {}
        if any(key not in feature for feature in features for key in keys):
            raise ValueError(
                "The features should include `input_ids_chosen`, `attention_mask_chosen`, `input_ids_rejected` and "
                "`attention_mask_rejected`"
            )
        for side in ("chosen", "rejected"):
            padded = self.tokenizer.pad(
                {name: [feature[f"{name}_{side}"] for feature in features] for name in ("input_ids", "attention_mask")},
                padding=self.padding,
                max_length=self.max_length,
                pad_to_multiple_of=self.pad_to_multiple_of,
                return_tensors=self.return_tensors,
                verbose=False,
            )
            batch |= {f"{name}_{side}": padded[name] for name in ("input_ids", "attention_mask")}
        if "margin" in features[0]:
            batch["margin"] = torch.tensor([feature["margin"] for feature in features], dtype=torch.float)
        return {**batch, "return_loss": True}


@dataclass
class DPODataCollatorWithPadding:
    """Pads the columns of tokenised pairs by what their names end in; other columns stay lists.

    Prompts of a causal model are padded on the left, everything else on the right.
    """

    pad_token_id: int = 0
    label_pad_token_id: int = -100
    is_encoder_decoder: bool | None = False

    def _pad_value(self, key: str) -> int:
        if key.endswith("_attention_mask"):
            return 0
        if self.is_encoder_decoder:
            if key.startswith("prompt") and key.endswith("input_ids"):
                return self.pad_token_id
            if key.startswith(("chosen", "rejected")) or "decoder" in key:
                return self.label_pad_token_id
        elif key.endswith("_labels"):
            return self.label_pad_token_id
        elif key.endswith("_input_ids"):
            return self.pad_token_id
        raise ValueError(f"Unexpected key in batch '{key}'")

    def __call__(self, features: list[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        for key in features[0]:
            values = [feature[key] for feature in features]
            if key.endswith(("_input_ids", "_attention_mask", "_labels")):
                left = "prompt" in key and not self.is_encoder_decoder
                rows = [torch.as_tensor(value, dtype=torch.long) for value in values]
                batch[key] = pad_sequence(
                    rows,
                    batch_first=True,
                    padding_value=self._pad_value(key),
                    padding_side="left" if left else "right",
                )
            elif key.endswith("_logps"):
                batch[key] = torch.tensor(values)
            else:
                batch[key] = values
        return batch
