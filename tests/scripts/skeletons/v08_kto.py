"""Release 0.8-0.11, official example: callbacks, chat and rewards.

Rows: setup_chat_format; ModelConfig; get_peft_config; option --no_remove_unused_columns.

Run: python kto.py --model_name_or_path=zephyr --per_device_train_batch_size 2 --max_steps 2 --learning_rate 1e-4
    --output_dir=kto-aligned-model --logging_first_step --report_to none --bf16 False --no_remove_unused_columns
    --lr_scheduler_type=cosine --use_peft --lora_target_modules=all-linear --lora_r=8 --lora_alpha=8
"""

from dataclasses import dataclass

import tiny
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from trl import KTOConfig, KTOTrainer, ModelConfig, get_peft_config, setup_chat_format


@dataclass
class ScriptArguments:
    """The data of the KTO script."""

    dataset_name: str = "kto-mix-14k"


script_args, kto_args, model_args = HfArgumentParser(
    (ScriptArguments, KTOConfig, ModelConfig)
).parse_args_into_dataclasses()
name = tiny.folder(model_args.model_name_or_path, chat=False)
model = AutoModelForCausalLM.from_pretrained(name)
ref_model = AutoModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
if tokenizer.chat_template is None:
    model, tokenizer = setup_chat_format(model, tokenizer)
dataset = load_dataset(tiny.data(script_args.dataset_name, tiny.UNPAIRED))
kto_trainer = KTOTrainer(
    model, ref_model if not model_args.use_peft else None, args=kto_args, train_dataset=dataset["train"],
    eval_dataset=dataset["test"], tokenizer=tokenizer, peft_config=get_peft_config(model_args),
)  # fmt: skip
kto_trainer.train()
kto_trainer.save_model(kto_args.output_dir)
