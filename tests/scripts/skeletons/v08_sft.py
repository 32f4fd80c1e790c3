"""Release 0.9-0.11, official example: parsers.

Rows: ModelConfig; TrlParser; trl.commands.cli_utils; get_peft_config; get_quantization_config; get_kbit_device_map;
RichProgressCallback.

Run: python sft.py --model_name_or_path opt --dataset_name guanaco --dataset_text_field text
    --per_device_train_batch_size 2 --max_steps 2 --output_dir out --logging_steps 1 --learning_rate 1.41e-5
    --use_peft --lora_r 8 --lora_alpha 16 --report_to none
"""

from trl.commands.cli_utils import SFTScriptArguments, TrlParser, init_zero_verbose  # isort: skip

init_zero_verbose()
# ruff: noqa: E402

import tiny
from datasets import load_dataset
from transformers import AutoTokenizer

from trl import (
    ModelConfig,
    RichProgressCallback,
    SFTConfig,
    SFTTrainer,
    get_kbit_device_map,
    get_peft_config,
    get_quantization_config,
)

parser = TrlParser((SFTScriptArguments, SFTConfig, ModelConfig))
args, training_args, model_config = parser.parse_args_and_config()
training_args.disable_tqdm = True
tiny.folder(model_config.model_name_or_path)
quantization_config = get_quantization_config(model_config)
training_args.model_init_kwargs = {
    "revision": model_config.model_revision, "attn_implementation": model_config.attn_implementation,
    "torch_dtype": model_config.torch_dtype, "use_cache": not training_args.gradient_checkpointing,
    "device_map": get_kbit_device_map() if quantization_config is not None else None,
    "quantization_config": quantization_config,
}  # fmt: skip
tokenizer = AutoTokenizer.from_pretrained(model_config.model_name_or_path, use_fast=True)
raw_datasets = load_dataset(tiny.data(args.dataset_name, tiny.TEXTS))
trainer = SFTTrainer(
    model=model_config.model_name_or_path, args=training_args, train_dataset=raw_datasets["train"],
    eval_dataset=raw_datasets["test"], tokenizer=tokenizer, peft_config=get_peft_config(model_config),
    callbacks=[RichProgressCallback],
)  # fmt: skip
trainer.train()
