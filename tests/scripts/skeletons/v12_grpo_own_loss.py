"""Release 0.18-0.28, third party: overrides.

Rows: none.
"""

import tiny
from datasets import Dataset

from trl import GRPOConfig, GRPOTrainer


class EntropyGRPOTrainer(GRPOTrainer):
    """GRPO whose loss comes from this class."""

    called = False

    def _compute_loss(self, model, inputs):
        self.called = True
        input_ids = inputs["completion_ids"]
        logits = model(input_ids=input_ids, attention_mask=inputs["completion_mask"]).logits
        return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


args = GRPOConfig(
    output_dir="g", per_device_train_batch_size=4, num_generations=2, max_completion_length=6, max_steps=1
)
tiny.folder("model")
trainer = EntropyGRPOTrainer(
    "model", args=args, reward_funcs=lambda completions, **kwargs: [float(len(c)) for c in completions],
    train_dataset=Dataset.from_list(tiny.PROMPTS),
)  # fmt: skip
trainer.train()
assert trainer.called, "_compute_loss was not called"
