"""Release 0.15-0.24, official example: older trainers.

Rows: PPO of 0.12+; ModelConfig; ScriptArguments; get_peft_config.

Run: python ppo_tldr.py --dataset_name tldr --learning_rate 3e-6 --output_dir minimal/ppo_tldr
    --per_device_train_batch_size 1 --gradient_accumulation_steps 2 --num_ppo_epochs 1 --num_mini_batches 1
    --total_episodes 4 --model_name_or_path pythia --sft_model_path pythia --reward_model_path pythia-rm
    --local_rollout_forward_batch_size 2 --response_length 6 --missing_eos_penalty 1.0 --stop_token eos
    --eval_strategy steps --eval_steps 2 --num_sample_generations 2 --report_to none --use_peft --lora_r 4
"""

import tiny
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from trl import ModelConfig, PPOConfig, PPOTrainer, ScriptArguments, get_peft_config

parser = HfArgumentParser((ScriptArguments, PPOConfig, ModelConfig))
script_args, training_args, model_args = parser.parse_args_into_dataclasses()
tiny.folder(training_args.sft_model_path)
tiny.reward_folder(training_args.reward_model_path)
tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, padding_side="left")
value_model = AutoModelForSequenceClassification.from_pretrained(training_args.reward_model_path, num_labels=1)
reward_model = AutoModelForSequenceClassification.from_pretrained(training_args.reward_model_path, num_labels=1)
policy = AutoModelForCausalLM.from_pretrained(training_args.sft_model_path)
peft_config = get_peft_config(model_args)
ref_policy = AutoModelForCausalLM.from_pretrained(training_args.sft_model_path) if peft_config is None else None
dataset = load_dataset(tiny.data(script_args.dataset_name, tiny.CHAT_PROMPTS))


def tokenize(element):
    input_ids = tokenizer.apply_chat_template(element["prompt"], add_generation_prompt=True, return_dict=False)
    return {"input_ids": input_ids, "lengths": len(input_ids)}


dataset = dataset.map(tokenize, remove_columns=["prompt", "solution"]).filter(lambda row: row["lengths"] <= 512)
trainer = PPOTrainer(
    args=training_args, processing_class=tokenizer, model=policy, ref_model=ref_policy, reward_model=reward_model,
    value_model=value_model, train_dataset=dataset["train"], eval_dataset=dataset["test"], peft_config=peft_config,
)  # fmt: skip
trainer.train()
trainer.save_model(training_args.output_dir)
trainer.generate_completions()
