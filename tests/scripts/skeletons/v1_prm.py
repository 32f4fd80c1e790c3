"""Release 1.x, official example: names and modules.

Rows: trl.experimental.prm; ScriptArguments; ModelConfig; get_peft_config; get_kbit_device_map.

Run: python prm.py --model_name_or_path Qwen2-0.5B-Instruct --dataset_name prm800k --output_dir prm-out
    --per_device_train_batch_size 2 --max_steps 2 --gradient_checkpointing True --learning_rate 1.0e-5
    --eval_strategy steps --eval_steps 2
"""

import tiny
from datasets import load_dataset
from transformers import AutoModelForTokenClassification, AutoTokenizer, HfArgumentParser

from trl import ModelConfig, ScriptArguments, get_kbit_device_map, get_peft_config, get_quantization_config
from trl.experimental.prm import PRMConfig, PRMTrainer

parser = HfArgumentParser((ScriptArguments, PRMConfig, ModelConfig))
script_args, training_args, model_args = parser.parse_args_into_dataclasses()
name = tiny.step_folder(model_args.model_name_or_path)
quantization_config = get_quantization_config(model_args)
device_map = get_kbit_device_map() if quantization_config is not None else None
model = AutoModelForTokenClassification.from_pretrained(name, num_labels=2, device_map=device_map)
dataset = load_dataset(tiny.data(script_args.dataset_name, tiny.STEPS))
trainer = PRMTrainer(
    model=model, processing_class=AutoTokenizer.from_pretrained(name), args=training_args,
    train_dataset=dataset["train"], eval_dataset=dataset["test"], peft_config=get_peft_config(model_args),
)  # fmt: skip
trainer.train()
trainer.save_model(training_args.output_dir)
