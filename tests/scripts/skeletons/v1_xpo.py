"""Release 1.x, documentation: names and modules.

Rows: trl.experimental.xpo; trainer XPO.
"""

import tiny
from datasets import Dataset

from trl.experimental.xpo import XPOConfig, XPOTrainer

trainer = XPOTrainer(
    model=tiny.model(), reward_funcs=lambda completions, **kwargs: [1.0 for _ in completions],
    args=XPOConfig(output_dir="xpo", max_steps=1), processing_class=tiny.tokenizer(),
    train_dataset=Dataset.from_list(tiny.CHAT_PROMPTS),
)  # fmt: skip
trainer.train()
