"""Release 0.14-0.28, third party: settings.

Rows: GRPOConfig.warmup_ratio.
"""

import re

import tiny
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl import GRPOConfig, GRPOTrainer


def correctness_reward_func(prompts, completions, solution, **kwargs) -> list[float]:
    return [2.0 if right in c[0]["content"] else 0.0 for c, right in zip(completions, solution, strict=True)]


def strict_format_reward_func(completions, **kwargs) -> list[float]:
    return [0.5 if re.match(r"<reasoning>.*</reasoning>", c[0]["content"]) else 0.0 for c in completions]


model_name = tiny.folder("Qwen2.5-1.5B-Instruct")
training_args = GRPOConfig(
    output_dir="outputs/GRPO", run_name="GRPO-gsm8k", learning_rate=5e-6, adam_beta1=0.9, adam_beta2=0.99,
    weight_decay=0.1, warmup_ratio=0.1, lr_scheduler_type="cosine", logging_steps=1, bf16=True,
    optim="paged_adamw_8bit", per_device_train_batch_size=4, gradient_accumulation_steps=1, num_generations=4,
    max_completion_length=6, max_steps=1, save_steps=100, max_grad_norm=0.1, log_on_each_node=False, use_vllm=False,
    report_to="none",
)  # fmt: skip
model = AutoModelForCausalLM.from_pretrained(model_name)
tokenizer = AutoTokenizer.from_pretrained(model_name)
tokenizer.pad_token = tokenizer.eos_token
trainer = GRPOTrainer(
    model=model, processing_class=tokenizer, reward_funcs=[strict_format_reward_func, correctness_reward_func],
    args=training_args, train_dataset=Dataset.from_list(tiny.CHAT_PROMPTS),
)  # fmt: skip
trainer.train()
