"""What a run of DDPO leaves on disk: checkpoints to go on from, and a model card."""

import os
import re
from collections import deque
from typing import Any

from accelerate import Accelerator

from trl.trainer.ddpo_config import DDPOConfig
from trl.trainer.statistics import PerPromptStatTracker

MODEL_CARD = """---
tags:
{tags}
---

# {name}

A diffusion model that was trained with `trl.DDPOTrainer`, the method of "Training diffusion models with reinforcement
learning" ([arXiv:2305.13301](https://arxiv.org/abs/2305.13301)), to draw images that the reward `{reward}` likes, in
{steps} optimizer steps.

A model that is optimised against a reward drifts away from what the reward does not measure: look at its images.

| setting | value |
|---|---|
{settings}
"""


class Progress:
    """What a resumed run has to know besides weights, optimizer and random states."""

    def __init__(self, stat_tracker: PerPromptStatTracker) -> None:
        self.stat_tracker = stat_tracker
        self.global_step = 0

    def state_dict(self) -> dict[str, Any]:
        remembered = {prompt: list(rewards) for prompt, rewards in self.stat_tracker.stats.items()}
        return {"global_step": self.global_step, "prompt_rewards": remembered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.global_step = state["global_step"]
        tracker = self.stat_tracker
        tracker.stats = {
            prompt: deque(rewards, maxlen=tracker.buffer_size) for prompt, rewards in state["prompt_rewards"].items()
        }


def latest_checkpoint(path: str) -> str:
    """`path` if it is a `checkpoint_N`, else the one with the highest N in it."""
    path = os.path.normpath(os.path.expanduser(path))
    if checkpoint_number(path) >= 0 and os.path.isdir(path):
        return path
    found = [name for name in (os.listdir(path) if os.path.isdir(path) else []) if checkpoint_number(name) >= 0]
    if not found:
        raise ValueError(f"No checkpoints found in {path}: resume_from takes a checkpoint_N folder or its parent")
    return os.path.join(path, max(found, key=checkpoint_number))


def checkpoint_number(path: str) -> int:
    """N of a `checkpoint_N`, -1 for anything else."""
    match = re.fullmatch(r"checkpoint_(\d+)", os.path.basename(path))
    return int(match.group(1)) if match else -1


def refuse_to_overwrite(accelerator: Accelerator, epochs: range, save_freq: int) -> None:
    """Raise now, not when an epoch's work is done, if a checkpoint that these epochs will write exists."""
    if not accelerator.project_configuration.automatic_checkpoint_naming:
        return
    for epoch in epochs:
        path = os.path.join(accelerator.project_dir, "checkpoints", f"checkpoint_{epoch}")
        if epoch != 0 and epoch % save_freq == 0 and os.path.exists(path):
            raise ValueError(f"{path} already exists: give another logdir or run_name, remove it, or resume from it")


def model_card(name: str, tags: list[str], config: DDPOConfig, reward: str, steps: int) -> str:
    """The text of a `README.md`."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in config.to_dict().items() if value not in ("", {}))
    return MODEL_CARD.format(
        tags="\n".join(f"- {tag}" for tag in tags), name=name, reward=reward, steps=steps, settings=rows
    )
