"""Proximal policy optimisation of language models (arXiv:1707.06347, arXiv:1909.08593), driven by `step` or `train`."""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NoReturn

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, gather_object, parse_flag_from_env, tqdm
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
)

from trl.core import PPODecorators, convert_to_scalar, entropy_from_logits, flatten_dict, set_seed, stats_to_np
from trl.data.columns import check_embedded, flags_in
from trl.data.formats import refuse_splits
from trl.data.microbatches import unasked_budget
from trl.data.pictures import processor_of
from trl.data.records import Rollout
from trl.generation import make_sampler
from trl.generation.engine import check_shown, picture_tokens
from trl.generation.generate_kwargs import OUTPUTS, asked_end_tokens, sampling_params
from trl.generation.plain_generate import generate_padded
from trl.generation.sampler import Sampler, check_sampler, is_exact
from trl.generation.stopping import end_tokens, without_ends
from trl.generation.vllm.engine import EngineError
from trl.generation.vllm.sync import as_one
from trl.import_utils import is_wandb_available, pip_install
from trl.kernels.step_memory import in_place, kept_memory
from trl.legacy import ppo_padded
from trl.losses.advantages import token_rewards
from trl.losses.kl import KL_PENALTIES
from trl.losses.loss_sum import LossSum, Measure, masked_sum
from trl.losses.policy import Correction, clipped_surrogate, clipped_value
from trl.models import zero
from trl.models.forward import eval_mode, introduce
from trl.models.modeling_base import PreTrainedModelWrapper, create_reference_model
from trl.models.modeling_value_head import SUPPORTED_ARCHITECTURES
from trl.models.precision import check_trainable, dtype_of, frozen_dtype, precision_of, say_memory, warn_of_half
from trl.models.prepare import check_vocabulary, context_length, embedding_rows, equalise, load_model
from trl.models.reference import Reference, copy_of, needs_no_copy
from trl.models.scoring import Head, Scores, classifier_of, in_head
from trl.models.sharded import (
    gathered,
    own_layers,
    prepare_frozen,
    say_gathering,
    shard_beside,
    shards_weights,
)
from trl.models.unwrap import (
    below_accelerate,
    below_value_head,
    is_encoder_decoder,
    is_sharded,
    learns_prompt,
    reads_pictures,
)
from trl.models.weight_files import gathered_state, on_host, spread_like
from trl.rewards.named import RewardSource
from trl.rewards.panel import LARGEST
from trl.rollout.collector import rendered
from trl.rollout.experience import Experience, PolicyBatch, padded
from trl.rollout.measure import (
    PACKED_TOKENS,
    ActorCritic,
    advantages,
    check_first_ratio,
    measure,
    with_advantages,
)
from trl.rollout.prompts import PromptStream, with_opened_pictures, with_prompts
from trl.rollout.rewards import RolloutRewards, TokenRewards, panel_of, total_scores
from trl.rollout.source import (
    EnvironmentSource,
    GenerateSource,
    SamplerSource,
    Source,
    close_objects,
    environment_for_policy,
    reward_names,
)
from trl.trainer import checkpoints, overrides, ppo_forms, ppo_statistics, ppo_today
from trl.trainer.base import BaseTrainer
from trl.trainer.configuration import ACTIONS, PostTrainingConfig, processing_class_of, read_numbers
from trl.trainer.guard import NonFiniteSteps, Piece, check_weights, sampler_errors
from trl.trainer.model_card import PPO_CARD, CardFacts, card_text, listed, write_card, write_model_card
from trl.trainer.optim import TFAdam
from trl.trainer.ppo_forms import TodaysSettings
from trl.trainer.preparation import prepare_tokenizer, text_tokenizer
from trl.trainer.ranks import after_restart, check_agreement, join_again, say_unsharded, watched
from trl.trainer.run_folder import RunFacts, RunFolder, check_writable, told
from trl.trainer.run_record import resolved
from trl.trainer.settings import OfForm, WholeOfForm, bfloat16_by_default, logger
from trl.trainer.signals import TERMINATED, StopSignal
from trl.trainer.statistics import AdaptiveKLController, FixedKLController, RunningMoments, exact_div
from trl.trainer.tally import StepWatch, Tally, write_metrics
from trl.trainer.update import gradient_norm, leave_zeros, optimizer_step

if TYPE_CHECKING:
    from datasets import Dataset

SHOWN = {"score": "ppo/mean_scores", "kl": "objective/kl", "entropy": "ppo/policy/entropy"}
"""what the progress bar shows"""
STATE, OLD_RANDOM_STATE = "trainer_state.pt", "random_state-{rank}.pt"
"""files of a checkpoint; the second one is release 1.0.0's"""
OWN = "own:"
"""before the names of statistics that a user's `loss` adds"""
JSONDict = Annotated[dict[str, Any], tyro.conf.arg(metavar="JSON", constructor=json.loads)]
Runtime = tyro.conf.Suppress


@dataclass
class PPOConfig(TodaysSettings):
    """Numbers of `PPOTrainer`; as a command line through `tyro.cli(PPOConfig)`.

    Of one of two forms: these fields, which release 0.7.7 has, or those of 0.12 and later (`TodaysSettings` and
    `ppo_forms.SHARED`), which `HfArgumentParser` reads. A mixture is a ValueError.
    """

    exp_name: str = os.path.basename(sys.argv[0])[: -len(".py")]
    """name of the experiment, for trackers"""
    seed: int = WholeOfForm(0, other=42)
    """seed of all random numbers"""
    log_with: Literal["wandb", "tensorboard"] | None = None
    """tracker that `log_stats` writes to"""
    task_name: str | None = None
    """for your own records: the tracker stores it, nothing reads it"""
    model_name: str | None = None
    """for your own records: the tracker stores it, nothing reads it"""
    query_dataset: str | None = None
    """for your own records: the tracker stores it, nothing reads it"""
    reward_model: str | None = None
    """for your own records: the tracker stores it, nothing reads it"""
    remove_unused_columns: bool = True
    """drop columns of a `Dataset` that the model does not take, except `label`, `prompt`, `query`, `response`"""
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
    learning_rate: float = OfForm(1e-5, other=3e-6)
    """of the default optimizer; today's form: 3e-6"""
    adap_kl_ctrl: bool = True
    """the KL coefficient follows the measured KL towards `target`; else it stays"""
    init_kl_coef: float = 0.2
    """the KL coefficient at the start"""
    kl_penalty: Literal["kl", "abs", "mse", "k3", "full"] = "kl"
    """kl: log p - log p_ref; abs: its absolute value; mse: half its square; k3: p_ref / p - 1 + log p - log p_ref;
    full: the exact KL over the vocabulary"""
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
    """end a step's epochs when the policy's KL to the policy before the step exceeds 1.5 `target_kl`"""
    target_kl: float = 1
    """see `early_stopping`"""
    compare_steps: int = 1
    """steps between two comparisons with the best score so far"""
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
    vllm_importance_sampling_correction: bool = True
    """where an engine outside of the trainer samples in `train()`: weigh each token of the policy's loss by the ratio
    of the policy's probability to the engine's. The local sampler needs no weights and gets none"""
    vllm_importance_sampling_mode: str = "sequence_mask"
    """whose ratio and how it is bounded: token_truncate (TIS), token_mask (IcePop), sequence_truncate, sequence_mask
    (MIS), geometric_truncate, geometric_mask"""
    vllm_importance_sampling_clip_max: float | None = 3.0
    """upper bound of that ratio; None: none"""
    vllm_importance_sampling_clip_min: float | None = None
    """lower bound; None: none"""

    temperature: float = OfForm(1.0, other=0.7)
    """of sampling *and* of the log-probabilities that the step computes; today's form: 0.7"""
    missing_eos_penalty: float | None = None
    """EOS trick: a response that does not end in EOS (or `stop_token`) scores minus this, whatever its score was;
    today's form: this is subtracted from its score"""
    stop_token: str | None = None
    """text of a further token that ends a response in `train()`; the response is scored up to it; today's form: "eos"
    is the end token, and without one (or `stop_token_id`) every response is as long as `response_length`"""
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
    save_total_limit: int = WholeOfForm(2, other=None)
    """newest checkpoints that `train()` keeps; today's form: all"""
    overwrite_output_dir: bool = False
    """remove another run's checkpoints from `output_dir` when `train()` begins; False: refuse such a folder"""
    enable_jit_checkpoint: bool = False
    """at SIGTERM `train()` finishes its step, saves it and exits with 143; needs `output_dir`"""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """where a loss or a gradient is nan or infinite, before the optimizer step: an error, or the step is left out"""
    max_non_finite_skips: int = 10
    """optimizer steps of a run that `on_non_finite="skip"` leaves out at most; one more is an error"""

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
        self._form = ppo_forms.form_of(self)
        for name, default in (("include_num_input_tokens_seen", "no"), ("debug", "")):
            if not getattr(self, name):  # a parser reads these defaults otherwise
                setattr(self, name, default)
        if self._form is not None:
            self._take_defaults()
        read_numbers(self)
        if self._form == ppo_forms.TODAY:
            ppo_forms.check_today(self)
            self.world_size = self.arguments.world_size
            return
        if self.output_dir is None and self.save_steps is not None:
            raise ValueError(f"save_steps={self.save_steps!r}, output_dir=None: checkpoints need both, or neither")
        if self._form == ppo_forms.OLDER and self.save_steps is None and self.output_dir is not None:
            raise ValueError(f"save_steps=None, output_dir={self.output_dir!r}: checkpoints need both, or neither")
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
        self.derive()

    def derive(self) -> None:
        """Check the fields and compute the numbers that follow from them; the trainer does so again when it is built.

        So a field that was changed in the meantime has its effect.
        """
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
                f"Please install wandb to use wandb logging. You can do this by running `{pip_install('wandb')}`."
            )
        if self.kl_penalty not in KL_PENALTIES:
            raise AssertionError(f"kl_penalty={self.kl_penalty!r}: choose 'kl', 'abs', 'mse', 'k3' or 'full'")

    def correction(self) -> Correction | None:
        """How what an engine outside of the trainer sampled is weighed; None: not at all."""
        if not self.vllm_importance_sampling_correction:
            return None
        return Correction(
            self.vllm_importance_sampling_mode,
            self.vllm_importance_sampling_clip_max,
            self.vllm_importance_sampling_clip_min,
        )

    def _validate(self) -> None:
        self.correction()
        for name in ("batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs", "steps",
                     "compare_steps", "max_new_tokens", "save_total_limit", "max_non_finite_skips"):  # fmt: skip
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
        if self.on_non_finite not in ACTIONS:
            raise ValueError(f"on_non_finite={self.on_non_finite!r}: choose 'stop' or 'skip'")
        if self.max_non_finite_skips != 10 and self.on_non_finite != "skip":
            raise ValueError(
                f"max_non_finite_skips={self.max_non_finite_skips}: no effect without on_non_finite='skip'"
            )
        for name in ("enable_jit_checkpoint", "overwrite_output_dir"):
            if getattr(self, name) and self.output_dir is None:
                raise ValueError(f"{name}=True: needs `output_dir` and `save_steps`")
        if self.use_score_norm and not self.use_score_scaling:
            raise ValueError("use_score_norm=True: it only has an effect with use_score_scaling=True")

    @property
    def form(self) -> str | None:
        """The form of the fields that were given; None: they fit both, and the trainer's arguments decide."""
        return self._form

    def given_fields(self) -> list[str]:
        """Names of the fields that have another value than their default."""
        return ppo_forms.given_fields(self)

    def take_form(self, form: str) -> None:
        """Be of a form, where the fields fit both; the defaults that depend on it are then this form's."""
        if self._form is None:
            self._form = form
            self._take_defaults()

    def _take_defaults(self) -> None:
        for name in ppo_forms.SHARED:
            setattr(self, name, ppo_forms.in_form(getattr(self, name), self._form))

    @property
    def arguments(self) -> PostTrainingConfig:
        """Today's form: what it says as `TrainingArguments`; made anew where a field has changed."""
        said = ppo_forms.said_of(self)
        if self.__dict__.get("_said") != said:
            self._said, self._arguments = said, ppo_forms.arguments_of(self)
        return self._arguments

    if not TYPE_CHECKING:  # whose base class says what there is

        def __getattr__(self, name: str) -> Any:
            """Today's form: what `TrainingArguments` have beside their fields, such as `device`."""
            if name.startswith("_") or self.__dict__.get("_form") != ppo_forms.TODAY:
                raise AttributeError(f"'PPOConfig' object has no attribute {name!r}")
            return getattr(self.arguments, name)

    def to_dict(self) -> dict[str, Any]:
        """All fields of its form, nested ones as `name/key`."""
        left_out = () if self._form == ppo_forms.TODAY else ppo_forms.ONLY_TODAY
        held = {name: value for name, value in self.__dict__.items() if name[0] != "_" and name not in left_out}
        return flatten_dict(held)


