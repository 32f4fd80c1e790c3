"""Makes the model, the tokenizer and the data that a user hands over ready for training, for every trainer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from trl.data.encode import Limits
from trl.data.pictures import read_by, reader_of
from trl.models.chat_setup import template_at
from trl.models.forward import introduce
from trl.models.peft_support import is_peft_model, warn_of_frozen_head
from trl.models.prepare import (
    align_special_tokens,
    check_vocabulary,
    context_length,
    disable_dropout_in_model,
    ensure_pad_token,
    load_model,
    read_tokenizer,
    wrap_peft,
)
from trl.models.weight_files import reads_saved_form
from trl.trainer.configuration import PostTrainingConfig, PreferenceConfig, processing_class_of

logger = logging.getLogger(__name__)


def prepare_tokenizer(tokenizer: Any, model: nn.Module | str | None, config: PostTrainingConfig) -> Any:
    """The tokenizer given, or that of the model's folder, with the config's tokens and with a padding token.

    ValueError where neither says which tokenizer, or where nothing can pad.
    """
    if tokenizer is None:
        tokenizer = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    if not tokenizer:
        raise ValueError(
            "tokenizer: none was given and the model does not say where it came from: pass `processing_class`"
        )
    trusted = {"trust_remote_code": True} if config.trust_remote_code and isinstance(tokenizer, str) else {}
    tokenizer = text_tokenizer(read_tokenizer(tokenizer, **trusted))
    apply_token_settings(tokenizer, **config.token_settings())
    return ensure_pad_token(tokenizer)


def text_tokenizer(processing_class: Any) -> Any:
    """The tokenizer of a processor; see `read_by`."""
    inner = read_by(processing_class)
    if inner is processing_class:
        return inner
    if reader_of(inner) is not None:
        return inner
    logger.warning(
        "processing_class: of the %s its tokenizer is used, for text; checkpoints hold the tokenizer alone",
        type(processing_class).__name__,
    )
    return inner


def apply_token_settings(
    tokenizer: Any,
    *,
    eos_token: str | None = None,
    pad_token: str | None = None,
    chat_template_path: str | None = None,
) -> None:
    """Set the end token, the padding token and the chat template; None leaves the tokenizer's own."""
    for name, token in (("eos_token", eos_token), ("pad_token", pad_token)):
        if token is None:
            continue
        if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            raise ValueError(f"{name}={token!r}: not in the tokenizer's vocabulary; add it there or choose another")
        setattr(tokenizer, name, token)
    if chat_template_path is not None:
        tokenizer.chat_template = template_at(chat_template_path)


def fitting_length(config: Any, model: nn.Module | None) -> int | None:
    """`config.max_length`, or the length of the model's context where that is shorter, with a warning if it was set."""
    limit = None if model is None else context_length(model)
    length = config.max_length
    if limit is None or length is None or length <= limit:
        return length
    if asked_length(config, limit) is not None:
        warnings.warn(f"max_length={length}: the model has {limit} positions, and rows may have as many tokens")
    return limit


def asked_length(config: Any, length: int | None) -> int | None:
    """`config.max_length` where it was set and is longer than the length that fits the model; else None."""
    asked = config.max_length
    if length is None or asked is None or asked <= length:
        return None
    return None if asked == type(config).__dataclass_fields__["max_length"].default else asked


def answer_limits(config: PreferenceConfig, model: nn.Module | None, encoder_decoder: bool) -> Limits:
    """How long prompts and answers may be; an encoder-decoder holds them apart, so the default bounds no whole row."""
    length = config.max_length if encoder_decoder else fitting_length(config, model)
    asked = asked_length(config, length)
    if encoder_decoder and length == type(config).__dataclass_fields__["max_length"].default:
        length = None
    return Limits(length, config.max_prompt_length, config.max_completion_length, config.truncation_mode, asked)


def label_kwargs(config: PostTrainingConfig, model: Any, labels: int) -> dict[str, Any] | None:
    """Keywords that load a classifier by name with so many labels; None for a model that is loaded already."""
    if not isinstance(model, str):
        return None
    given = config.model_init_kwargs
    return {"num_labels": labels, **(given if isinstance(given, dict) else {})}


def label_count(model: Any) -> int:
    return int(model.config.num_labels)


def refuse_collator(owner: Any, data_collator: Any) -> None:
    """ValueError if a collator was given: the trainer packs its rows itself and would ignore it."""
    if data_collator is not None:
        raise ValueError(f"data_collator: {type(owner).__name__} packs its rows itself; leave it out")


def prepare(
    owner: Any,
    model: nn.Module | str | None,
    model_init: Callable[..., nn.Module] | None,
    config: PostTrainingConfig,
    *,
    processing_class: Any,
    tokenizer: Any,
    **how: Any,
) -> tuple[nn.Module | None, Callable[..., nn.Module] | None, Any]:
    """Model, `model_init` (None where not given) and tokenizer, ready for a trainer; `how` goes to `prepare_model`.

    ValueError if neither a model nor a `model_init` was given, or if no tokenizer can be found.
    """
    tokenizer = prepare_tokenizer(processing_class_of(processing_class, tokenizer), model, config)
    if model is None and model_init is None:
        raise ValueError("model: none was given; pass a model, a folder, a Hub name, or `model_init`")
    settings = {"config": config, "tokenizer": tokenizer, "owner": type(owner).__name__, **how}
    made = None
    if model_init is not None:

        @wraps(model_init)  # `Trainer` counts its parameters
        def made(*trial: Any) -> nn.Module:
            return prepare_model(model_init(*trial), **settings)

    return None if model is None else prepare_model(model, **settings), made, tokenizer


TASKS: dict[type, str] = {AutoModelForSequenceClassification: "SEQ_CLS", AutoModelForTokenClassification: "TOKEN_CLS"}
"""what the adapter of a classifier is for"""


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
    quantization_config: Any = None,
) -> nn.Module:
    """Load a model by name, wrap it for PEFT, switch dropout off if asked, and check it against the tokenizer."""
    kwargs: Any = config.model_init_kwargs if init_kwargs is None else init_kwargs
    if quantization_config is not None:
        if not isinstance(model, str):
            raise ValueError("quantization_config: says how a model is loaded, but yours is already instantiated")
        kwargs = {**(kwargs or {}), "quantization_config": quantization_config}
    if config.trust_remote_code and isinstance(model, str):
        kwargs = {"trust_remote_code": True, **(kwargs or {})}
    model = load_model(model, auto_class, kwargs, owner=owner, whole=peft_config is None)
    reads_saved_form(model)
    if peft_config is not None:
        model = wrap_peft(
            model,
            peft_config,
            owner=owner,
            gradient_checkpointing=config.gradient_checkpointing,
            gradient_checkpointing_kwargs=config.gradient_checkpointing_kwargs,
            bf16=bool(config.bf16),
            merge=merge,
            task=TASKS.get(auto_class),
        )
    elif auto_class in TASKS and is_peft_model(model):
        warn_of_frozen_head(model)
    if not dropout:
        disable_dropout_in_model(model)
    if tokenizer is not None:
        check_vocabulary(model, tokenizer)
        align_special_tokens(model, tokenizer)
        introduce(model, tokenizer)
    return model
