"""What the stages of the quickstart measured."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl.quickstart.intervals import Interval


@dataclass
class Imitation:
    """What the first stage did."""

    losses: list[float]
    heldout_before: float
    """nats a token on lines of other films"""
    heldout_after: float


@dataclass
class Preference:
    """What the second stage did."""

    losses: list[float]
    pairs: int
    accuracy: Interval
    """of the reward model on held-out pairs"""
    judge_accuracy: Interval
    """of the judge on the same pairs"""


@dataclass
class Reading:
    """What one model wrote for the held-out prompts, and what it is worth."""

    texts: list[str]
    reward: list[float]
    judge: list[float]
    variety: list[float]
    kl: list[float]
    """log p - log p_ref of each continuation, in nats"""


@dataclass
class Reinforcement:
    """What the third stage did."""

    prompts: list[str]
    before: Reading
    after: Reading
    history: dict[str, list[float]] = field(default_factory=dict)
    """a list for each curve, a number a step"""
    ending: str = ""
