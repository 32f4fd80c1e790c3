"""Release 0.9-0.11, official example: older trainers.

Rows: PPOv2Config; PPOv2Trainer; SIMPLE_CHAT_TEMPLATE; ModelConfig.

Run: python ppo.py --learning_rate 3e-6 --output_dir minimal/ppo --per_device_train_batch_size 2
    --gradient_accumulation_steps 1 --num_ppo_epochs 1 --num_mini_batches 1 --total_episodes 4
    --model_name_or_path pythia --sft_model_path pythia --reward_model_path pythia-rm
    --local_rollout_forward_batch_size 2 --response_length 6 --missing_eos_penalty 1.0 --stop_token eos
    --num_sample_generations 0 --report_to none
"""

import tiny
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from trl import ModelConfig
from trl.trainer.ppov2_trainer import PPOv2Config, PPOv2Trainer
from trl.trainer.utils import SIMPLE_CHAT_TEMPLATE

config, model_config = HfArgumentParser((PPOv2Config, ModelConfig)).parse_args_into_dataclasses()
tiny.folder(config.sft_model_path, chat=False)
tiny.reward_folder(config.reward_model_path)
tokenizer = AutoTokenizer.from_pretrained(model_config.model_name_or_path, padding_side="left")
tokenizer.add_special_tokens({"pad_token": "<pad>"})
if tokenizer.chat_template is None:
    tokenizer.chat_template = SIMPLE_CHAT_TEMPLATE
value_model = AutoModelForSequenceClassification.from_pretrained(config.reward_model_path, num_labels=1)
reward_model = AutoModelForSequenceClassification.from_pretrained(config.reward_model_path, num_labels=1)
ref_policy = AutoModelForCausalLM.from_pretrained(config.sft_model_path)
policy = AutoModelForCausalLM.from_pretrained(config.sft_model_path)
dataset = Dataset.from_list(tiny.PROMPTS).map(
    lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns=["prompt"]
)
trainer = PPOv2Trainer(
    config=config, tokenizer=tokenizer, policy=policy, ref_policy=ref_policy, reward_model=reward_model,
    value_model=value_model, train_dataset=dataset.select(range(4)), eval_dataset=dataset.select(range(4, 6)),
)  # fmt: skip
trainer.train()
trainer.save_model(config.output_dir)
