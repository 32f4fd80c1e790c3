"""Release 1.x, official example: names and modules.

Rows: trl.experimental.distillation; DistillationConfig.teacher_model_revision;
teacher given by both argument and config; ScriptArguments; ModelConfig; TrlParser.

Run: python distillation.py --model_name_or_path Qwen3-0.6B --teacher_model_name_or_path Qwen3-4B
    --teacher_model_revision main --dataset_name math --output_dir distilled --max_steps 1 --beta 0.5
    --per_device_train_batch_size 2 --max_completion_length 6 --learning_rate 1e-5
"""

import tiny
from datasets import load_dataset

from trl import ModelConfig, ScriptArguments, TrlParser
from trl.experimental.distillation import DistillationConfig, DistillationTrainer

parser = TrlParser((ScriptArguments, DistillationConfig, ModelConfig))
script_args, training_args, model_args = parser.parse_args_and_config()
tiny.folder(model_args.model_name_or_path)
tiny.folder(training_args.teacher_model_name_or_path)
dataset = load_dataset(tiny.data(script_args.dataset_name, tiny.CHAT_PROMPTS))
trainer = DistillationTrainer(
    model=model_args.model_name_or_path, teacher_model=training_args.teacher_model_name_or_path, args=training_args,
    train_dataset=dataset["train"],
)  # fmt: skip
trainer.train()
