"""Settings of scripts for a GPU or for another release: the table of what each means here, and what is done instead."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, field, fields
from difflib import get_close_matches
from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available, is_torch_xla_available

from trl.import_utils import is_gpu_available, is_installed

logger = logging.getLogger(__name__)

_PADS = "has no effect: rows are packed, and what little is padded is never scored"
_CACHE = "has no effect: the local sampler keeps a cache of its own"
_COMPILE = "becomes `compile_layers`: torch compiles the layers of the model"
_MIXED = "has no effect: torch's own mixed precision is the only one"
NO_EFFECT: dict[str, str] = {
    "pad_to_multiple_of": _PADS,
    "label_pad_token_id": _PADS,
    "padding_value": _PADS,
    "is_encoder_decoder": "has no effect: the model's own config says it",
    "use_logits_to_keep": "has no effect: the head always computes the scored positions only",
    "use_liger_kernel": "is switched off where liger-kernel is not installed; logits never exist whole here without it",
    "use_liger_loss": "has no effect: the logits never exist whole here",
    "label_names": "has no effect: a batch says itself which of its tokens are learned",
    "jit_mode_eval": "has no effect: transformers has dropped it",
    "use_ipex": "has no effect: transformers has dropped it",
    "fp16_backend": _MIXED,
    "fp16_opt_level": _MIXED,
    "tpu_num_cores": "has no effect: transformers has dropped it",
    "mp_parameters": "has no effect: transformers has dropped it",
    "ray_scope": "has no effect: transformers has dropped it",
    "save_safetensors": "has no effect: weights are always saved as safetensors",
    "use_mps_device": "has no effect: an MPS device is used where there is one; `use_cpu=True` leaves it alone",
    "half_precision_backend": _MIXED,
    "include_tokens_per_second": "has no effect: `include_num_input_tokens_seen` counts tokens",
    "local_rollout_forward_batch_size": "has no effect: passes without gradient take as many rows as fit their tokens",
    "cache_implementation": _CACHE,
    "use_transformers_paged": _CACHE,
    "use_transformers_continuous_batching": _CACHE,
    "transformers_continuous_batching_config": _CACHE,
    "cast_lm_head_to_fp32": "has no effect: log-probabilities are taken in float32 of logits in the weights' own "
    "precision; load the model in float32 for a head in float32",
    "log_multimodal": "has no effect: tables have marks for pictures, files of rollouts their thumbnails",
    "log_completions_hub_repo": "has no effect: upload `output_dir/rollouts`, where completions stay as Parquet files",
    "log_completions_steps": "has no effect: `log_completions=True` prints at each rollout",
    "vllm_device": "has no effect: vLLM runs on the trainer's device, or where its server does",
}
"""field -> what it does here: another value than the default changes memory or speed elsewhere, and nothing here"""

TRANSLATED: dict[str, str] = {
    "warmup_ratio": "becomes `warmup_steps` below 1; a `warmup_steps` that is given wins",
    "no_cuda": "becomes `use_cpu`",
    "use_liger": "becomes `use_liger_kernel`",
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "torchdynamo": _COMPILE,
    "logging_dir": "becomes the folder of TensorBoard's logs",
    "evaluation_strategy": "becomes `eval_strategy`",
    "group_by_length": "becomes `train_sampling_strategy='group_by_length'`",
    "include_inputs_for_metrics": "becomes `include_for_metrics=['inputs']`",
    "max_seq_length": "becomes `max_length`",
    "max_new_tokens": "becomes `max_completion_length`",
    "max_target_length": "becomes `max_completion_length`",
    "rloo_k": "becomes `num_generations`",
    "num_ppo_epochs": "becomes `num_iterations` of RLOO",
    "kl_coef": "becomes `beta` of RLOO",
    "cliprange": "becomes `epsilon` of RLOO",
    "response_length": "becomes `max_completion_length` of RLOO",
    "normalize_advantage": "becomes `normalize_advantages`",
    "num_sample_generations": "becomes `log_completions` of RLOO, where it is not 0",
    "exp_name": "becomes `run_name` of RLOO",
    "wandb_log_unique_prompts": "becomes `log_unique_prompts`",
    "vllm_guided_decoding_regex": "becomes `vllm_structured_outputs_regex`",
    "vllm_max_model_len": "becomes `vllm_max_model_length`",
    "gpu_memory_utilization": "becomes `vllm_gpu_memory_utilization`",
}
"""field of another release -> what it becomes here"""

_AS_THERE = "as in `transformers.Trainer`"
_AS_THERE_FIELDS = (
    "output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "gradient_accumulation_steps", "max_grad_norm", "fp16", "bf16_full_eval", "fp16_full_eval",
    "use_cache", "torch_empty_cache_steps", "logging_strategy", "logging_first_step",
    "log_on_each_node", "logging_nan_inf_filter", "log_level", "log_level_replica", "disable_tqdm", "report_to",
    "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "eval_strategy",
    "eval_steps", "eval_delay", "per_device_eval_batch_size", "prediction_loss_only", "eval_on_start",
    "eval_use_gather_object", "eval_accumulation_steps", "save_only_model", "save_strategy", "save_steps",
    "save_on_each_node", "save_total_limit", "enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo",
    "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "restore_callback_states_from_checkpoint", "full_determinism",
    "seed", "data_seed", "use_cpu", "dataloader_drop_last", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order", "length_column_name",
    "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend",
    "ddp_timeout", "debug", "skip_memory_metrics", "do_train", "do_eval", "do_predict", "resume_from_checkpoint",
    "local_rank", "include_for_metrics",
)  # fmt: skip
INHERITED: dict[str, str] = {
    **dict.fromkeys(_AS_THERE_FIELDS, _AS_THERE),
    **dict.fromkeys(
        ("activation_checkpointing", "gradient_checkpointing"),
        f"{_AS_THERE}; where nothing is said, `memory_plan` switches it on if the run would not fit without it",
    ),
    **dict.fromkeys(
        ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
        f"{_AS_THERE} (`every_n_layers`, `offload`); `keep='attention'` keeps what attention gave instead of computing "
        "it again, `keep='products'` what all products of matrices gave",
    ),
    "dataloader_num_workers": f"{_AS_THERE}: they pack batches ahead; with 0 a thread does so for a GPU",
    "warmup_steps": f"{_AS_THERE}: none with lr_scheduler_type='constant', which one line says",
    "tf32": f"{_AS_THERE}, where a GPU computes it",
    "optim_args": f"{_AS_THERE}; an error with an optimizer that reads none, such as torch's AdamW",
    "optim_target_modules": f"{_AS_THERE}; an error with an optimizer other than GaLore and APOLLO, which reads none",
    "average_tokens_across_devices": "the loss is divided by the count of all ranks; False is an error on several",
    "label_smoothing_factor": "supervised losses (SFT, IterativeSFT) learn the uniform distribution with this weight, "
    "process reward models the mean over their labels; an error for all others",
    "liger_kernel_config": f"{_AS_THERE}, with `use_liger_kernel=True`",
    "neftune_noise_alpha": "rows are padded, whose width the noise depends on; an error where a policy's first ratio "
    "must be 1 (GRPO, RLOO)",
    "auto_find_batch_size": f"{_AS_THERE}; an error where the batch size is part of a rollout",
    "include_num_input_tokens_seen": "counts the tokens of all rows, a shared prompt in each; rows have no padding to "
    "leave out",
    "batch_eval_metrics": f"{_AS_THERE}; RewardTrainer then counts its accuracy itself",
    "eval_do_concat_batches": f"{_AS_THERE}; RewardTrainer then counts its accuracy itself",
    "ignore_data_skip": f"{_AS_THERE}; an error where prompts are drawn by the loop",
    "accelerator_config": f"{_AS_THERE}; `dispatch_batches=True` becomes False, as a packed batch cannot be cut",
    "parallelism_config": f"{_AS_THERE} for data parallelism; `cp_size` is `context_parallel_size`, an error where it "
    "does not exist; an error for tensor and sequence parallelism",
    "dataloader_pin_memory": f"{_AS_THERE}, where there is a device to copy to",
    "train_sampling_strategy": f"{_AS_THERE}; lengths are counted where no column holds them",
    "fsdp": f"{_AS_THERE}; on-policy trainers take FSDP2 only, see `gather`",
    "fsdp_config": f"{_AS_THERE}; on-policy trainers take FSDP2 only, see `gather`",
    "deepspeed": f"{_AS_THERE}; where its `gradient_clipping` is left out, `max_grad_norm` holds",
}
"""fields of `TrainingArguments` whose defaults are its own -> what they do here"""
_LOOP = "has no effect: prompts are drawn by the loop; evaluation follows it"
CORRECTION = (
    "vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap",
)  # fmt: skip
"""fields of the correction of an engine's mismatch, which the trainers with an importance ratio have"""
ROLLOUTS: dict[str, str] = {
    **dict.fromkeys(CORRECTION, "has no effect: this loss has no ratio to the policy that sampled, to be corrected"),
    "train_sampling_strategy": "'sequential' becomes `shuffle_dataset=False`; else it has no effect: rollouts are not "
    "ordered by length",
    "length_column_name": "has no effect: rollouts are not ordered by length",
    "include_for_metrics": "has no effect: no metrics are computed of predictions",
    **dict.fromkeys(
        ("dataloader_drop_last", "dataloader_num_workers", "dataloader_persistent_workers",
         "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"), _LOOP,
    ),
}  # fmt: skip
"""what the trainers that sample do otherwise"""
BY_STEPS: dict[str, str] = dict.fromkeys(
    (
        "num_train_epochs", "logging_first_step", "eval_on_start", "eval_delay", "load_best_model_at_end",
        "metric_for_best_model", "greater_is_better", "save_total_limit", "save_only_model", "auto_find_batch_size",
        "train_sampling_strategy", "length_column_name", "dataloader_drop_last", "dataloader_num_workers",
        "torch_empty_cache_steps", "include_num_input_tokens_seen", "ignore_data_skip", "enable_jit_checkpoint",
        "memory_plan", "activation_offloading",
    ),
    "has no effect: `step` is called with the data, and the loop around it is yours",
)  # fmt: skip
"""what `IterativeSFTTrainer` does otherwise"""


