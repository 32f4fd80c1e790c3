"""Release 0.9-0.11, documentation: names and modules.

Rows: trainer BCO.
"""

import tiny
from datasets import Dataset

from trl import BCOConfig, BCOTrainer

training_args = BCOConfig(
    output_dir="bco", beta=0.1, per_device_train_batch_size=2, max_steps=2, max_length=96, max_prompt_length=64,
    logging_steps=1, report_to="none",
)  # fmt: skip
bco_trainer = BCOTrainer(
    tiny.model(), tiny.model(), args=training_args, train_dataset=Dataset.from_list(tiny.UNPAIRED),
    tokenizer=tiny.tokenizer(),
)  # fmt: skip
bco_trainer.train()
