"""From what a user hands to a trainer to a model that is ready to train: once, for every trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from trl.models.prepare import (
    align_special_tokens,
    check_vocabulary,
    context_length,
    disable_dropout_in_model,
    load_model,
    load_tokenizer,
    wrap_peft,
)
from trl.trainer.configuration import PostTrainingConfig


def prepare_tokenizer(tokenizer: Any, model: nn.Module | str | None, **kwargs: Any) -> Any:
    """The tokenizer given, or that of the model's folder; ValueError where neither says which."""
    if tokenizer is not None:
        return load_tokenizer(tokenizer, **kwargs)
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise ValueError(
            "tokenizer: none was given and the model does not say where it came from: pass `processing_class`"
        )
    return load_tokenizer(name, **kwargs)


def dress_tokenizer(tokenizer: Any, config: Any) -> Any:
    """Set the end and padding tokens and the chat template that the config names."""
    for name in ("eos_token", "pad_token"):
        token = getattr(config, name)
        if token is None:
            continue
        if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            raise ValueError(f"{name}={token!r}: not in the tokenizer's vocabulary; add it there or choose another")
        setattr(tokenizer, name, token)
    if config.chat_template_path is not None:
        with open(config.chat_template_path, encoding="utf-8") as file:
            tokenizer.chat_template = file.read()
    return tokenizer


def each_dataset(dataset: Any, prepare: Callable[[Any, str], Any], name: str) -> Any:
    """`prepare(dataset, name)`, for each one of a dict of evaluation sets; None stays None."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {key: prepare(one, f"{name} ({key})") for key, one in dataset.items()}
    return prepare(dataset, name)


def fitting_length(config: Any, model: nn.Module | None) -> int | None:
    """`config.max_length`, or the model's context where that is shorter and the length is only the default's."""
    limit = None if model is None else context_length(model)
    length = config.max_length
    if limit is None or length is None or length <= limit:
        return length
    if length != type(config).__dataclass_fields__["max_length"].default:
        raise ValueError(f"max_length={length}: the model has {limit} positions; give at most that")
    return limit


def prepare_model(
    model: nn.Module | str,
    config: PostTrainingConfig,
    tokenizer: Any,
    peft_config: Any = None,
    *,
    auto_class: type,
    owner: str,
    dropout: bool = True,
    merge: bool = False,
    init_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Load by name, wrap for PEFT, switch dropout off where asked, and hold the tokenizer against the model."""
    model = load_model(model, auto_class, config.model_init_kwargs if init_kwargs is None else init_kwargs, owner=owner)
    if peft_config is not None:
        model = wrap_peft(
            model,
            peft_config,
            owner=owner,
            gradient_checkpointing=config.gradient_checkpointing,
            gradient_checkpointing_kwargs=config.gradient_checkpointing_kwargs,
            bf16=bool(config.bf16),
            merge=merge,
        )
    if not dropout:
        disable_dropout_in_model(model)
    if tokenizer is not None:
        check_vocabulary(model, tokenizer)
        align_special_tokens(model, tokenizer)
    return model
