"""Release 1.x, official example: names and modules.

Rows: trl.experimental.cpo; trl.experimental.orpo; ScriptArguments; ModelConfig; get_peft_config;
option --no_remove_unused_columns.

Run: python cpo.py --dataset_name ultrafeedback --model_name_or_path gpt2 --per_device_train_batch_size 2
    --max_steps 1 --learning_rate 8e-6 --logging_steps 1 --output_dir aligned --optim rmsprop --warmup_steps 1
    --no_remove_unused_columns --use_peft --lora_r 16 --lora_alpha 16
"""

import tiny
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from trl import ModelConfig, ScriptArguments, get_peft_config
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

for config_class, trainer_class in ((CPOConfig, CPOTrainer), (ORPOConfig, ORPOTrainer)):
    parser = HfArgumentParser((ScriptArguments, config_class, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_into_dataclasses()
    training_args.output_dir += f"/{trainer_class.__name__}"
    name = tiny.folder(model_args.model_name_or_path)
    dataset = load_dataset(tiny.data(script_args.dataset_name, tiny.CHAT_PAIRS))
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(name), args=training_args, train_dataset=dataset["train"],
        eval_dataset=dataset["test"] if training_args.eval_strategy != "no" else None,
        processing_class=AutoTokenizer.from_pretrained(name), peft_config=get_peft_config(model_args),
    )  # fmt: skip
    trainer.train()
