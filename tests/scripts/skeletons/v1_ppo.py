"""Release 1.x, official example: older trainers.

Rows: trl.experimental.ppo; PPO of 0.12+; ScriptArguments; ModelConfig; get_peft_config; get_quantization_config;
get_kbit_device_map.

Run: python ppo.py --dataset_name sentiment --dataset_train_split train --learning_rate 3e-6 --output_dir ppo-out
    --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --num_ppo_epochs 1 --num_mini_batches 1
    --total_episodes 4 --model_name_or_path pythia --sft_model_path pythia --reward_model_path pythia-rm
    --local_rollout_forward_batch_size 2 --response_length 6 --missing_eos_penalty 1.0 --stop_token eos
    --num_sample_generations 0
"""

import tiny
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from trl import ModelConfig, ScriptArguments, get_kbit_device_map, get_peft_config, get_quantization_config
from trl.experimental.ppo import PPOConfig, PPOTrainer

parser = HfArgumentParser((ScriptArguments, PPOConfig, ModelConfig))
script_args, training_args, model_args = parser.parse_args_into_dataclasses()
tiny.folder(training_args.sft_model_path)
tiny.reward_folder(training_args.reward_model_path)
device_map = get_kbit_device_map() if get_quantization_config(model_args) is not None else None
tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, padding_side="left")
load_scorer = AutoModelForSequenceClassification.from_pretrained
value_model = load_scorer(training_args.reward_model_path, num_labels=1, device_map=device_map)
reward_model = load_scorer(training_args.reward_model_path, num_labels=1, device_map=device_map)
policy = AutoModelForCausalLM.from_pretrained(training_args.sft_model_path)
peft_config = get_peft_config(model_args)
ref_policy = AutoModelForCausalLM.from_pretrained(training_args.sft_model_path) if peft_config is None else None
dataset = load_dataset(tiny.data(script_args.dataset_name, tiny.PROMPTS), split=script_args.dataset_train_split)
dataset = dataset.map(lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns=["prompt"])
trainer = PPOTrainer(
    args=training_args, processing_class=tokenizer, model=policy, ref_model=ref_policy, reward_model=reward_model,
    value_model=value_model, train_dataset=dataset, eval_dataset=dataset, peft_config=peft_config,
)  # fmt: skip
trainer.train()
trainer.save_model(training_args.output_dir)
trainer.generate_completions()
