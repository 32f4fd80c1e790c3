"""Release 0.14-0.23, official example: parsers.

Rows: parse:GRPO family; TrlParser; ScriptArguments; ModelConfig; get_peft_config; GRPOConfig.vllm_mode.

Run: python grpo.py --model_name_or_path Qwen2-0.5B --dataset_name math --reward_model_name_or_path rm
    --output_dir grpo-out --max_steps 1 --per_device_train_batch_size 4 --num_generations 4
    --max_completion_length 6 --learning_rate 1e-5 --vllm_mode colocate --use_vllm False --report_to none
    --use_peft --lora_r 8
"""

from dataclasses import dataclass, field

import tiny
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config


@dataclass
class GRPOScriptArguments(ScriptArguments):
    """The data, and who gives rewards."""

    reward_model_name_or_path: str | None = field(default=None, metadata={"help": "name of a reward model"})


parser = TrlParser((GRPOScriptArguments, GRPOConfig, ModelConfig))
script_args, training_args, model_args = parser.parse_args_and_config()
tiny.folder(model_args.model_name_or_path)
tiny.reward_folder(script_args.reward_model_name_or_path)
tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
reward_model = AutoModelForSequenceClassification.from_pretrained(script_args.reward_model_name_or_path, num_labels=1)
dataset = load_dataset(tiny.data(script_args.dataset_name, tiny.CHAT_PROMPTS))
trainer = GRPOTrainer(
    model=model_args.model_name_or_path, reward_funcs=reward_model, args=training_args,
    train_dataset=dataset[script_args.dataset_train_split],
    eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
    processing_class=tokenizer, peft_config=get_peft_config(model_args),
)  # fmt: skip
trainer.train()
trainer.save_model(training_args.output_dir)
