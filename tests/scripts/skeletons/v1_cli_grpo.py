"""Release 1.x, documentation: command line.

Rows: ModelConfig; ScriptArguments; parse:GRPO family.
"""

import tiny

tiny.folder("Qwen2.5-0.5B-Instruct")
tiny.data("math", tiny.CHAT_PROMPTS)
for command in ("grpo", "rloo"):
    tiny.shell(
        f"trl {command} --model_name_or_path Qwen2.5-0.5B-Instruct --dataset_name math --reward_funcs accuracy_reward "
        f"--output_dir {command}-out --max_steps 1 --per_device_train_batch_size 4 --num_generations 2 "
        "--max_completion_length 6"
    )
