"""The layers that may lie around a transformers model, and one function for each strip.

| layer, from the outside | put there by | stripped by |
| --- | --- | --- |
| DDP, FSDP, DeepSpeed, `torch.compile` | accelerate | `below_accelerate` |
| value head (`AutoModelFor...WithValueHead`) | the user | `below_value_head` |
| adapter (`PeftModel`) | PEFT | `below_peft` |
| transformers model | `from_pretrained` | |

Each function strips its own layer and all those outside of it; a layer that is not there is no fault.
"""

from __future__ import annotations

from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn


def below_accelerate(model: nn.Module) -> Any:
    """The model with a value head, a PEFT model, or a transformers model."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


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
