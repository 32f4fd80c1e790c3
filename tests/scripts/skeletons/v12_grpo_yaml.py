"""Release 0.15-0.28, third party: parsers.

Rows: parse:GRPO family; TrlParser; ScriptArguments; ModelConfig; get_peft_config; GRPOConfig.warmup_ratio.

Run: python grpo.py --config recipe.yaml
"""

from dataclasses import dataclass, field
from pathlib import Path

import tiny
from datasets import load_dataset

import trl
from trl import GRPOTrainer, ModelConfig, TrlParser, get_peft_config

Path("recipe.yaml").write_text("""
model_name_or_path: distill
dataset_name: openr1
learning_rate: 1.0e-6
lr_scheduler_type: cosine
warmup_ratio: 0.1
max_steps: 1
max_completion_length: 6
num_generations: 4
per_device_train_batch_size: 4
reward_funcs: [length, vowels]
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
output_dir: data/distill
report_to: none
""")


@dataclass
class GRPOScriptArguments(trl.ScriptArguments):
    """The data, and the reward functions by name."""

    reward_funcs: list[str] = field(default_factory=lambda: ["length"])


@dataclass
class GRPOConfig(trl.GRPOConfig):
    """Today's config with the callbacks of this recipe."""

    benchmarks: list[str] = field(default_factory=list)


parser = TrlParser((GRPOScriptArguments, GRPOConfig, ModelConfig))
script_args, training_args, model_args = parser.parse_args_and_config()
tiny.folder(model_args.model_name_or_path)
functions = {
    "length": lambda completions, **kwargs: [-float(len(c[0]["content"])) for c in completions],
    "vowels": lambda completions, **kwargs: [float(c[0]["content"].count("a")) for c in completions],
}
dataset = load_dataset(tiny.data(script_args.dataset_name, tiny.CHAT_PROMPTS))
trainer = GRPOTrainer(
    model=model_args.model_name_or_path, reward_funcs=[functions[name] for name in script_args.reward_funcs],
    args=training_args, train_dataset=dataset["train"], peft_config=get_peft_config(model_args),
)  # fmt: skip
trainer.train()
