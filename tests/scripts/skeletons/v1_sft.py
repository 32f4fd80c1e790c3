"""Release 1.x, official example: parsers.

Rows: ModelConfig; ScriptArguments; TrlParser; DatasetMixtureConfig; get_dataset; get_peft_config;
get_quantization_config; trainer argument quantization_config; field trust_remote_code.

Run: python sft.py --model_name_or_path Qwen2-0.5B --dataset_name Capybara --learning_rate 2.0e-4 --max_steps 2
    --per_device_train_batch_size 2 --packing --max_length 64 --eos_token "<|im_end|>" --eval_strategy steps
    --eval_steps 2 --use_peft --lora_r 32 --lora_alpha 16 --trust_remote_code --dtype float32 --output_dir sft-out
"""

import tiny
from datasets import load_dataset

from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig))
    script_args, training_args, model_args, dataset_args = parser.parse_args_and_config()
    tiny.folder(model_args.model_name_or_path)
    tiny.data(script_args.dataset_name, tiny.MESSAGES * 2)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision, "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }  # fmt: skip
    if dataset_args.datasets:
        dataset = get_dataset(dataset_args)
    else:
        dataset = load_dataset(
            script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
        )
    trainer = SFTTrainer(
        model=model_args.model_name_or_path, args=training_args, train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args), peft_config=get_peft_config(model_args),
    )  # fmt: skip
    trainer.train()
    trainer.accelerator.print("done")
    trainer.save_model(training_args.output_dir)
