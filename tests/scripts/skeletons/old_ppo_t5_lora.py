"""Release 0.4-0.7.7, third party: older trainers.

Rows: none.
"""

import tiny
import torch
from peft import LoraConfig
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from trl import AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer

name = tiny.folder("flan-t5-tiny", AutoModelForSeq2SeqLM)
tokenizer = AutoTokenizer.from_pretrained(name)
lora_config = LoraConfig(r=4, lora_alpha=8, target_modules=["q", "v"], lora_dropout=0.0, task_type="SEQ_2_SEQ_LM")
model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(name, peft_config=lora_config, is_trainable=True)
config = PPOConfig(learning_rate=1.41e-4, batch_size=2, mini_batch_size=2, ppo_epochs=1, log_with=None)
ppo_trainer = PPOTrainer(config=config, model=model, ref_model=None, tokenizer=tokenizer)
queries = [tokenizer(row["prompt"], return_tensors="pt").input_ids[0] for row in tiny.PROMPTS[:2]]
responses = ppo_trainer.generate(queries, do_sample=True, max_new_tokens=5)
rewards = [torch.tensor(1.0), torch.tensor(-1.0)]
stats = ppo_trainer.step(queries, responses, rewards)
print(f"objective/kl: {stats['objective/kl']}", stats["ppo/loss/total"])
