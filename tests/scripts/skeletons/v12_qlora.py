"""Release 0.20-0.28, course: settings.

Rows: SFTConfig.warmup_ratio; get_quantization_config; get_peft_config; ModelConfig.

Run: python qlora.py --model_name_or_path gemma --load_in_4bit --use_peft --lora_r 8 --lora_target_modules all-linear
    --attn_implementation flash_attention_2
"""

import tiny
from datasets import Dataset
from transformers import HfArgumentParser

from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

(model_args,) = HfArgumentParser(ModelConfig).parse_args_into_dataclasses()
args = SFTConfig(
    output_dir="gemma-qlora", max_length=128, packing=True, max_steps=2, per_device_train_batch_size=1,
    gradient_checkpointing=True, optim="paged_adamw_8bit", logging_steps=1, learning_rate=2e-4, fp16=False, bf16=True,
    max_grad_norm=0.3, warmup_ratio=0.03, lr_scheduler_type="constant", report_to="none",
    model_init_kwargs={
        "attn_implementation": model_args.attn_implementation,
        "quantization_config": get_quantization_config(model_args),
    },
    dataset_kwargs={"add_special_tokens": False, "append_concat_token": True},
)  # fmt: skip
trainer = SFTTrainer(
    model=tiny.folder(model_args.model_name_or_path), args=args, train_dataset=Dataset.from_list(tiny.MESSAGES),
    peft_config=get_peft_config(model_args),
)  # fmt: skip
trainer.train()
