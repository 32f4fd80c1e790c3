"""Release 1.x, documentation: command line.

Rows: ModelConfig; ScriptArguments; option --no_remove_unused_columns.
"""

import tiny

tiny.folder("Qwen2-0.5B-Instruct")
tiny.data("ultrafeedback", tiny.CHAT_PAIRS)
tiny.shell(
    "trl dpo --model_name_or_path Qwen2-0.5B-Instruct --dataset_name ultrafeedback --dataset_test_split test "
    "--output_dir dpo-out --max_steps 1 --per_device_train_batch_size 2 --learning_rate 5.0e-6 --use_peft --lora_r 32 "
    "--lora_alpha 16 --eval_strategy steps --eval_steps 1 --no_remove_unused_columns --warmup_ratio 0.1"
)
