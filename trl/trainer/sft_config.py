"""Settings of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl.trainer.configuration import OfflineConfig, choose, refuse_unused, require

PACKING_STRATEGIES = ("bfd", "wrapped", "constant_length")
SFT_LOSSES = ("nll", "dft")
DATASET_KWARGS = ("add_special_tokens", "append_concat_token", "skip_prepare_dataset")


@dataclass
class SFTConfig(OfflineConfig):
    """`TrainingArguments` and what supervised fine-tuning adds."""

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
    loss_type: str = field(default="nll")
    """nll, or dft (each token weighs its own probability)"""
    packing: bool = field(default=False)
    """fill rows of `max_length` tokens with whole sequences, so that every batch has the same size"""
    packing_strategy: str = field(default="bfd")
    """bfd (best-fit decreasing), wrapped (one stream, cut), constant_length (a `ConstantLengthDataset`)"""
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
    """constant_length only: characters a token, to size the buffer"""

    def validate(self) -> None:
        super().validate()
        choose(self, "truncation_mode", ("keep_start", "keep_end"))
        choose(self, "loss_type", SFT_LOSSES)
        choose(self, "packing_strategy", PACKING_STRATEGIES)
        require(self, "max_length", self.max_length is None or self.max_length > 1, "give a length > 1, or None")
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
        masks = ("completion_only_loss", "assistant_only_loss", "dataset_batch_size")
        refuse_unused(self, masks, not stream, "another packing_strategy: constant_length learns all of a text stream")
        cuts = not packs or self.packing_strategy == "bfd" or not (self.packing and self.eval_packing in (None, True))
        refuse_unused(self, ("truncation_mode",), cuts, f"truncation: {self.packing_strategy} rows are never cut short")
