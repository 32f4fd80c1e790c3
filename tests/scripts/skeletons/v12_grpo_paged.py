"""Release 0.20-0.28, documentation: settings.

Rows: GRPOConfig.use_transformers_paged; GRPOConfig.cast_lm_head_to_fp32.
"""

import tiny
from datasets import Dataset

from trl import GRPOConfig, GRPOTrainer

training_args = GRPOConfig(
    output_dir="grpo", use_transformers_paged=True, cast_lm_head_to_fp32=True, ds3_gather_for_generation=True,
    use_liger_kernel=False, cache_implementation=None, per_device_train_batch_size=4, num_generations=2,
    max_completion_length=6, max_steps=1, report_to="none",
)  # fmt: skip
trainer = GRPOTrainer(
    model=tiny.folder("Qwen2-0.5B"), args=training_args, train_dataset=Dataset.from_list(tiny.PROMPTS),
    reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
)  # fmt: skip
trainer.train()
