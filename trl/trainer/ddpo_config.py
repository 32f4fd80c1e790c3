"""The numbers of DDPO (arXiv:2305.13301)."""

import os
import sys
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from trl.import_utils import is_bitsandbytes_available, is_torchvision_available, pip_install
from trl.trainer.configuration import choose, require


@dataclass
class DDPOConfig:
    """Settings of `DDPOTrainer`."""

    exp_name: str = field(default_factory=lambda: os.path.basename(sys.argv[0]).removesuffix(".py"))
    """names the run at the tracker where `run_name` is empty"""
    run_name: str = ""
    """names the run at the tracker, and its folder under `logdir`"""
    seed: int = 0
    """every process adds its rank"""
    log_with: Literal["wandb", "tensorboard"] | str | None = None
    """accelerate's tracker; 'wandb' and 'tensorboard' can show images"""
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)
    """accelerate's `init_kwargs` of the tracker, e.g. `{"wandb": {"entity": "us"}}`"""
    accelerator_kwargs: dict[str, Any] = field(default_factory=dict)
    """more keywords of `Accelerator`"""
    project_kwargs: dict[str, Any] = field(default_factory=dict)
    """more keywords of `ProjectConfiguration`; they win over `logdir`, `run_name` and `num_checkpoint_limit`"""
    tracker_project_name: str = "trl"
    """project under which the tracker files the run"""
    logdir: str = "logs"
    """checkpoints go to `logdir/run_name/checkpoints`, the tracker's files to `logdir/run_name`"""

    num_epochs: int = 100
    """rounds of sampling and training"""
    save_freq: int = 1
    """epochs between two checkpoints; there is none after epoch 0"""
    num_checkpoint_limit: int = 5
    """older checkpoints are deleted"""
    mixed_precision: str | None = "fp16"
    """'fp16', 'bf16' or 'no'; None leaves it to accelerate. Frozen weights are cast, trained ones stay in float32. \
'fp16' needs a GPU"""
    allow_tf32: bool = True
    """let CUDA multiply float32 matrices in TF32"""
    resume_from: str = ""
    """a `checkpoint_N` folder, or a folder of them: the latest is taken"""

    sample_num_steps: int = 50
    """denoising steps: the length of an episode"""
    sample_eta: float = 1.0
    """noise of a DDIM step; 0 would leave nothing to learn from"""
    sample_guidance_scale: float = 5.0
    """classifier-free guidance above 1"""
    sample_batch_size: int = 1
    """per process"""
    sample_num_batches_per_epoch: int = 2
    """per process"""

    train_batch_size: int = 1
    """per process; not larger than `sample_batch_size`"""
    train_use_8bit_adam: bool = False
    """AdamW of bitsandbytes, whose states take 8 bits"""
    train_learning_rate: float = 3e-4
    """of AdamW"""
    train_adam_beta1: float = 0.9
    """decay of AdamW's mean of gradients"""
    train_adam_beta2: float = 0.999
    """decay of AdamW's mean of their squares"""
    train_adam_weight_decay: float = 1e-4
    """weight decay of AdamW"""
    train_adam_epsilon: float = 1e-8
    """of AdamW's division"""
    train_gradient_accumulation_steps: int = 1
    """batches to an optimizer step; the timesteps of a batch are accumulated besides"""
    train_max_grad_norm: float = 1.0
    """clip the norm of the gradient, at every optimizer step"""
    train_num_inner_epochs: int = 1
    """passes over the samples of an epoch; above 1 the clipping has work to do"""
    train_cfg: bool = True
    """guide in training as in sampling; without it the trained policy is not the one that sampled"""
    train_adv_clip_max: float = 5
    """advantages are clipped to +- this"""
    train_clip_range: float = 1e-4
    """small, since the log-probability of a step is a mean over its pixels"""
    train_timestep_fraction: float = 1.0
    """the part of the denoising steps, drawn anew for every sample, that is trained on"""

    per_prompt_stat_tracking: bool = False
    """normalise rewards by their own prompt's"""
    per_prompt_stat_tracking_buffer_size: int = 16
    """rewards of each prompt that its mean is taken over"""
    per_prompt_stat_tracking_min_count: int = 16
    """with fewer rewards of a prompt, the batch's mean and deviation are used"""
    async_reward_computation: bool = False
    """score the batches in threads"""
    max_workers: int = 2
    """threads of `async_reward_computation`"""
    negative_prompts: str | None = ""
    """one negative prompt for all samples"""

    def __post_init__(self) -> None:
        if self.log_with not in (None, "wandb", "tensorboard"):
            warnings.warn(
                "Accelerator tracking only supports image logging if `log_with` is set to 'wandb' or 'tensorboard'."
            )
        if self.log_with == "wandb" and not is_torchvision_available():
            warnings.warn("Wandb image logging requires torchvision to be installed")
        if self.train_use_8bit_adam and not is_bitsandbytes_available():
            raise ImportError(f"train_use_8bit_adam=True needs bitsandbytes: {pip_install('bitsandbytes')}")
        self._check_ranges()

    def _check_ranges(self) -> None:
        counts = (
            "num_epochs", "save_freq", "num_checkpoint_limit", "sample_num_steps", "sample_batch_size",
            "sample_num_batches_per_epoch", "train_batch_size", "train_gradient_accumulation_steps",
            "train_num_inner_epochs", "max_workers",
        )  # fmt: skip
        for name in counts:
            require(self, name, getattr(self, name) >= 1, "give at least 1")
        for name in ("sample_eta", "train_clip_range", "train_adv_clip_max", "train_max_grad_norm"):
            require(self, name, getattr(self, name) > 0, "give more than 0, or there is nothing to learn from")
        single = self.negative_prompts is None or isinstance(self.negative_prompts, str)
        require(self, "negative_prompts", single, "give one string, for all samples")
        choose(self, "mixed_precision", (None, "no", "fp16", "bf16"))
        require(
            self,
            "train_timestep_fraction",
            self.train_timestep_fraction <= 1 and self.trained_timesteps >= 1,
            f"give a fraction of the {self.sample_num_steps} denoising steps that leaves at least one",
        )
        if not self.train_cfg and self.sample_guidance_scale > 1:
            warnings.warn(
                f"train_cfg=False with sample_guidance_scale={self.sample_guidance_scale}: the policy that is trained "
                "is not the one that samples, and ratios do not start at 1."
            )

    @property
    def trained_timesteps(self) -> int:
        """How many denoising steps of each sample are trained on."""
        return int(self.sample_num_steps * self.train_timestep_fraction)

    def to_dict(self) -> dict[str, Any]:
        """The fields, nested containers copied."""
        return asdict(self)