ABSENT = {
    **dict.fromkeys(("max_staleness", "sync_in_flight"), "GRPO, RLOO, online DPO and distillation draw rollouts ahead"),
    "keep_sampling_mask": "GRPO and RLOO learn tokens as chosen from the words that filters left",
    "routing_replay": "GRPO and RLOO send tokens to the experts that an engine took",
}
"""field that some trainers have -> what they do by it"""


def unknown_field(owner: str, name: str, known: Iterable[str]) -> str:
    """The error for a field that a config does not have."""
    near = get_close_matches(name, known, 1, 0.8)
    way_out = f"did you mean {near[0]!r}?" if near else "leave it out"
    if name in ABSENT:
        way_out = f"{ABSENT[name]}, this trainer does not; leave it out"
    return f"{owner}.__init__() got an unexpected keyword argument {name!r}: {way_out}"


def means(config_class: Any) -> dict[str, str]:
    """What each field of a config does here, from the tables; fields that are not in it have a docstring of their own.

    An inherited field with another default has both.
    """
    known = {**INHERITED, **config_class.exceptions(), **TRANSLATED, **NO_EFFECT}
    return {entry.name: known[entry.name] for entry in fields(config_class) if entry.name in known}


def check_inherited(config: Any) -> None:
    """ValueError where a field of `TrainingArguments` would change numbers elsewhere and cannot do so here."""
    factor, optim = config.label_smoothing_factor, str(getattr(config.optim, "value", config.optim))
    if not 0 <= factor < 1:
        raise ValueError(f"label_smoothing_factor={factor!r}: give a weight in [0, 1)")
    if factor and not config.smooths_labels:
        also = "; `label_smoothing` is that of preferences" if hasattr(config, "label_smoothing") else ""
        raise ValueError(f"label_smoothing_factor={factor!r}: this loss has no labels to smooth; leave it out{also}")
    if not config.average_tokens_across_devices and config.world_size > 1:
        raise ValueError("average_tokens_across_devices=False: the loss is divided by the count of all ranks; leave it")
    if config.optim_target_modules is not None and not optim.startswith(("galore", "apollo")):
        raise ValueError(
            f"optim_target_modules={config.optim_target_modules!r}: optim={optim!r} reads none, only GaLore and APOLLO "
            "do"
        )
    if config.optim_args and optim.removesuffix("_fused") in ("adamw_torch", "adafactor", "adamw_torch_xla"):
        raise ValueError(f"optim_args={config.optim_args!r}: optim={optim!r} reads none; leave it out")
    if getattr(config, "past_index", -1) >= 0:
        raise ValueError(f"past_index={config.past_index!r}: no state is carried from row to row; leave it out")
    if config.parallelism_config is not None:
        check_parallelism(config.parallelism_config, config.shares_rows, type(config).__name__)


