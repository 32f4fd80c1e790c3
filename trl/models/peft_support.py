"""Everything that needs PEFT: putting adapters on, loading them from a folder, reading the head of a reward model."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file
from torch import nn

from trl.import_utils import is_peft_available, pip_install
from trl.models.precision import heads_of, raise_trained
from trl.models.weight_files import find_file

if is_peft_available():
    from peft import (
        PeftConfig,
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForSeq2SeqLM,
        get_peft_model,
        prepare_model_for_kbit_training,
    )
    from peft.tuners.tuners_utils import BaseTunerLayer

    PEFT_ARCHITECTURES: tuple[type[nn.Module], ...] = (PeftModelForCausalLM, PeftModelForSeq2SeqLM)
    KBIT_ARGUMENTS = tuple(name for name in inspect.signature(prepare_model_for_kbit_training).parameters)[1:]
else:
    PEFT_ARCHITECTURES = ()
    KBIT_ARGUMENTS = ()

logger = logging.getLogger(__name__)


def is_peft_model(model: Any) -> bool:
    """Whether `model` is a PEFT model (False where PEFT is not installed)."""
    return is_peft_available() and isinstance(model, PeftModel)


def is_peft_config(config: Any) -> bool:
    return is_peft_available() and isinstance(config, PeftConfig)


def require_peft(wanted_by: str) -> None:
    """ImportError where PEFT is not installed."""
    if not is_peft_available():
        raise ImportError(f"PEFT is not installed and {wanted_by} needs it: {pip_install('peft')}")


def is_quantized(model: nn.Module) -> bool:
    """Whether the weights are held in 8 or 4 bits, by any of transformers' quantisation methods."""
    loaded = any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (8, 4))
    return loaded or getattr(model, "quantization_method", None) is not None


@contextmanager
def _without_library_noise() -> Iterator[None]:
    """Hide warnings about names of transformers that PEFT still uses: the user cannot avoid them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`(is_gradient_checkpointing|gradient_checkpointing_enable)` is dep")
        warnings.filterwarnings("ignore", message=r"fan_in_fan_out is set to False but the target module is `Conv1D`")
        yield


def add_adapter(model: nn.Module, peft_config: Any, **kbit_arguments: Any) -> nn.Module:
    """A PEFT model of `model`; a quantised one is prepared for training first, with `kbit_arguments`."""
    if is_quantized(model):
        with _without_library_noise():
            model = prepare_model_for_kbit_training(model, **kbit_arguments)
    elif any(kbit_arguments.values()):
        names = ", ".join(f"`{name}`" for name in kbit_arguments)
        raise ValueError(
            f"{names} prepare a quantised model for training, and this one is not quantised: "
            "leave them out, or pass a `quantization_config`"
        )
    with _without_library_noise():
        try:
            adapted = get_peft_model(model, peft_config)
        except ValueError as error:
            if not str(error).startswith("Please specify `target_modules`"):
                raise
            kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
            raise ValueError(
                f"peft_config: PEFT does not know which layers of a model of kind {kind!r} to adapt: name them by "
                "`target_modules` (--lora_target_modules), 'all-linear' or q_proj and v_proj, say"
            ) from error
    raise_trained(adapted)
    _put_on[adapted] = _changes(adapted)
    return adapted


_put_on: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""PEFT models that were made here, and how often their weights had been written to then"""


def _changes(model: nn.Module) -> int:
    return sum(weight._version for weight in model.parameters())


def base_is_start(model: Any) -> bool:
    """Whether a PEFT model without its adapter is what training starts from.

    It is with an adapter that was put on here and has not been trained, unless its initialisation changed the base
    (PiSSA, OLoRA, CorDA), and with a LoRA whose B is 0. An adapter that has learned something belongs to the start.
    """
    configs = [model.peft_config[name] for name in model.active_adapters]
    new = _put_on.get(model) == _changes(model)
    if new and not any(isinstance(getattr(config, "init_lora_weights", None), str) for config in configs):
        return True
    beside = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices")
    plain = all(
        str(config.peft_type).endswith("LORA")
        and getattr(config, "bias", None) == "none"
        and not any(getattr(config, name, None) for name in beside)
        for config in configs
    )
    if not plain:
        return False
    second = [weight for name, weight in model.named_parameters() if ".lora_B." in name or ".lora_embedding_B." in name]
    return bool(second) and all(weight.numel() and not weight.any() for weight in second)


