"""Release 0.12-0.28, course: settings.

Rows: DPOConfig.warmup_ratio.
"""

import tiny
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl import DPOConfig, DPOTrainer

name = tiny.folder("SmolLM2-135M-Instruct")
training_args = DPOConfig(
    per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=5e-5, lr_scheduler_type="cosine",
    max_steps=2, save_strategy="no", logging_steps=1, output_dir="smol_dpo_output", warmup_ratio=0.1, bf16=True,
    report_to="none", remove_unused_columns=False, beta=0.1, max_length=128,
)  # fmt: skip
trainer = DPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(name), args=training_args,
    train_dataset=Dataset.from_list(tiny.CHAT_PAIRS), processing_class=AutoTokenizer.from_pretrained(name),
)  # fmt: skip
trainer.train()
trainer.save_model("./smol_dpo")
