"""Release 1.x, documentation: callbacks, chat and rewards.

Rows: WeaveCallback.
"""

import tiny
from datasets import Dataset

from trl import DPOConfig, DPOTrainer, WeaveCallback

trainer = DPOTrainer(
    tiny.model(),
    args=DPOConfig(output_dir="dpo", max_steps=1, eval_strategy="steps", eval_steps=1, report_to="none"),
    train_dataset=Dataset.from_list(tiny.PAIRS),
    eval_dataset=Dataset.from_list(tiny.PAIRS[:2]),
    processing_class=tiny.tokenizer(),
)
trainer.add_callback(WeaveCallback(trainer=trainer, project_name="dpo-training", num_prompts=2))
trainer.train()