class PPOTrainer(BaseTrainer):
    """Trains a language model with a value head against scores of its responses.

    ref_model: the reference of the KL. None: a frozen copy of the model as it is, sharing the layers before
    `num_shared_layers`; for a PEFT model whose adapter is new, the model with its adapter switched off.
    value_model: a model with a score head (num_labels=1) as critic; the policy's value head is then frozen.
    reward_funcs: functions, their names, reward models or their folders; `train()` scores a response with their sum.
    reward_processing_classes: tokenizers of the reward models.
    environment: such as a `TextEnvironment`; `train()` plays episodes in it, whose score is the sum of their rewards.
    sampler: what samples the policy's responses instead of the local sampler, such as a `VLLMSampler`.

    Today's form (a config of that form, or any argument from `args` to `optimizers`): `model` is a language model
    without a value head; `reward_model` reads the tokens of prompt and response; `eval_dataset` holds prompts to show
    samples of; `policy` and `ref_policy` are older names of `model` and `ref_model`.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "ppo"]
    _said_gathering = False

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: nn.Module | str | None = None,
        ref_model: nn.Module | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dataset: torch.utils.data.Dataset | Dataset | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: LRScheduler | None = None,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        value_model: nn.Module | None = None,
        reward_funcs: RewardSource | Sequence[RewardSource] | None = None,
        reward_processing_classes: Any = None,
        environment: Any = None,
        args: PPOConfig | None = None,
        policy: nn.Module | str | None = None,
        ref_policy: nn.Module | str | None = None,
        reward_model: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        sampler: Sampler | None = None,
    ):
        check_sampler(sampler)
        self.sampler = sampler
        self._followed = 0
        """how often a sampler with weights of its own was given the policy's"""
        self._pushed = (-1, -1)
        places = (model, ref_model, tokenizer, dataset, optimizer, data_collator, num_shared_layers, lr_scheduler)
        today = {
            "args": args, "policy": policy, "ref_policy": ref_policy, "reward_model": reward_model,
            "train_dataset": train_dataset, "eval_dataset": eval_dataset, "peft_config": peft_config,
            "callbacks": callbacks, "optimizers": None if optimizers == (None, None) else optimizers,
        }  # fmt: skip
        parts: dict[str, Any] = dict(zip(ppo_forms.ORDER, places, strict=True))
        parts |= {"processing_class": processing_class, "value_model": value_model}
        if isinstance(model, PreTrainedTokenizerBase):
            parts, today = ppo_forms.from_todays_order(places, parts, today)
        self.args = ppo_forms.one_of("args", args, "config", config)
        self.arguments: PostTrainingConfig | None = None
        self.eval_dataset = today["eval_dataset"]
        self._token_rewards: TokenRewards | None = None
        parts["tokenizer"] = text_tokenizer(processing_class_of(parts.pop("processing_class"), parts["tokenizer"]))
        parts |= {"reward_funcs": reward_funcs, "reward_processing_classes": reward_processing_classes}
        config = self.args
        if isinstance(config, PPOConfig) and ppo_forms.takes_todays_form(config, today, parts):
            config = self._take_todays_form(parts, today)
        super().__init__(config)
        self._build(config, environment=environment, callbacks=callbacks, **parts)

    def _build(
        self, config: PPOConfig | None, *, model: Any, ref_model: Any, tokenizer: Any, dataset: Any, optimizer: Any,
        data_collator: Any, num_shared_layers: int | None, lr_scheduler: Any, value_model: Any, reward_funcs: Any,
        reward_processing_classes: Any, environment: Any, callbacks: list[TrainerCallback] | None,
    ) -> None:  # fmt: skip
        """Check the parts and put them together."""
        check_arguments(config, model, ref_model, tokenizer, dataset, lr_scheduler, num_shared_layers)
        assert config is not None
        set_seed(config.seed)
        warn_of_half(model, config.learning_rate)
        self.config: PPOConfig = config
        if config.output_dir is not None:  # a reward function may change the directory
            config.output_dir = os.path.abspath(config.output_dir)
        self.tokenizer = tokenizer
        judge = None if self._token_rewards is None else self._token_rewards.model
        for each in (model, ref_model, value_model, judge):
            introduce(each, tokenizer)
        self.dataset = dataset
        self.accelerator = make_accelerator(config)
        say_unsharded(self.accelerator)
        self.is_encoder_decoder = is_encoder_decoder(model)
        self.is_peft_model = getattr(model, "is_peft_model", False)
        self.is_distributed = self.accelerator.num_processes > 1
        self._on_deepspeed = zero.is_on(self.accelerator)
        self.current_device = self.accelerator.device
        complete_config(
            config,
            self.accelerator.num_processes,
            is_encoder_decoder=self.is_encoder_decoder,
            is_peft_model=self.is_peft_model,
            has_dataset=dataset is not None,
        )
        start_trackers(self.accelerator, config)
        reference: nn.Module | None = ref_model
        if reference is None and self.is_peft_model:
            reference = None if needs_no_copy(model) else copy_of(model, share=not shards_weights(self.accelerator))
        elif reference is None:
            equalise(model)
            reference = create_reference_model(model, num_shared_layers=num_shared_layers)
            if shards_weights(self.accelerator):  # each by itself
                reference = zero.copy_in_parts(reference, {})
        self._prepare(model, value_model, reference, optimizer, data_collator, lr_scheduler)
        adaptive = AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
        self.kl_ctl: Any = adaptive if config.adap_kl_ctrl else FixedKLController(config.init_kl_coef)
        self._built_with = _followed(config)
        self.running = RunningMoments(self.accelerator)
        self.current_step = self.logged_steps = self.data_position = 0
        self.highest_reward = -float("inf")
        self._folder, self._signal = RunFolder(is_old=_is_old_checkpoint), StopSignal()
        self._non_finite = NonFiniteSteps(config.on_non_finite, config.max_non_finite_skips)
        self._named: list[Piece] = []
        self._agree = False
        """whether the processes were compared"""
        self._said_filters = self._said_others = False
        self._sampled: tuple[list[list[int]], Tensor] | None = None
        """tokens by the sampler of `train` and their log-probabilities, on the way to its step"""
        self._reward_funcs, self._reward_tokenizers = reward_funcs, reward_processing_classes
        self.environment = None if environment is None else self._ready(environment, reward_funcs)
        self._take_own_methods()
        PPODecorators.optimize_device_cache = config.optimize_device_cache
        self.progress = None if self.arguments is None else self._progress(self.arguments, callbacks)
        if self.accelerator.process_index:  # each process samples with its own seed
            set_seed(config.seed + 1_000_003 * self.accelerator.process_index)

    def _prepare(
        self, model: Any, value_model: Any, ref_model: Any, optimizer: Any, data_collator: Any, lr_scheduler: Any
    ) -> None:
        """Put everything on the device and under accelerate."""
        if value_model is not None:
            check_critic(model, value_model, optimizer)
        trained = [model] if value_model is None else [model, value_model]
        self._parameters = [p for each in trained for p in each.parameters() if p.requires_grad]
        if optimizer is None and self.arguments is not None:
            optimizer = ppo_forms.optimizer_of(self.arguments, self._parameters, self.config.adam_epsilon)
        optimizer = make_optimizer(self.config, self._parameters) if optimizer is None else optimizer
        if lr_scheduler is None and self.arguments is not None:
            lr_scheduler = ppo_forms.scheduler_of(self.arguments, self.config.total_ppo_epochs, optimizer)
        lr_scheduler = make_scheduler(self.config, optimizer, lr_scheduler)
        collator = DataCollatorForLanguageModeling(self.tokenizer, mlm=False)
        self._embeddings = embedding_rows(model)
        self.model = model  # whose arguments `prepare_dataloader`, which a subclass may replace, looks at
        dataloader = None if self.dataset is None else self.prepare_dataloader(self.dataset, data_collator)
        together = zero.as_one(self.accelerator, model, value_model)
        prepare = partial(self.accelerator.prepare, together, optimizer, collator, dataloader, lr_scheduler)
        if self.arguments is not None and not self.args.ds3_gather_for_generation:
            logger.warning("ds3_gather_for_generation=False: no effect: PPO gathers all weights at once to sample")
        self.reference = Reference(model, ref_model)  # which looks at the adapter while its weights are whole
        zero.fill_config(self.accelerator, self.config.mini_batch_size, self.config.max_grad_norm)
        sharded = self.accelerator.is_fsdp2
        if sharded and value_model is not None:
            prepare = partial(shard_beside, self.accelerator, value_model, optimizer, prepare)
        with own_layers(self.accelerator, model) if sharded else nullcontext():
            prepared = prepare()
        self.model, self.optimizer, self.data_collator, self.dataloader, self.lr_scheduler = prepared
        engine = None
        if together is not model:
            engine, self.model = self.model, model
        apart = value_model is not None and not sharded and engine is None
        self.value_model = self.accelerator.prepare(value_model) if apart else value_model
        self.ref_model = None if ref_model is None else prepare_frozen(self.accelerator, ref_model)
        if sharded:
            trained = [each for each in (self.model, self.value_model) if each is not None]
            self._parameters = [p for each in trained for p in each.parameters() if p.requires_grad]
        self.reference.policy, self.reference.frozen = self.model, self.ref_model
        self.actor = ActorCritic(self.model, self.value_model, self.config.temperature, engine)
        if self.accelerator.is_main_process:
            say_memory(nn.ModuleList(trained), self.reference.kept, optimizer)

    @property
    def processing_class(self) -> Any:
        """The tokenizer by its newer name, or the processor that it belongs to."""
        return processor_of(self.tokenizer)

    @property
    def shared_layer_parameters(self) -> list[str]:
        """Names of the policy's parameters that the reference shares (`num_shared_layers`)."""
        theirs = set() if self.ref_model is None else {id(parameter) for parameter in self.ref_model.parameters()}
        policy = below_accelerate(self.model)
        return [name for name, parameter in policy.named_parameters() if id(parameter) in theirs]

    def prepare_dataloader(
        self, dataset: torch.utils.data.Dataset | Dataset, data_collator: Callable[[list[Any]], Any] | None = None
    ) -> torch.utils.data.DataLoader:
        """A loader of whole, shuffled batches; not yet under accelerate."""
        return make_dataloader(dataset, data_collator, below_accelerate(self.model).forward, self.config)

    # --- sampling ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Responses to queries; with `generate_ref_response` a pair, the second by the reference.

        A 1-d tensor gives a tensor [1, L], a list of 1-d tensors a list of 1-d tensors. `batch_size` queries at a
        time; `length_sampler` draws `max_new_tokens` for each of those batches. Each response ends with its first end
        token; encoder-decoders' begin with the start token and never contain the prompt. Keywords are those of
        transformers' `generate`; a missing one is the model's `generation_config`'s, so that without any it is greedy.
        """
        single = isinstance(query_tensor, Tensor)
        queries: list[Tensor] = [query_tensor] if isinstance(query_tensor, Tensor) else list(query_tensor)
        if any(not isinstance(query, Tensor) or query.ndim != 1 for query in queries):
            raise ValueError(
                "query_tensor must be a tensor of shape (`seq_len`) or a list of tensors of shape (`seq_len`)"
            )
        if self.config.temperature != 1:
            generation_kwargs.setdefault("temperature", self.config.temperature)
        queries = seen_tokens(queries, generation_kwargs.pop("attention_mask", None))
        queries = [query.to(self.current_device) for query in queries]
        refuse_outputs(generation_kwargs)

        policy = below_accelerate(self.model)
        self.follow()

        def responses_of(model: Any) -> Any:
            responses = self._respond(model, queries, batch_size, length_sampler, generation_kwargs)
            if return_prompt and not self.is_encoder_decoder:
                responses = [torch.cat(pair) for pair in zip(queries, responses, strict=True)]
            return responses[0][None] if single else responses

        with eval_mode(policy, checkpointing=True), self._gathered():
            response = responses_of(policy)
        if not generate_ref_response:
            return response
        with self.reference.model() as reference, gathered(reference or policy):
            return response, responses_of(below_accelerate(reference or policy))

    def _gathered(self) -> AbstractContextManager[None]:
        """The policy's weights whole on every process, for sampling; collective where they are sharded.

        A sampler with weights of its own needs none of them, and its error on one process is one of all.
        """
        if self.sampler is not None and hasattr(self.sampler, "follow") and not is_exact(self.sampler):
            return as_one("sample")
        if is_sharded(self.model) and not self._said_gathering:
            self._said_gathering = True
            if self.accelerator.is_main_process:
                say_gathering(self.model)
        return gathered(self.model)

    def _respond(
        self,
        model: Any,
        queries: Sequence[Tensor],
        batch_size: int,
        length_sampler: Callable[[], int] | None,
        kwargs: Mapping[str, Any],
    ) -> list[Tensor]:
        """A response to each query; a `length_sampler` draws the length for every `batch_size` queries anew."""
        responses: list[Tensor] = []
        size = len(queries) if length_sampler is None else batch_size
        for start in range(0, len(queries), size):
            part = queries[start : start + size]
            own = kwargs if length_sampler is None else {**kwargs, "max_new_tokens": int(length_sampler())}
            rollout = self._source(model, own, batch_size).draw([{"prompt_ids": query.tolist()} for query in part])
            responses += [query.new_tensor(ids) for query, ids in zip(part, rollout.completions, strict=True)]
        return responses

    def _source(self, model: Any, kwargs: Mapping[str, Any], max_rows: int) -> Source:
        """A sampler, or the model's `generate` for keywords that no sampler knows."""
        params = None if self.is_encoder_decoder else sampling_params(model, kwargs)
        if params is None:
            generate = partial(generate_padded, model, self.tokenizer, kwargs=kwargs)
            return GenerateSource(generate, self.current_device, max_rows)
        return SamplerSource(self._sampler(model, max_rows), lambda seed: replace(params, seed=seed))

    def _sampler(self, model: Any, max_rows: int) -> Sampler:
        """The user's for the policy; else the local one."""
        if self.sampler is not None and model is below_accelerate(self.model):
            return self.sampler
        return make_sampler(model, self.tokenizer, max_rows=max_rows)

    def follow(self) -> None:
        """Give a sampler with weights of its own the policy's of now, once for each step. Collective."""
        if self.sampler is None or not hasattr(self.sampler, "follow"):
            return
        now = (self.current_step, sum(parameter._version for parameter in self._parameters))
        if now != self._pushed:
            self._followed, self._pushed = self._followed + 1, now
        self.sampler.follow(self._followed)

    def _samples_policy(self) -> bool:
        """Whether `train` samples from the policy at its temperature, with no filter in between."""
        params = sampling_params(below_accelerate(self.model), self._sampling_kwargs())
        temperature = self.config.temperature
        return params is not None and params == replace(
            params, temperature=temperature, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, min_new_tokens=0
        )

    @cached_property
    def source(self) -> Source:
        """What completes the prompts in `train`: the environment, a sampler or `generate`."""
        policy, config, kwargs = below_accelerate(self.model), self.config, self._sampling_kwargs()
        if self.environment is None:
            return self._source(policy, kwargs, config.batch_size)
        params = sampling_params(policy, kwargs)
        if params is None:
            raise ValueError(
                "generation_kwargs: the turns of an environment are sampled, and only `generate` knows these"
            )
        sampler = self._sampler(policy, config.batch_size)
        context = context_length(below_value_head(policy))
        return EnvironmentSource(
            self.environment, sampler, lambda seed: replace(params, seed=seed), context, config.max_new_tokens
        )

    def _sampling_kwargs(self) -> dict[str, Any]:
        """Keywords of `generate` in `train`."""
        config, end = self.config, self.tokenizer.eos_token_id
        ends = [*([] if end is None else [end]), *stop_tokens(config, self.tokenizer)]
        kwargs: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": config.max_new_tokens}
        kwargs |= {"eos_token_id": ends} if ends else {}
        kwargs |= {"temperature": config.temperature} if config.temperature != 1 else {}
        return {**kwargs, **config.generation_kwargs}

    def _ready(self, environment: Any, reward_funcs: Any) -> Any:
        """The environment with what it needs to play; ValueError for arguments that do not go together."""
        if self.is_encoder_decoder:
            raise ValueError("environment: an encoder-decoder cannot go on from an answer; train a causal model")
        if self.config.missing_eos_penalty is not None:
            raise ValueError("missing_eos_penalty: episodes of an environment end in other ways too; leave it out")
        ends = end_tokens(self.model, self.tokenizer, asked_end_tokens(self._sampling_kwargs()))
        return environment_for_policy(environment, self.tokenizer, ends, reward_funcs=reward_funcs)

    # --- a step -----------------------------------------------------------------------------------------------------

    @PPODecorators.empty_device_cache()
    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        response_masks: list[Tensor] | None = None,
    ) -> dict[str, Any]:
        """`ppo_epochs` passes over a batch of responses and their scores; the statistics of it.

        response_masks: 1 where the policy chose the token; needed if responses contain the text of tools.
        """
        clock = ppo_statistics.Clock()
        if self.is_distributed and not self._agree:
            self._check_agreement()
        self._follow_config()
        queries, responses, scores, response_masks = self._step_safety_checker(
            self.config.batch_size, queries, responses, scores, response_masks
        )
        scores_B = self._shaped(torch.stack([score.float() for score in scores]), responses)
        config: Any = below_accelerate(self.model).config
        start = config.decoder_start_token_id if self.is_encoder_decoder else None
        seen = reads_pictures(self.model)
        for name, rows in (("queries", queries), ("responses", responses)) if seen else ():
            check_shown([row.tolist() for row in rows], picture_tokens(self.model), name)
        rollout = rollout_of(queries, responses, response_masks, start, self._embeddings, seen)
        memory = kept_memory(self.current_device)
        gradients = in_place(self.current_device, self.accelerator.num_processes, hooked=self._on_deepspeed)
        with eval_mode(*self.actor.models, checkpointing=True), self.accelerator.autocast(), memory, gradients:
            measured, kl_BT = self._measure(Experience.of(rollout).packed_once())
            clock.lap("forward_pass")
            if self._owns("compute_rewards", "_kl_penalty"):
                rewards_BT, penalty_BT = self._own_rewards(scores_B, measured)
            else:
                penalty_BT = -self.kl_ctl.value * kl_BT
                rewards_BT = token_rewards(scores_B, kl_BT, measured.mask_BT, self.kl_ctl.value)
            clock.lap("compute_rewards")
            if self._owns("compute_advantages"):
                experience = self._own_advantages(measured, rewards_BT)
            else:
                experience = with_advantages(self.accelerator, measured, rewards_BT, **self._gae_numbers())
            experience, of_sampler = self._of_sampler(experience)
            clock.lap("compute_advantages")
            train_stats = self._update(experience)
            clock.lap("optimize_step")
        stats = of_sampler | self.record_step_stats(
            self.kl_ctl.value, logprobs=measured.old_logprobs_BT, ref_logprobs=measured.reference_BT,
            masks=measured.mask_BT, scores=scores_B, non_score_reward=penalty_BT, train_stats=train_stats,
            queries=queries, responses=responses,
        )  # fmt: skip
        stats = stats_to_np(self.gather_stats(stats))
        clock.lap("calc_stats")
        self.kl_ctl.update(stats["objective/kl"], self.config.batch_size * self.accelerator.num_processes)
        stats |= {"ppo/learning_rate": self.optimizer.param_groups[0]["lr"], **clock.stats()}
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        return stats if self.config.log_with == "wandb" else convert_to_scalar(stats)

    def _check_agreement(self) -> None:
        """Collective: see `ranks.check_agreement`."""
        config = self.config if self.arguments is None else self.args
        model = nn.ModuleList(map(below_accelerate, self._models().values()))
        check_agreement(self.describe_run(), config, model, self.reference.kept, self.eval_dataset)
        self._agree = True

    def _follow_config(self) -> None:
        """Take over what a script has changed in the config since the last step, where something was built from it."""
        if self.arguments is not None:
            self._follow_args()
        config, now = self.config, _followed(self.config)
        changed = {name for name, value in now.items() if value != self._built_with[name]}
        if not changed:
            return
        if changed & {"mini_batch_size", "gradient_accumulation_steps"}:
            config.derive()
            config.global_backward_batch_size = (config.backward_batch_size or 1) * self.accelerator.num_processes
            self.accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps
        if "temperature" in changed:
            if not config.temperature > 0:
                raise ValueError(f"temperature={config.temperature!r}: give a number above 0")
            self.actor = replace(self.actor, temperature=config.temperature)
            self.__dict__.pop("source", None)  # which samples at the old one
        if "init_kl_coef" in changed and self.current_step:
            warnings.warn(
                f"init_kl_coef={config.init_kl_coef!r}: training has begun, so it has no effect; set "
                "`trainer.kl_ctl.value`"
            )
        elif "init_kl_coef" in changed:
            self.kl_ctl.value = config.init_kl_coef
        if changed & {"target", "horizon", "adap_kl_ctrl"}:
            self._control_kl()
        if "learning_rate" in changed:
            self._set_rate(self._built_with["learning_rate"], config.learning_rate)
        if "steps" in changed:
            config.derive()
        self._built_with = now

    def _control_kl(self) -> None:
        """Give the KL controller its numbers of now; the coefficient stays where it is."""
        config = self.config
        if type(self.kl_ctl) not in (AdaptiveKLController, FixedKLController):
            warnings.warn("target, horizon, adap_kl_ctrl: `trainer.kl_ctl` is your own, so they have no effect")
        elif config.adap_kl_ctrl:
            self.kl_ctl = AdaptiveKLController(self.kl_ctl.value, config.target, config.horizon)
        else:
            self.kl_ctl = FixedKLController(self.kl_ctl.value)

    def _set_rate(self, before: float, rate: float) -> None:
        """Move the optimizer, and the scheduler with it, to another `learning_rate`; one that is yours stays."""
        groups = self.optimizer.param_groups
        if any(group.get("initial_lr", group["lr"]) != before for group in groups):
            warnings.warn(f"learning_rate={rate!r}: the optimizer is your own, so it has no effect; set its `lr`")
            return
        for group in groups:
            group["lr"] = rate * (group["lr"] / before if before else 1.0)
            if "initial_lr" in group:
                group["initial_lr"] = rate
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [rate] * len(scheduler.base_lrs)

    def _step_safety_checker(
        self,
        batch_size: int,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        masks: list[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor] | None]:
        """The lists on the trainer's device, scores 0-d; ValueError for what is not a batch."""
        return checked_batch(batch_size, queries, responses, scores, masks, self.current_device)

    def _shaped(self, scores_B: Tensor, responses: Sequence[Tensor]) -> Tensor:
        """Scores as the step learns from them: EOS trick, best-so-far push, scaling, normalising, clipping."""
        config = self.config
        if config.missing_eos_penalty is not None and self._subtracts_missing_eos:
            ended = torch.tensor(self._ended(responses), device=scores_B.device)
            scores_B = torch.where(ended, scores_B, scores_B - config.missing_eos_penalty)
        elif config.missing_eos_penalty is not None:
            ends = {*end_tokens(self.model, self.tokenizer), *stop_tokens(config, self.tokenizer)}
            ended = torch.tensor([len(row) > 0 and int(row[-1]) in ends for row in responses], device=scores_B.device)
            scores_B = torch.where(ended, scores_B, -config.missing_eos_penalty)
        self._push_if_best(scores_B)
        if config.use_score_scaling:
            self.running.update(scores_B)
            if config.use_score_norm:
                scores_B = scores_B - self.running.mean
            scores_B = scores_B / (self.running.std + torch.finfo(scores_B.dtype).eps)
        if config.score_clip is not None:
            scores_B = scores_B.clamp(-config.score_clip, config.score_clip)
        return scores_B

    def _push_if_best(self, scores_B: Tensor) -> None:
        """Every `compare_steps` steps: push the model if these scores are the best so far. The first are only kept."""
        self.current_step += 1
        if not self.config.push_to_hub_if_best_kwargs or (self.current_step - 1) % self.config.compare_steps:
            return
        mean = self.accelerator.reduce(scores_B.mean(), "mean").item()
        if mean > self.highest_reward:
            first, self.highest_reward = self.highest_reward == -float("inf"), mean
            if not first and self.accelerator.is_main_process:
                self.push_to_hub(**self.config.push_to_hub_if_best_kwargs)

    @property
    def _total(self) -> ppo_statistics.Total:
        """Sums the numbers of all processes."""
        return partial(self.accelerator.reduce, reduction="sum") if self.is_distributed else ppo_statistics.alone

    @property
    def _budget(self) -> int | None:
        if self._on_deepspeed:  # each backward pass would be a step
            return None
        return unasked_budget(self.current_device, self.accelerator.num_processes)

    def _measure(self, experience: Experience) -> tuple[Experience, Tensor]:
        """Processes must make equally many passes, so only a single one may fill them up with tokens."""
        return measure(
            self.actor, self.reference, experience, kl_penalty=self.config.kl_penalty, rows=self.config.mini_batch_size,
            tokens=0 if self.is_distributed else self._budget or PACKED_TOKENS, device=self.current_device,
        )  # fmt: skip

    def _of_sampler(self, experience: Experience) -> tuple[Experience, dict[str, Any]]:
        """The experience, weighed where an engine sampled it; and how far the sampler of `train` was from the policy
        that is measured here, nothing where it is not known."""
        sampled, self._sampled = self._sampled, None
        if sampled is None:
            return experience, {}
        correction = self.config.correction() if self._engine_samples() else None
        responses, sampled_BT = sampled
        if [ids.tolist() for ids in experience.completions] != list(map(list, responses)):
            self._met_others(weighs=correction is not None)
            return experience, {}
        if correction is not None and self._owns("loss"):
            raise ValueError("vllm_importance_sampling_correction=True: an own `loss` is not weighed; set it to False")
        keys = ppo_statistics.sampling_keys(experience, sampled_BT, self.config.cliprange, self._total, correction)
        if correction is None:
            return experience, keys
        old_BT = experience.old_logprobs_BT
        assert old_BT is not None
        weight_BT, _ = correction.weigh(old_BT, sampled_BT.to(old_BT), experience.mask_BT)
        return replace(experience, weight_BT=weight_BT.expand_as(old_BT)), keys

    def _met_others(self, weighs: bool) -> None:
        """`step` was given other responses than `train` has sampled: an error where they are to be weighed."""
        text = (
            "`step` was given other responses than `train` sampled, so the sampler's log-probabilities are not theirs"
        )
        if weighs:
            raise ValueError(
                f"vllm_importance_sampling_correction=True: {text}; give it all of them in their order, or set it to "
                "False"
            )
        if not self._said_others:
            logger.warning("%s: nothing is logged under sampling/", text)
        self._said_others = True

    def _engine_samples(self) -> bool:
        """Whether `train` samples by another computation of the policy than its own."""
        sampler = getattr(self.source, "sampler", None)
        return sampler is not None and not is_exact(sampler)

    def _gae_numbers(self) -> dict[str, Any]:
        return {"gamma": self.config.gamma, "lam": self.config.lam, "whiten_rewards": self.config.whiten_rewards}

    def _update(self, experience: Experience) -> dict[str, Tensor]:
        """Epochs x optimizer steps x micro-batches; the mean statistics of all optimizer steps."""
        history: list[dict[str, Tensor]] = []
        ratios: list[Tensor] = []
        rows, budget = experience.to("cpu"), self._budget
        for _ in range(self.config.ppo_epochs):
            order = np.random.permutation(len(rows))
            for step in np.split(order, len(order) // (self.config.backward_batch_size or 1)):
                parts = [rows.select(part.tolist()) for part in np.split(step, self.config.gradient_accumulation_steps)]
                pieces = [piece for part in parts for piece in ([part] if budget is None else part.cut(budget))]
                batches = [piece.batch() for piece in pieces]
                whole = len(pieces) == len(parts)
                places: list[Any] = np.split(step, len(parts)) if whole else [None] * len(pieces)
                self._named = [Piece(one, k, rows) for k, (one, rows) in enumerate(zip(batches, places, strict=True))]
                history.append(self._optimizer_step(batches, ratios, first=not history))
            if self._early_stop(history[-1]["policy_kl"]):
                break
        self._named = []
        if not self._on_deepspeed:  # which would add to them
            leave_zeros(self._parameters)
        means = {name: torch.stack([each[name] for each in history]).mean() for name in history[0]}
        own = {name.removeprefix(OWN): value for name, value in means.items() if name.startswith(OWN)}
        log_ratios, masks = torch.cat(ratios, 1)
        counted = log_ratios[masks > 0].exp()  # how many there are is asked once, not in each mini-batch
        return own | ppo_statistics.seed_keys(means) | ppo_statistics.batch_keys(experience, counted, self._total)

    def _optimizer_step(self, pieces: Sequence[PolicyBatch], ratios: list[Tensor], first: bool) -> dict[str, Tensor]:
        def accept(means: Mapping[str, Tensor]) -> bool:
            if first:
                check_first_ratio(means, lambda: precision_of(self.model))
            return self._ratio_is_sane(means["ratio"])

        return optimizer_step(
            self.accelerator, self.actor.wrapped, self.optimizer, pieces,
            lambda piece: self.actor.within_forward(lambda actor: self._objective(actor, piece, ratios)),
            lambda piece: piece.counted,
            parameters=self._parameters, max_grad_norm=self.config.max_grad_norm, accept=accept,
            non_finite=self._met_non_finite,
        )  # fmt: skip

    def _met_non_finite(self, watch: StepWatch) -> None:
        """Called on all processes; the rows that are named are those of the batch that `step` was given."""
        self._non_finite.met(self.current_step, self.accelerator, watch, self.actor.models, self._named)

    def _objective(self, actor: ActorCritic, batch: PolicyBatch, ratios: list[Tensor]) -> LossSum:
        """Clipped surrogate plus `vf_coef` times clipped value loss, summed over tokens."""
        batch = batch.to(self.current_device)
        scores = actor(batch.packed, entropy=True)
        log_ratio_BT = scores.logprobs_BT.detach() - batch.old_logprobs_BT
        ratios.append(torch.stack([log_ratio_BT, batch.mask_BT.to(log_ratio_BT)]).flatten(1))
        if self._owns("loss"):
            return self._own_loss(actor, batch, scores)
        policy, value = actor_critic_loss(self.config, batch, scores)
        return policy.plus(value)

    # --- where a subclass overrides a method of release 0.7.7 (see `overrides.TABLE`) ---------------------------------

    def _owns(self, *names: str) -> bool:
        return any(name in self._own or name in vars(self) for name in names)

    def _take_own_methods(self) -> None:
        """See what is the user's; ValueError for what a step would not call."""
        self._own = overrides.own_methods(type(self), vars(self))
        if self._owns("compute_rewards", "_kl_penalty") and self.config.kl_penalty == "full":
            raise ValueError(
                "kl_penalty='full': an overridden compute_rewards or _kl_penalty would need log-probabilities of the "
                "whole vocabulary, which never exist at once; choose 'kl', 'abs', 'mse' or 'k3'"
            )

    def _own_rewards(self, scores_B: Tensor, measured: Experience) -> tuple[Tensor, Tensor]:
        """The reward of each token by the user's `compute_rewards` or `_kl_penalty`, and what of it is no score."""
        given = self.compute_rewards(scores_B, measured.old_logprobs_BT, measured.reference_BT, measured.mask_BT)  # type: ignore[arg-type]
        rewards_BT, penalty_BT = (each if torch.is_tensor(each) else torch.stack(list(each)) for each in given[:2])
        self._check_own("compute_rewards", measured.mask_BT, rewards_BT, penalty_BT)
        return rewards_BT * measured.mask_BT, penalty_BT

    def _own_advantages(self, measured: Experience, rewards_BT: Tensor) -> Experience:
        """What is learned by the user's `compute_advantages`."""
        assert measured.values_BT is not None
        mask_BT = measured.mask_BT
        values_BT, advantages_BT, returns_BT = self.compute_advantages(measured.values_BT, rewards_BT, mask_BT)
        self._check_own("compute_advantages", mask_BT, values_BT, advantages_BT, returns_BT)
        learned_BT, returns_BT = advantages_BT.detach() * mask_BT, returns_BT.detach() * mask_BT
        return replace(measured, values_BT=values_BT.detach(), advantages_BT=learned_BT, returns_BT=returns_BT)

    def _own_loss(self, actor: ActorCritic, batch: PolicyBatch, scores: Scores) -> LossSum:
        """The loss by the user's `loss`, which also gets whole logits: a second pass makes them."""

        def whole(head: Head, states_SD: Tensor) -> Tensor:
            return head.logits(states_SD) / actor.temperature

        (logits_SV,) = in_head(actor.model, batch.packed, whole)
        at = (batch.packed.row_S, batch.packed.slot_S)
        logits_BTV = logits_SV.new_zeros(*batch.mask_BT.shape, logits_SV.shape[-1]).index_put(at, logits_SV)
        policy, value, stats = self.loss(
            batch.old_logprobs_BT, batch.values_BT, logits_BTV, scores.values_BT, scores.logprobs_BT, batch.mask_BT,  # type: ignore[arg-type]
            batch.advantages_BT, batch.returns_BT,  # type: ignore[arg-type]
        )  # fmt: skip
        self._check_own("loss", batch.counted, policy, value)
        with torch.no_grad():
            shown = [each.metrics for each in actor_critic_loss(self.config, batch, scores)]
        total, count = (policy + value) * batch.counted, batch.counted
        of_loss: dict[str, Measure] = {"policy": policy.detach() * count, "value_loss": value.detach() * count}
        own = {
            f"{OWN}{name}": torch.as_tensor(each).detach().float() * count
            for name, each in _one_level(stats).items()
            if name not in ppo_statistics.SEED_KEYS and torch.as_tensor(each).numel() == 1
        }
        return LossSum(total, count, {**shown[0], **shown[1], **of_loss, **own})

    @staticmethod
    def _check_own(name: str, like: Tensor, *given: Any) -> None:
        """ValueError unless all that a user's method gave are tensors of one shape."""
        for each in given:
            if not torch.is_tensor(each) or each.shape != like.shape:
                found = tuple(each.shape) if torch.is_tensor(each) else type(each).__name__
                raise ValueError(f"{name}: it gave {found}; give tensors of shape {tuple(like.shape)}")

    def _ratio_is_sane(self, ratio: Tensor) -> bool:
        if ratio.item() <= self.config.ratio_threshold:
            return True
        warnings.warn(
            f"The average ratio of batch ({ratio.item():.2f}) exceeds threshold {self.config.ratio_threshold:.2f}. "
            "Skipping batch."
        )
        return False

    def _early_stop(self, policykl: Tensor | float) -> bool:
        """Whether the policy has moved too far in this step, on the mean of all processes."""
        if not self.config.early_stopping:
            return False
        moved = self.accelerator.reduce(torch.as_tensor(policykl, device=self.current_device).float(), "mean").item()
        if moved <= 1.5 * self.config.target_kl:
            return False
        self.optimizer.zero_grad(set_to_none=False)
        return True

    # --- the pieces of a step on padded tensors, for scripts that put their own together ------------------------------

    def prepare_model_inputs(self, queries: Sequence[Tensor], responses: Sequence[Tensor]) -> dict[str, Tensor]:
        """Padded model inputs of queries and responses, no labels. [B, L]"""
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        build = ppo_padded.encoder_decoder_inputs if self.is_encoder_decoder else ppo_padded.causal_inputs
        inputs = build(queries, responses, pad or 0, self.tokenizer.padding_side)
        return {name: column.to(self.current_device) for name, column in inputs.items()}

    def batched_forward_pass(
        self,
        model: nn.Module,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        model_inputs: Mapping[str, Tensor],
        return_logits: bool = False,
        response_masks: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """(log-probabilities, logits or None, values, mask of the response's tokens), `mini_batch_size` rows at a time.

        [B, L - 1], [B, L - 1, V], [B, L - 1], [B, L - 1]: position p is about token p + 1. Without dropout.
        """
        columns = []
        with eval_mode(model, checkpointing=True):
            for start in range(0, len(queries), self.config.mini_batch_size):
                rows = slice(start, start + self.config.mini_batch_size)
                inputs = {name: column[rows] for name, column in model_inputs.items()}
                logprobs, logits, values = ppo_padded.forward_chunk(
                    model, inputs, self.config.temperature, self.is_encoder_decoder
                )
                columns.append((logprobs, values, *((logits,) if return_logits else ())))
        attention = model_inputs["decoder_attention_mask" if self.is_encoder_decoder else "attention_mask"]
        mask = ppo_padded.response_mask(attention, queries, responses, response_masks, self.is_encoder_decoder)
        parts = [torch.cat(each) for each in zip(*columns, strict=True)]
        return parts[0], parts[2] if return_logits else None, parts[1], mask

    def compute_rewards(  # type: ignore[override]
        self, scores: Tensor | Sequence[Tensor], logprobs: Tensor, ref_logprobs: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(rewards, their KL part): `-kl_coef KL` at every position, the score at the last that counts. [B, T]

        For `kl_penalty="full"` the log-probabilities are those of the whole vocabulary, [B, T, V].
        """
        kl_BT = self._kl_penalty(logprobs, ref_logprobs)
        scores_B = torch.stack([torch.as_tensor(score, device=kl_BT.device).flatten()[0] for score in scores])
        return token_rewards(scores_B, kl_BT, masks, self.kl_ctl.value), -self.kl_ctl.value * kl_BT

    def _kl_penalty(self, logprob: Tensor, ref_logprob: Tensor) -> Tensor:
        """The penalty `config.kl_penalty` of each token."""
        return KL_PENALTIES[self.config.kl_penalty](logprob, ref_logprob)

    def compute_advantages(self, values: Tensor, rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(masked values, whitened advantages, returns), [B, T] each."""
        return advantages(self.accelerator, values, rewards, mask, **self._gae_numbers())

    def loss(  # type: ignore[override]
        self, old_logprobs: Tensor, values: Tensor, logits: Tensor, vpreds: Tensor, logprobs: Tensor, mask: Tensor,
        advantages: Tensor, returns: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
        """(policy loss, `vf_coef` times value loss, statistics) of a minibatch; losses 0 where the ratio explodes."""
        batch = ppo_padded.as_batch(mask, old_logprobs, advantages, values, returns)
        policy, value = actor_critic_loss(self.config, batch, Scores(logprobs, entropy_from_logits(logits), vpreds))
        tally = Tally(self.current_device)
        tally.add_loss(policy.plus(value))
        sane = float(self._ratio_is_sane(tally.tensors()["ratio"]))
        ratios = (logprobs - old_logprobs).detach()[mask > 0].exp()
        stats = ppo_statistics.seed_keys(tally.tensors()) | ppo_statistics.batch_keys(batch, ratios)
        return policy.mean * sane, value.mean * sane, stats

    @PPODecorators.empty_device_cache()
    def train_minibatch(
        self, old_logprobs: Tensor, values: Tensor, logprobs: Tensor, logits: Tensor, vpreds: Tensor, mask: Tensor,
        advantages: Tensor, returns: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Backward pass and optimizer step of a minibatch; accumulates inside `accelerator.accumulate`."""
        policy, value, stats = self.loss(old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns)
        self.accelerator.backward(policy + value)
        if self.accelerator.sync_gradients:
            watch = StepWatch()
            watch.losses, watch.norm = [(policy + value).detach()], gradient_norm(self._parameters)
            if self.config.max_grad_norm is not None:
                self.accelerator.clip_grad_norm_(self._parameters, self.config.max_grad_norm)
            if not watch.read(self.accelerator)[0]:
                self._met_non_finite(watch)
                self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return stats

    # --- a whole run --------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: bool | str | os.PathLike[str] | None = None,
        callback: Callable[[int, dict[str, Any], dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """`total_ppo_epochs` steps on prompts of the data set; the last step's statistics.

        resume_from_checkpoint: a folder, or True for the newest in `output_dir` (from the start if there is none yet).
        callback: called after each step with its number, its statistics and its batch (texts, scores, tokens).
        """
        config, rewards = self.config, self._rewards()
        folder, overwrite = config.output_dir, config.overwrite_output_dir
        resume_from_checkpoint = after_restart(resume_from_checkpoint, folder)
        resumes = folder is not None and self._folder.goes_on(resume_from_checkpoint, folder)
        asked = bool(resume_from_checkpoint)
        held: AbstractContextManager[None] = nullcontext()
        if folder is not None:
            held = self._folder.held(folder, resumes=resumes, overwrite=overwrite, asked=asked)
        listeners = [] if self.progress is None else self.progress.handler.callbacks
        heard = told(listeners, lambda: RunFacts(type(self).__name__, self.arguments, resumes, self._data()))
        timeout = None if self.arguments is None else self.arguments.ddp_timeout
        watch = watched(lambda: self.current_step, timeout)
        with watch, held, self._signal.listening(config.enable_jit_checkpoint), heard:
            if self.is_distributed:
                self._check_agreement()
            if folder is not None:
                checkpoints.clean_up(folder)
            found = checkpoints.find(resume_from_checkpoint, folder, is_old=_is_old_checkpoint)
            if found is not None:
                self._resume(found)
            if folder is not None and self.accelerator.is_main_process:
                self._folder.begin_metrics(folder, self.data_position if found and resumes else None)
            try:
                with sampler_errors(lambda: self.current_step + 1, *self.actor.models):
                    stats = self._steps(rewards, callback)
            finally:
                close_objects(self.environment)
            check_weights(self.accelerator, f"after step {self.current_step}", *self._models().values())
            return stats

    def _data(self) -> dict[str, dict[str, Any]]:
        from trl.trainer.given_data import data_facts  # which brings `datasets`

        return {} if self.dataset is None else {"train": data_facts(self.dataset)}

    def _steps(
        self, rewards: RolloutRewards, callback: Callable[[int, dict[str, Any], dict[str, Any]], None] | None
    ) -> dict[str, Any]:
        """The steps that the run still has to make; the last one's statistics."""
        config = self.config
        stats: dict[str, Any] = {}
        first = self.data_position
        last, shown = config.total_ppo_epochs, self.progress is not None and self.progress.shows_steps
        silent = shown or not sys.stderr.isatty()
        self._begin_run(last)
        progress = tqdm(total=last, initial=self.data_position, desc="PPO", disable=silent)
        for rows in self.batches():
            if self.progress is not None:
                self.progress.begin_update()
            try:
                batch = self._rollout(rows, rewards)
            except EngineError as error:
                self.data_position -= 1  # whoever resumes draws the same prompts
                self._end_without_engine(error, first)
            self._sampled = batch.pop("sampled", None)
            stats = self.step(batch["queries"], batch["responses"], batch["scores"], batch.get("masks"))
            try:
                stops = self._report(stats, batch)
            except EngineError as error:  # of an evaluation
                self._end_without_engine(error, first)
            progress.update()
            progress.set_postfix({name: f"{float(stats[key]):.3g}" for name, key in SHOWN.items()})
            step = self.data_position
            if config.output_dir is not None and self.accelerator.is_main_process:
                write_metrics(config.output_dir, {"step": step, **stats})
            if callback is not None:
                callback(step, stats, batch)
            ends = config.enable_jit_checkpoint and self._signal.on_any(self.accelerator)
            due = config.save_steps is not None and (step % config.save_steps == 0 or step == last)
            if due or ends:
                self.save_checkpoint(step)
            if ends:
                raise SystemExit(TERMINATED)
            if stops:
                break
        progress.close()
        if self.progress is not None:
            self.progress.end()
        return stats

    def _end_without_engine(self, error: EngineError, first: int) -> NoReturn:
        """End the run with a checkpoint of its last whole step, if it made one: nobody samples any more."""
        step = self.data_position
        if step == first or self.config.output_dir is None:
            raise error
        self.save_checkpoint(step)
        kept = f"checkpoint-{step} is saved: go on with train(resume_from_checkpoint=True)"
        raise EngineError(f"step {step + 1}: {error}; {kept}") from error

    # --- today's form -------------------------------------------------------------------------------------------------

    def _take_todays_form(self, parts: dict[str, Any], today: Mapping[str, Any]) -> PPOConfig:
        """Make the older form's parts of today's, in place; the config's numbers in the older form."""
        config, dataset = PPOConfig(**self._numbers(today["train_dataset"])), today["train_dataset"]
        config.output_dir, self.arguments = self.args.output_dir, self.args.arguments
        for name in ppo_forms.NEEDS_FOLDER:
            setattr(config, name, getattr(self.args, name))
        self._told = self._numbers(dataset)
        if self.args.process_index == 0:
            check_writable(str(self.args.output_dir))
        set_seed(config.seed)  # the value head is drawn
        policy = ppo_forms.one_of("model", parts["model"], "policy", today["policy"])
        policy = self._path("sft_model_path") if policy is None else policy
        parts["tokenizer"] = prepare_tokenizer(parts["tokenizer"], policy, self.arguments)
        parts["model"] = ppo_today.policy_of(
            policy, self.arguments, parts["tokenizer"], today["peft_config"], self.args.model_adapter_name
        )
        reference = ppo_forms.one_of("ref_model", parts["ref_model"], "ref_policy", today["ref_policy"])
        parts["ref_model"] = ppo_today.reference_of(reference, policy, dtype_of(parts["model"]), self.arguments)
        scorer, tokenizers = today["reward_model"], parts["reward_processing_classes"]
        if scorer is not None and scorer is parts["value_model"]:
            scorer = copy.deepcopy(scorer)  # one of them learns
        like = frozen_dtype(parts["model"], self.arguments.mixed_precision)
        parts["reward_funcs"] = self._scorer(scorer, parts["reward_funcs"], tokenizers, like)
        parts["dataset"], (parts["optimizer"], parts["lr_scheduler"]) = dataset, today["optimizers"] or (None, None)
        return config

    def _numbers(self, dataset: Any) -> dict[str, Any]:
        """What the config of today's form says, in the older form."""
        return ppo_forms.numbers_of(self.args, len(dataset) if hasattr(dataset, "__len__") else None)

    def _follow_args(self) -> None:
        """Take over what a script or a callback has changed in the config of today's form since the last step."""
        now = self._numbers(self.dataset)
        changed = {name: value for name, value in now.items() if value != self._told[name]}
        if not changed:
            return
        for name, value in changed.items():
            setattr(self.config, name, value)
        self.config.derive()
        self._told = now
        if "init_kl_coef" in changed:
            self.kl_ctl.value = self._built_with["init_kl_coef"] = self.config.init_kl_coef
        self.__dict__.pop("source", None)  # which samples as before

    def _path(self, name: str) -> str | None:
        """The folder or name that a field of the config was given; None for its default."""
        return getattr(self.args, name) if name in self.args.given_fields() else None

    def _scorer(self, reward_model: Any, reward_funcs: Any, tokenizers: Any, like: torch.dtype | None) -> Any:
        """What scores the responses: reward functions, or a model that reads tokens, which is put aside.

        One given by name is stored `like`.
        """
        assert self.arguments is not None
        source = ppo_forms.one_of("reward_model", reward_model, "reward_funcs", reward_funcs)
        source = self._path("reward_model_path") if source is None else source
        if isinstance(source, str) and tokenizers is None and Path(source).is_dir():
            keywords = {"num_labels": 1, **self.arguments.loading_keywords()}
            source = load_model(source, AutoModelForSequenceClassification, keywords, frozen=True, like=like)
        if tokenizers is None and reward_funcs is None and ppo_today.reads_tokens(source):
            self._token_rewards = TokenRewards(source, self.arguments.device)
        return source

    def _progress(self, arguments: PostTrainingConfig, callbacks: list[TrainerCallback] | None) -> ppo_today.Progress:
        return ppo_today.Progress(
            arguments, callbacks, model=self.model, processing_class=self.tokenizer, optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
        )  # fmt: skip

    @property
    def _subtracts_missing_eos(self) -> bool:
        """Today's form subtracts the penalty; that of 0.7.7 and of 0.8-0.10 puts it in the score's place."""
        return self.arguments is not None and not self.args.non_eos_penalty

    def _ended(self, responses: Sequence[Tensor]) -> list[bool]:
        """Which responses hold the end token, or stop at the stop token."""
        stop = self.args.stop_token_id
        stops = [*stop_tokens(self.config, self.tokenizer), *([] if stop is None else [stop])]
        return [ppo_today.holds_end(row, self.tokenizer.eos_token_id, stops) for row in responses]

    @property
    def state(self) -> TrainerState | None:
        """Today's form: where the run stands, with its `log_history`."""
        return None if self.progress is None else self.progress.state

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, or those of a class."""
        if self.progress is not None:
            self.progress.handler.remove_callback(callback)

    def add_callback(self, callback: Any) -> None:
        """Today's form: a callback of transformers more."""
        if self.progress is None:
            raise ValueError("add_callback: the form of release 0.7.7 has `train(callback=...)`")
        self.progress.handler.add_callback(callback)

    def _begin_run(self, updates: int) -> None:
        if self.progress is not None:
            rows = len(self.dataset) / (self.config.batch_size * self.accelerator.num_processes)  # type: ignore[arg-type]
            self.progress.begin(updates, self.data_position, rows)
            if self.progress.arguments.eval_on_start and self.eval_dataset is not None:
                self.evaluate()

    def _report(self, stats: dict[str, Any], batch: Mapping[str, Any]) -> bool:
        """Send a step's statistics where the form sends them; whether a callback asks to stop."""
        if self.progress is None or self.arguments is None:
            self.log_stats(stats, batch, batch["scores"])
            return False
        progress, step, samples = self.progress, self.data_position, self.args.num_sample_generations
        progress.end_update()
        if progress.control.should_log:
            self._log_today(stats, batch["responses"])
        if samples and self.eval_dataset is not None and step % max(1, self.config.total_ppo_epochs // samples) == 0:
            self.generate_completions(sampling=True)
        if progress.control.should_evaluate and self.eval_dataset is not None:
            self.evaluate()
        if progress.control.should_save and self.config.output_dir is not None:
            self.save_checkpoint(step)
            progress.saved()
        return bool(progress.control.should_training_stop)

    def _log_today(self, stats: Mapping[str, Any], responses: Sequence[Tensor]) -> None:
        assert self.progress is not None
        ended = torch.tensor(sum(self._ended(responses)), device=self.current_device)
        logs = ppo_today.todays_metrics(
            stats, vf_coef=self.config.vf_coef, ended=int(self.accelerator.reduce(ended, "sum")),
            episode=self.data_position * (self.config.global_batch_size or 1),
            seconds=time.perf_counter() - self.progress.started,
        )  # fmt: skip
        self.progress.log(logs)
        self.accelerator.log(logs, step=self.data_position)

    def generate_completions(self, sampling: bool = False) -> dict[str, list[Any]]:
        """The most probable responses to the prompts of `eval_dataset`, and their scores, as a table on the console.

        sampling: to the first `per_device_eval_batch_size` prompts only. The columns of the table are returned.
        """
        columns = self._completions(self.args.per_device_eval_batch_size if sampling else None)
        if self.accelerator.is_main_process:
            ppo_today.print_samples(columns)
        return columns

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """The mean score of the most probable responses to the prompts of `eval_dataset`."""
        scores = self._completions(None, eval_dataset)["score"]
        metrics = {"eval_objective/scores": sum(scores) / len(scores)}
        if self.progress is not None:
            self.progress.log(metrics)
            self.progress.evaluated(metrics)
        self.accelerator.log(metrics, step=self.data_position)
        return metrics

    def _completions(self, most: int | None, dataset: Any = None) -> dict[str, list[Any]]:
        """Prompts, most probable responses and scores, of all processes."""
        dataset = self.eval_dataset if dataset is None else dataset
        if dataset is None:
            raise ValueError("eval_dataset=None: give the trainer a data set of prompts to respond to")
        rewards, policy = self._rewards(), below_accelerate(self.model)
        kwargs = {**self._sampling_kwargs(), "do_sample": False}
        size = self.args.per_device_eval_batch_size if self.arguments is not None else self.config.batch_size
        source = self._source(policy, kwargs, size)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        places = range(len(dataset))[: most if most is None else most * world][rank::world]
        columns: dict[str, list[Any]] = {"query": [], "model response": [], "score": []}
        self.follow()
        with self._gathered():  # once: processes may have one batch more or less
            for start in range(0, len(places), size):
                rows = [dataset[place] for place in places[start : start + size]]
                batch = self._rollout(rows, rewards, source)
                columns["query"] += batch["query"]
                columns["model response"] += batch["response"]
                columns["score"] += [float(score) for score in batch["scores"]]
        return {name: gather_object(values) for name, values in columns.items()} if world > 1 else columns

    def save_model(self, output_dir: str | os.PathLike[str] | None = None) -> None:
        """The policy and the tokenizer, in a folder that transformers loads; without the value head in today's form."""
        folder = self.config.output_dir if output_dir is None else output_dir
        if folder is None:
            raise ValueError("output_dir=None: say where the model goes")
        check_weights(self.accelerator, f"step {self.current_step}", self.model)
        self._write_model(folder)
        self.accelerator.wait_for_everyone()

    def _write_model(self, folder: str | os.PathLike[str]) -> None:
        """The model as `save_pretrained` writes it, and the tokenizer; collective, as weights may be gathered."""
        saved, main = self._saved_model(), self.accelerator.is_main_process
        gathered = self._whole_state(saved, keep=main)
        if main:
            saved.save_pretrained(folder, **gathered)
            processor_of(self.tokenizer).save_pretrained(folder)

    def _whole_state(self, saved: Any, keep: bool) -> dict[str, Any]:
        """A keyword of `save_pretrained`, where weights are sharded; collective there."""
        sharded = self.accelerator.distributed_type == DistributedType.FSDP or shards_weights(self.accelerator)
        return {"state_dict": gathered_state(saved, keep=keep)} if sharded else {}

    def _saved_model(self) -> Any:
        model = below_accelerate(self.model)
        return model if self.arguments is None else model.pretrained_model

    def push_to_hub(self, repo_id: str | None = None, *, dataset_name: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Upload the model; by default under today's form's `hub_model_id`, or the name of its folder.

        dataset_name: for the message of the commit. Further keywords are those of `PyTorchModelHubMixin`.
        """
        if repo_id is None and self.arguments is not None:
            repo_id = self.args.hub_model_id or Path(str(self.args.output_dir)).name
            kwargs = {"token": self.args.hub_token, "private": self.args.hub_private_repo, **kwargs}
        if dataset_name is not None:
            kwargs.setdefault("commit_message", f"Trained on {dataset_name}")
        if repo_id is None:
            raise ValueError("repo_id: say under which name the model is uploaded")
        return super().push_to_hub(repo_id, **kwargs)

    def save_checkpoint(self, step: int) -> None:
        """Save `checkpoint-N` of a run, and remove the oldest ones."""
        assert self.config.output_dir is not None
        folder = Path(self.config.output_dir, f"{checkpoints.PREFIX}{step}")
        self.save_state(folder)
        if self.accelerator.is_main_process:
            limit = self.config.save_total_limit
            checkpoints.keep_newest(self.config.output_dir, limit, keep=[folder], is_old=_is_old_checkpoint)

    def batches(self) -> Iterator[list[dict[str, Any]]]:
        """The rows of each step that the run still has to make; `load_state` goes on in the same order.

        A step takes the next rows of the stream, of which each process has its part.
        """
        if self.dataset is None:
            raise ValueError("dataset=None: give the trainer a data set of prompts")
        config, accelerator = self.config, self.accelerator
        stream = PromptStream(self.dataset, config.seed)
        while self.data_position < config.total_ppo_epochs:
            part = self.data_position * accelerator.num_processes + accelerator.process_index
            self.data_position += 1
            part *= config.batch_size
            stream.check(part, config.batch_size, self.tokenizer, self._embeddings)
            yield stream.take(part, config.batch_size)

    def _rewards(self) -> RolloutRewards:
        """The reward functions; without any, an environment's rollouts carry their rewards."""
        if self._token_rewards is not None:
            return self._token_rewards
        if self._reward_funcs is None and self.environment is None:
            raise ValueError("train() needs something that scores responses: pass `reward_funcs`")
        if self._reward_funcs is None:
            return RolloutRewards(None, kinds=reward_names(self.environment))
        like = frozen_dtype(self.model, self.accelerator.mixed_precision)
        tokenizers, device = self._reward_tokenizers, self.accelerator.device
        return RolloutRewards(panel_of(self._reward_funcs, tokenizers, self.tokenizer, device, like))

    def _rollout(
        self, rows: Sequence[Mapping[str, Any]], rewards: RolloutRewards, source: Source | None = None
    ) -> dict[str, Any]:
        """A response to each row's prompt and its score, as a batch for `step` and for reports."""
        self._follow_config()
        asked = with_prompts(rows, self.tokenizer)
        if source is None:
            self.follow()
        weights = self._gathered() if source is None else nullcontext()  # who brings a source has gathered them
        with torch.no_grad(), eval_mode(below_accelerate(self.model), checkpointing=True), weights:
            rollout = (self.source if source is None else source).draw(asked)
        if not rollout.texts:
            rollout.texts = without_ends(self.tokenizer, rollout.completions, end_tokens(self.model, self.tokenizer))
        prompts = [row["prompt"] for row in asked]
        names = dict.fromkeys(name for row in rows for name in row if name not in ("prompts", "completions"))
        columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
        columns = with_opened_pictures(columns, self.tokenizer)
        columns.setdefault("prompt_texts", rendered(rollout, self.tokenizer))
        if self.environment is not None and "truncated" in rollout.metadata:
            columns["truncated"] = rollout.metadata["truncated"]
        batch: dict[str, Any] = {"query": prompts, "response": rollout.texts}
        tokens = {"queries": rollout.prompts, "responses": rollout.completions}
        if self.environment is not None:
            tokens["masks"] = rollout.masks  # 1 where the policy chose the token
        for name, lists in tokens.items():
            batch[name] = [torch.tensor(ids, dtype=torch.long, device=self.current_device) for ids in lists]
        if source is None and rollout.logprobs and self._samples_policy():
            batch["sampled"] = rollout.completions, padded(rollout.logprobs)
        elif source is None and self._engine_samples() and not self._said_filters:
            self._said_filters = True
            logger.warning(
                "generation_kwargs change what the engine draws from: its log-probabilities are of another "
                "distribution than the policy's, and are not used to weigh tokens"
            )
        return {**batch, "scores": total_scores(rewards(rollout, prompts, columns))}

    def save_state(self, directory: str | os.PathLike[str]) -> None:
        """Save all that the next step depends on, and the model as `save_pretrained` does, whole or not at all."""
        kind = self.accelerator.distributed_type
        if kind == DistributedType.DEEPSPEED:
            raise NotImplementedError(
                f"save_state does not gather weights that {kind.value} has spread: use `trainer.accelerator.save_state`"
            )
        check_weights(self.accelerator, f"step {self.current_step}", *self._models().values())
        checkpoints.save_checkpoint(Path(directory), self._write_state, self.describe_run(), step=self.data_position)

    def _write_state(self, folder: Path) -> None:
        state = on_host(self._state(), keep=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            checkpoints.write_state(folder / STATE, state)
        self._write_model(folder)

    def load_state(self, directory: str | os.PathLike[str]) -> None:
        """Go on exactly where `save_state` was called, in a trainer that was built in the same way."""
        folder = Path(directory)
        if folder.is_dir() and not any((folder / name).is_file() for name in (STATE, checkpoints.MANIFEST)):
            raise ValueError(f"{str(directory)!r} holds no {STATE}: give a folder that `save_state` or `train` wrote")
        found = checkpoints.find(folder, None, is_old=_is_old_checkpoint)
        assert found is not None
        self._resume(found)

    def _resume(self, found: checkpoints.Checkpoint) -> None:
        run = self.describe_run()
        checkpoints.check_identity(found, run)
        allowed = [] if found.manifest else checkpoints.numpy_globals()
        state = checkpoints.read_state(found.folder / STATE, allowed=allowed)
        rank, seed = self.accelerator.process_index, self.config.seed
        random_state = checkpoints.random_state_of(found, rank, seed, old=OLD_RANDOM_STATE)
        self._check_state(state)
        # a script that calls `step` with rows of its own has no place in the data
        checkpoints.check_settings(found, run, has_place=state["counters"]["data_position"] > 0)
        self._restore(state)
        checkpoints.set_random_state(random_state)

    def describe_run(self) -> checkpoints.Run:
        """What a checkpoint of this run is compared with when a later run resumes from it."""
        rows = self.config.batch_size * self.accelerator.num_processes
        return checkpoints.describe_run(
            type(self).__name__, self.model, self.config.to_dict(), fixed={"rows in a step": rows}, dataset=self.dataset
        )

    def _state(self) -> dict[str, Any]:
        """What all processes have in common."""
        return {
            "weights": {name: _trained(model) for name, model in self._models().items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
            "kl_coef": self.kl_ctl.value,
            "running": {name: getattr(self.running, name) for name in ("mean", "std", "var", "count")},
            "counters": {name: getattr(self, name) for name in ("current_step", "logged_steps", "data_position")},
            "highest_reward": self.highest_reward,
            "left out": self._non_finite.skipped,
            "reference": _sums(self.ref_model),
            "world_size": self.accelerator.num_processes,
        }

    def _models(self) -> dict[str, nn.Module]:
        models = {"model": self.model, "value_model": self.value_model}
        return {name: model for name, model in models.items() if model is not None}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """ValueError for a state of a trainer that was built differently."""
        if not _same_sums(state["reference"], _sums(self.ref_model)):
            raise ValueError(
                "the reference model is not the one of the checkpoint: build the trainer from the model that training "
                "started with, `load_state` brings the trained weights"
            )
        if (state["scheduler"] is None) != (self.lr_scheduler is None):
            raise ValueError(
                "lr_scheduler: the checkpoint was written with one and this trainer has none, or the reverse"
            )
        own = {name: _trained(model) for name, model in self._models().items()}
        for name in sorted({*own, *state["weights"]}):
            if odd := sorted(own.get(name, {}).keys() ^ state["weights"].get(name, {}).keys()):
                raise ValueError(
                    f"{name} trains other weights than the checkpoint's ({odd[0]!r} is only in one of them)"
                )
            for key, parameter in own[name].items():
                if (shape := state["weights"][name][key].shape) != parameter.shape:
                    raise ValueError(
                        f"{name}: {key!r} has shape {tuple(parameter.shape)}, in the checkpoint {tuple(shape)}: build "
                        "the trainer from the model that training started with"
                    )
        checkpoints.check_optimizer(self.optimizer, state["optimizer"])

    @torch.no_grad()
    def _restore(self, state: Mapping[str, Any]) -> None:
        """Put a state back that `_check_state` has let pass."""
        for name, model in self._models().items():
            for key, parameter in _trained(model).items():
                parameter.copy_(spread_like(state["weights"][name][key], parameter))
        self.optimizer.load_state_dict(checkpoints.spread_state(self.optimizer, state["optimizer"]))
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(state["scheduler"])
        self.kl_ctl.value = state["kl_coef"]
        for name, value in state["running"].items():
            setattr(self.running, name, value)
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self.highest_reward = state["highest_reward"]
        self._non_finite.skipped = state.get("left out", 0)

    # --- reports ----------------------------------------------------------------------------------------------------

    def record_step_stats(self, kl_coef: float, **data: Any) -> dict[str, Any]:
        """Statistics of a step from its parts, see `ppo_statistics.step_stats`."""
        return ppo_statistics.step_stats(kl_coef, total=self._total, **data)

    def gather_stats(self, stats: Mapping[str, Any]) -> dict[str, Any]:
        """Over all processes: numbers averaged, distributions laid together."""
        return ppo_statistics.gathered(self.accelerator, stats) if self.is_distributed else dict(stats)

    def log_stats(
        self,
        stats: Mapping[str, Any],
        batch: Mapping[str, Any],
        rewards: Sequence[Tensor],
        columns_to_log: Sequence[str] = ("query", "response"),
    ) -> None:
        """Send a step's statistics, `env/reward_*` and (wandb) a table of the batch's columns to the tracker."""
        ppo_statistics.log_stats(
            self.accelerator, stats, batch, rewards, columns_to_log, self.config.log_with, self.logged_steps
        )
        self.logged_steps += 1

    def create_model_card(
        self,
        path: str | None = None,
        model_name: str | None = "TRL Model",
        dataset_name: str | list[str] | None = None,
    ) -> None:
        """Write `README.md`; without a Hub account at hand, a warning instead.

        path: None: `output_dir`, with what was done (data, settings, results, versions), as other trainers' cards.
        """
        if path is not None:
            write_model_card(path, model_name, PPO_CARD)
            return
        if self.config.output_dir is None:
            raise ValueError("output_dir=None: say where the card goes")
        if not self.accelerator.is_main_process:
            return
        folder = Path(self.config.output_dir)
        base = str(getattr(below_value_head(below_accelerate(self.model)).config, "_name_or_path", "") or "")
        logs = [] if self.progress is None else self.progress.state.log_history[-1:]
        name = folder.name if model_name == "TRL Model" or model_name is None else model_name
        facts = CardFacts(
            "PPOTrainer", name, base, resolved([self.config]), tags=self._tag_names, steps=self.current_step,
            data=self._data(), datasets=listed(dataset_name), logs=logs,
            peft=hasattr(below_value_head(below_accelerate(self.model)), "peft_config"),
        )  # fmt: skip
        if not write_card(folder, card_text(facts)):
            warnings.warn(f"{folder / 'README.md'}: it is not of trl, and stays as it is")

    def _save_pretrained(self, save_directory: Any) -> None:
        check_weights(self.accelerator, f"step {self.current_step}", self.model)
        saved = self._saved_model()
        saved.save_pretrained(save_directory, **self._whole_state(saved, keep=True))
        processor_of(self.tokenizer).save_pretrained(save_directory)
        self.create_model_card(str(save_directory))

    def _show_tokens(self, tokens: Tensor, masks: Tensor) -> None:
        """Print tokens in two colours, by their mask."""
        ppo_padded.show_tokens(self.tokenizer, tokens, masks)


overrides.remember(PPOTrainer)
PPOv2Config, PPOv2Trainer = PPOConfig, PPOTrainer
"""names of releases 0.8-0.11"""


def _one_level(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics of a user's `loss`, which release 0.7.7 gave in one level or in two."""
    nested = {name: value for name, value in stats.items() if isinstance(value, Mapping)}
    return {**{name: value for name, value in stats.items() if name not in nested}, **flatten_dict(nested)}


def actor_critic_loss(config: PPOConfig, batch: PolicyBatch, scores: Scores) -> tuple[LossSum, LossSum]:
    """The clipped surrogate, and `vf_coef` times the clipped value loss, each with its metrics; summed over tokens."""
    assert scores.values_BT is not None
    assert scores.entropy_BT is not None
    assert batch.values_BT is not None
    assert batch.returns_BT is not None
    mask_BT, clip = batch.mask_BT, config.cliprange
    policy = clipped_surrogate(
        scores.logprobs_BT, batch.old_logprobs_BT, batch.advantages_BT, mask_BT, clip_low=clip, clip_high=clip,
        weight_BT=batch.weight_BT,
    )  # fmt: skip
    value = clipped_value(scores.values_BT, batch.values_BT, batch.returns_BT, mask_BT, config.cliprange_value)
    weighed = config.vf_coef * value.total
    of_policy: dict[str, Measure] = {
        **policy.metrics,
        "policy": policy.total.detach(),
        "entropy": masked_sum(scores.entropy_BT, mask_BT),
        "advantage": masked_sum(batch.advantages_BT, mask_BT),
    }
    of_value: dict[str, Measure] = {**value.metrics, "value_loss": weighed.detach()}
    return LossSum(policy.total, policy.count, of_policy), LossSum(weighed, value.count, of_value)


# --- what a step is given -----------------------------------------------------------------------------------------


def checked_batch(
    batch_size: int,
    queries: list[Tensor],
    responses: list[Tensor],
    scores: list[Tensor],
    masks: list[Tensor] | None,
    device: Any,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor] | None]:
    """The lists on `device`, scores as 0-d tensors; ValueError if they are not a batch."""
    given = {"queries": queries, "responses": responses, "scores": scores}
    if masks is not None:
        given["masks"] = masks
    for name, rows in given.items():
        if not isinstance(rows, list):
            raise ValueError(f"{name} must be a list of tensors - got {type(rows)}")
        for place, row in enumerate(rows):
            if not isinstance(row, Tensor):
                raise ValueError(f"Elements in {name} must be tensors - got {type(row)} ({name}[{place}])")
            _check_kind(name, place, row if name == "scores" else _flat(row))
        if batch_size is not None and len(rows) != batch_size:
            raise ValueError(
                f"Batch size ({batch_size}) does not match number of examples - but got {len(rows)} for: {name}"
            )
        rows = [row.detach().to(device) for row in rows]  # old scripts keep the graphs of scores
        given[name] = rows if name == "scores" else list(map(_flat, rows))
    empty = next((place for place, query in enumerate(given["queries"]) if not query.numel()), None)
    if empty is not None:
        raise ValueError(f"queries[{empty}] is empty: give at least one token, such as the beginning-of-text token")
    if not any(response.numel() for response in given["responses"]):
        raise ValueError("responses: all of them are empty, there is nothing to learn from")
    given["scores"] = [_score(row, score) for row, score in enumerate(given["scores"])]
    for place, (response, mask) in enumerate(zip(given["responses"], given.get("masks", []), strict=False)):
        if response.shape != mask.shape:
            raise ValueError(
                f"masks[{place}] has shape {tuple(mask.shape)}, its response {tuple(response.shape)}: they must agree"
            )
    return given["queries"], given["responses"], given["scores"], given.get("masks")


def _flat(row: Tensor) -> Tensor:
    """A row of tokens, also of shape [1, L]."""
    return row[0] if row.dim() == 2 and len(row) == 1 else row


def seen_tokens(queries: list[Tensor], mask: Any) -> list[Tensor]:
    """The queries without the tokens that an attention mask (one row for each query) hides; None hides nothing."""
    if mask is None:
        return queries
    rows = [torch.as_tensor(row).flatten() for row in (mask if len(mask) == len(queries) else [mask])]
    if [len(row) for row in rows] != [len(query) for query in queries]:
        raise ValueError(
            f"attention_mask: {[len(row) for row in rows]} places for queries of {[len(query) for query in queries]} "
            "tokens; give one for each token, or leave it out: queries without padding need none"
        )
    return [query[row.to(query.device) > 0] for query, row in zip(queries, rows, strict=True)]


def refuse_outputs(generation_kwargs: dict[str, Any]) -> None:
    """ValueError for keywords that ask for more than the responses' tokens; takes out those that are off."""
    for name in OUTPUTS:
        if generation_kwargs.pop(name, None):
            raise ValueError(
                f"{name}: `generate` of the trainer returns the responses' tokens and nothing else; leave it out, or "
                "call `trainer.model.generate`"
            )


def _check_kind(name: str, row: int, tensor: Tensor) -> None:
    """ValueError for a tensor of another kind or shape than token ids, masks or scores have."""
    if tensor.is_meta:
        raise ValueError(f"{name}[{row}] is a tensor on the device meta, which holds no numbers: give one that does")
    if name == "scores":
        if tensor.is_complex():
            raise ValueError(f"scores[{row}] is of {tensor.dtype}: give a real number")
        return
    if tensor.dim() != 1:
        raise ValueError(f"{name}[{row}] has shape {tuple(tensor.shape)}: give one row of tokens, [L]")
    numbers = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
    if name != "masks" and not numbers:
        raise ValueError(f"{name}[{row}] is of {tensor.dtype}: give token ids, which are whole numbers")


def _score(row: int, score: Tensor) -> Tensor:
    if score.dim() > 1:
        raise ValueError(f"Scores must be 1-dimensional - got {score.dim()} (scores[{row}])")
    if score.numel() != 1:
        raise ValueError(f"scores[{row}] holds {score.numel()} numbers: give one score for each response")
    if not torch.isfinite(score).all():
        raise ValueError(f"scores[{row}]={score.item()} is not finite: give every response a number")
    if abs(float(score)) > LARGEST:
        raise ValueError(f"scores[{row}]={score.item()}: its square is no number in float32; scale the scores down")
    return score.reshape(())


def rollout_of(
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    masks: Sequence[Tensor] | None,
    start_token_id: int | None = None,
    embeddings: int | None = None,
    pictured: bool = False,
) -> Rollout:
    """The lists as a rollout whose log-probabilities are unknown.

    A leading `start_token_id` is left out: an encoder-decoder begins with it, no policy chose it. An id beyond
    `embeddings`, or a mask of other numbers than 0 and 1, is a ValueError. pictured: queries may hold pictures.
    """
    rollout = Rollout(prompts=[query.tolist() for query in queries], completions=[], logprobs=[], masks=[])
    for row, ids in enumerate(rollout.prompts):
        _check_ids(ids, "queries", row, embeddings, pictured)
    for row, response in enumerate(responses):
        ids = response.tolist()
        _check_ids(ids, "responses", row, embeddings, pictured and masks is not None)  # an environment may show some
        mask = [1] * len(ids) if masks is None else flags_in({f"masks[{row}]": masks[row]}, f"masks[{row}]")
        skip = int(start_token_id is not None and ids[:1] == [start_token_id])
        rollout.completions.append(ids[skip:])
        rollout.masks.append(mask[skip:])
    return rollout


def _check_ids(ids: list[int], name: str, row: int, embeddings: int | None, pictured: bool = False) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < (math.inf if embeddings is None else embeddings):
        check_embedded(ids, f"{name}[{row}]", embeddings, pictured)


# --- what a trainer is built from ---------------------------------------------------------------------------------


def check_arguments(
    config: Any, model: Any, ref_model: Any, tokenizer: Any, dataset: Any, lr_scheduler: Any, num_shared_layers: Any
) -> None:
    """ValueError for arguments of the wrong type, warnings for missing ones."""
    if not isinstance(config, PPOConfig):
        raise ValueError(f"config must be a PPOConfig, got {type(config)}")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            "tokenizer must be a PreTrainedTokenizerBase like a PreTrainedTokenizer or a PreTrainedTokenizerFast, "
            f"got {type(tokenizer)}"
        )
    supported = f"supported architectures are: {SUPPORTED_ARCHITECTURES}"
    if not isinstance(model, PreTrainedModelWrapper):
        raise ValueError(f"model must be a PreTrainedModelWrapper, got {type(model)} - {supported}")
    check_vocabulary(model, tokenizer)
    check_trainable(model)
    if learns_prompt(model):
        raise ValueError(
            "PromptLearningConfig is not supported for PPO training. Use an adapter of the weights, such as LoRA, or "
            "train virtual tokens with GRPO or RLOO."
        )
    if ref_model is not None and not isinstance(ref_model, PreTrainedModelWrapper):
        raise ValueError(f"ref_model must be a PreTrainedModelWrapper or `None`, got {type(ref_model)} - {supported}")
    refuse_splits(dataset)
    if dataset is not None and not isinstance(dataset, torch.utils.data.Dataset) and not _of_datasets(dataset):
        raise ValueError(f"dataset must be a torch.utils.data.Dataset or datasets.Dataset, got {type(dataset)}")
    if lr_scheduler is not None and not isinstance(lr_scheduler, LRScheduler):
        raise ValueError(f"lr_scheduler must be a torch.optim.lr_scheduler.LRScheduler, got {type(lr_scheduler)}")
    if ref_model is None and num_shared_layers is not None and model.is_peft_model:
        raise ValueError(f"num_shared_layers={num_shared_layers}: a PEFT model is its own reference, nothing is copied")
    if ref_model is not None and num_shared_layers is not None:
        warnings.warn("num_shared_layers is ignored when ref_model is provided", UserWarning)
    if dataset is None:
        warnings.warn(
            "No dataset is provided. Make sure to set config.batch_size to the correct value before training.",
            UserWarning,
        )
    if config.push_to_hub_if_best_kwargs and "repo_id" not in config.push_to_hub_if_best_kwargs:
        raise ValueError("You have to specify repo_id in order to push the model to the hub!")


def make_accelerator(config: PPOConfig) -> Accelerator:
    """The accelerator of a config; the scheduler moves once per PPO step, however many processes there are.

    Where nothing is said of precision, a GPU that computes in bfloat16 by itself does so.
    """
    keywords = {"step_scheduler_with_optimizer": False, **config.accelerator_kwargs}
    on_cpu = keywords.get("cpu") or parse_flag_from_env("ACCELERATE_USE_CPU")
    said = "mixed_precision" in keywords or "ACCELERATE_MIXED_PRECISION" in os.environ
    if not said and not on_cpu and bfloat16_by_default():
        keywords["mixed_precision"] = "bf16"
    join_again("gloo" if on_cpu else None)
    return Accelerator(
        log_with=config.log_with,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        project_config=ProjectConfiguration(**config.project_kwargs),
        **keywords,
    )


def _followed(config: PPOConfig) -> dict[str, Any]:
    """The fields from which something is built that a later change of them must reach."""
    names = ("mini_batch_size", "gradient_accumulation_steps", "temperature", "init_kl_coef", "target", "horizon",
             "adap_kl_ctrl", "learning_rate", "steps")  # fmt: skip
    return {name: getattr(config, name) for name in names}


def start_trackers(accelerator: Accelerator, config: PPOConfig) -> None:
    numbers = config.to_dict()
    accelerator.init_trackers(
        config.tracker_project_name,
        config=numbers if config.log_with == "tensorboard" else {"trl_ppo_trainer_config": numbers},
        init_kwargs=config.tracker_kwargs,
    )


def check_critic(model: Any, value_model: nn.Module, optimizer: Optimizer | None) -> None:
    """A separate critic must have a score head and be trained; the policy's value head is then frozen."""
    classifier_of(value_model)
    model.v_head.requires_grad_(False)
    if optimizer is not None:
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(parameter) in trained for parameter in value_model.parameters()):
            raise ValueError("optimizer: it holds no parameter of the `value_model`, which would never be trained")


def make_optimizer(config: PPOConfig, parameters: Sequence[nn.Parameter]) -> Optimizer:
    """Adam as `adam_style` says; torch's in one pass over memory where a kernel does so."""
    rate, eps = config.learning_rate, config.adam_epsilon
    if config.adam_style == "tf":
        return TFAdam(parameters, lr=rate, eps=eps)
    fused = all(each.device.type in ("cpu", "cuda") and each.is_floating_point() for each in parameters)
    return Adam(parameters, lr=rate, eps=eps, fused=fused or None)


def make_scheduler(config: PPOConfig, optimizer: Optimizer, given: LRScheduler | None) -> LRScheduler | None:
    """The scheduler given, or a linear fall to 0 over the run if `anneal_learning_rate`."""
    if not config.anneal_learning_rate:
        return given
    if given is not None:
        raise ValueError("anneal_learning_rate=True: an `lr_scheduler` is given too; choose one of them")
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / config.total_ppo_epochs))


def complete_config(
    config: PPOConfig, processes: int, *, is_encoder_decoder: bool, is_peft_model: bool, has_dataset: bool
) -> None:
    """Check the config and add what is only known at run time."""
    config.derive()
    config.is_encoder_decoder, config.is_peft_model, config.world_size = is_encoder_decoder, is_peft_model, processes
    config.global_backward_batch_size = (config.backward_batch_size or 1) * processes
    config.global_batch_size = config.batch_size * processes
    if processes > 1 and not has_dataset:
        warnings.warn(
            "No dataset is provided. With several processes prepare your own dataloader with "
            "`trainer.accelerator.prepare(dataloader)`, or all of them train on the same prompts.",
            UserWarning,
        )


def stop_tokens(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The id of `stop_token`; ValueError if it is not a single token."""
    if config.stop_token is None:
        return []
    ids = tokenizer.encode(config.stop_token, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(
            f"stop_token={config.stop_token!r}: the tokenizer makes {len(ids)} tokens of it; give one token"
        )
    return list(ids)


def _of_datasets(dataset: Any) -> bool:
    from datasets import Dataset  # 80 MB that a script without a data set does not need

    return isinstance(dataset, Dataset)


def make_dataloader(
    dataset: Any,
    data_collator: Callable[[list[Any]], Any] | None,
    forward: Callable[..., Any],
    config: PPOConfig,
) -> torch.utils.data.DataLoader:
    """Whole shuffled batches without the columns that `forward` and reward functions do not take.

    The order depends on the config's seed alone, not on the random numbers of sampling. See `remove_unused_columns`.
    """
    if isinstance(dataset, torch.utils.data.IterableDataset):
        raise ValueError("dataset: rows are drawn by their place, a stream has none; give a map-style data set")
    if not len(dataset):  # type: ignore[arg-type]
        raise ValueError("dataset: it has no rows; give prompts")
    if _of_datasets(dataset) and config.remove_unused_columns:
        taken = {*inspect.signature(forward).parameters, "label", "prompt", "query", "response"}
        unused = [name for name in dataset.column_names if name not in taken]
        if len(unused) == len(dataset.column_names):
            raise ValueError(
                f"dataset: of its columns {unused} none is read; give it `input_ids`, `prompt` or `query`, or set "
                "remove_unused_columns=False"
            )
        dataset = dataset.remove_columns(unused)
    return torch.utils.data.DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=data_collator,
        generator=torch.Generator().manual_seed(config.seed),
    )


# --- checkpoints --------------------------------------------------------------------------------------------------


def _is_old_checkpoint(folder: Path) -> bool:
    """Whether release 1.0.0 wrote a folder: its random states had another name, and it had no manifest."""
    return (folder / STATE).is_file() and (folder / OLD_RANDOM_STATE.format(rank=0)).is_file()


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in below_accelerate(model).named_parameters() if p.requires_grad}


@torch.no_grad()
def _sums(model: nn.Module | None) -> list[float] | None:
    """The sum of each parameter, which tell one model from another. MPS has no float64."""
    if model is None:
        return None
    parameters = list(below_accelerate(model).parameters())
    wide = [on_host((p.cpu() if p.device.type == "mps" else p).double().sum(), keep=True) for p in parameters]
    return torch.stack([total.to(wide[0].device) for total in wide]).tolist()


def _same_sums(one: list[float] | None, other: list[float] | None) -> bool:
    """Whether two lists of sums are of the same model, but for the order in which sums were taken."""
    if one is None or other is None or len(one) != len(other):
        return one is other
    return all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in zip(one, other, strict=True))
