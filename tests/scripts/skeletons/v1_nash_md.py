"""Release 1.x, documentation: names and modules.

Rows: trl.experimental.nash_md; trainer NashMD.
"""

import tiny
from datasets import Dataset

from trl.experimental.nash_md import NashMDConfig, NashMDTrainer

trainer = NashMDTrainer(
    model=tiny.model(), reward_funcs=lambda completions, **kwargs: [1.0 for _ in completions],
    args=NashMDConfig(output_dir="nash-md", max_steps=1), processing_class=tiny.tokenizer(),
    train_dataset=Dataset.from_list(tiny.CHAT_PROMPTS),
)  # fmt: skip
trainer.train()
