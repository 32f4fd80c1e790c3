"""Release 0.12-0.28, third party: overrides.

Rows: compute_loss(model, inputs) on model(**inputs).
"""

import tiny
from datasets import Dataset

from trl import SFTConfig, SFTTrainer


class WeightedSFTTrainer(SFTTrainer):
    """Half the model's own loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = 0.5 * outputs.loss
        return (loss, outputs) if return_outputs else loss


trainer = WeightedSFTTrainer(
    tiny.model(),
    args=SFTConfig(output_dir="half", max_steps=2, per_device_train_batch_size=2, report_to="none"),
    train_dataset=Dataset.from_list(tiny.COMPLETED),
    processing_class=tiny.tokenizer(),
)
trainer.train()
