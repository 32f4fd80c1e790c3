"""Release 0.18-0.28, documentation: settings.

Rows: SFTConfig.activation_offloading.
"""

import tiny
from datasets import Dataset

from trl import SFTConfig, SFTTrainer

training_args = SFTConfig(
    output_dir="sft", activation_offloading=True, pad_to_multiple_of=8, use_liger_kernel=True, max_length=128,
    per_device_train_batch_size=2, max_steps=2, report_to="none",
)  # fmt: skip
trainer = SFTTrainer(
    model=tiny.folder("Qwen3-0.6B"), args=training_args, train_dataset=Dataset.from_list(tiny.COMPLETED)
)
trainer.train()
