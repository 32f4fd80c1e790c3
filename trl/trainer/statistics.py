"""Running statistics and controllers that trainers keep between steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from trl.import_utils import lazy_names
from trl.rollout.measure import get_global_statistics

# scripts import it from here; it is read when asked for, as it brings a trainer along
__getattr__ = lazy_names(__name__, {"trl.trainer.reward_trainer": ["compute_accuracy"]})[0]


class AdaptiveKLController:
    """A KL coefficient that follows the measured KL towards `target` (section 2.2 of arXiv:1909.08593)."""

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        self.value = init_kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, current: float, n_steps: int) -> None:
        """`value *= 1 + clip(current / target - 1, -0.2, 0.2) * n_steps / horizon`; a KL of nan changes nothing."""
        if np.isnan(current):
            return
        error = float(np.clip(current / self.target - 1, -0.2, 0.2))
        self.value *= 1 + error * n_steps / self.horizon


class FixedKLController:
    """A KL coefficient that does not change."""

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, current: float, n_steps: int) -> None:
        """Nothing to do."""


def _unbiased_std(variance: Tensor, count: float, alone: float) -> Tensor:
    """The unbiased standard deviation; `alone` for a single value, which has none."""
    return (variance * count / (count - 1)).sqrt() if count > 1 else torch.full_like(variance, alone)


class RunningMoments:
    """Mean and variance of everything seen so far, over all processes (parallel algorithm of Chan et al., 1979)."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.mean: Tensor | float = 0.0
        self.std: Tensor | float = 1.0
        """unbiased; 1 until two values were seen"""
        self.var: Tensor | float = 1.0
        """population variance"""
        self.count: float = 1e-24

    @torch.no_grad()
    def update(self, xs: Tensor) -> tuple[float, float]:
        """Take in a batch of any shape; `(mean, unbiased std)` of the batch alone (std 0 for a single value)."""
        mean, variance, counted = get_global_statistics(self.accelerator, xs, device=xs.device)
        count = counted.item()
        delta, seen = mean - self.mean, self.count + count
        squares = self.var * self.count + variance * count + delta**2 * self.count * count / seen
        self.mean = self.mean + delta * count / seen
        self.var = squares / seen
        self.count = seen
        self.std = _unbiased_std(self.var, seen, alone=1.0)
        return mean.item(), _unbiased_std(variance, count, alone=0.0).item()


class RewardShift:
    """BCO's reward shift: the running mean of all implicit rewards, `delta` in eq. 9 of arXiv:2404.04656.

    It is constant within an optimizer step, so micro-batches do not change it.
    """

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
        rewards = torch.cat(self._pending).cpu().double()  # MPS has no float64
        sums = torch.stack([rewards.sum(), rewards.new_tensor(float(len(rewards)))]).to(torch.float32)
        total, count = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
        self.total, self.count = self.total + total, self.count + count
        self._pending = []

    def state(self) -> dict[str, Any]:
        return {"total": self.total, "count": self.count, "pending": [x.cpu() for x in self._pending]}

    def load(self, state: dict[str, Any]) -> None:
        self.total, self.count, self._pending = state["total"], state["count"], list(state["pending"])


class PerPromptStatTracker:
    """Advantages of rewards against the recent rewards of their own prompt (DDPO, arXiv:2305.13301)."""

    def __init__(self, buffer_size: int, min_count: int) -> None:
        self.buffer_size = buffer_size
        self.min_count = min_count
        self.stats: dict[str, deque[float]] = {}

    def update(self, prompts: Sequence[str], rewards: ArrayLike) -> NDArray[np.floating[Any]]:
        """Normalised rewards [B]. A prompt with fewer than `min_count` rewards is measured against the batch."""
        names, values = np.asarray(prompts), np.asarray(rewards)
        if not np.issubdtype(values.dtype, np.floating):
            values = values.astype(np.float64)
        advantages = np.empty_like(values)
        for prompt in np.unique(names):
            own = values[names == prompt]
            recent = self.stats.setdefault(str(prompt), deque(maxlen=self.buffer_size))
            recent.extend(own.tolist())
            baseline = values if len(recent) < self.min_count else np.asarray(recent)
            advantages[names == prompt] = (own - np.mean(baseline)) / (np.std(baseline) + 1e-6)
        return advantages

    def get_stats(self) -> dict[str, dict[str, float]]:
        """`{prompt: {mean, std, count}}` of the rewards that are remembered."""
        return {
            prompt: {"mean": float(np.mean(recent)), "std": float(np.std(recent)), "count": len(recent)}
            for prompt, recent in self.stats.items()
        }


def exact_div(a: int, b: int, a_str: str, b_str: str, custom_error_message: str = "") -> int:
    """`a // b`, a ValueError with both names if something remains."""
    if a % b != 0:
        raise ValueError(f"{custom_error_message}, {a_str}={a}, {b_str}={b}, inexact division: {a} / {b} = {a / b}")
    return a // b
