"""Release 0.11, documentation: older trainers.

Rows: OnlineDPOTrainer(reward_model=); OnlineDPOConfig.max_new_tokens; OnlineDPOConfig.reward_model_path.
"""

import tiny
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trl import OnlineDPOConfig, OnlineDPOTrainer

args = OnlineDPOConfig(
    output_dir="online-dpo", reward_model_path=tiny.reward_folder("pythia-rm"), max_new_tokens=6, temperature=0.7,
    missing_eos_penalty=1.0, beta=0.1, per_device_train_batch_size=1, max_steps=2, logging_steps=1, report_to="none",
)  # fmt: skip
name = tiny.folder("pythia-sft")
tok = AutoTokenizer.from_pretrained(name, padding_side="left")
trainer = OnlineDPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(name),
    ref_model=AutoModelForCausalLM.from_pretrained(name),
    reward_model=AutoModelForSequenceClassification.from_pretrained(args.reward_model_path, num_labels=1),
    args=args, tokenizer=tok, train_dataset=Dataset.from_list(tiny.PROMPTS),
    eval_dataset=Dataset.from_list(tiny.PROMPTS[:2]),
)  # fmt: skip
trainer.train()
