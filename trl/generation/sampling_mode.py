"""The model inside its wrappers, and the state it samples in: no gradients, no dropout, the attention asked for."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

_WRAPPED = ("module", "_orig_mod", "_fsdp_wrapped_module", "pretrained_model")


def language_model(model: Any) -> Any:
    """The causal language model, or the PEFT model of one, inside value-head, compiled and distributed wrappers."""
    while isinstance(model, torch.nn.Module):
        inner = next((model._modules[name] for name in _WRAPPED if name in model._modules), None)
        if inner is None or isinstance(model, PreTrainedModel):
            break
        model = inner
    return model


def base_model(model: Any) -> Any:
    """The `transformers` model inside a PEFT model, with the adapter's layers in it; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def learns_prompt(model: Any) -> bool:
    """Whether a PEFT adapter of the model puts virtual tokens before the prompt."""
    configs = getattr(model, "peft_config", {}) if hasattr(model, "get_base_model") else {}
    return any(getattr(config, "is_prompt_learning", False) for config in configs.values())


def accepts(model: Any, keyword: str) -> bool:
    """Whether the forward of the model inside names this keyword."""
    return keyword in inspect.signature(base_model(model).forward).parameters


def context_length(model: Any) -> int | None:
    """Most tokens of prompt and completion that the model has positions for; None where it sets no limit."""
    config: Any = getattr(base_model(model), "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions"):
        limit = getattr(text, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


@contextmanager
def sampling_mode(model: torch.nn.Module, attention: str | None = None) -> Iterator[None]:
    """Evaluate without gradients, through the attention implementation named; everything is put back afterwards."""
    training = [module for module in model.modules() if module.training]
    configs = _configs(model) if attention is not None else []
    before = [config._attn_implementation for config in configs]
    try:
        model.eval()
        for config in configs:
            config._attn_implementation = attention
        with torch.no_grad():
            yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
        for module in training:
            module.training = True


def _configs(model: torch.nn.Module) -> list[Any]:
    """Every configuration that names an attention implementation, parents before children."""
    found: dict[int, Any] = {}

    def visit(config: Any) -> None:
        if id(config) not in found:
            found[id(config)] = config
            for name in getattr(config, "sub_configs", {}):
                if getattr(config, name, None) is not None:
                    visit(getattr(config, name))

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            visit(module.config)
    return list(found.values())
