"""Arithmetic on tensors and on dictionaries of statistics, and the seeding that everything rests on."""

from __future__ import annotations

import gc
import numbers
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

WANDB_PADDING = -1


# --- dictionaries of statistics ---------------------------------------------------------------------------------


def flatten_dict(nested: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """One level of keys, joined by `sep`; a key that already holds `sep` is a ValueError."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if sep in key:
            raise ValueError(f"separator '{sep}' not allowed to be in key '{key}'")
        if isinstance(value, Mapping):
            flat.update({f"{key}{sep}{inner}": leaf for inner, leaf in flatten_dict(value, sep).items()})
        else:
            flat[key] = value
    return flat


def convert_to_scalar(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors and arrays that hold one number, 0-d or 1-d, become that number; the rest stays as it is."""

    def is_one_number(value: Any) -> bool:
        return isinstance(value, Tensor | np.ndarray) and (value.ndim == 0 or value.shape == (1,))

    return {key: value.item() if is_one_number(value) else value for key, value in stats.items()}


def stack_dicts(stats_dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Per key of the first dictionary: the flattened tensors as rows, padded on the right with `WANDB_PADDING`."""
    return {
        key: pad_sequence([d[key].flatten() for d in stats_dicts], batch_first=True, padding_value=WANDB_PADDING)
        for key in stats_dicts[0]
    }


def add_suffix(input_dict: Mapping[str, Any], suffix: str) -> dict[str, Any]:
    """The same values under `key + suffix`."""
    return {key + suffix: value for key, value in input_dict.items()}


def average_torch_dicts(list_of_dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Per key of the first dictionary: the mean over the dictionaries."""
    return {key: torch.stack([d[key] for d in list_of_dicts]).mean(dim=0) for key in list_of_dicts[0]}


def stats_to_np(stats_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors become numpy arrays on the CPU (bfloat16, which numpy lacks, as float32), numbers become floats."""
    converted: dict[str, Any] = {}
    for key, value in stats_dict.items():
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        if isinstance(value, numbers.Real | np.bool_):
            value = float(value)
        converted[key] = value
    return converted


# --- tensors ----------------------------------------------------------------------------------------------------


def pad_to_size(tensor: Tensor, size: int, dim: int = 1, padding: float = 50256) -> Tensor:
    """`tensor` with `padding` behind it along `dim`, up to `size`; the same object if it has that size already."""
    missing = size - tensor.size(dim)
    if missing == 0:
        return tensor
    if missing < 0:
        raise ValueError(f"size={size}: dimension {dim} already holds {tensor.size(dim)}; padding does not cut")
    from_last = tensor.ndim - 1 - dim % tensor.ndim
    return F.pad(tensor, (0, 0) * from_last + (0, missing), value=padding)


def logprobs_from_logits(logits: Tensor, labels: Tensor | None, gather: bool = True) -> Tensor:
    """Log-probabilities of `labels` [B, T] under `logits` [B, T, V]; all of them [B, T, V] if not `gather`."""
    logprobs = F.log_softmax(logits, dim=-1)
    if not gather:
        return logprobs
    if labels is None:
        raise ValueError("labels=None: gathering needs the ids to gather; pass them, or gather=False")
    return torch.gather(logprobs, -1, labels.unsqueeze(-1)).squeeze(-1)


def whiten(values: Tensor, shift_mean: bool = True) -> Tensor:
    """Values of unit (unbiased) variance; of mean 0, or of their own mean if not `shift_mean`."""
    mean, var = torch.mean(values), torch.var(values)
    whitened = (values - mean) * torch.rsqrt(var + 1e-8)
    return whitened if shift_mean else whitened + mean


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """Mean of the values where `mask` is 1, over `axis` or over everything."""
    if axis is None:
        return (values * mask).sum() / mask.sum()
    return (values * mask).sum(dim=axis) / mask.sum(dim=axis)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of the values where `mask` is 1. The unbiased variance of a single value is not finite."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    if not unbiased:
        return variance
    count = mask.sum()
    if count == 0:
        raise ValueError(
            "The sum of the mask is zero, which can happen when `mini_batch_size=1`;"
            "try increase the `mini_batch_size` or `gradient_accumulation_steps`"
        )
    return variance * (count / (count - 1))


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """`whiten` with the statistics of the masked-in values, applied at every position."""
    mean, var = masked_mean(values, mask), masked_var(values, mask)
    whitened = (values - mean) * torch.rsqrt(var + 1e-8)
    return whitened if shift_mean else whitened + mean


def clip_by_value(x: Tensor, tensor_min: Tensor | float, tensor_max: Tensor | float) -> Tensor:
    """`max(min(x, tensor_max), tensor_min)`, elementwise: bounds may be tensors, and the lower one wins."""
    low, high = (torch.as_tensor(bound, device=x.device) for bound in (tensor_min, tensor_max))
    return torch.max(torch.min(x, high), low)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of the categorical distributions in the last dimension."""
    probs = F.softmax(logits, dim=-1)
    return torch.logsumexp(logits, dim=-1) - torch.sum(probs * logits, dim=-1)


def randn_tensor(
    shape: tuple[int, ...] | list[int],
    generator: list[torch.Generator] | torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
) -> Tensor:
    """Normal noise on `device`; a list of generators gives each row of the batch its own.

    A CPU generator draws on the CPU, whatever the device: the same noise everywhere.
    """
    device = torch.device(device or "cpu")
    draw_on = device
    if generator is not None:
        first = generator[0] if isinstance(generator, list) else generator
        if first.device.type != device.type:
            if first.device.type != "cpu":
                raise ValueError(f"Cannot generate a {device} tensor from a generator of type {first.device.type}.")
            draw_on = torch.device("cpu")
            warnings.warn(
                f"The passed generator was created on 'cpu' even though a tensor on {device} was expected. The tensor "
                f"is drawn on 'cpu' and then moved to {device}; a generator created there would be slightly faster."
            )

    def draw(size: Sequence[int], source: torch.Generator | None) -> Tensor:
        drawn = torch.randn(tuple(size), generator=source, device=draw_on, dtype=dtype, layout=layout or torch.strided)
        return drawn.to(device)

    if isinstance(generator, list) and len(generator) > 1:
        if len(generator) != shape[0]:
            raise ValueError(f"generator: {len(generator)} generators for a batch of {shape[0]}; give one for each row")
        return torch.cat([draw((1, *shape[1:]), source) for source in generator])
    return draw(shape, generator[0] if isinstance(generator, list) else generator)


# --- sampling ---------------------------------------------------------------------------------------------------


def top_k_top_p_filtering(
    logits: Tensor,
    top_k: int = 0,
    top_p: float = 1.0,
    filter_value: float = -float("inf"),
    min_tokens_to_keep: int = 1,
) -> Tensor:
    """`logits` [B, V] with `filter_value` outside the `top_k` best (0: all), then outside the nucleus of mass `top_p`.

    The nucleus (arXiv:1904.09751) includes the first token that takes the mass over `top_p`.
    """
    if top_k > 0:
        kept = min(max(int(top_k), min_tokens_to_keep), logits.size(-1))
        worst_kept = torch.topk(logits, kept).values[..., -1:]
        logits = logits.masked_fill(logits < worst_kept, filter_value)
    if 0 <= top_p < 1:
        ordered, order = torch.sort(logits, descending=True)
        probs = F.softmax(ordered, dim=-1)
        outside = probs.cumsum(dim=-1) - probs > top_p
        outside[..., :min_tokens_to_keep] = False
        logits = logits.masked_fill(outside.scatter(-1, order, outside), filter_value)
    return logits


@torch.no_grad()
def respond_to_batch(
    model: Callable[..., Any], queries: Tensor, txt_len: int = 20, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """`txt_len` sampled ids behind each of the equally long `queries` [B, P]; the model runs whole at every step.

    `model(ids)[0]` must be the logits. For anything but a demonstration use a sampler with a cache.
    """
    ids = queries
    for _ in range(txt_len):
        logits = top_k_top_p_filtering(model(ids)[0][:, -1, :], top_k=top_k, top_p=top_p)
        ids = torch.cat([ids, torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)], dim=-1)
    return ids[:, queries.size(1) :]


class LengthSampler:
    """Draws a whole number from `[min_value, max_value)`."""

    def __init__(self, min_value: int, max_value: int) -> None:
        if min_value >= max_value:
            raise ValueError(f"max_value={max_value}: nothing lies in [{min_value}, {max_value}); raise it")
        self.values = list(range(min_value, max_value))

    def __call__(self) -> int:
        return cast(int, np.random.choice(self.values))


# --- devices ----------------------------------------------------------------------------------------------------


def _accelerator_module() -> Any:
    """`torch.xpu`, `torch.npu` or `torch.cuda`: whichever this machine has (cuda if none)."""
    from trl import import_utils

    if import_utils.is_xpu_available():
        return torch.xpu
    if import_utils.is_npu_available():
        return cast(Any, torch).npu
    return torch.cuda


def set_seed(seed: int) -> None:
    """Seed random, numpy and torch, on the CPU and on every accelerator."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    _accelerator_module().manual_seed_all(seed)


class PPODecorators:
    """Frees cached device memory after a step, if `PPODecorators.optimize_device_cache` says so."""

    optimize_device_cache = False

    @classmethod
    @contextmanager
    def empty_device_cache(cls) -> Iterator[None]:
        """A context, and so a decorator: the cache is emptied behind its body."""
        yield
        if cls.optimize_device_cache:
            gc.collect()
            _accelerator_module().empty_cache()
            gc.collect()
