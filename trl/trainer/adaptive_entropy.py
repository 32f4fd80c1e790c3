"""An entropy bonus whose weight follows the policy's entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from trl.losses.policy import adaptive_entropy_coef


class AdaptiveEntropy(TrainerCallback):
    """Moves the coefficient after each optimizer step, up while the entropy is below its target, down above it.

    Skywork OR1 (arXiv:2505.22312); as there, the bonus counts only while the entropy is at most the target.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.coef = trainer, float(trainer.args.entropy_coef)
        self.entropy: float | None = None
        """of the last optimizer step, in nats a token"""
        self._seen: list[Tensor] = []

    @property
    def active(self) -> float:
        """The coefficient of the step that is due."""
        return self.coef if self.entropy is None or self.entropy <= self.trainer.args.entropy_target else 0.0

    def add(self, total: Tensor, tokens: Tensor) -> None:
        """A micro-batch's entropies."""
        self._seen.append(torch.stack([total.detach(), tokens.to(total)]))

    def state_of(self) -> dict[str, float | None]:
        """What a checkpoint keeps."""
        return {"coef": self.coef, "entropy": self.entropy}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state_of` gave."""
        self.coef, self.entropy = state["coef"], state["entropy"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        mine = sum(self._seen, torch.zeros(2, device=args.device))
        self._seen = []
        total, tokens = self.trainer.accelerator.reduce(mine, "sum").tolist()
        if not tokens:
            return
        self.entropy = total / tokens
        self.coef = adaptive_entropy_coef(
            self.coef,
            self.entropy,
            target=args.entropy_target,
            delta=args.entropy_coef_delta,
            least=args.entropy_coef_min,
            most=args.entropy_coef_max,
        )
