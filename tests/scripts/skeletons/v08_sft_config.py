"""Release 0.9-0.11, course: settings.

Rows: SFTConfig.max_seq_length; SFTConfig.warmup_ratio.
"""

import tiny
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl import SFTConfig, SFTTrainer

model_id = tiny.folder("mistral")
model = AutoModelForCausalLM.from_pretrained(model_id)
tokenizer = AutoTokenizer.from_pretrained(model_id)
tokenizer.pad_token = tokenizer.eos_token
args = SFTConfig(
    output_dir="mistral-sft", num_train_epochs=1, per_device_train_batch_size=2, gradient_accumulation_steps=1,
    optim="adamw_torch", save_steps=10, logging_steps=1, learning_rate=2e-4, weight_decay=0.001, fp16=False, bf16=False,
    max_grad_norm=0.3, max_steps=2, warmup_ratio=0.03, group_by_length=True, lr_scheduler_type="constant",
    report_to="none", max_seq_length=64, packing=False, dataset_text_field="text",
)  # fmt: skip
trainer = SFTTrainer(
    model=model, train_dataset=Dataset.from_list(tiny.TEXTS), tokenizer=tokenizer, args=args,
    peft_config=LoraConfig(lora_alpha=16, lora_dropout=0.1, r=4, bias="none", task_type="CAUSAL_LM"),
)  # fmt: skip
trainer.train()
trainer.model.save_pretrained("mistral-new")