def check_parallelism(parallelism: Any, shares_rows: bool, owner: str) -> None:
    """ValueError for what a `ParallelismConfig` asks and cannot be done. shares_rows: context parallelism can be."""
    sizes = {name: getattr(parallelism, f"{name}_size", 1) or 1 for name in ("tp", "sp", "cp")}
    split = [f"{name}_size={size}" for name, size in sizes.items() if size > 1 and name != "cp"]
    if split:
        raise ValueError(
            f"parallelism_config: {', '.join(split)}: heads and layers are not cut here; shard weights by FSDP2, and "
            "cut long rows by context_parallel_size"
        )
    if sizes["cp"] > 1 and not shares_rows:
        raise ValueError(
            f"parallelism_config: cp_size={sizes['cp']}: {owner} makes its rows while it trains, which ranks cannot "
            "share; leave it out (SFT, preferences, KTO and reward models take it)"
        )


ADAMW = {
    "paged_adamw", "paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit", "adamw_bnb_8bit", "adamw_apex_fused",
    "adamw_hf",
}  # fmt: skip
"""names of AdamW that a machine without a GPU, or today's transformers, does not have"""
GONE = {"adamw_apex_fused", "adamw_hf"}
"""those of them that transformers has dropped"""


class OfForm(float):
    """A default for which another form of the settings has another one; a user's own number is a plain float."""

    other: float | None

    def __new__(cls, number: float, other: float | None) -> OfForm:
        made = super().__new__(cls, number)
        made.other = other
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:  # type: ignore[override]
        return float(self), self.other


