"""A window: `RewardConfig` under the module that users import it from."""

from trl.trainer.reward_config import RewardConfig

__all__ = ["RewardConfig"]
