"""Release 0.12-0.14, course: older trainers.

Rows: PPO of 0.12+.
"""

import tiny
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from trl import PPOConfig, PPOTrainer


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2
        return control


tokenizer = tiny.tokenizer()
args = PPOConfig(
    output_dir="ppo", per_device_train_batch_size=2, num_train_epochs=2, num_ppo_epochs=1, response_length=5,
    stop_token="eos", missing_eos_penalty=0.5, learning_rate=1e-4, lr_scheduler_type="cosine", warmup_steps=1,
    weight_decay=0.01, max_grad_norm=1.0, logging_steps=1, save_strategy="steps", save_steps=1, seed=7,
    report_to="none", gradient_checkpointing=True, num_sample_generations=0,
)  # fmt: skip
args.gradient_checkpointing_kwargs = {"use_reentrant": False}
rows = [{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in tiny.PROMPTS]
scorer = AutoModelForSequenceClassification
trainer = PPOTrainer(
    args, tokenizer, tiny.model(AutoModelForCausalLM), tiny.model(AutoModelForCausalLM),
    tiny.model(scorer, num_labels=1), Dataset.from_list(rows), tiny.model(scorer, num_labels=1), callbacks=[Stop()],
)  # fmt: skip
trainer.train()
assert trainer.state.global_step == 2, "a callback stopped it"
assert {"objective/kl", "objective/rlhf_reward", "policy/approxkl_avg", "episode"} <= set(trainer.state.log_history[-1])
