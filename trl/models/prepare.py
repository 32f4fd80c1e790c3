"""A model and its tokenizer made ready for training: once, for every trainer."""

from __future__ import annotations

import logging
import os
import warnings
from functools import partial
from itertools import chain
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.hooks import RemovableHandle
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from trl.data.pictures import read_by
from trl.import_utils import is_bitsandbytes_available, is_gpu_available, pip_install
from trl.models.forward import dropout_rates
from trl.models.peft_support import (
    find_adapter,
    is_peft_model,
    is_quantized,
    load_adapter,
    peft_module_casting_to_bf16,
    wrap_peft,
)
from trl.models.precision import dtype_keywords
from trl.models.processors import has_processor, load_processor
from trl.models.unwrap import below_value_head, in_parts
from trl.models.weight_files import HUB_ARGUMENTS

logger = logging.getLogger(__name__)

__all__ = [
    "activate_neftune",
    "align_special_tokens",
    "check_vocabulary",
    "context_length",
    "disable_dropout_in_model",
    "embedding_rows",
    "enable_gradient_checkpointing",
    "ensure_pad_token",
    "equalise",
    "is_peft_model",
    "is_quantized",
    "load_model",
    "load_tokenizer",
    "neftune_post_forward_hook",
    "peft_module_casting_to_bf16",
    "read_tokenizer",
    "wrap_peft",
]


def load_model(
    name_or_model: str | os.PathLike[str] | nn.Module,
    auto_class: Any,
    init_kwargs: dict[str, Any] | None = None,
    *model_args: Any,
    owner: str | None = None,
    is_trainable: bool = True,
    whole: bool = True,
    like: torch.dtype | None = None,
    frozen: bool = False,
) -> nn.Module:
    """The model of a folder, a Hub name or an object; a PEFT model where the folder holds an adapter.

    `owner`: the trainer that was given the model. It warns about a name and refuses `init_kwargs` with an object.
    whole: its weights are trained, in float32 unless a dtype is asked for; False: an adapter is put on, and they stay
    as they were saved. frozen: nothing is trained, and the weights are stored `like` the policy's (None: as saved).
    OSError says in one line why a folder or name cannot be read.
    """
    if not isinstance(name_or_model, str | os.PathLike):
        if init_kwargs:
            raise ValueError(
                f"You passed model_kwargs to the {owner or 'loader'}. But your model is already instantiated."
            )
        return name_or_model
    source, init_kwargs = os.fspath(name_or_model), modern_init_kwargs(init_kwargs or {})
    where = {name: init_kwargs[name] for name in HUB_ARGUMENTS if name in init_kwargs}
    if owner is not None:
        warnings.warn(
            f"You passed a model_id to the {owner}. This will automatically create an "
            f"`{_seeing(auto_class, source, where).__name__}` or a `PeftModel` (if you passed a `peft_config`) for you."
        )
    adapter = find_adapter(source, **where)
    if adapter is None:
        init_kwargs |= dtype_keywords(source, init_kwargs, where, trained=whole and not frozen, like=like)
        return _from_pretrained(auto_class, source, model_args, init_kwargs)
    if not adapter.base_model_name_or_path:
        raise OSError(f"the adapter {source!r} does not say which model it belongs to (`base_model_name_or_path`)")
    base_kwargs = {name: value for name, value in init_kwargs.items() if name not in ("revision", "subfolder")}
    if adapter.revision:
        base_kwargs["revision"] = adapter.revision
    of_base = {name: base_kwargs[name] for name in HUB_ARGUMENTS if name in base_kwargs}
    base_kwargs |= dtype_keywords(adapter.base_model_name_or_path, base_kwargs, of_base, trained=False, like=like)
    try:
        base = _from_pretrained(auto_class, adapter.base_model_name_or_path, model_args, base_kwargs)
    except (OSError, ValueError) as error:
        raise (OSError if isinstance(error, OSError) else ValueError)(
            f"the adapter {source!r} belongs to a model that cannot be loaded: {error} (if it lies elsewhere now, "
            "write it into the adapter_config.json as `base_model_name_or_path`, or give it to `trl merge` as --base)"
        ) from error
    return load_adapter(base, source, is_trainable=is_trainable and not frozen, **where)


