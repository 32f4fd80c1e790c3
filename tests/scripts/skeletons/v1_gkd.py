"""Release 1.x, official example: names and modules.

Rows: trl.experimental.gkd; teacher given by both argument and config; GKDConfig.max_new_tokens; ScriptArguments;
ModelConfig; TrlParser; get_quantization_config; LogCompletionsCallback.

Run: python gkd.py --model_name_or_path Qwen2-0.5B --teacher_model_name_or_path Qwen2-1.5B --dataset_name chatbot
    --learning_rate 2e-5 --per_device_train_batch_size 2 --output_dir gkd-model --max_steps 2 --max_new_tokens 6
    --eval_strategy steps --eval_steps 2
"""

import tiny
from datasets import load_dataset
from transformers import AutoTokenizer, GenerationConfig

from trl import LogCompletionsCallback, ModelConfig, ScriptArguments, TrlParser, get_quantization_config
from trl.experimental.gkd import GKDConfig, GKDTrainer

parser = TrlParser((ScriptArguments, GKDConfig, ModelConfig))
script_args, training_args, model_args = parser.parse_args_and_config()
tiny.folder(model_args.model_name_or_path)
tiny.folder(training_args.teacher_model_name_or_path)
training_args.model_init_kwargs = {"quantization_config": get_quantization_config(model_args)}
dataset = load_dataset(tiny.data(script_args.dataset_name, tiny.CHAT_COMPLETED))
trainer = GKDTrainer(
    model=model_args.model_name_or_path, teacher_model=training_args.teacher_model_name_or_path, args=training_args,
    train_dataset=dataset["train"], eval_dataset=dataset["test"],
    processing_class=AutoTokenizer.from_pretrained(model_args.model_name_or_path, padding_side="left"),
)  # fmt: skip
generation_config = GenerationConfig(max_new_tokens=training_args.max_new_tokens, do_sample=True)
trainer.add_callback(LogCompletionsCallback(trainer, generation_config, num_prompts=2))
trainer.train()
