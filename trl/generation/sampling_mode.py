"""The state a model samples in: no gradients, no dropout, the attention asked for; and what its adapter is."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from trl.models.unwrap import below_peft


def learns_prompt(model: Any) -> bool:
    """Whether a PEFT adapter of the model puts virtual tokens before the prompt."""
    configs = getattr(model, "peft_config", {}) if hasattr(model, "get_base_model") else {}
    return any(getattr(config, "is_prompt_learning", False) for config in configs.values())


def accepts(model: Any, keyword: str) -> bool:
    """Whether the forward of the model inside names this keyword."""
    return keyword in inspect.signature(below_peft(model).forward).parameters


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
