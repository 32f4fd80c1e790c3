"""Release 0.8, course: callbacks, chat and rewards.

Rows: 0.8 style packing=True on messages; setup_chat_format.
"""

import tiny
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from trl import SFTTrainer, setup_chat_format

dataset = load_dataset("json", data_files=tiny.jsonl("train_dataset.json", tiny.MESSAGES * 4), split="train")
model_id = tiny.folder("codellama", chat=False)
model = AutoModelForCausalLM.from_pretrained(model_id)
tokenizer = AutoTokenizer.from_pretrained(model_id)
tokenizer.padding_side = "right"
model, tokenizer = setup_chat_format(model, tokenizer)
args = TrainingArguments(
    output_dir="code-llama-text-to-sql", max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=2,
    logging_steps=1, save_strategy="no", learning_rate=2e-4, max_grad_norm=0.3, lr_scheduler_type="constant",
    report_to="none",
)  # fmt: skip
peft_config = LoraConfig(
    lora_alpha=8, lora_dropout=0.05, r=4, bias="none", target_modules="all-linear", task_type="CAUSAL_LM"
)
trainer = SFTTrainer(
    model=model, args=args, train_dataset=dataset, peft_config=peft_config, max_seq_length=128, tokenizer=tokenizer,
    packing=True, dataset_kwargs={"add_special_tokens": False, "append_concat_token": False},
)  # fmt: skip
trainer.train()
trainer.save_model()