class WholeOfForm(int):
    """As `OfForm`, of whole numbers."""

    other: int | None

    def __new__(cls, number: int, other: int | None) -> WholeOfForm:
        made = super().__new__(cls, number)
        made.other = other
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:  # type: ignore[override]
        return int(self), self.other


def accepted(name: str, default: Any = None) -> Any:
    """A dataclass field whose meaning is an entry of the tables."""
    return field(default=default, metadata={"help": NO_EFFECT.get(name) or TRANSLATED.get(name) or ROLLOUTS[name]})


def default_of(entry: Field[Any]) -> Any:
    """The default of a dataclass field."""
    return entry.default_factory() if entry.default_factory is not MISSING else entry.default


def log_without_effect(config: Any, exceptions: Mapping[str, str] | None = None) -> None:
    """One line for the fields that were set and do nothing here: which, and why. Fields of one reason share it.

    exceptions: the table of one trainer; default: those of the config's trainers, and `NO_EFFECT`.
    """
    lines: dict[str, list[str]] = {}
    texts = config.exceptions() | NO_EFFECT | config.unused() if exceptions is None else exceptions
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.name in texts and value != default_of(entry):
            lines.setdefault(texts[entry.name], []).append(f"{entry.name}={value!r}")
    if config.liger_kernel_config and not config.use_liger_kernel and exceptions is None:
        lines["has no effect without use_liger_kernel=True"] = [f"liger_kernel_config={config.liger_kernel_config!r}"]
    schedule = str(getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type))
    if config.warmup_steps and schedule == "constant" and exceptions is None:
        lines["has no effect with lr_scheduler_type='constant'; 'constant_with_warmup' has one"] = [
            f"warmup_steps={config.warmup_steps!r}"
        ]
    for text, names in lines.items():
        logger.warning("%s: %s", ", ".join(names), text)


def translate(config: Any) -> None:
    """Fields that transformers has renamed or dropped, as those that it has today."""
    if config.evaluation_strategy is not None:
        config.eval_strategy, config.evaluation_strategy = config.evaluation_strategy, None
    if (ratio := config.warmup_ratio) is not None:
        if not 0 <= ratio < 1:
            raise ValueError(f"warmup_ratio={ratio!r}: give a share of the steps in [0, 1)")
        if ratio and config.warmup_steps:
            logger.warning("warmup_ratio=%r: warmup_steps=%r wins", ratio, config.warmup_steps)
        config.warmup_steps, config.warmup_ratio = config.warmup_steps or ratio, None
    config.use_cpu, config.no_cuda = config.use_cpu or config.no_cuda, False
    config.use_liger_kernel, config.use_liger = config.use_liger_kernel or config.use_liger, False
    if config.group_by_length:
        config.train_sampling_strategy, config.group_by_length = "group_by_length", False
    if config.include_inputs_for_metrics:
        config.include_for_metrics = [*{*config.include_for_metrics, "inputs"}]
        config.include_inputs_for_metrics = False


