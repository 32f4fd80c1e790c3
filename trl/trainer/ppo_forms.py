"""The two forms of PPO's settings: that of release 0.7.7, and today's (PPOv2 of 0.8-0.11, PPO of 0.12-1.x).

There is one PPO. A config of today's form holds today's names, and the trainer turns them into the numbers of the older
one. `SHARED` and the fields of `TodaysSettings` are the table of which field means which form.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import Field, dataclass, fields, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import tyro
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from trl.trainer.configuration import KeepsAsked, PostTrainingConfig
from trl.trainer.settings import ADAMW, NO_EFFECT, TRANSLATED, OfForm, WholeOfForm, accepted, default_of, logger

OLDER, TODAY = "0.7.7", "today"
"""the forms"""

EXAMPLE = "EleutherAI/pythia-160m"
"""the default of paths of models, which scripts of 0.8 to today load by themselves; no trainer loads it unasked"""
SHARED = (
    "exp_name", "seed", "learning_rate", "gamma", "lam", "cliprange", "cliprange_value", "vf_coef",
    "gradient_accumulation_steps", "max_grad_norm", "whiten_rewards", "temperature", "missing_eos_penalty",
    "stop_token", "adam_epsilon", "output_dir", "save_steps", "save_total_limit", "remove_unused_columns",
    "on_non_finite", "max_non_finite_skips", "enable_jit_checkpoint", "overwrite_output_dir",
    "vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
)  # fmt: skip
"""fields of both forms"""
NEEDS_FOLDER = ("enable_jit_checkpoint", "overwrite_output_dir")
"""those that the older form allows with `output_dir` only"""
SET_BY_TRAINER = (
    "world_size", "is_encoder_decoder", "is_peft_model", "backward_batch_size", "global_backward_batch_size",
    "global_batch_size",
)  # fmt: skip
TODAYS_NAMES = {
    "steps": "total_episodes", "ppo_epochs": "num_ppo_epochs", "init_kl_coef": "kl_coef", "kl_penalty": "kl_estimator",
    "mini_batch_size": "per_device_train_batch_size", "max_new_tokens": "response_length", "log_with": "report_to",
    "batch_size": "per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches",
}  # fmt: skip
"""field of the older form -> what says the same in today's"""
READ = {
    "per_device_train_batch_size", "per_device_eval_batch_size", "num_train_epochs", "max_steps", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2", "bf16", "fp16", "tf32",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs", "logging_strategy", "logging_steps", "logging_first_step", "report_to",
    "run_name", "project", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy", "use_cpu",
    "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "model_init_kwargs", "trust_remote_code",
    "resume_from_checkpoint", "do_train", "do_eval", "do_predict", "disable_tqdm", "log_level", "log_level_replica",
    "local_rank", "debug", "ddp_backend", "ddp_timeout", "logging_dir", "router_aux_loss_coef",
    "restore_callback_states_from_checkpoint",
}  # fmt: skip
"""fields of `TrainingArguments` that PPO, its callbacks or `PostTrainingConfig` act on"""
CHANGES_NUMBERS = {
    "optim_args", "optim_target_modules", "label_smoothing_factor", "bf16_full_eval", "fp16_full_eval", "use_cache",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "neftune_noise_alpha", "auto_find_batch_size",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "full_determinism", "data_seed", "fsdp",
    "fsdp_config", "deepspeed", "parallelism_config", "train_sampling_strategy", "ignore_data_skip", "save_only_model",
    "hub_always_push", "hub_revision", "accelerator_config",
}  # fmt: skip
"""fields of `TrainingArguments` that PPO cannot act on, and that somebody who sets them would miss"""


ELSEWHERE = {*NO_EFFECT, *TRANSLATED}
"""fields whose line `PostTrainingConfig` writes, or which it translates"""


def _common_fields() -> type:
    """A dataclass with what `PostTrainingConfig` has beside the shared fields, by keyword only; `tyro` hides it."""
    types = get_type_hints(PostTrainingConfig)

    def same(entry: Field[Any]) -> Any:
        copied: Any = copy.copy(entry)  # its default, its factory and its help
        copied.kw_only = True
        return copied

    kept = [entry for entry in fields(PostTrainingConfig) if entry.name not in SHARED]
    return make_dataclass(
        "_CommonSettings",
        [(e.name, Annotated[types[e.name], tyro.conf.Suppress], same(e)) for e in kept],
        bases=(KeepsAsked,),
    )


if TYPE_CHECKING:
    _CommonSettings = PostTrainingConfig
else:
    _CommonSettings = _common_fields()


