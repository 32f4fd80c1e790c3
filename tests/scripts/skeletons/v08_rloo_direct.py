"""Release 0.9-0.11, third party: older trainers.

Rows: RLOO of 0.9-0.16 (config=, policy=, reward_model=).
"""

import tiny
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from trl import RLOOConfig, RLOOTrainer

tokenizer = tiny.tokenizer()
config = RLOOConfig(
    output_dir="rloo", exp_name="rloo_small", per_device_train_batch_size=2, gradient_accumulation_steps=1, rloo_k=2,
    num_mini_batches=2, num_ppo_epochs=2, total_episodes=8, response_length=5, stop_token_id=tokenizer.eos_token_id,
    missing_eos_penalty=1.0, kl_coef=0.03, cliprange=0.2, temperature=0.9, local_rollout_forward_batch_size=2,
    num_sample_generations=0, report_to="none",
)  # fmt: skip
rows = [{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in tiny.PROMPTS]
trainer = RLOOTrainer(
    config=config, processing_class=tokenizer, policy=tiny.model(AutoModelForCausalLM),
    ref_policy=tiny.model(AutoModelForCausalLM),
    reward_model=tiny.model(AutoModelForSequenceClassification, num_labels=1),
    train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:2]),
)  # fmt: skip
trainer.train()
assert trainer.state.global_step == 8, "2 batches, 2 passes, 2 optimizer steps of each"
trainer.save_model(config.output_dir)
trainer.generate_completions()
