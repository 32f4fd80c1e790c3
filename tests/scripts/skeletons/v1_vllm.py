"""Release 1.x, third party: settings.

Rows: use_vllm=True; GRPOConfig.vllm_mode; GRPOConfig.vllm_enable_sleep_mode; RLOOConfig.vllm_mode;
RLOOConfig.vllm_gpu_memory_utilization.
"""

import tiny
from datasets import Dataset

from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

common = {
    "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 6,
    "max_steps": 1, "use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.4,
    "vllm_max_model_length": 512, "report_to": "none",
}  # fmt: skip
name = tiny.folder("Qwen3-0.6B")
prompts = Dataset.from_list(tiny.PROMPTS)
shorter = lambda completions, **kwargs: [-float(len(text)) for text in completions]  # noqa: E731
args = GRPOConfig("grpo", vllm_enable_sleep_mode=True, vllm_importance_sampling_correction=True, **common)
GRPOTrainer(model=name, reward_funcs=shorter, args=args, train_dataset=prompts).train()
RLOOTrainer(model=name, reward_funcs=shorter, args=RLOOConfig("rloo", **common), train_dataset=prompts).train()
