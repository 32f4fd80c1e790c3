"""Settings of reward-model training."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl.trainer.configuration import OfflineConfig, require


@dataclass
class RewardConfig(OfflineConfig):
    """`TrainingArguments` and what a Bradley-Terry reward model adds."""

    learning_rate: float = field(default=1e-4)
    """initial learning rate"""
    max_length: int | None = field(default=None)
    """longest prompt + completion in tokens; None: 1024, or the model's context where that is shorter"""
    center_rewards_coefficient: float | None = field(default=None)
    """weight of (chosen + rejected)^2, which keeps the rewards around 0"""
    disable_dropout: bool = field(default=True)
    """train without dropout"""
    eos_token: str | None = field(default=None)
    """token that ends a completion, where it is not the tokenizer's own"""
    pad_token: str | None = field(default=None)
    """padding token, where it is not the tokenizer's own"""
    chat_template_path: str | None = field(default=None)
    """file with a Jinja chat template for the tokenizer"""

    def validate(self) -> None:
        super().validate()
        require(self, "max_length", self.max_length is None or self.max_length > 1, "give a length > 1, or None")
        center = self.center_rewards_coefficient
        require(self, "center_rewards_coefficient", center is None or center >= 0, "give a weight >= 0, or None")
