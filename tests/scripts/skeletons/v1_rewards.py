"""Release 1.x, documentation: callbacks, chat and rewards.

Rows: get_cosine_scaled_reward; get_repetition_penalty_reward.
"""

import tiny
from datasets import Dataset

from trl import GRPOConfig, GRPOTrainer
from trl.rewards import get_cosine_scaled_reward, get_repetition_penalty_reward

trainer = GRPOTrainer(
    model=tiny.folder("Qwen2-0.5B"),
    reward_funcs=[get_cosine_scaled_reward(), get_repetition_penalty_reward(3, -1.0)],
    args=GRPOConfig(
        output_dir="g", per_device_train_batch_size=4, num_generations=2, max_completion_length=6, max_steps=1
    ),
    train_dataset=Dataset.from_list([row | {"solution": "$2$"} for row in tiny.CHAT_PROMPTS]),
)
trainer.train()
