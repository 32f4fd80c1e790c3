"""Reward functions that a user can name. Names are imported when first read (PEP 562)."""

from trl.import_utils import lazy_names

_names = {
    "trl.rewards.math_answers": [
        "accuracy_reward", "exact_match_reward", "get_cosine_scaled_reward", "reasoning_accuracy_reward",
    ],
    "trl.rewards.named": ["REWARDS", "reward_named"],
    "trl.rewards.panel": ["RewardError", "RewardPanel"],
    "trl.rewards.reward_model": ["RewardModel"],
    "trl.rewards.sentiment": ["sentiment_reward"],
    "trl.rewards.served_judge": ["ServedJudge"],
    "trl.rewards.texts": [
        "get_repetition_penalty_reward", "get_soft_overlong_punishment", "length_penalty", "pattern_reward",
        "repetition_penalty", "think_answer_format_reward", "think_format_reward",
    ],
}  # fmt: skip

__getattr__, __dir__, __all__ = lazy_names(__name__, _names)
