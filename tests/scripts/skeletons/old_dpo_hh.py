"""Release 0.5-0.7.7, official example: names and modules.

Rows: none.
"""

import tiny
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from trl import DPOTrainer, create_reference_model

name = tiny.folder("gpt2")
model = AutoModelForCausalLM.from_pretrained(name)
model_ref = create_reference_model(model)
tokenizer = AutoTokenizer.from_pretrained(name)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
dataset = Dataset.from_list(tiny.PAIRS)
training_args = TrainingArguments(
    per_device_train_batch_size=2, max_steps=3, remove_unused_columns=False, gradient_accumulation_steps=1,
    learning_rate=1e-3, output_dir="./test", report_to="none", logging_steps=1, warmup_steps=1, optim="rmsprop",
)  # fmt: skip
dpo_trainer = DPOTrainer(
    model, model_ref, args=training_args, beta=0.1, train_dataset=dataset, eval_dataset=dataset.select(range(2)),
    tokenizer=tokenizer, max_length=96, max_target_length=32, max_prompt_length=64,
)  # fmt: skip
dpo_trainer.train()
print(dpo_trainer.evaluate()["eval_rewards/accuracies"])
