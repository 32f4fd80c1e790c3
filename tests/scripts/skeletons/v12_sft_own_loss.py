"""Release 0.12-0.28, third party: overrides.

Rows: compute_loss(model, inputs) on model(**inputs).
"""

import tiny
import torch
from datasets import Dataset

from trl import SFTConfig, SFTTrainer


class SmoothedSFTTrainer(SFTTrainer):
    """Cross entropy of the shifted labels with label smoothing."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs.logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.1)
        return (loss, outputs) if return_outputs else loss


args = SFTConfig(
    output_dir="smooth",
    max_steps=2,
    per_device_train_batch_size=2,
    padding_free=False,
    logging_steps=1,
    report_to="none",
)
trainer = SmoothedSFTTrainer(
    tiny.model(), args=args, train_dataset=Dataset.from_list(tiny.COMPLETED), processing_class=tiny.tokenizer()
)
trainer.train()
