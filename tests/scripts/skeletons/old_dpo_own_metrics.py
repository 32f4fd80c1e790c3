"""Release 0.5-0.11, third party: overrides.

Rows: none.
"""

import tiny
from datasets import Dataset
from transformers import TrainingArguments

from trl import DPOTrainer


class SFTRegularisedDPOTrainer(DPOTrainer):
    """DPO that adds the likelihood of the chosen answers to the loss of the batch."""

    called = False

    def get_batch_loss_metrics(self, model, batch, train_eval="train"):
        self.called = True
        loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)
        chosen_logps = self.concatenated_forward(model, batch)[0]
        return loss - 0.1 * chosen_logps.mean(), metrics


args = TrainingArguments(
    "out", max_steps=1, per_device_train_batch_size=2, remove_unused_columns=False, report_to="none"
)
trainer = SFTRegularisedDPOTrainer(
    tiny.model(), None, args=args, beta=0.1, train_dataset=Dataset.from_list(tiny.PAIRS), tokenizer=tiny.tokenizer()
)
trainer.train()
assert trainer.called, "get_batch_loss_metrics was not called"
