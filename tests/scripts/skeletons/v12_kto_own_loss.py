"""Release 0.12-0.28, third party: overrides.

Rows: none.
"""

import tiny
from datasets import Dataset

from trl import KTOConfig, KTOTrainer


class ShiftedKTOTrainer(KTOTrainer):
    """KTO whose losses are shifted by a thousand."""

    def kto_loss(self, *logps):
        losses, *rest = super().kto_loss(*logps)
        return (losses + 1000, *rest)


args = KTOConfig(output_dir="kto", per_device_train_batch_size=2, max_steps=1, logging_steps=1, report_to="none")
trainer = ShiftedKTOTrainer(
    model=tiny.model(), ref_model=tiny.model(), args=args, train_dataset=Dataset.from_list(tiny.UNPAIRED),
    processing_class=tiny.tokenizer(),
)  # fmt: skip
trainer.train()
assert trainer.state.log_history[0]["loss"] > 500, "kto_loss was not called"
