"""Settings that preference trainers share, on pairs or on single completions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl.trainer.configuration import OfflineConfig, choose, refuse_unused, require


@dataclass
class PreferenceConfig(OfflineConfig):
    """Lengths, the scale of the rewards, and what is done to the policy."""

    learning_rate: float = field(default=1e-6)
    """initial learning rate"""
    beta: float = field(default=0.1)
    """scale of the log-ratios: the smaller, the further the policy may move"""
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
    pad_token: str | None = field(default=None)
    """padding token, where it is not the tokenizer's own"""

    def validate(self) -> None:
        super().validate()
        choose(self, "truncation_mode", ("keep_start", "keep_end"))
        require(self, "beta", self.beta >= 0, "give a scale >= 0")
        for name in ("max_length", "max_prompt_length", "max_completion_length"):
            value = getattr(self, name)
            require(self, name, value is None or value > 0, "give a length > 0, or None")


@dataclass
class ReferenceConfig(OfflineConfig):
    """Where the reference comes from, and whether it moves."""

    precompute_ref_log_probs: bool = field(default=False)
    """compute the reference's log-probabilities once, before training; no second model is kept then"""
    precompute_ref_batch_size: int | None = field(default=None)
    """batch size for that; None: the larger one of training and evaluation"""
    ref_model_init_kwargs: dict[str, Any] | str | None = field(default=None)
    """keywords of `from_pretrained` for a reference given by name"""
    sync_ref_model: bool = field(default=False)
    """TR-DPO: move the reference towards the policy every `ref_model_sync_steps`"""
    ref_model_mixup_alpha: float = field(default=0.6)
    """TR-DPO: share of the policy in the new reference"""
    ref_model_sync_steps: int = field(default=512)
    """TR-DPO: optimizer steps between two moves"""

    @property
    def moves_reference(self) -> bool:
        return self.sync_ref_model

    def validate(self) -> None:
        super().validate()
        require(self, "ref_model_mixup_alpha", 0 < self.ref_model_mixup_alpha <= 1, "give a share in (0, 1]")
        require(self, "ref_model_sync_steps", self.ref_model_sync_steps > 0, "give a number of steps > 0")
        sync = ("ref_model_mixup_alpha", "ref_model_sync_steps")
        refuse_unused(self, sync, self.sync_ref_model, "sync_ref_model=True")
        batch, precomputes = self.precompute_ref_batch_size, self.precompute_ref_log_probs
        require(self, "precompute_ref_batch_size", batch is None or batch > 0, "give a number of rows > 0, or None")
        refuse_unused(self, ("precompute_ref_batch_size",), precomputes, "precompute_ref_log_probs=True")
        require(
            self, "sync_ref_model", not (self.sync_ref_model and precomputes), "a precomputed reference cannot move"
        )
