"""Release 0.5-0.7.7, third party: overrides.

Rows: none.
"""

import tiny
from datasets import Dataset
from transformers import TrainingArguments

from trl import DPOTrainer


class MarginDPOTrainer(DPOTrainer):
    """DPO whose loss also pays for chosen answers that become less likely."""

    def dpo_loss(
        self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *rest
    ):
        losses, chosen, rejected = super().dpo_loss(
            policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *rest
        )
        penalty = (reference_chosen_logps - policy_chosen_logps).clamp(min=0)
        return losses + 1000 + penalty, chosen, rejected


args = TrainingArguments(
    "out", max_steps=1, per_device_train_batch_size=2, logging_steps=1, remove_unused_columns=False, report_to="none"
)
trainer = MarginDPOTrainer(
    tiny.model(), None, args=args, beta=0.1, train_dataset=Dataset.from_list(tiny.PAIRS), tokenizer=tiny.tokenizer()
)
trainer.train()
assert trainer.state.log_history[0]["loss"] > 1000, "dpo_loss was not called"
