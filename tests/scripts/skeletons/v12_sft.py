"""Release 0.12-0.19, official example: parsers.

Rows: ScriptArguments; ModelConfig; TrlParser; get_peft_config; get_quantization_config; get_kbit_device_map;
SFTConfig.max_seq_length.

Run: python sft.py --model_name_or_path Qwen2-0.5B --dataset_name Capybara --learning_rate 2.0e-4 --max_steps 2
    --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --gradient_checkpointing --logging_steps 1
    --eval_strategy steps --eval_steps 2 --use_peft --lora_r 32 --lora_alpha 16 --output_dir Qwen2-0.5B-SFT
    --max_seq_length 128 --torch_dtype float32 --report_to none
"""

import tiny
from datasets import load_dataset
from transformers import AutoTokenizer

from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_kbit_device_map,
    get_peft_config,
    get_quantization_config,
)

if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    tiny.folder(model_args.model_name_or_path)
    tiny.data(script_args.dataset_name, tiny.MESSAGES)
    quantization_config = get_quantization_config(model_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision, "trust_remote_code": model_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation, "torch_dtype": model_args.torch_dtype,
        "use_cache": not training_args.gradient_checkpointing, "quantization_config": quantization_config,
        "device_map": get_kbit_device_map() if quantization_config is not None else None,
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, use_fast=True)
    dataset = load_dataset(script_args.dataset_name)
    trainer = SFTTrainer(
        model=model_args.model_name_or_path, args=training_args, train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        processing_class=tokenizer, peft_config=get_peft_config(model_args),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(training_args.output_dir)
