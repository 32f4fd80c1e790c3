"""Release 0.12-0.28, official example: parsers.

Rows: ScriptArguments; ModelConfig; TrlParser; get_peft_config; get_quantization_config; get_kbit_device_map;
parse:DPOConfig.loss_type; option --no_remove_unused_columns.

Run: python dpo.py --dataset_name ultrafeedback --model_name_or_path Qwen2-0.5B-Instruct --learning_rate 5.0e-6
    --max_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --gradient_checkpointing
    --logging_steps 1 --eval_strategy steps --eval_steps 2 --output_dir Qwen2-0.5B-DPO --report_to none
    --no_remove_unused_columns --use_peft --lora_r 32 --lora_alpha 16
"""

import tiny
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl import (
    DPOConfig,
    DPOTrainer,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_kbit_device_map,
    get_peft_config,
    get_quantization_config,
)

parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig))
script_args, training_args, model_args = parser.parse_args_and_config()
tiny.folder(model_args.model_name_or_path)
quantization_config = get_quantization_config(model_args)
model_kwargs = {
    "revision": model_args.model_revision, "attn_implementation": model_args.attn_implementation,
    "device_map": get_kbit_device_map() if quantization_config is not None else None,
}  # fmt: skip
model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **model_kwargs)
peft_config = get_peft_config(model_args)
ref_model = None if peft_config else AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **model_kwargs)
tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
if script_args.ignore_bias_buffers:
    model._ddp_params_and_buffers_to_ignore = []
dataset = load_dataset(tiny.data(script_args.dataset_name, tiny.CHAT_PAIRS), name=script_args.dataset_config)
trainer = DPOTrainer(
    model, ref_model, args=training_args, train_dataset=dataset[script_args.dataset_train_split],
    eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
    processing_class=tokenizer, peft_config=peft_config,
)  # fmt: skip
trainer.train()
print(trainer.evaluate())
trainer.save_model(training_args.output_dir)
