"""Sizes and rates of the quickstart: one set for a real model, one for a tiny model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Sizes and rates of the three stages. A line is a critic's quote, a step an optimizer step or a PPO step."""

    imitation_steps: int
    imitation_lines: int
    """lines in a step"""
    imitation_rate: float
    line_tokens: int
    """longer lines are cut"""

    reward_pairs: int
    """number of training pairs of rated lines; each is seen once"""
    reward_batch: int
    """pairs in a step"""
    reward_rate: float
    rating_gap: float
    """smallest difference of the two mean ratings (-4 to 4) in a training pair"""
    trained_layers: int
    """number of top layers of the reward model that are trained; the rest is frozen"""
    accuracy_pairs: int
    """number of held-out pairs, whose ratings differ by at least half a point"""

    ppo_steps: int
    ppo_lines: int
    """continuations in a step"""
    ppo_minibatch: int
    ppo_epochs: int
    ppo_rate: float
    kl_coefficient: float
    prompt_words: int
    new_tokens: int
    least_tokens: int
    """shortest continuation: an empty one must not be a way to a good reward"""
    temperature: float
    """temperature of sampling and of the trained policy"""
    measured_prompts: int
    """number of held-out prompts, each continued before and after PPO"""

    highest_kl: float
    """largest KL from the imitating model, in nats a continuation; above it the reward is not reliable and PPO stops"""
    lost_variety: float
    """fall of the distinct-word ratio at which PPO stops, because the text begins to repeat itself"""
    lora_share: float
    """share of the layers, counted from the top, that get adapters; 0: all weights are trained"""


SMALL = Recipe(
    imitation_steps=20, imitation_lines=16, imitation_rate=1e-3, line_tokens=48,
    reward_pairs=640, reward_batch=16, reward_rate=2e-4, rating_gap=1.0, trained_layers=3, accuracy_pairs=300,
    ppo_steps=12, ppo_lines=24, ppo_minibatch=12, ppo_epochs=2, ppo_rate=8e-4, kl_coefficient=0.05,
    prompt_words=4, new_tokens=14, least_tokens=8, temperature=1.0, measured_prompts=80,
    highest_kl=10.0, lost_variety=0.06, lora_share=0.4,
)  # fmt: skip

TINY = Recipe(
    imitation_steps=220, imitation_lines=32, imitation_rate=3e-3, line_tokens=64,
    reward_pairs=800, reward_batch=16, reward_rate=2e-4, rating_gap=1.0, trained_layers=3, accuracy_pairs=200,
    ppo_steps=40, ppo_lines=48, ppo_minibatch=24, ppo_epochs=2, ppo_rate=5e-4, kl_coefficient=0.1,
    prompt_words=4, new_tokens=16, least_tokens=12, temperature=0.7, measured_prompts=256,
    highest_kl=12.0, lost_variety=0.1, lora_share=0.0,
)  # fmt: skip
