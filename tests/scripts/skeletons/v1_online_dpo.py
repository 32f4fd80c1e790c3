"""Release 1.x, documentation: names and modules.

Rows: trl.experimental.online_dpo; OnlineDPOConfig.max_new_tokens.
"""

import tiny
from datasets import Dataset

from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer


def reward_len(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


training_args = OnlineDPOConfig(
    output_dir="online-dpo", max_new_tokens=6, max_length=128, beta=0.1, per_device_train_batch_size=2, max_steps=2,
    report_to="none",
)  # fmt: skip
trainer = OnlineDPOTrainer(
    model=tiny.folder("Qwen2-0.5B-Instruct"), reward_funcs=reward_len, args=training_args,
    processing_class=tiny.tokenizer(), train_dataset=Dataset.from_list(tiny.CHAT_PROMPTS),
)  # fmt: skip
trainer.train()
