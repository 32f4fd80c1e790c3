"""What a `DDPOConfig` asks for: accelerate, trackers, an optimizer; checkpoints and a model card."""

import os
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import AutocastKwargs, ProjectConfiguration, parse_flag_from_env
from torch import nn

from trl.import_utils import pip_install
from trl.trainer.checkpoints import Checkpoint, Torn, find, is_whole
from trl.trainer.ddpo_config import DDPOConfig
from trl.trainer.statistics import PerPromptStatTracker

PREFIX, STATE, PICKLED = "checkpoint_", "trainer_state.pt", "random_states_0.pkl"
"""names of a checkpoint, of the file with its optimizer and progress, and of a file that only release 1.0.0 wrote"""


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


def create_accelerator(config: DDPOConfig, *, own_autocast: bool) -> Accelerator:
    """The Accelerator that the config asks for; `own_autocast`: the pipeline brings its own autocast context."""
    # Asked of torch: accelerate would accept it and compute in float32, and asking it would fix its state too early.
    on_cpu = config.accelerator_kwargs.get("cpu") or parse_flag_from_env("ACCELERATE_USE_CPU")
    if config.mixed_precision == "fp16" and (on_cpu or not torch.accelerator.is_available()):
        raise ValueError("mixed_precision='fp16': needs a GPU; on a CPU choose 'no' (exact) or 'bf16'")
    name = config.log_with
    if name in ("wandb", "tensorboard") and name not in map(str, get_available_trackers()):
        raise ImportError(f"log_with={name!r}: {name} is not installed; {pip_install(name)}")
    directory = os.path.abspath(os.path.join(config.logdir, config.run_name))  # a reward may change the directory
    project = {
        "project_dir": directory,
        "logging_dir": directory,
        "automatic_checkpoint_naming": True,
        "total_limit": config.num_checkpoint_limit,
    }
    keywords: dict[str, Any] = {
        "log_with": config.log_with,
        "mixed_precision": config.mixed_precision,
        "project_config": ProjectConfiguration(**{**project, **config.project_kwargs}),
        # One batch adds up over its denoising steps.
        "gradient_accumulation_steps": config.train_gradient_accumulation_steps * config.trained_timesteps,
        **config.accelerator_kwargs,
    }
    if own_autocast:
        # accelerate shall not put another context around the model
        keywords["kwargs_handlers"] = [*keywords.get("kwargs_handlers", ()), AutocastKwargs(enabled=False)]
    accelerator = Accelerator(**keywords)
    # samples are no dataloader's: one that another trainer left unfinished must not end our accumulation early
    accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
    return accelerator


def start_trackers(accelerator: Accelerator, config: DDPOConfig) -> None:
    """Tell the tracker of `config.log_with` what is run."""
    name = config.log_with
    if name is None:
        return
    settings = config.to_dict()
    if name == "tensorboard":
        plain = (bool, int, float, str)
        settings = {key: value if isinstance(value, plain) else str(value) for key, value in settings.items()}
    else:
        settings = {"ddpo_trainer_config": settings}
    options = dict(config.tracker_kwargs)
    if name == "wandb":
        options["wandb"] = {"name": config.run_name or config.exp_name, **options.get("wandb", {})}
    accelerator.init_trackers(config.tracker_project_name, config=settings, init_kwargs=options)


def create_optimizer(config: DDPOConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, on 8 bits if asked."""
    if config.train_use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as Optimizer
    else:
        from torch.optim import AdamW as Optimizer
    return Optimizer(
        parameters,
        lr=config.train_learning_rate,
        betas=(config.train_adam_beta1, config.train_adam_beta2),
        weight_decay=config.train_adam_weight_decay,
        eps=config.train_adam_epsilon,
    )


def place(module: nn.Module, device: torch.device, frozen_dtype: torch.dtype) -> None:
    """Move a module; cast what is not trained. Trained weights keep their precision, as the optimizer needs it."""
    module.to(device)
    for parameter in module.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(frozen_dtype)


class Progress:
    """The optimizer steps so far and the rewards that are remembered of each prompt."""

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


def checkpoint_folder(accelerator: Accelerator) -> Path:
    """The folder that holds the run's checkpoints."""
    return Path(accelerator.project_dir, "checkpoints")


def checkpoint_to_resume(path: str) -> Checkpoint | None:
    """The checkpoint `path` if it is called `checkpoint_N`, else the newest whole one in it; None if it has none."""
    folder = Path(path).expanduser()
    if folder.name.startswith(PREFIX) and folder.name.removeprefix(PREFIX).isdigit():
        return find(folder, None, prefix=PREFIX, is_old=refuse_pickled)
    return find(True, folder, prefix=PREFIX, is_old=refuse_pickled)


def is_pickled(folder: Path) -> bool:
    """Whether release 1.0.0 wrote a checkpoint."""
    return (folder / PICKLED).is_file()


def refuse_pickled(folder: Path) -> bool:
    """`Torn` for a checkpoint of release 1.0.0, False for any other folder."""
    if is_pickled(folder):
        raise Torn(f"{folder} was written by release 1.0.0: its pickle files could run code and are not read")
    return False


def refuse_to_overwrite(accelerator: Accelerator, epochs: range, save_freq: int) -> None:
    """Raise now, not when an epoch's work is done, if a checkpoint that these epochs will write exists."""
    if not accelerator.project_configuration.automatic_checkpoint_naming:
        return
    for epoch in epochs:
        path = checkpoint_folder(accelerator) / f"{PREFIX}{epoch}"
        if epoch and epoch % save_freq == 0 and (is_whole(path, contents=True) or (path / PICKLED).is_file()):
            raise ValueError(f"{path} already exists: give another logdir or run_name, remove it, or resume from it")


def model_card(name: str, tags: list[str], config: DDPOConfig, reward: str, steps: int) -> str:
    """The text of a `README.md`."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in config.to_dict().items() if value not in ("", {}))
    return MODEL_CARD.format(
        tags="\n".join(f"- {tag}" for tag in tags), name=name, reward=reward, steps=steps, settings=rows
    )
