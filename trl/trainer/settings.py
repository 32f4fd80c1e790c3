"""Settings of scripts for a GPU or for another release: the table of what each means here, and what is done instead."""

from __future__ import annotations

import logging
import warnings
from dataclasses import MISSING, Field, field, fields
from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available, is_torch_xla_available

from trl.import_utils import is_gpu_available, is_installed

logger = logging.getLogger(__name__)

_VLLM = "has no effect: the local sampler draws the completions and needs no settings"
_CORRECTION = "has no effect: sampler and policy are one model, so there is no mismatch to correct"
_PADS = "has no effect: rows are packed, and what little is padded is never scored"
_CACHE = "has no effect: the local sampler keeps a cache of its own"
NO_EFFECT: dict[str, str] = {
    "activation_offloading": "has no effect: activations stay on the device; packed rows and "
    "`max_tokens_per_microbatch` keep them small, `gradient_checkpointing=True` smaller",
    "pad_to_multiple_of": _PADS,
    "label_pad_token_id": _PADS,
    "padding_value": _PADS,
    "is_encoder_decoder": "has no effect: the model's own config says it",
    "use_logits_to_keep": "has no effect: the head always computes the scored positions only",
    "use_liger_kernel": "is switched off where liger-kernel is not installed; logits never exist whole here without it",
    "use_liger_loss": "has no effect: the logits never exist whole here",
    "group_by_length": "has no effect: rows are not padded, so nothing is saved; "
    "train_sampling_strategy='group_by_length' orders rows that have a column `input_ids`",
    "save_safetensors": "has no effect: weights are always saved as safetensors",
    "use_mps_device": "has no effect: an MPS device is used where there is one; `use_cpu=True` leaves it alone",
    "half_precision_backend": "has no effect: torch's own mixed precision is the only one",
    "include_tokens_per_second": "has no effect: `include_num_input_tokens_seen` counts tokens",
    "ds3_gather_for_generation": "has no effect: the sampler needs the weights whole, and DeepSpeed ZeRO-3 is refused",
    "cache_implementation": _CACHE,
    "use_transformers_paged": _CACHE,
    "use_transformers_continuous_batching": _CACHE,
    "transformers_continuous_batching_config": _CACHE,
    "cast_lm_head_to_fp32": "has no effect: log-probabilities are taken in float32 of logits in the weights' own "
    "precision; load the model in float32 for a head in float32",
    "log_multimodal": "has no effect: rollouts hold text alone",
    "log_completions_hub_repo": "has no effect: upload `output_dir/rollouts`, where completions stay as Parquet files",
    "log_completions_steps": "has no effect: `log_completions=True` prints at each rollout",
    "vllm_mode": _VLLM,
    "vllm_model_impl": _VLLM,
    "vllm_enable_sleep_mode": _VLLM,
    "vllm_structured_outputs_regex": _VLLM,
    "vllm_guided_decoding_regex": _VLLM,
    "vllm_server_base_url": _VLLM,
    "vllm_server_host": _VLLM,
    "vllm_server_port": _VLLM,
    "vllm_server_timeout": _VLLM,
    "vllm_group_port": _VLLM,
    "vllm_device": _VLLM,
    "vllm_dtype": _VLLM,
    "vllm_enable_prefix_caching": _VLLM,
    "vllm_gpu_memory_utilization": _VLLM,
    "vllm_max_model_length": _VLLM,
    "vllm_max_model_len": _VLLM,
    "vllm_tensor_parallel_size": _VLLM,
    "vllm_importance_sampling_correction": _CORRECTION,
    "vllm_importance_sampling_mode": _CORRECTION,
    "vllm_importance_sampling_clip_max": _CORRECTION,
    "vllm_importance_sampling_clip_min": _CORRECTION,
    "vllm_importance_sampling_cap": _CORRECTION,
}
"""field -> what it does here: another value than the default changes memory or speed elsewhere, and nothing here"""

TRANSLATED: dict[str, str] = {
    "warmup_ratio": "becomes `warmup_steps` below 1; a `warmup_steps` that is given wins",
    "no_cuda": "becomes `use_cpu`",
    "use_liger": "becomes `use_liger_kernel`",
    "logging_dir": "becomes the folder of TensorBoard's logs",
    "evaluation_strategy": "becomes `eval_strategy`",
    "max_seq_length": "becomes `max_length`",
    "max_new_tokens": "becomes `max_completion_length`",
    "max_target_length": "becomes `max_completion_length`",
    "wandb_log_unique_prompts": "becomes `log_unique_prompts`",
    "router_aux_loss_coef": "has no effect on a dense model; a mixture of experts is refused with it, because the "
    "router's auxiliary loss is not computed here",
}
"""field of another release -> what it becomes here"""

ADAMW = {
    "paged_adamw", "paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit", "adamw_bnb_8bit", "adamw_apex_fused",
    "adamw_hf",
}  # fmt: skip
"""names of AdamW that a machine without a GPU, or today's transformers, does not have"""
GONE = {"adamw_apex_fused", "adamw_hf"}
"""those of them that transformers has dropped"""


def accepted(name: str, default: Any = None) -> Any:
    """A dataclass field whose meaning is an entry of the tables."""
    return field(default=default, metadata={"help": NO_EFFECT.get(name) or TRANSLATED[name]})


def default_of(entry: Field[Any]) -> Any:
    """The default of a dataclass field."""
    return entry.default_factory() if entry.default_factory is not MISSING else entry.default


def log_without_effect(config: Any) -> None:
    """One line for the fields that were set and do nothing here: which, and why. Fields of one reason share it."""
    lines: dict[str, list[str]] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.name in NO_EFFECT and value != default_of(entry):
            lines.setdefault(NO_EFFECT[entry.name], []).append(f"{entry.name}={value!r}")
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
    optim = str(getattr(config.optim, "value", config.optim))
    if optim in GONE or (optim in ADAMW and not is_gpu_available()):
        reason = "transformers has dropped it" if optim in GONE else "needs a GPU and bitsandbytes"
        warnings.warn(f"optim={optim!r}: {reason}; adamw_torch is used, whose states are in the weights' precision")
        config.optim = "adamw_torch"


def _choose_precision(config: Any) -> None:
    if config.bf16 is None:
        config.bf16 = bool(not config.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported())
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


def switch_liger_off(config: Any) -> None:
    """Without the package, transformers would refuse `use_liger_kernel`."""
    if config.use_liger_kernel and not is_installed("liger_kernel"):
        config.use_liger_kernel = False


def table() -> str:
    """The tables in Markdown, for `docs/deviations/settings.md`."""
    rows: dict[str, list[str]] = {}
    for name, text in {**TRANSLATED, **NO_EFFECT}.items():
        rows.setdefault(text, []).append(f"`{name}`")
    return "\n".join(["| field | here |", "|---|---|", *(f"| {', '.join(n)} | {text} |" for text, n in rows.items())])
