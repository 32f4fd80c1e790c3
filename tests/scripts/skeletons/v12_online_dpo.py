"""Release 0.12-0.24, official example: older trainers.

Rows: OnlineDPOConfig.max_new_tokens; OnlineDPOConfig.reward_model_path; LogCompletionsCallback; SIMPLE_CHAT_TEMPLATE;
ScriptArguments; ModelConfig; TrlParser; get_quantization_config.

Run: python dpo_online.py --model_name_or_path pythia --reward_model_path pythia-rm --dataset_name tldr
    --learning_rate 5.0e-7 --output_dir online-dpo --per_device_train_batch_size 2 --max_new_tokens 6 --max_steps 2
    --warmup_ratio 0.1 --missing_eos_penalty 1.0 --eval_strategy steps --eval_steps 2 --report_to none
"""

import tiny
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from trl import (
    LogCompletionsCallback,
    ModelConfig,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    ScriptArguments,
    TrlParser,
    get_quantization_config,
)
from trl.trainer.utils import SIMPLE_CHAT_TEMPLATE

parser = TrlParser((ScriptArguments, OnlineDPOConfig, ModelConfig))
script_args, training_args, model_args = parser.parse_args_and_config()
name = tiny.folder(model_args.model_name_or_path)
tiny.reward_folder(training_args.reward_model_path)
assert get_quantization_config(model_args) is None
reward_model = AutoModelForSequenceClassification.from_pretrained(training_args.reward_model_path, num_labels=1)
reward_tokenizer = AutoTokenizer.from_pretrained(training_args.reward_model_path, truncation_side="left")
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
if tokenizer.chat_template is None:
    tokenizer.chat_template = SIMPLE_CHAT_TEMPLATE
dataset = load_dataset(tiny.data(script_args.dataset_name, tiny.CHAT_PROMPTS))
trainer = OnlineDPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(name), reward_model=reward_model, args=training_args,
    train_dataset=dataset["train"], eval_dataset=dataset["test"], processing_class=tokenizer,
    reward_processing_class=reward_tokenizer,
)  # fmt: skip
generation_config = GenerationConfig(max_new_tokens=training_args.max_new_tokens, do_sample=True)
trainer.add_callback(LogCompletionsCallback(trainer, generation_config, num_prompts=2))
trainer.train()
