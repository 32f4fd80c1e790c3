"""Release 1.x, documentation: names and modules.

Rows: none.
"""

import tiny
from datasets import load_dataset

from trl import GRPOConfig, GRPOTrainer
from trl.rewards import think_format_reward


def reward_len(completions, **kwargs):
    return [-abs(5 - len(completion[0]["content"])) for completion in completions]


dataset = load_dataset(tiny.data("deepmath", tiny.CHAT_PROMPTS), split="train")
trainer = GRPOTrainer(
    model=tiny.folder("Qwen2.5-0.5B-Instruct"),
    args=GRPOConfig(max_steps=1, per_device_train_batch_size=4, num_generations=4, max_completion_length=6),
    reward_funcs=[think_format_reward, reward_len],
    train_dataset=dataset,
)
trainer.train()
