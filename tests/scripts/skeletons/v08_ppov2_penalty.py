"""Release 0.9-0.11, third party: older trainers.

Rows: PPOv2Config; PPOv2Trainer.
"""

import tiny
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DataCollatorWithPadding

from trl import PPOv2Config, PPOv2Trainer

tokenizer = tiny.tokenizer()
config = PPOv2Config(
    output_dir="ppov2", learning_rate=3e-6, per_device_train_batch_size=1, gradient_accumulation_steps=2,
    num_mini_batches=2, num_ppo_epochs=2, total_episodes=8, response_length=5, non_eos_penalty=True,
    penalty_reward_value=-1, stop_token="eos", kl_coef=0.05, whiten_rewards=True, local_rollout_forward_batch_size=1,
    num_sample_generations=1, bf16=False, report_to="none", warmup_ratio=0.1, save_strategy="no",
)  # fmt: skip
rows = [{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in tiny.PROMPTS]
trainer = PPOv2Trainer(
    config=config, tokenizer=tokenizer, policy=tiny.model(AutoModelForCausalLM),
    ref_policy=tiny.model(AutoModelForCausalLM),
    reward_model=tiny.model(AutoModelForSequenceClassification, num_labels=1),
    value_model=tiny.model(AutoModelForSequenceClassification, num_labels=1), train_dataset=Dataset.from_list(rows),
    data_collator=DataCollatorWithPadding(tokenizer), eval_dataset=Dataset.from_list(rows[:2]),
)  # fmt: skip
trainer.train()
trainer.save_model(config.output_dir)
table = trainer.generate_completions(sampling=True)
AutoModelForCausalLM.from_pretrained(config.output_dir)
