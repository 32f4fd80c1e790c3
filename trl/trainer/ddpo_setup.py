"""From a `DDPOConfig` to accelerate, trackers and an optimizer."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import AutocastKwargs, ProjectConfiguration, parse_flag_from_env
from torch import nn

from trl.trainer.ddpo_config import DDPOConfig


def create_accelerator(config: DDPOConfig, *, own_autocast: bool) -> Accelerator:
    """The Accelerator that the config asks for; `own_autocast`: the pipeline brings its own autocast context."""
    # Asked of torch: accelerate would accept it and compute in float32, and asking it would fix its state too early.
    on_cpu = config.accelerator_kwargs.get("cpu") or parse_flag_from_env("ACCELERATE_USE_CPU")
    if config.mixed_precision == "fp16" and (on_cpu or not torch.accelerator.is_available()):
        raise ValueError("mixed_precision='fp16': needs a GPU; on a CPU choose 'no' (exact) or 'bf16'")
    name = config.log_with
    if name in ("wandb", "tensorboard") and name not in map(str, get_available_trackers()):
        raise ImportError(f'log_with={name!r}: {name} is not installed; pip install "trl[{name}]"')
    directory = os.path.join(config.logdir, config.run_name)
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
