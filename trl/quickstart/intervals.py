"""95 % intervals of means and shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % confidence interval."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def above_zero(self) -> bool:
        return self.low > 0

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of independent values, by Student's t."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs at least 2 values, got {n}")
    if not all(map(math.isfinite, values)):
        raise ValueError("an interval needs finite values; one of them is not finite")
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = float(t.ppf((1 + confidence) / 2, n - 1)) * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half, n)


def gain_interval(before: Sequence[float], after: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of the paired differences `after - before`: differences between prompts cancel out."""
    return mean_interval([b - a for a, b in zip(before, after, strict=True)], confidence)


def share_interval(hits: int, n: int, confidence: float = 0.95) -> Interval:
    """Share of hits among n independent trials, by Wilson's score."""
    from scipy.stats import binomtest

    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"hits={hits}, n={n}: give 0 <= hits <= n and n > 0")
    bounds = binomtest(hits, n).proportion_ci(confidence, method="wilson")
    return Interval(hits / n, float(bounds.low), float(bounds.high), n)