def rename(config: Any, older: str, newer: str) -> None:
    """Give a field the value of its older name; ValueError where both were given and differ."""
    value, current = getattr(config, older), getattr(config, newer)
    if value is None or value == current:
        return
    if current != default_of(type(config).__dataclass_fields__[newer]):
        raise ValueError(f"{older}={value!r}, {newer}={current!r}: two names of one setting; give one of them")
    setattr(config, newer, value)


def fit_to_machine(config: Any) -> None:
    """What a script asks of a GPU, as this machine can do it; one warning each says what is done instead."""
    _choose_precision(config)
    if config.bf16_full_eval and not torch.accelerator.is_available():
        config.use_cpu = True
    if config.tf32 and not is_torch_tf32_available():
        warnings.warn("tf32=True: no GPU here computes it; products stay in float32")
        config.tf32 = None
    if config.activation_offloading and (config.use_cpu or not torch.accelerator.is_available()):
        logger.warning("activation_offloading=True: has no effect on a CPU: activations are in main memory")
    optim = str(getattr(config.optim, "value", config.optim))
    if optim in GONE or (optim in ADAMW and not is_gpu_available()):
        reason = "transformers has dropped it" if optim in GONE else "needs a GPU and bitsandbytes"
        warnings.warn(f"optim={optim!r}: {reason}; adamw_torch is used, whose states are in the weights' precision")
        config.optim = "adamw_torch"


def bfloat16_by_default() -> bool:
    """Whether mixed precision is on where nobody said anything: the GPU computes in bfloat16 by itself."""
    return bool(torch.cuda.is_available() and torch.cuda.is_bf16_supported())


def _choose_precision(config: Any) -> None:
    if config.bf16 is None:
        config.bf16 = not config.fp16 and bfloat16_by_default()
    if bool(config.bf16) == bool(config.fp16):  # neither, or both, which transformers refuses
        return
    if config.bf16:
        able = config.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()
    else:
        able = not config.use_cpu and is_gpu_available()
    if able:
        return
    name = "bf16" if config.bf16 else "fp16"
    on_cpu = config.use_cpu or not torch.accelerator.is_available()
    config.bf16, config.fp16 = on_cpu and cpu_has_bfloat16(), False
    config.use_cpu = config.use_cpu or config.bf16
    where = "on a CPU" if on_cpu else "on a device that lacks it"
    instead = "bfloat16, which this CPU has" if config.bf16 else "float32"
    warnings.warn(f"{name}=True {where}: training computes in {instead}")


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies matrices in bfloat16 by itself."""
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def compile_by_layers(config: Any) -> None:
    """What asks torch to compile the model asks for its layers here, because a pass is no graph of its own."""
    asked = config.torch_compile or config.torch_compile_backend or config.torch_compile_mode or config.torchdynamo
    if asked and config.compile_layers is None:
        backend, mode = config.torch_compile_backend or config.torchdynamo or "inductor", config.torch_compile_mode
        config.compile_layers = f"{backend}:{mode}" if mode else backend
    config.torch_compile, config.torch_compile_backend, config.torch_compile_mode = False, None, None
    config.torchdynamo = None


def switch_liger_off(config: Any) -> None:
    """Without the package, transformers would refuse `use_liger_kernel`."""
    if config.use_liger_kernel and not is_installed("liger_kernel"):
        config.use_liger_kernel = False


def table() -> str:
    """The tables in Markdown, for `docs/deviations/settings.md`."""
    rows: dict[str, list[str]] = {}
    for name, text in {**TRANSLATED, **NO_EFFECT, **INHERITED}.items():
        rows.setdefault(text, []).append(f"`{name}`")
    for title, exceptions in (("trainers that sample", ROLLOUTS), ("IterativeSFTTrainer", BY_STEPS)):
        for name, text in exceptions.items():
            rows.setdefault(f"{title}: {text}", []).append(f"`{name}`")
    return "\n".join(["| field | here |", "|---|---|", *(f"| {', '.join(n)} | {text} |" for text, n in rows.items())])
