"""Release 1.x, documentation: callbacks, chat and rewards.

Rows: SFTConfig.chat_template_path of a folder.
"""

import tiny
from datasets import Dataset

from trl import SFTConfig, SFTTrainer

trainer = SFTTrainer(
    model=tiny.folder("Qwen3-0.6B-Base", chat=False),
    args=SFTConfig(
        output_dir="Qwen3-0.6B-Instruct",
        chat_template_path=tiny.folder("SmolLM3-3B"),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to="none",
    ),
    train_dataset=Dataset.from_list(tiny.MESSAGES),
)
trainer.train()
