"""Release 0.12-0.28, official example: parsers.

Rows: ScriptArguments; ModelConfig; get_peft_config; get_quantization_config; get_kbit_device_map; setup_chat_format.

Run: python reward_modeling.py --model_name_or_path Qwen2-0.5B --dataset_name ultrafeedback --max_steps 2
    --output_dir Qwen2-0.5B-Reward --per_device_train_batch_size 2 --gradient_checkpointing True
    --learning_rate 1.0e-5 --eval_strategy steps --eval_steps 2 --max_length 256 --report_to none
    --use_peft --lora_task_type SEQ_CLS --lora_r 8 --lora_alpha 16
"""

import tiny
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from trl import (
    ModelConfig,
    RewardConfig,
    RewardTrainer,
    ScriptArguments,
    get_kbit_device_map,
    get_peft_config,
    get_quantization_config,
    setup_chat_format,
)

parser = HfArgumentParser((ScriptArguments, RewardConfig, ModelConfig))
script_args, training_args, model_args = parser.parse_args_into_dataclasses()
tiny.folder(model_args.model_name_or_path, AutoModelForSequenceClassification, chat=False, num_labels=1)
quantization_config = get_quantization_config(model_args)
device_map = get_kbit_device_map() if quantization_config is not None else None
tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, use_fast=True)
model = AutoModelForSequenceClassification.from_pretrained(
    model_args.model_name_or_path, num_labels=1, device_map=device_map
)
model.config.pad_token_id = tokenizer.pad_token_id
if tokenizer.chat_template is None:
    model, tokenizer = setup_chat_format(model, tokenizer)
dataset = load_dataset(tiny.data(script_args.dataset_name, tiny.CHAT_PAIRS))
trainer = RewardTrainer(
    model=model, processing_class=tokenizer, args=training_args, train_dataset=dataset[script_args.dataset_train_split],
    eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
    peft_config=get_peft_config(model_args),
)  # fmt: skip
trainer.train()
trainer.save_model(training_args.output_dir)
trainer.log_metrics("eval", trainer.evaluate())
