"""Release 0.18-0.28, documentation: settings.

Rows: use_vllm=True; GRPOConfig.vllm_mode.
"""

import tiny
from datasets import Dataset

from trl import GRPOConfig, GRPOTrainer


def reward_num_unique_chars(completions, **kwargs):
    return [float(len(set(text))) for text in completions]


training_args = GRPOConfig(
    output_dir="grpo", use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.3,
    vllm_tensor_parallel_size=1, per_device_train_batch_size=4, num_generations=2, max_completion_length=6, max_steps=1,
    report_to="none",
)  # fmt: skip
trainer = GRPOTrainer(
    model=tiny.folder("Qwen2-7B"), args=training_args, reward_funcs=reward_num_unique_chars,
    train_dataset=Dataset.from_list(tiny.PROMPTS),
)  # fmt: skip
trainer.train()
