"""The training jobs of the `trl` command. Nothing heavy is imported here: `trl --help` lists them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Training:
    """A job that trains on a data set."""

    trainer: str
    help: str
    rewards: bool = False
    """the trainer takes reward functions"""
    judges: bool = True
    """the trainer of these takes held-out judges too"""
    lora_rate: float = 1e-5
    """learning rate of an adapter, where the user gives none: about ten times that of whole weights"""
    task: str = "CAUSAL_LM"
    """`task_type` of the LoRA config"""
    row: str = '{"prompt": "..."}'
    """what a row of the data set looks like"""
    more: str = ""
    """what the example of `--help` needs besides a model and data"""

    @property
    def config(self) -> str:
        return self.trainer.removesuffix("Trainer") + "Config"


TEXT = (
    '{"text": "..."}, {"prompt": "...", "completion": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'
)
PAIR = '{"prompt": "...", "chosen": "...", "rejected": "..."}'
STEPS = '{"prompt": "...", "completions": ["step", "step"], "labels": [true, false]}'
LABELLED = '{"prompt": "...", "completion": "...", "label": true}'
TEACHER = "--teacher_model_name_or_path Qwen/Qwen2.5-7B-Instruct "

JOBS = {
    "sft": Training("SFTTrainer", "Fine-tune on texts, prompts with completions, or conversations.", lora_rate=2e-4,
                    row=TEXT),
    "reward": Training("RewardTrainer", "Train a reward model on preference pairs.", lora_rate=3e-4, task="SEQ_CLS",
                       row=PAIR),
    "prm": Training("PRMTrainer", "Train a reward model of single steps.", lora_rate=1e-4, task="TOKEN_CLS",
                    row=STEPS),
    "dpo": Training("DPOTrainer", "Optimise on preference pairs, against a reference.", row=PAIR),
    "orpo": Training("ORPOTrainer", "Optimise on preference pairs, without a reference (odds ratio).", row=PAIR),
    "cpo": Training("CPOTrainer", "Optimise on preference pairs, without a reference (contrastive).", row=PAIR),
    "simpo": Training("SimPOTrainer", "Optimise on preference pairs, without a reference (per token).", row=PAIR),
    "kto": Training("KTOTrainer", "Optimise on completions that are good or not.", row=LABELLED),
    "grpo": Training("GRPOTrainer", "Reinforce on groups of own completions.", rewards=True),
    "rloo": Training("RLOOTrainer", "Reinforce, each completion against the mean of the others.", rewards=True),
    "ppo": Training("PPOTrainer", "Reinforce with a critic, token by token.", rewards=True, judges=False,
                    lora_rate=3e-5),
    "raft": Training("RAFTTrainer", "Imitate the best of own completions.", rewards=True, lora_rate=2e-4),
    "online_dpo": Training("OnlineDPOTrainer", "Optimise on pairs of own completions.", rewards=True,
                           lora_rate=5e-6),
    "distillation": Training("DistillationTrainer", "Learn from a teacher on own completions.", more=TEACHER),
    "gkd": Training("GKDTrainer", "Learn from a teacher on own completions and on given ones.", lora_rate=2e-4,
                    row='{"prompt": "...", "completion": "..."}', more=TEACHER),
}  # fmt: skip
"""command -> what it trains; an entry here is all that a new command needs"""