def _seeing(auto_class: Any, source: str, where: dict[str, Any]) -> Any:
    """What loads a language model with the part that reads pictures, where the config names one."""
    if auto_class is not AutoModelForCausalLM:
        return auto_class
    try:
        config, _ = PretrainedConfig.get_config_dict(source, **where)
    except Exception:  # the loading itself says what is wrong
        return auto_class
    sees = "vision_config" in config and config.get("model_type") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if sees else auto_class


def _from_pretrained(auto_class: Any, source: str, model_args: tuple[Any, ...], init_kwargs: dict[str, Any]) -> Any:
    if _is_no_folder(source):
        raise OSError(f"could not load a model from {source!r}: there is no such folder")
    try:
        auto_class = _seeing(auto_class, source, {key: init_kwargs[key] for key in HUB_ARGUMENTS if key in init_kwargs})
        # False, not None: transformers would ask at the terminal whether to run the code of an unknown model.
        return auto_class.from_pretrained(source, *model_args, **{"trust_remote_code": False, **init_kwargs})
    except ImportError:
        raise
    except Exception as error:  # transformers, safetensors, json and the Hub each have their own
        if isinstance(error, TypeError | torch.OutOfMemoryError):  # wrong keyword, too large: the message says it
            raise
        if str(error).startswith("Unrecognized configuration class"):
            raise ValueError(
                f"could not load a model from {source!r}: transformers has no {auto_class.__name__} of its kind; take "
                "another model, or load this one by a class of your own and pass the object"
            ) from error
        kind = OSError if isinstance(error, OSError) or "Safetensor" in type(error).__name__ else ValueError
        raise kind(
            f"could not load a model from {source!r}: {_reason(error)} "
            "Pass a folder that `save_pretrained` wrote, or the name of a Hub repository."
        ) from error


def _is_no_folder(source: str) -> bool:
    """Whether a place is written as a folder's and there is none; as a name on the Hub it would make no sense."""
    written = source.startswith(("/", ".", "~")) or source.count("/") > 1
    return written and not os.path.exists(os.path.expanduser(source))


def _reason(error: Exception) -> str:
    """The first line of a library's error, as a sentence."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if line.endswith("instantiate the backend tokenizer from one of:"):  # the ways follow, none of them a user's
        line = "it holds no tokenizer"
    return line if line.endswith((".", "!", "?")) else line.rstrip(":,;") + "."


def modern_init_kwargs(init_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `from_pretrained` in today's spelling: `torch_dtype`, `load_in_8bit`, `load_in_4bit` still work."""
    kwargs = dict(init_kwargs)
    dtype, newer = kwargs.pop("torch_dtype", None), kwargs.pop("dtype", None)
    if dtype is not None or newer is not None:
        kwargs["dtype"] = dtype if newer is None else newer
    bits = {name: kwargs.pop(name) for name in ("load_in_8bit", "load_in_4bit") if name in kwargs}
    if any(bits.values()):
        wanted = " and ".join(f"`{name}`" for name, value in bits.items() if value)
        if kwargs.get("quantization_config") is not None:
            raise ValueError(f"{wanted} and `quantization_config` both say how to quantise: pass one of them")
        if is_bitsandbytes_available():
            kwargs["quantization_config"] = BitsAndBytesConfig(**bits)
        else:
            _refuse_or_leave_whole(wanted)
    return _without_gpu_kernels(kwargs)


def _refuse_or_leave_whole(wanted: str) -> None:
    """Where bitsandbytes is not installed: ImportError on a GPU; without one, a warning that the weights stay whole."""
    if is_gpu_available():
        raise ImportError(f"{wanted} needs bitsandbytes: {pip_install('bitsandbytes')}")
    warnings.warn(f"{wanted} needs a GPU and bitsandbytes: the weights are loaded whole, in the `dtype` that is asked")