def wrap_peft(
    model: Any,
    peft_config: Any,
    *,
    owner: str = "trainer",
    gradient_checkpointing: bool = False,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    bf16: bool = False,
    merge: bool = False,
    task: str | None = None,
) -> nn.Module:
    """`model` with a new adapter, ready to be trained: k-bit preparation, gradients of the inputs, bf16 casting.

    `owner`: the trainer's name, for messages. A model that has an adapter already is merged with it if `merge`, else
    ValueError. After k-bit preparation checkpointing is on: the caller turns it off in its own arguments.
    task: the `task_type` of a classifier's adapter (SEQ_CLS, TOKEN_CLS), whose head is trained and saved with it.
    """
    if not is_peft_available():
        raise ValueError(
            "PEFT is not installed and you passed a `peft_config` in the trainer's kwargs, please install it to use "
            f"the PEFT models: {pip_install('peft')}"
        )
    if not is_peft_config(peft_config):
        raise ValueError(
            f"If you want to use the PeftModel, you need to pass a PeftConfig object to the {owner}. "
            f"and you passed a {type(peft_config)}."
        )
    if is_peft_model(model):
        if not merge:
            raise ValueError(
                "the model has an adapter already and `peft_config` asks for another one: leave `peft_config` out to "
                "train the adapter it has, or pass `model.merge_and_unload()`"
            )
        model = model.merge_and_unload()
    if task is not None:
        peft_config = for_classifier(model, peft_config, task)
    kbit: dict[str, Any] = {}
    if is_quantized(model):
        kbit = {"use_gradient_checkpointing": gradient_checkpointing}
        if gradient_checkpointing_kwargs is not None:
            kbit["gradient_checkpointing_kwargs"] = gradient_checkpointing_kwargs
    elif gradient_checkpointing and (gradient_checkpointing_kwargs or {}).get("use_reentrant", True):
        model.enable_input_require_grads()
    model = add_adapter(model, peft_config, **kbit)
    if bf16 and getattr(model, "is_loaded_in_4bit", False):
        peft_module_casting_to_bf16(model)
        raise_trained(model)
    return model


def for_classifier(model: nn.Module, peft_config: Any, task: str) -> Any:
    """The config with the `task_type` of a classifier, and its head among `modules_to_save`; said where it changes."""
    config, told, heads = deepcopy(peft_config), peft_config.task_type, list(heads_of(model))
    if not heads or not hasattr(config, "modules_to_save"):
        raise ValueError(
            f"task_type={told!r}: the head of {type(model).__name__} cannot be trained with a "
            f"{type(config).__name__}: name it in `modules_to_save` of a LoraConfig with task_type={task!r}"
        )
    if getattr(told, "value", told) != task:
        logger.warning(
            "task_type=%s: %s is a classifier, so its adapter gets task_type=%r, and the head (%s) is trained and "
            "saved with it", getattr(told, "value", told), type(model).__name__, task, ", ".join(heads),
        )  # fmt: skip
    config.task_type = task
    config.modules_to_save = sorted({*(config.modules_to_save or ()), *heads})
    return config


def warn_of_frozen_head(model: Any) -> None:
    """Warn of an adapter of a classifier that leaves the head as it is, and without it when it is saved."""
    heads = heads_of(model.get_base_model())
    if not any(weight.requires_grad for head in heads.values() for weight in head.parameters()):
        warnings.warn(
            f"the adapter leaves the head ({', '.join(heads)}) as it is, and is saved without it: make it with "
            "task_type='SEQ_CLS' (TOKEN_CLS for process rewards) or modules_to_save=[...], or pass `peft_config` here"
        )


def peft_module_casting_to_bf16(model: nn.Module) -> None:
    """Adapter layers to bfloat16, norms to float32, float32 embeddings and heads to bfloat16; in place."""
    require_peft("peft_module_casting_to_bf16")
    tuner_layer: Any = BaseTunerLayer
    for name, module in model.named_modules():
        if isinstance(module, tuner_layer):
            module.to(torch.bfloat16)
        elif "norm" in name:
            module.to(torch.float32)
        elif any(part in name for part in ("lm_head", "embed_tokens", "wte", "wpe")):
            weight = getattr(module, "weight", None)
            if weight is not None and weight.dtype == torch.float32:
                module.to(torch.bfloat16)


def find_adapter(source: str, **where: Any) -> Any | None:
    """The PeftConfig of a folder or repository that holds an adapter; None if it holds none, or PEFT is missing."""
    if not is_peft_available() or find_file(source, "adapter_config.json", **where) is None:
        return None
    return PeftConfig.from_pretrained(source, **{key: value for key, value in where.items() if value is not None})


def load_adapter(base: nn.Module, source: str, *, is_trainable: bool, **where: Any) -> nn.Module:
    """A PEFT model of `base` with the adapter that lies at `source`."""
    with _without_library_noise():
        adapted = PeftModel.from_pretrained(base, source, is_trainable=is_trainable, **where)
    raise_trained(adapted)
    return adapted


def reward_head_weights(source: str, modules: tuple[str, ...], token: str | bool | None = None) -> dict[str, Any]:
    """`weight` (and `bias`) of the score head stored with the adapter at `source`.

    `modules`: names of modules that are such a head ("score").
    """
    weights: dict[str, Any] = {}
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        file = find_file(source, name, token=token)
        if file is not None:
            stored = load_file(file) if name.endswith(".safetensors") else torch.load(file, "cpu", weights_only=True)
            break
    else:
        raise ValueError(
            "Could not find adapter model in the Hub, make sure you have the correct adapter model id."
            + (f" (looked in the folder {source!r})" if os.path.isdir(source) else "")
        )
    for key, tensor in stored.items():
        *path, last = key.split(".")
        if last in ("weight", "bias") and any(module in path for module in modules):
            weights[last] = tensor
    if "weight" not in weights:
        raise ValueError(
            f"the adapter {source!r} holds no head ({', '.join(modules)}): train it with `task_type='SEQ_CLS'`, "
            "so that the head is saved with it"
        )
    return weights
