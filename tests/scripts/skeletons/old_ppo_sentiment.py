"""Release 0.4-0.7.7, official example: older trainers.

Rows: none.
"""

import tiny
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, set_seed
from trl.core import LengthSampler

config = PPOConfig(
    model_name=tiny.folder("gpt2-imdb"), learning_rate=1.41e-5, batch_size=2, mini_batch_size=1, ppo_epochs=2, target=6
)
set_seed(config.seed)
tokenizer = AutoTokenizer.from_pretrained(config.model_name)
tokenizer.pad_token = tokenizer.eos_token
input_size = LengthSampler(2, 8)


def tokenize(sample):
    sample["input_ids"] = tokenizer.encode(sample["text"])[: input_size()]
    sample["query"] = tokenizer.decode(sample["input_ids"])
    return sample


dataset = Dataset.from_list(tiny.TEXTS).map(tokenize, batched=False)
dataset.set_format(type="torch")
model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
ref_model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
collator = lambda data: {key: [row[key] for row in data] for key in data[0]}  # noqa: E731
ppo_trainer = PPOTrainer(config, model, ref_model, tokenizer, dataset=dataset, data_collator=collator)
sampling = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "max_new_tokens": 6}
for batch in ppo_trainer.dataloader:
    responses = ppo_trainer.generate(batch["input_ids"], return_prompt=False, pad_token_id=0, **sampling)
    batch["response"] = tokenizer.batch_decode(responses)
    rewards = [torch.tensor(float(len(text))) for text in batch["response"]]
    stats = ppo_trainer.step(batch["input_ids"], responses, rewards)
    ppo_trainer.log_stats(stats, batch, rewards)
ppo_trainer.save_pretrained("gpt2-imdb-pos")
