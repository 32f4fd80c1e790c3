"""Settings of unpaired preference optimisation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl.losses.kto import UNPAIRED_LOSSES
from trl.trainer.configuration import PostTrainingConfig, choose, require


@dataclass
class KTOConfig(PostTrainingConfig):
    """`TrainingArguments` and what KTO adds."""

    learning_rate: float = field(default=1e-6)
    """initial learning rate"""
    loss_type: str = field(default="kto")
    """kto, bco or apo_zero_unpaired"""
    beta: float = field(default=0.1)
    """scale of the log-ratios: the smaller, the further the policy may move"""
    desirable_weight: float = field(default=1.0)
    """weight of the desirable completions' loss"""
    undesirable_weight: float = field(default=1.0)
    """weight of the undesirable completions' loss"""
    max_length: int | None = field(default=1024)
    """longest prompt + completion in tokens; None: never cut"""
    max_prompt_length: int | None = field(default=None)
    """longest prompt in tokens"""
    max_completion_length: int | None = field(default=None)
    """longest completion in tokens"""
    truncation_mode: str = field(default="keep_start")
    """which end of a long prompt stays: keep_start or keep_end"""
    disable_dropout: bool = field(default=True)
    """train without dropout"""
    padding_free: bool = field(default=True)
    """no padding, shared prompts computed once; False forces padded rows (same results, slower)"""
    pad_token: str | None = field(default=None)
    """padding token, where it is not the tokenizer's own"""
    precompute_ref_log_probs: bool = field(default=False)
    """compute the reference's log-probabilities once, before training"""
    precompute_ref_batch_size: int | None = field(default=None)
    """batch size for that; None: the training batch size"""
    ref_model_init_kwargs: dict[str, Any] | str | None = field(default=None)
    """keywords of `from_pretrained` for a reference given by name"""

    def validate(self) -> None:
        super().validate()
        choose(self, "loss_type", UNPAIRED_LOSSES)
        choose(self, "truncation_mode", ("keep_start", "keep_end"))
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            require(self, name, getattr(self, name) >= 0, "give a number >= 0")
        for name in ("max_length", "max_prompt_length", "max_completion_length", "precompute_ref_batch_size"):
            value = getattr(self, name)
            require(self, name, value is None or value > 0, "give a number > 0, or None")
        useless = self.precompute_ref_batch_size is not None and not self.precompute_ref_log_probs
        require(self, "precompute_ref_batch_size", not useless, "no effect without precompute_ref_log_probs=True")
