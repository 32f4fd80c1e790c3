"""Release 0.12-0.28, third party: settings.

Rows: KTOConfig.warmup_ratio.
"""

import tiny
from datasets import Dataset

from trl import KTOConfig, KTOTrainer

args = KTOConfig(
    output_dir="kto", beta=0.1, desirable_weight=1.33, per_device_train_batch_size=2, max_steps=2,
    warmup_ratio=0.1, lr_scheduler_type="cosine", logging_dir="logs", save_safetensors=True, max_length=128,
    report_to="none",
)  # fmt: skip
trainer = KTOTrainer(
    model=tiny.model(), ref_model=tiny.model(), args=args, train_dataset=Dataset.from_list(tiny.UNPAIRED),
    processing_class=tiny.tokenizer(),
)  # fmt: skip
trainer.train()
