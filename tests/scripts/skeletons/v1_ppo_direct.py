"""Release 1.x, documentation: older trainers.

Rows: trl.experimental.ppo; PPO of 0.12+.
"""

import tiny
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from trl.experimental.ppo import PPOConfig, PPOTrainer

tokenizer = tiny.tokenizer()
training_args = PPOConfig(
    output_dir="ppo", per_device_train_batch_size=2, total_episodes=4, response_length=5, stop_token="eos",
    optim="paged_adamw_8bit", bf16=True, save_total_limit=1, run_name="small",
)  # fmt: skip
trainer = PPOTrainer(
    args=training_args,
    processing_class=tokenizer,
    model=tiny.model(AutoModelForCausalLM),
    ref_model=tiny.model(AutoModelForCausalLM),
    reward_model=tiny.model(AutoModelForSequenceClassification, num_labels=1),
    value_model=tiny.model(AutoModelForSequenceClassification, num_labels=1),
    train_dataset=Dataset.from_list(tiny.CHAT_PROMPTS).remove_columns("solution"),
)
trainer.train()
trainer.train(resume_from_checkpoint=True)
