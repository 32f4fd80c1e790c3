"""Release 0.9-0.11, official example: parsers.

Rows: DPOScriptArguments; trl.commands.cli_utils; TrlParser; ModelConfig; get_peft_config; get_quantization_config;
get_kbit_device_map; RichProgressCallback; parse:DPOConfig.loss_type; option --no_remove_unused_columns.

Run: python dpo.py --dataset_name hh --model_name_or_path gpt2 --per_device_train_batch_size 2 --max_steps 2
    --learning_rate 1e-3 --logging_steps 1 --eval_steps 2 --output_dir dpo_out --optim rmsprop --warmup_steps 1
    --report_to none --no_remove_unused_columns --use_peft --lora_r=16 --lora_alpha=16
"""

import tiny
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl import (
    DPOConfig,
    DPOTrainer,
    ModelConfig,
    RichProgressCallback,
    get_kbit_device_map,
    get_peft_config,
    get_quantization_config,
)
from trl.commands.cli_utils import DPOScriptArguments, TrlParser
from trl.trainer.utils import SIMPLE_CHAT_TEMPLATE

parser = TrlParser((DPOScriptArguments, DPOConfig, ModelConfig))
args, training_args, model_config = parser.parse_args_and_config()
tiny.folder(model_config.model_name_or_path)
quantization_config = get_quantization_config(model_config)
model_kwargs = {
    "revision": model_config.model_revision, "torch_dtype": model_config.torch_dtype,
    "device_map": get_kbit_device_map() if quantization_config is not None else None,
}  # fmt: skip
model = AutoModelForCausalLM.from_pretrained(model_config.model_name_or_path, **model_kwargs)
peft_config = get_peft_config(model_config)
model_ref = AutoModelForCausalLM.from_pretrained(model_config.model_name_or_path) if peft_config is None else None
tokenizer = AutoTokenizer.from_pretrained(model_config.model_name_or_path)
if tokenizer.chat_template is None:
    tokenizer.chat_template = SIMPLE_CHAT_TEMPLATE
dataset = load_dataset(tiny.data(args.dataset_name, tiny.PAIRS))
trainer = DPOTrainer(
    model, model_ref, args=training_args, train_dataset=dataset[args.dataset_train_split], tokenizer=tokenizer,
    eval_dataset=dataset[args.dataset_test_split], peft_config=peft_config, callbacks=[RichProgressCallback],
)  # fmt: skip
trainer.train()
