"""The layers that may lie around a transformers model, and one function for each strip.

| layer, from the outside | put there by | stripped by |
| --- | --- | --- |
| DDP, FSDP, DeepSpeed, `torch.compile` | accelerate | `below_accelerate` |
| value head (`AutoModelFor...WithValueHead`) | the user | `below_value_head` |
| adapter (`PeftModel`) | PEFT | `below_peft` |
| transformers model | `from_pretrained` | |

Each function strips its own layer and all those outside it; a model without that layer is returned as it is.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.integrations import is_deepspeed_zero3_enabled


def below_accelerate(model: nn.Module) -> Any:
    """The model with a value head, a PEFT model, or a transformers model."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def below_processes(model: nn.Module) -> Any:
    """The model below DDP, FSDP or DeepSpeed; one that `torch.compile` made stays compiled."""
    return extract_model_from_parallel(model)


def below_value_head(model: nn.Module) -> Any:
    """The PEFT model or the transformers model."""
    model = below_accelerate(model)
    return getattr(model, "pretrained_model", model)


def below_peft(model: nn.Module) -> Any:
    """The transformers model; the layers of an adapter stay in it."""
    inner = below_value_head(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether prompts go to an encoder and answers to a decoder."""
    return bool(getattr(getattr(below_value_head(model), "config", None), "is_encoder_decoder", False))


picture_readers: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""what reads the pictures of a vision-language model, see `models.pictures`"""


def reads_pictures(model: nn.Module) -> bool:
    """Whether the model was told what reads its pictures."""
    return bool(picture_readers) and below_peft(model) in picture_readers


def adapter_state(model: nn.Module) -> tuple[bool, tuple[str, ...]]:
    """Whether the model's adapter is switched off, and which adapters are active; (False, ()) without PEFT."""
    network = below_value_head(model)
    if not hasattr(network, "peft_config"):
        return False, ()
    active = getattr(network, "active_adapters", ())  # a method in transformers' own PEFT support
    names = active if isinstance(active, list | tuple) else ()
    return bool(getattr(network, "_adapters_disabled", False)), tuple(names)


def learns_prompt(model: nn.Module) -> bool:
    """Whether a PEFT adapter of the model puts virtual tokens before the prompt."""
    network = below_value_head(model)
    configs = getattr(network, "peft_config", {}) if hasattr(network, "get_base_model") else {}
    return any(getattr(config, "is_prompt_learning", False) for config in configs.values())


def reads_rows(model: nn.Module) -> bool:
    """Whether an adapter of the model begins where certain tokens stand in a row (aLoRA), so it must see rows apart."""
    configs = getattr(below_value_head(model), "peft_config", {}) or {}
    return any(getattr(config, "alora_invocation_tokens", None) for config in configs.values())


def accepts(model: nn.Module, keyword: str) -> bool:
    """Whether the forward of the transformers model names this keyword."""
    return keyword in inspect.signature(type(below_peft(model)).forward).parameters


def in_parts(weight: Tensor) -> bool:
    """Whether ZeRO-3 holds a weight in parts."""
    return hasattr(weight, "ds_id")


def has_parts(model: nn.Module) -> bool:
    """Whether ZeRO-3 holds weights of the model in parts."""
    return "deepspeed" in sys.modules and any(in_parts(weight) for weight in model.parameters())


_alone: WeakSet[nn.Module] = WeakSet()


@contextmanager
def each_alone(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within it ranks need not run the same passes of these sharded modules: see `models.sharded`."""
    _alone.update(modules)
    try:
        yield
    finally:
        _alone.difference_update(modules)


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of the weights (FSDP, ZeRO-3), so all must run the same passes."""
    if model in _alone:
        return False
    parts = (isinstance(module, FSDPModule) and module not in _alone for module in model.modules())
    return has_parts(model) or any(parts)


def runs_in_step(model: nn.Module) -> bool:
    """`is_sharded` where there are several processes: each pass of the model is then one of all."""
    return torch.distributed.is_initialized() and is_sharded(model)


def own_pace(model: nn.Module) -> dict[str, bool]:
    """Keywords of `generate` by which ranks do not wait for each other at each token, as sharded ones do."""
    parts = is_deepspeed_zero3_enabled() or holds_parts(model)
    return {"synced_gpus": False} if parts else {}


def is_fsdp2(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model or parts of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def holds_parts(model: nn.Module) -> bool:
    """Whether each process keeps a part of the weights, whatever passes it runs now."""
    return has_parts(model) or is_fsdp2(model)
