"""Pipelines, prompts and trainers that the tests of DDPO share."""

import random
import warnings

import numpy as np
import torch
from digits.modeling_digits import DDPODigitsPipeline, DigitsTextEncoder, digits_unet

from trl.models.modeling_sd_base import DefaultDDPOStableDiffusionPipeline
from trl.rewards.images import brightness
from trl.trainer.ddpo_config import DDPOConfig
from trl.trainer.ddpo_trainer import DDPOTrainer


def build(kind, directory=None):
    if kind == "digits":
        torch.manual_seed(1)
        return DDPODigitsPipeline(digits_unet(8), DigitsTextEncoder(32))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "If you are aware that the pretrained model has no lora weights")
        return DefaultDDPOStableDiffusionPipeline(str(directory), use_lora=kind == "lora")


def digit_prompt():
    return str(random.randrange(10)), {"number": np.random.rand()}


def letters_prompt():
    return random.choice(["cat", "dog"]), {}


def config(tmp_path, **keywords):
    defaults = {
        "num_epochs": 2, "mixed_precision": "no", "logdir": str(tmp_path / "logs"), "sample_num_steps": 3,
        "sample_batch_size": 2, "train_batch_size": 1, "sample_num_batches_per_epoch": 2, "train_learning_rate": 1e-3,
    }  # fmt: skip
    return DDPOConfig(**{**defaults, **keywords})


def trainer(tmp_path, pipeline=None, reward=brightness, prompt=digit_prompt, hook=lambda *_: None, **keywords):
    built = DDPOTrainer(config(tmp_path, **keywords), reward, prompt, pipeline or build("digits"), hook)
    built.sd_pipeline.set_progress_bar_config(disable=True)
    return built


def recorded(trainer):
    """The list that everything logged will be appended to."""
    seen, log = [], trainer.accelerator.log

    def keep(values, step=None):
        seen.append({**values, "step": step})
        log(values, step)

    trainer.accelerator.log = keep
    return seen