@dataclass(kw_only=True)
class TodaysSettings(_CommonSettings):
    """What only today's form of `PPOConfig` has: its own fields, and those of `TrainingArguments`."""

    logging_steps: float = 1
    """today's form: updates between two logs"""
    num_ppo_epochs: int = 4
    """today's form: passes over each batch"""
    num_mini_batches: int = 1
    """today's form: optimizer steps of a pass over a batch"""
    total_episodes: int | None = None
    """today's form: responses to train on, over the whole run and all processes; None: `num_train_epochs` passes"""
    response_length: int = 53
    """today's form: length limit of the responses"""
    stop_token_id: int | None = None
    """today's form: the token that ends a response; set this or `stop_token`"""
    kl_coef: float = 0.05
    """today's form: weight of the KL to the reference in the reward"""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """today's form: k1: log p - log p_ref, unbiased; k3: never negative, of lower variance"""
    non_eos_penalty: bool = False
    """releases 0.8-0.10: a response without its end token scores `penalty_reward_value`, whatever its score was"""
    penalty_reward_value: float = -1
    """see `non_eos_penalty`"""
    num_sample_generations: int = 10
    """today's form: times in a run that responses to prompts of `eval_dataset` are printed; 0: never"""
    reward_model_path: str = EXAMPLE
    """today's form: for your script, and where `reward_model` is not given, the reward model to load"""
    sft_model_path: str = EXAMPLE
    """today's form: for your script, and where `model` is not given, the policy to load"""
    model_adapter_name: str | None = None
    """today's form: the adapter to train, of a PEFT model with several"""
    ref_adapter_name: str | None = None
    """today's form: refused; give the reference as `ref_model`"""
    local_rollout_forward_batch_size: int = accepted("local_rollout_forward_batch_size", 64)
    ds3_gather_for_generation: bool = True
    """today's form: False has no effect, which one line says: with DeepSpeed ZeRO-3 all weights are gathered at once"""


ONLY_TODAY = tuple(entry.name for entry in fields(TodaysSettings))


def form_of(config: Any) -> str | None:
    """The form that a config's fields have; None: they fit both. ValueError where they are mixed."""
    given = given_fields(config)
    today = [name for name in given if name in ONLY_TODAY]
    older = [name for name in given if name not in (*ONLY_TODAY, *SHARED, *SET_BY_TRAINER)]
    if today and older:
        ways = [f"{name} is {TODAYS_NAMES[name]} there" for name in older if name in TODAYS_NAMES]
        raise ValueError(
            f"{', '.join(older)}: the form of release 0.7.7; {', '.join(today)}: that of 0.12 and later; use one of "
            f"them{''.join(f' ({way})' for way in ways[:1])}"
        )
    if today or (config.output_dir is not None and config.save_steps is None and not older):
        return TODAY
    return OLDER if older else None


def given_fields(config: Any) -> list[str]:
    """Names of the fields that have another value than their default."""
    return [e.name for e in fields(config) if _is_given(getattr(config, e.name), default_of(e))]


def _is_given(value: Any, default: Any) -> bool:
    if isinstance(default, OfForm | WholeOfForm):
        return value is not default
    if (default == "no" and value is False) or (default == "" and not value):  # as parsers read these defaults
        return False
    return bool(value != default)


def in_form(value: Any, form: str | None) -> Any:
    """A field's value: of a default that depends on the form, this form's."""
    if not isinstance(value, OfForm | WholeOfForm):
        return value
    if form == TODAY:
        return value.other
    return float(value) if isinstance(value, OfForm) else int(value)


def check_today(config: Any) -> None:
    """ValueError for wrong values of today's own fields."""

    def require(name: str, holds: bool, way_out: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(config, name)!r}: {way_out}")

    for name in ("num_ppo_epochs", "num_mini_batches", "response_length", "per_device_train_batch_size",
                 "gradient_accumulation_steps"):  # fmt: skip
        require(name, getattr(config, name) >= 1, "give a whole number of at least 1")
    episodes = config.total_episodes
    require("total_episodes", episodes is None or episodes >= 1, "give a whole number of at least 1, or None")
    require("max_steps", episodes is None or config.max_steps < 0, f"total_episodes={episodes} says the length too")
    require("num_sample_generations", config.num_sample_generations >= 0, "give a number of times, or 0")
    require("kl_estimator", config.kl_estimator in ("k1", "k3"), "choose 'k1' or 'k3'")
    require("kl_coef", config.kl_coef >= 0, "give a weight of at least 0")
    alone = config.stop_token is None or config.stop_token_id is None
    require("stop_token_id", alone, f"stop_token={config.stop_token!r} names one too; give one of them")
    alone = not config.non_eos_penalty or config.missing_eos_penalty is None
    require("non_eos_penalty", alone, "missing_eos_penalty is its newer name; give one of them")
    way_out = "the reference of another adapter: load it into a model of its own and give that as `ref_model`"
    require("ref_adapter_name", config.ref_adapter_name is None, way_out)


