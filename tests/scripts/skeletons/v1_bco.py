"""Release 1.x, documentation: names and modules.

Rows: trl.experimental.bco; trainer BCO.
"""

import tiny
from datasets import Dataset

from trl.experimental.bco import BCOConfig, BCOTrainer

args = BCOConfig(
    output_dir="bco",
    beta=0.1,
    per_device_train_batch_size=2,
    max_steps=2,
    max_length=128,
    logging_steps=1,
    report_to="none",
)
trainer = BCOTrainer(
    model=tiny.model(), ref_model=tiny.model(), args=args, train_dataset=Dataset.from_list(tiny.UNPAIRED),
    processing_class=tiny.tokenizer(),
)  # fmt: skip
trainer.train()
