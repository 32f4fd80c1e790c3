"""Release 1.x, official example: parsers.

Rows: parse:GRPO family; DatasetMixtureConfig; get_dataset; ScriptArguments; ModelConfig; TrlParser; get_peft_config;
get_quantization_config; trainer argument quantization_config; field trust_remote_code; GRPOConfig.vllm_mode.

Run: python grpo.py --config mixture.yaml --model_name_or_path Qwen3-0.6B --reward_funcs think_format_reward
    get_soft_overlong_punishment --output_dir grpo-out --max_steps 1 --per_device_train_batch_size 4
    --num_generations 2 --max_completion_length 6 --vllm_mode colocate --trust_remote_code --logging_steps 1
"""

from dataclasses import dataclass, field
from pathlib import Path

import tiny

from trl import (
    DatasetMixtureConfig,
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)
from trl.rewards import get_soft_overlong_punishment, think_format_reward

Path("mixture.yaml").write_text(f"""
datasets:
  - path: {tiny.data("first", tiny.CHAT_PROMPTS)}
  - {{path: {tiny.data("second", tiny.CHAT_PROMPTS)}, split: train, columns: [prompt, solution]}}
test_split_size: 0.25
""")
REWARDS = {
    "think_format_reward": think_format_reward,
    "get_soft_overlong_punishment": get_soft_overlong_punishment(max_completion_len=6, soft_punish_cache=2),
}


@dataclass
class GRPOScriptArguments(ScriptArguments):
    """The data, and the rewards by name."""

    reward_funcs: list[str] | None = field(default=None, metadata={"help": "names of reward functions"})


parser = TrlParser((GRPOScriptArguments, GRPOConfig, ModelConfig, DatasetMixtureConfig))
script_args, training_args, model_args, dataset_args = parser.parse_args_and_config()
dataset = get_dataset(dataset_args)
trainer = GRPOTrainer(
    model=tiny.folder(model_args.model_name_or_path), reward_funcs=[REWARDS[name] for name in script_args.reward_funcs],
    args=training_args, train_dataset=dataset[script_args.dataset_train_split],
    quantization_config=get_quantization_config(model_args), peft_config=get_peft_config(model_args),
)  # fmt: skip
trainer.train()
