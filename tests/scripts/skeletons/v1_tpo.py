"""Release 1.x, documentation: names and modules.

Rows: trl.experimental.tpo; trainer TPO.
"""

import tiny
from datasets import Dataset

from trl.experimental.tpo import TPOConfig, TPOTrainer

rows = [row | {"reference": row["chosen"]} for row in tiny.PAIRS]
trainer = TPOTrainer(
    model=tiny.model(), args=TPOConfig(output_dir="tpo", max_steps=1), processing_class=tiny.tokenizer(),
    train_dataset=Dataset.from_list(rows),
)  # fmt: skip
trainer.train()
