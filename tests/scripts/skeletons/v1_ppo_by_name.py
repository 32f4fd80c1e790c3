"""Release 1.x, third party: older trainers.

Rows: trl.experimental.ppo; PPO of 0.12+.
"""

import tiny
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trl import PPOConfig, PPOTrainer

tiny.folder("policy", chat=False)
tiny.reward_folder("scorer")
trainer = PPOTrainer(
    args=PPOConfig("by_name", output_dir="by_name", max_steps=2, per_device_train_batch_size=2, num_mini_batches=2),
    processing_class=AutoTokenizer.from_pretrained("policy"),
    model="policy",
    reward_model="scorer",
    value_model=AutoModelForSequenceClassification.from_pretrained("scorer", num_labels=1),
    train_dataset=Dataset.from_list(tiny.PROMPTS),
)
trainer.train()
assert trainer.state.global_step == 2
