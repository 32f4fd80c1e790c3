"""Settings of process reward models."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl.trainer.configuration import OfflineConfig, require


@dataclass
class PRMConfig(OfflineConfig):
    """`TrainingArguments` and what a reward model of single steps adds."""

    learning_rate: float = field(default=1e-5)
    """initial learning rate"""
    max_length: int | None = field(default=1024)
    """longest prompt + steps in tokens; None: never cut"""
    max_prompt_length: int | None = field(default=512)
    """longest prompt in tokens; None: never cut"""
    max_completion_length: int | None = field(default=None)
    """longest run of steps in tokens; None: never cut"""
    disable_dropout: bool = field(default=True)
    """train without dropout"""
    step_separator: str = field(default="\n")
    """text after each step; the label is read at its last token"""
    train_on_last_step_only: bool = field(default=False)
    """learn the last step's label only: an outcome reward model"""

    def validate(self) -> None:
        super().validate()
        for name in ("max_length", "max_prompt_length", "max_completion_length"):
            value = getattr(self, name)
            require(self, name, value is None or value > 0, "give a length > 0, or None")
        require(self, "step_separator", bool(self.step_separator), "give a text that ends a step")
