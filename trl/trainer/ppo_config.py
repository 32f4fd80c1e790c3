"""The numbers of `PPOTrainer`. Objects (models, data, optimizer, reward functions) are arguments of its constructor."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from trl.core import flatten_dict
from trl.import_utils import is_wandb_available
from trl.losses.kl import KL_PENALTIES
from trl.trainer.statistics import exact_div

JSONDict = Annotated[dict[str, Any], tyro.conf.arg(metavar="JSON", constructor=json.loads)]
Runtime = tyro.conf.Suppress


@dataclass
class PPOConfig:
    """Numbers of `PPOTrainer`; as a command line through `tyro.cli(PPOConfig)`."""

    exp_name: str = os.path.basename(sys.argv[0])[: -len(".py")]
    """name of the experiment, for trackers"""
    seed: int = 0
    """seed of everything that is drawn"""
    log_with: Literal["wandb", "tensorboard"] | None = None
    """tracker that `log_stats` writes to"""
    task_name: str | None = None
    """for your own records: handed to the tracker, not read"""
    model_name: str | None = None
    """for your own records: handed to the tracker, not read"""
    query_dataset: str | None = None
    """for your own records: handed to the tracker, not read"""
    reward_model: str | None = None
    """for your own records: handed to the tracker, not read"""
    remove_unused_columns: bool = True
    """drop columns of a `datasets.Dataset` that the model does not take; `label`, `prompt`, `query`, `response` stay"""
    tracker_kwargs: JSONDict = field(default_factory=dict)
    """`init_kwargs` of `Accelerator.init_trackers`"""
    accelerator_kwargs: JSONDict = field(default_factory=dict)
    """keywords of `Accelerator`"""
    project_kwargs: JSONDict = field(default_factory=dict)
    """keywords of `accelerate.utils.ProjectConfiguration`"""
    tracker_project_name: str = "trl"
    """project under which the tracker files the run"""
    push_to_hub_if_best_kwargs: JSONDict = field(default_factory=dict)
    """keywords of `push_to_hub` (`repo_id` is needed): the model is pushed whenever the mean score is the best yet"""

    steps: int = 20000
    """samples to train on, over the whole run; sets `total_ppo_epochs`"""
    learning_rate: float = 1e-5
    """of the default optimizer"""
    adap_kl_ctrl: bool = True
    """the KL coefficient follows the measured KL towards `target`; else it stays"""
    init_kl_coef: float = 0.2
    """the KL coefficient at the start"""
    kl_penalty: Literal["kl", "abs", "mse", "full"] = "kl"
    """kl: log p - log p_ref; abs: its absolute value; mse: half its square; full: the exact KL over the vocabulary"""
    target: float = 6
    """KL per sequence that the adaptive coefficient aims at"""
    horizon: float = 10000
    """samples in which the adaptive coefficient follows"""
    gamma: float = 1
    """discount of GAE"""
    lam: float = 0.95
    """lambda of GAE"""
    cliprange: float = 0.2
    """the ratio is clipped to 1 +- this"""
    cliprange_value: float = 0.2
    """the value is clipped to the old one +- this"""
    vf_coef: float = 0.1
    """weight of the value loss"""
    batch_size: int = 256
    """samples of a step, on each process"""
    forward_batch_size: int | None = None
    """deprecated: older name of `mini_batch_size`"""
    mini_batch_size: int = 1
    """samples of a forward and backward pass; changes memory and speed, not the update"""
    gradient_accumulation_steps: int = 1
    """passes of an optimizer step"""
    world_size: Annotated[int | None, Runtime] = None
    """set by the trainer: number of processes"""
    ppo_epochs: int = 4
    """passes over each batch"""
    max_grad_norm: float | None = None
    """clip the norm of the gradient, at every optimizer step"""
    optimize_cuda_cache: bool | None = None
    """deprecated: older name of `optimize_device_cache`"""
    optimize_device_cache: bool = False
    """free cached device memory after each step: slower, a little less memory"""
    early_stopping: bool = False
    """end a step's epochs once the policy's KL from itself before the step exceeds 1.5 `target_kl`"""
    target_kl: float = 1
    """see `early_stopping`"""
    compare_steps: int = 1
    """steps between two looks at whether the score is the best yet"""
    ratio_threshold: float = 10.0
    """an optimizer step whose mean ratio exceeds this is skipped"""
    use_score_scaling: bool = False
    """divide scores by their running standard deviation"""
    use_score_norm: bool = False
    """with `use_score_scaling`: subtract their running mean first"""
    score_clip: float | None = None
    """clip scores to +- this"""
    whiten_rewards: bool = False
    """scale the rewards of a batch to variance 1; their mean stays"""

    temperature: float = 1.0
    """of sampling *and* of the log-probabilities that the step computes"""
    missing_eos_penalty: float | None = None
    """EOS trick: a response that does not end in EOS (or `stop_token`) scores minus this, whatever its score was"""
    stop_token: str | None = None
    """text of a further token that ends a response in `train()`; the response is scored up to it"""
    max_new_tokens: int = 32
    """length limit of the responses in `train()`"""
    generation_kwargs: JSONDict = field(default_factory=dict)
    """further keywords of `generate` in `train()`, over do_sample=True, top_k=0, top_p=1.0"""
    adam_style: Literal["torch", "tf"] = "torch"
    """default optimizer; tf (`TFAdam`): far smaller first steps where gradients are small"""
    adam_epsilon: float = 1e-8
    """of the default optimizer; PPO papers use 1e-5"""
    anneal_learning_rate: bool = False
    """linearly to 0 over `total_ppo_epochs` steps; only with no `lr_scheduler` given"""
    output_dir: str | None = None
    """where `train()` puts its checkpoints"""
    save_steps: int | None = None
    """steps of `train()` between two checkpoints"""
    save_total_limit: int = 2
    """newest checkpoints that `train()` keeps"""

    is_encoder_decoder: Annotated[bool | None, Runtime] = None
    """set by the trainer"""
    is_peft_model: Annotated[bool | None, Runtime] = None
    """set by the trainer"""
    backward_batch_size: Annotated[int | None, Runtime] = None
    """samples of an optimizer step on each process: `mini_batch_size * gradient_accumulation_steps`"""
    global_backward_batch_size: Annotated[int | None, Runtime] = None
    """set by the trainer: samples of an optimizer step on all processes"""
    global_batch_size: Annotated[int | None, Runtime] = None
    """set by the trainer: samples of a step on all processes"""

    def __post_init__(self) -> None:
        if self.forward_batch_size is not None:
            warnings.warn(
                "Note that using `forward_batch_size` is deprecated, use `mini_batch_size` instead. "
                "By setting it you overwrite `mini_batch_size` which affects both the batch size during forward passes "
                "and also the mini batch size for PPO optimization."
            )
            self.mini_batch_size = self.forward_batch_size
        if self.optimize_cuda_cache is not None:
            warnings.warn("`optimize_cuda_cache` is deprecated, use `optimize_device_cache` instead.")
            self.optimize_device_cache = self.optimize_cuda_cache
        self._validate()
        self.backward_batch_size = self.mini_batch_size * self.gradient_accumulation_steps
        exact_div(
            self.batch_size,
            self.backward_batch_size,
            "batch_size",
            "mini_batch_size * gradient_accumulation_steps",
            "`batch_size` must be a multiple of `mini_batch_size * gradient_accumulation_steps`",
        )
        self.total_ppo_epochs = math.ceil(self.steps / self.batch_size)
        if self.log_with == "wandb" and not is_wandb_available():
            raise ImportError(
                'Please install wandb to use wandb logging. You can do this by running `pip install "trl[wandb]"`.'
            )
        if self.kl_penalty not in KL_PENALTIES:
            raise AssertionError(f"kl_penalty={self.kl_penalty!r}: choose 'kl', 'abs', 'mse' or 'full'")

    def _validate(self) -> None:
        for name in ("batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs", "steps",
                     "compare_steps", "max_new_tokens", "save_total_limit"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a whole number of at least 1")
        for name in ("temperature", "adam_epsilon", "horizon", "target", "ratio_threshold", "cliprange", "target_kl"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a number above 0")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a number from 0 to 1")
        for name in ("max_grad_norm", "score_clip", "save_steps"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a number above 0, or None for none")
        if self.adam_style not in ("torch", "tf"):
            raise ValueError(f"adam_style={self.adam_style!r}: choose 'torch' or 'tf'")
        if self.log_with not in (None, "wandb", "tensorboard"):
            raise ValueError(f"log_with={self.log_with!r}: choose 'wandb', 'tensorboard' or None")
        if self.use_score_norm and not self.use_score_scaling:
            raise ValueError("use_score_norm=True: it only has an effect with use_score_scaling=True")
        if (self.save_steps is None) != (self.output_dir is None):
            raise ValueError(
                f"save_steps={self.save_steps!r}, output_dir={self.output_dir!r}: checkpoints need both, or neither"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields, nested ones as `name/key`."""
        return flatten_dict(dict(self.__dict__))
