"""95 % intervals of means and shares."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


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


def paired_share_interval(gained: int, lost: int, n: int, confidence: float = 0.95) -> Interval:
    """Share of trials that `gained` less that which `lost`, of n pairs, as Bonett and Price (2012) have it.

    Two trials are added of which one gains and one loses, so that n pairs alike do not pass for certainty.
    """
    from scipy.stats import norm

    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = float(norm.ppf((1 + confidence) / 2)) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return Interval((gained - lost) / n, max(-1.0, up - down - half), min(1.0, up - down + half), n)


# -- by resampling the rows ----------------------------------------------------------------------

CELLS = 4_000_000
"""numbers that a batch of resampled rows may have"""


@dataclass(frozen=True)
class Measure:
    """A figure of one model on some rows: the sum of `totals` over the sum of `counts`."""

    name: str
    totals: np.ndarray
    """of each row; nan where the row has none"""
    counts: np.ndarray
    """of each row what its total is divided by: its tokens, or 1"""
    better: int = 1
    """1: more is better, -1: less is better, 0: neither"""

    @property
    def known(self) -> np.ndarray:
        """Which rows have a number."""
        return np.isfinite(self.totals) & (self.counts > 0)

    @property
    def value(self) -> float:
        kept = self.known
        return float(self.totals[kept].sum() / self.counts[kept].sum()) if kept.any() else math.nan


def bootstrap(columns: Sequence[np.ndarray], figure: Callable[..., Any], confidence: float = 0.95) -> Interval:
    """An interval of a figure of rows, which are drawn again and again with all their columns (BCa, Efron 1987).

    figure: of columns of numbers, along their last axis. The same rows give the same interval. One row has none: nan.
    """
    from scipy.stats import bootstrap as resampled

    rows, value = len(columns[0]), float(figure(*columns, axis=-1))
    if rows < 2:
        return Interval(value, math.nan, math.nan, rows)
    if all(np.ptp(column) == 0 for column in columns):
        return Interval(value, value, value, rows)
    settings: dict[str, Any] = {
        "paired": True, "vectorized": True, "axis": -1, "confidence_level": confidence, "n_resamples": 9999,
        "batch": max(1, CELLS // rows), "rng": 0,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of figures that hardly vary: seen below
        found = resampled(columns, figure, method="BCa", **settings).confidence_interval
        if not (math.isfinite(found.low) and math.isfinite(found.high)):
            found = resampled(columns, figure, method="percentile", **settings).confidence_interval
    return Interval(value, float(found.low), float(found.high), rows)


def _ratio(totals: Any, counts: Any, axis: int = -1) -> Any:
    return totals.sum(axis) / counts.sum(axis)


def _gain(totals: Any, counts: Any, others: Any, other_counts: Any, axis: int = -1) -> Any:
    return _ratio(others, other_counts, axis) - _ratio(totals, counts, axis)


def _hits(totals: np.ndarray, counts: np.ndarray) -> int | None:
    """Rows that have it, where each row either has it wholly (1) or not at all (0) and counts alike; else None."""
    rates = totals / counts
    if len(rates) < 2 or not np.isin(rates, (0, 1)).all() or (np.ptp(counts) > 0 and np.ptp(rates) > 0):
        return None
    return int(rates.sum())


def interval_of(measure: Measure) -> Interval:
    """The figure with its interval; that of a share, by Wilson, where each row is a 0 or a 1."""
    kept = measure.known
    if not kept.any():
        return Interval(math.nan, math.nan, math.nan, 0)
    columns = measure.totals[kept], measure.counts[kept]
    hits = _hits(*columns)
    return bootstrap(columns, _ratio) if hits is None else share_interval(hits, len(columns[0]))


def difference(before: Measure, after: Measure) -> Interval:
    """The paired difference `after - before` on the rows that both have a number for."""
    kept = before.known & after.known
    if not kept.any():
        return Interval(math.nan, math.nan, math.nan, 0)
    columns = [one[kept] for each in (before, after) for one in (each.totals, each.counts)]
    return _of_shares(*columns) or bootstrap(columns, _gain)


def _of_shares(totals: np.ndarray, counts: np.ndarray, others: np.ndarray, other_counts: np.ndarray) -> Interval | None:
    """The difference where all rows of 0 and 1 change alike, of which resampling makes a certainty; else None."""
    gains, hits, n = others / other_counts - totals / counts, _hits(others, other_counts), len(totals)
    if hits is None or np.ptp(gains) > 0:
        return None
    if _hits(totals, counts) is not None:
        return paired_share_interval(n * int(gains[0] > 0), n * int(gains[0] < 0), n)
    share, fixed = share_interval(hits, n), float(totals[0] / counts[0])  # such as the half that equal models win
    return Interval(share.mean - fixed, share.low - fixed, share.high - fixed, n)