def said_of(config: Any) -> dict[str, Any]:
    """A config's fields that are fields of `TrainingArguments` too."""
    return {entry.name: getattr(config, entry.name) for entry in fields(PostTrainingConfig)}


def arguments_of(config: Any) -> PostTrainingConfig:
    """The config's `TrainingArguments`, which know the device; ValueError for one that PPO cannot act on."""
    own, ignored = said_of(config), []
    for entry in fields(PostTrainingConfig):
        name = entry.name
        if name in READ or name in SHARED or name in ELSEWHERE or not _is_given(own[name], default_of(entry)):
            continue
        if name in CHANGES_NUMBERS:
            raise ValueError(f"{name}={own[name]!r}: PPO does not act on it; leave it out")
        ignored.append(f"{name}={own[name]!r}")
    shared = {name: in_form(own[name], TODAY) for name in SHARED if name in own}
    shared |= {"max_grad_norm": shared["max_grad_norm"] or 0.0, "save_steps": shared["save_steps"] or 500}
    made = PostTrainingConfig(**copy.deepcopy(own | shared))
    if made.push_to_hub and made.process_index == 0:
        logger.warning("push_to_hub=True: the model is uploaded when `trainer.push_to_hub()` is called")
    if ignored and made.process_index == 0:
        logger.warning("%s: PPO does not read this", ", ".join(ignored))
    return made


def numbers_of(config: Any, rows: int | None) -> dict[str, Any]:
    """The fields of the older form that say what a config of today's form says.

    rows: of the data set, where their number is known and the length of the run depends on it.
    """
    check_today(config)
    arguments: PostTrainingConfig = config.arguments
    shared = {name: in_form(getattr(config, name), TODAY) for name in SHARED}
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.num_mini_batches
    ends = [] if config.stop_token_id is None else [config.stop_token_id]
    return {
        **{
            name: shared[name]
            for name in SHARED
            if name not in ("output_dir", "save_steps", "stop_token", *NEEDS_FOLDER)
        },
        "save_total_limit": shared["save_total_limit"] or sys.maxsize,
        "missing_eos_penalty": -config.penalty_reward_value
        if config.non_eos_penalty
        else shared["missing_eos_penalty"],
        "stop_token": None if config.stop_token == "eos" else config.stop_token,
        "steps": math.ceil(_episodes(config, rows, batch * arguments.world_size) / arguments.world_size),
        "batch_size": batch,
        "mini_batch_size": config.per_device_train_batch_size,
        "ppo_epochs": config.num_ppo_epochs,
        "adap_kl_ctrl": False,
        "init_kl_coef": config.kl_coef,
        "kl_penalty": "k3" if config.kl_estimator == "k3" else "kl",
        "ratio_threshold": math.inf,
        "max_new_tokens": config.response_length,
        "generation_kwargs": {"eos_token_id": ends} if config.stop_token is None else {},
        **_tracking(arguments),
    }


def _episodes(config: Any, rows: int | None, batch: int) -> int:
    """Responses of the whole run, over all processes."""
    if config.total_episodes is not None:
        return int(config.total_episodes)
    if config.max_steps > 0:
        return int(config.max_steps) * batch
    return max(1, int(config.num_train_epochs * (rows or 1)))


def _tracking(arguments: PostTrainingConfig) -> dict[str, Any]:
    """Fields of the older form for the precision and the tracker; ValueError for a tracker that PPO cannot write to."""
    precision = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "no"
    made: dict[str, Any] = {"accelerator_kwargs": {"mixed_precision": precision}}
    known = [name for name in arguments.report_to if name in ("wandb", "tensorboard")]
    other = [name for name in arguments.report_to if name not in (*known, "none")]
    if len(known) > 1 or (other and not known):
        raise ValueError(f"report_to={arguments.report_to!r}: choose 'wandb', 'tensorboard' or 'none'")
    if not known:
        return made
    made["log_with"] = known[0]
    if known[0] == "tensorboard":
        made["project_kwargs"] = {"logging_dir": f"{arguments.output_dir}/runs"}
    elif arguments.run_name:
        made["tracker_kwargs"] = {"wandb": {"name": arguments.run_name}}
    return made