def _without_gpu_kernels(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords without what needs a GPU, where there is none; one warning each."""
    if is_gpu_available():
        return kwargs
    attention = kwargs.get("attn_implementation")
    if isinstance(attention, str) and "flash" in attention:
        warnings.warn(f"attn_implementation={attention!r} needs a GPU: sdpa computes the same attention here")
        kwargs["attn_implementation"] = "sdpa"
    quantisation: Any = kwargs.get("quantization_config")
    settings = quantisation.to_dict() if hasattr(quantisation, "to_dict") else quantisation
    bits = isinstance(settings, dict) and (settings.get("load_in_4bit") or settings.get("load_in_8bit"))
    if bits and not is_bitsandbytes_available():
        _refuse_or_leave_whole("`quantization_config`")
        del kwargs["quantization_config"]
    return kwargs


def load_tokenizer(
    name_or_tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase,
    *,
    padding_side: str | None = None,
    **kwargs: Any,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, Hub name or object, with a padding token (`ensure_pad_token`)."""
    tokenizer = read_tokenizer(name_or_tokenizer, **kwargs)
    if padding_side is not None:
        tokenizer.padding_side = padding_side
    return ensure_pad_token(tokenizer)


def read_tokenizer(name_or_tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase, **kwargs: Any) -> Any:
    """The tokenizer of a folder, Hub name or object, as it is; `kwargs` go to `from_pretrained`.

    Of a processor it is the tokenizer, which knows the processor (`data.pictures.reader_of`).
    """
    tokenizer: Any = name_or_tokenizer
    if isinstance(name_or_tokenizer, str | os.PathLike):
        if _is_no_folder(os.fspath(name_or_tokenizer)):
            raise OSError(f"could not load a tokenizer from {os.fspath(name_or_tokenizer)!r}: there is no such folder")
        options = {"trust_remote_code": False, **kwargs}
        try:
            tokenizer = _of_processor(os.fspath(name_or_tokenizer), options)
            if tokenizer is None:
                tokenizer = AutoTokenizer.from_pretrained(name_or_tokenizer, **options)
        except Exception as error:  # as many kinds as there are tokenizers
            raise OSError(
                f"could not load a tokenizer from {os.fspath(name_or_tokenizer)!r}: {_reason(error)} "
                "Save one there with `tokenizer.save_pretrained`, or pass a tokenizer."
            ) from error
    elif kwargs:
        raise ValueError(f"{', '.join(kwargs)} cannot change a tokenizer that is loaded already")
    return tokenizer


def _of_processor(name: str, options: dict[str, Any]) -> Any:
    """The tokenizer of the processor that lies there, which then reads pictures for it; None: there is none."""
    if not has_processor(name, **{key: options[key] for key in HUB_ARGUMENTS if key in options}):
        return None
    try:
        return read_by(load_processor(name, **options))
    except Exception as error:  # as many kinds as there are processors
        logger.warning("the processor at %r cannot be loaded (%s): rows may hold text only", name, _reason(error))
        return None


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """`tokenizer` with a padding token: its own, else its end token.

    Where the end token also pads, only the attention mask tells the two apart: mask by position, never by id.
    ValueError where there is neither.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has neither a pad token nor an EOS token: set one of its tokens, "
                "`tokenizer.pad_token = ...`, or add one with `tokenizer.add_special_tokens({'pad_token': '<pad>'})` "
                "and `model.resize_token_embeddings(len(tokenizer))`"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def align_special_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model's configs the tokenizer's padding id where they have none; classifiers and `generate` need it."""
    configs = [getattr(below_value_head(model), name, None) for name in ("config", "generation_config")]
    for config in configs:
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id


def check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError if the tokenizer makes ids for which the model has no embedding.

    Tokens that were added to the vocabulary and that no row has to hold (Gemma's placeholder for images) are only
    warned of: `embedding_rows` is what rows are checked against.
    """
    rows = embedding_rows(model) or 0
    beyond = {token: own for token, own in tokenizer.get_vocab().items() if own >= rows}
    if not beyond:
        return
    way_out = "call `model.resize_token_embeddings(len(tokenizer))`"
    used = {own for own in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) if own is not None}
    if used.intersection(beyond.values()) or not set(beyond.values()) <= set(tokenizer.added_tokens_decoder):
        raise ValueError(
            f"the tokenizer's highest id is {max(beyond.values())}, and the model's embedding has {rows} rows: use the "
            f"model's own tokenizer, or {way_out}"
        )
    names = ", ".join(sorted(beyond, key=lambda token: beyond[token])[:5])
    warnings.warn(
        f"the model's embedding has {rows} rows, and the tokenizer's {names} lie beyond it: a row that holds one is "
        f"refused; to train on them {way_out}",
        stacklevel=2,
    )


def embedding_rows(model: nn.Module | None) -> int | None:
    """Rows of the model's embedding: ids below it can be read; None without a model."""
    if model is None:
        return None
    rows = getattr(below_value_head(model).get_input_embeddings(), "num_embeddings", 0)
    return int(rows or below_value_head(model).config.get_text_config().vocab_size)


def context_length(model: nn.Module) -> int | None:
    """The longest sequence the model has positions for; None where the number of positions is unlimited (T5, ALiBi)."""
    config = below_value_head(model).config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        limit = getattr(config, "max_seq_len", None)  # MPT
    if limit is None:
        return None
    for module in below_value_head(model).modules():  # RoBERTa counts positions from its padding index on
        if isinstance(table := getattr(module, "position_embeddings", None), nn.Embedding):
            return limit if table.padding_idx is None else limit - table.padding_idx - 1
    return limit


def enable_gradient_checkpointing(model: nn.Module, kwargs: dict[str, Any] | None = None) -> None:
    """Recompute activations in the backward pass; ValueError for an architecture that cannot.

    Reentrant checkpoints need an input with a gradient: the output of frozen embeddings is set to have one.
    """
    inner = below_value_head(model)
    if not getattr(inner, "supports_gradient_checkpointing", False):
        raise ValueError(f"{type(inner).__name__} does not support `gradient_checkpointing`: set it to False")
    if hasattr(inner, "activation_checkpointing_enable"):  # the name since transformers 5.23
        inner.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    if (kwargs or {}).get("use_reentrant", False) and not inner.get_input_embeddings().weight.requires_grad:
        inner.enable_input_require_grads()


KEPT: dict[str, tuple[str, ...]] = {
    "attention": ("trl.tree_attention", "aten._scaled_dot_product", "aten._flash_attention", "torch_attn._varlen_attn"),
    "products": ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.", "aten._scaled_mm", "aten.linear."),
}
"""values of `keep` in `gradient_checkpointing_kwargs`, and how the names of the operations begin whose results stay"""


def keep_some(model: nn.Module, kwargs: dict[str, Any] | None) -> None:
    """Let checkpointed layers keep the results of some operations, where the settings have a `keep`; see `KEPT`."""
    how = dict(kwargs or {})
    keep, inner = how.pop("keep", None), below_value_head(model)
    if keep is None:
        return
    if keep not in KEPT:
        raise ValueError(
            f"gradient_checkpointing_kwargs={kwargs!r}: `keep` is one of {', '.join(map(repr, KEPT))}; or give a "
            "`context_fn` of torch.utils.checkpoint"
        )
    if how.get("use_reentrant"):
        raise ValueError(f"gradient_checkpointing_kwargs={kwargs!r}: `keep` needs use_reentrant=False")
    policy = partial(_kept, (*KEPT["attention"], *(KEPT[keep] if keep != "attention" else ())))
    how |= {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, policy)}
    placed = {name: how.pop(name) for name in ("every_n_layers", "offload") if name in how}
    inner.activation_checkpointing_enable(activation_checkpointing_kwargs=how, **placed)


def _kept(names: tuple[str, ...], context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = str(operation).startswith(names)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def disable_dropout_in_model(model: nn.Module) -> None:
    """Set every dropout rate to 0: of modules, of whole layers, and of attention that holds the rate as a number."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name in dropout_rates(module):
            setattr(module, name, 0.0)


def neftune_post_forward_hook(module: nn.Module, input: Any, output: Tensor) -> Tensor:
    """Embeddings plus uniform noise in ±alpha / sqrt(T D) while training; eq. 1 of arXiv:2310.05914.

    alpha is `module.neftune_noise_alpha`, T the tokens of the (padded) row and D the width.
    """
    if module.training:
        bound = module.neftune_noise_alpha / (output.size(1) * output.size(2)) ** 0.5
        output = output + torch.empty_like(output).uniform_(-bound, bound)
    return output


def activate_neftune(model: nn.Module, alpha: float) -> RemovableHandle:
    """Put the noise on the model's input embeddings; the handle, also `model.neftune_hook_handle`, takes it off."""
    embeddings = below_value_head(model).get_input_embeddings()
    embeddings.neftune_noise_alpha = alpha
    handle = embeddings.register_forward_hook(neftune_post_forward_hook)
    model.neftune_hook_handle = handle
    return handle


@torch.no_grad()
def equalise(model: nn.Module) -> None:
    """Give every process the weights of the first one, before a reference is copied from them: DDP would do it later.

    Collective. Processes differ where a model was initialised without a seed. Sharded and unmaterialised weights stay.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    device = PartialState().device
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_meta or type(tensor.data) is not Tensor or in_parts(tensor):
            continue
        first = tensor.data.to(device)
        torch.distributed.broadcast(first, 0)
        tensor.data.copy_(first)
