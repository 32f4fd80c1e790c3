"""Release 0.17-0.24, documentation: older trainers.

Rows: IterativeSFTConfig.
"""

import tiny

from trl import IterativeSFTConfig, IterativeSFTTrainer

tokenizer = tiny.tokenizer()
training_args = IterativeSFTConfig(
    output_dir="iterative", max_length=64, truncation_mode="keep_end", max_steps=2, per_device_train_batch_size=2,
    report_to="none",
)  # fmt: skip
trainer = IterativeSFTTrainer(tiny.model(), args=training_args, processing_class=tokenizer)
for _ in range(2):
    trainer.step(texts=[row["text"] for row in tiny.TEXTS[:2]])
