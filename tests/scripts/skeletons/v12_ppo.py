"""Release 0.12, official example: older trainers.

Rows: PPO of 0.12+; SIMPLE_CHAT_TEMPLATE; ScriptArguments; ModelConfig; get_quantization_config; get_kbit_device_map.

Run: python ppo.py --dataset_name sentiment --learning_rate 3e-6 --output_dir minimal/ppo --stop_token eos
    --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --num_ppo_epochs 1 --num_mini_batches 1
    --total_episodes 4 --model_name_or_path pythia --sft_model_path pythia --reward_model_path pythia-rm
    --local_rollout_forward_batch_size 2 --response_length 6 --missing_eos_penalty 1.0 --kl_coef 0.05
    --num_sample_generations 0 --report_to none
"""

import tiny
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from trl import ModelConfig, PPOConfig, PPOTrainer, ScriptArguments, get_kbit_device_map, get_quantization_config
from trl.trainer.utils import SIMPLE_CHAT_TEMPLATE

parser = HfArgumentParser((ScriptArguments, PPOConfig, ModelConfig))
script_args, training_args, model_config = parser.parse_args_into_dataclasses()
tiny.folder(training_args.sft_model_path, chat=False)
tiny.reward_folder(training_args.reward_model_path)
quantization_config = get_quantization_config(model_config)
device_map = get_kbit_device_map() if quantization_config is not None else None
tokenizer = AutoTokenizer.from_pretrained(model_config.model_name_or_path, padding_side="left")
if tokenizer.chat_template is None:
    tokenizer.chat_template = SIMPLE_CHAT_TEMPLATE
classifier = AutoModelForSequenceClassification
value_model = classifier.from_pretrained(training_args.reward_model_path, num_labels=1, device_map=device_map)
reward_model = classifier.from_pretrained(training_args.reward_model_path, num_labels=1)
ref_policy = AutoModelForCausalLM.from_pretrained(training_args.sft_model_path)
policy = AutoModelForCausalLM.from_pretrained(training_args.sft_model_path)
dataset = load_dataset(tiny.data(script_args.dataset_name, tiny.PROMPTS))
dataset = dataset.map(lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns=["prompt"])
trainer = PPOTrainer(
    config=training_args, processing_class=tokenizer, policy=policy, ref_policy=ref_policy, reward_model=reward_model,
    value_model=value_model, train_dataset=dataset["train"], eval_dataset=dataset["test"],
)  # fmt: skip
trainer.train()
trainer.save_model(training_args.output_dir)
