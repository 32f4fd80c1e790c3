"""Release 0.4-0.7.7, official example: names and modules.

Rows: none.
"""

import tiny
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trl import RewardConfig, RewardTrainer

name = tiny.reward_folder("opt-350m")
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)


def preprocess_function(examples):
    rows = {}
    for side in ("chosen", "rejected"):
        encoded = tokenizer(examples[side])
        rows[f"input_ids_{side}"] = encoded["input_ids"]
        rows[f"attention_mask_{side}"] = encoded["attention_mask"]
    return rows


dataset = Dataset.from_list(tiny.PAIRS).map(preprocess_function, batched=True)
dataset = dataset.filter(lambda row: len(row["input_ids_chosen"]) <= 64 and len(row["input_ids_rejected"]) <= 64)
reward_config = RewardConfig(
    output_dir="output", per_device_train_batch_size=2, num_train_epochs=1, gradient_accumulation_steps=1,
    learning_rate=1.41e-5, report_to="none", remove_unused_columns=False, optim="adamw_torch", logging_steps=1,
    evaluation_strategy="no", max_length=64,
)  # fmt: skip
trainer = RewardTrainer(
    model=model, tokenizer=tokenizer, args=reward_config, train_dataset=dataset, eval_dataset=dataset, peft_config=None
)
trainer.train()
