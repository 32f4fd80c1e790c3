"""Release 0.21-0.28, documentation: callbacks, chat and rewards.

Rows: BEMACallback.
"""

import tiny
from datasets import Dataset

from trl import BEMACallback, SFTConfig, SFTTrainer

trainer = SFTTrainer(
    model=tiny.folder("Qwen3-0.6B"),
    args=SFTConfig(output_dir="bema", max_steps=4, per_device_train_batch_size=2, report_to="none"),
    train_dataset=Dataset.from_list(tiny.TEXTS),
    callbacks=[BEMACallback(update_freq=2, ema_power=0.5, bias_power=0.2, lag=10, update_after=0)],
)
trainer.train()