def optimizer_of(arguments: PostTrainingConfig, parameters: Sequence[nn.Parameter], eps: float) -> Optimizer | None:
    """AdamW with the betas and the decay that were asked for; None where Adam as it is says the same."""
    name = str(getattr(arguments.optim, "value", arguments.optim))
    if name not in (*ADAMW, "adamw_torch", "adamw_torch_fused"):
        raise ValueError(f"optim={name!r}: PPO makes AdamW alone; give the optimizer as `optimizers=(optimizer, None)`")
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    if not arguments.weight_decay and betas == (0.9, 0.999):
        return None
    return AdamW(parameters, lr=arguments.learning_rate, betas=betas, eps=eps, weight_decay=arguments.weight_decay)


def scheduler_of(arguments: PostTrainingConfig, updates: int, optimizer: Optimizer) -> LRScheduler:
    """The learning rate of each update, by `lr_scheduler_type` over the whole run."""
    return get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=arguments.get_warmup_steps(updates),
        num_training_steps=updates,
        scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
    )


def one_of(newer: str, value: Any, older: str, older_value: Any) -> Any:
    """An argument under either of its two names; ValueError where both are given and differ."""
    if value is not None and older_value is not None and value is not older_value:
        raise ValueError(f"`{newer}` and `{older}` are two names of one argument: give one of them")
    return older_value if value is None else value


ORDER = (
    "model", "ref_model", "tokenizer", "dataset", "optimizer", "data_collator", "num_shared_layers", "lr_scheduler"
)  # fmt: skip
"""the arguments of release 0.7.7 behind the config"""
TODAYS_ORDER = (
    "processing_class", "model", "ref_model", "reward_model", "train_dataset", "value_model", "data_collator",
    "eval_dataset",
)  # fmt: skip
"""those of 0.8 to today"""
ONLY_OLDER_ARGUMENTS = ("dataset", "optimizer", "num_shared_layers", "lr_scheduler")


def from_todays_order(
    places: Sequence[Any], parts: dict[str, Any], today: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments where they stand in today's order, `places`, beside those that were given by name."""
    parts, today = {**parts, **dict.fromkeys(ORDER)}, dict(today)
    for name, value in zip(TODAYS_ORDER, places, strict=True):
        held = today if name in today else parts
        held[name] = one_of(name, held[name], f"argument {TODAYS_ORDER.index(name) + 2}", value)
    return parts, today


def takes_todays_form(config: Any, today: dict[str, Any], parts: dict[str, Any]) -> bool:
    """Whether a trainer's call is of today's form, which its config then takes.

    today: arguments that only today's form has; parts: the others. ValueError where arguments and config are of
    different forms.
    """
    older = {name: parts[name] for name in ONLY_OLDER_ARGUMENTS}
    arguments = {TODAY: _named(today), OLDER: _named(older)}
    form = config.form
    if form is None:
        form = TODAY if arguments[TODAY] else OLDER
    other = OLDER if form == TODAY else TODAY
    if wrong := [name for name in arguments[other] if name != "args"]:  # which is clear in either form
        names = "of release 0.7.7" if other == OLDER else "of 0.12 and later"
        held = [name for name in given_fields(config) if name not in (*SHARED, *SET_BY_TRAINER)]
        held = held or arguments[form]
        raise ValueError(
            f"{', '.join(wrong)}: of the form {names}, and {', '.join(held[:3])} of the other one; use one of them "
            f"({WAYS[wrong[0]]})"
        )
    config.take_form(form)
    return bool(form == TODAY)


WAYS = {
    "dataset": "dataset is train_dataset there",
    "optimizer": "optimizer is optimizers=(optimizer, None) there",
    "lr_scheduler": "lr_scheduler is optimizers=(optimizer, lr_scheduler) there",
    "num_shared_layers": "leave num_shared_layers out: the reference is a whole copy there",
    "policy": "policy is model there, with a value head",
    "ref_policy": "ref_policy is ref_model there, with a value head",
    "reward_model": "reward_model is reward_funcs there",
    "train_dataset": "train_dataset is dataset there",
    "eval_dataset": "leave eval_dataset out",
    "peft_config": "peft_config is an argument of AutoModelForCausalLMWithValueHead.from_pretrained there",
    "callbacks": "callbacks is train(callback=...) there",
    "optimizers": "optimizers is optimizer and lr_scheduler there",
}
"""argument of one form -> what says the same in the other"""


def _named(arguments: dict[str, Any]) -> list[str]:
    return [name for name, value in arguments.items() if value is not None]
