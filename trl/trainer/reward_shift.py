"""BCO's reward shift: the running mean of all implicit rewards so far."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class RewardShift:
    """`delta` of arXiv:2404.04656, eq. 9: constant within an optimizer step, so micro-batches do not change it."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0.0
        self._pending: list[Tensor] = []

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0

    def add(self, rewards_B: Tensor) -> None:
        """Remember the rewards of a micro-batch for the next step."""
        self._pending.append(rewards_B.detach().flatten())

    def close_step(self, accelerator: Accelerator) -> None:
        """Take what was added since the last call, from all ranks, into the mean."""
        if not self._pending:
            return
        rewards = torch.cat(self._pending).double()
        sums = torch.stack([rewards.sum(), rewards.new_tensor(float(len(rewards)))]).to(torch.float32)
        total, count = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
        self.total, self.count = self.total + total, self.count + count
        self._pending = []

    def state(self) -> dict[str, Any]:
        return {"total": self.total, "count": self.count, "pending": [x.cpu() for x in self._pending]}

    def load(self, state: dict[str, Any]) -> None:
        self.total, self.count, self._pending = state["total"], state["count"], list(state["pending"])
