"""Results of the quickstart's stages."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl.reports.intervals import Interval


@dataclass
class Imitation:
    """Result of the first stage, imitation."""

    losses: list[float]
    heldout_before: float
    """loss on lines of other films, in nats a token"""
    heldout_after: float


@dataclass
class Preference:
    """Result of the second stage, the reward model."""

    losses: list[float]
    pairs: int
    accuracy: Interval
    """accuracy of the reward model on held-out pairs"""
    judge_accuracy: Interval
    """accuracy of the judge on the same pairs"""


@dataclass
class Reading:
    """The continuations of the held-out prompts by one model, and their scores."""

    texts: list[str]
    reward: list[float]
    judge: list[float]
    variety: list[float]
    kl: list[float]
    """log p - log p_ref of each continuation, in nats"""


@dataclass
class Reinforcement:
    """Result of the third stage, PPO."""

    prompts: list[str]
    before: Reading
    after: Reading
    history: dict[str, list[float]] = field(default_factory=dict)
    """curve -> its value at each step"""
    ending: str = ""
