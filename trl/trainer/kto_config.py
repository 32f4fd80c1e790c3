"""Settings of unpaired preference optimisation."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl.losses.kto import UNPAIRED_LOSSES
from trl.trainer.configuration import choose, require
from trl.trainer.preference_config import PreferenceConfig, ReferenceConfig


@dataclass
class KTOConfig(PreferenceConfig, ReferenceConfig):
    """`TrainingArguments` and what KTO adds."""

    loss_type: str = field(default="kto")
    """kto, bco or apo_zero_unpaired"""
    desirable_weight: float = field(default=1.0)
    """weight of the desirable completions' loss"""
    undesirable_weight: float = field(default=1.0)
    """weight of the undesirable completions' loss"""

    def validate(self) -> None:
        super().validate()
        choose(self, "loss_type", UNPAIRED_LOSSES)
        for name in ("desirable_weight", "undesirable_weight"):
            require(self, name, getattr(self, name) >= 0, "give a number >= 0")
