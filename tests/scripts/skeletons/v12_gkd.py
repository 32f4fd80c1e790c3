"""Release 0.12-0.28, official example: older trainers.

Rows: GKDConfig.max_new_tokens; GKDConfig.seq_kd; teacher given by both argument and config; LogCompletionsCallback;
ScriptArguments; ModelConfig; TrlParser; get_peft_config.

Run: python gkd.py --model_name_or_path Qwen2-0.5B --teacher_model_name_or_path Qwen2-1.5B --dataset_name chatbot
    --learning_rate 2e-5 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --output_dir gkd-model
    --max_steps 2 --max_new_tokens 6 --lmbda 0.5 --beta 0.5 --seq_kd False --eval_strategy steps --eval_steps 2
    --use_peft --lora_r 8 --lora_alpha 16 --report_to none
"""

import tiny
from datasets import load_dataset
from transformers import AutoTokenizer, GenerationConfig

from trl import (
    GKDConfig,
    GKDTrainer,
    LogCompletionsCallback,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_peft_config,
)

script_args, training_args, model_args = TrlParser((ScriptArguments, GKDConfig, ModelConfig)).parse_args_and_config()
tiny.folder(model_args.model_name_or_path)
tiny.folder(training_args.teacher_model_name_or_path)
training_args.model_init_kwargs = {"revision": model_args.model_revision}
training_args.teacher_model_init_kwargs = {"revision": "main"}
tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, padding_side="left")
dataset = load_dataset(tiny.data(script_args.dataset_name, tiny.CHAT_COMPLETED))
trainer = GKDTrainer(
    model=model_args.model_name_or_path, teacher_model=training_args.teacher_model_name_or_path, args=training_args,
    train_dataset=dataset["train"], eval_dataset=dataset["test"], processing_class=tokenizer,
    peft_config=get_peft_config(model_args),
)  # fmt: skip
if training_args.eval_strategy != "no":
    generation_config = GenerationConfig(max_new_tokens=training_args.max_new_tokens, do_sample=True)
    trainer.add_callback(LogCompletionsCallback(trainer, generation_config, num_prompts=2))
trainer.train()
trainer.save_model(training_args.output_dir)
