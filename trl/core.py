"""Arithmetic on tensors and on dictionaries of statistics, and the seeds of all random numbers.

What only scripts for release 0.7.7 call is in `trl.legacy.core`; its names are read from here too.
"""

from __future__ import annotations

import gc
import numbers
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trl.import_utils import lazy_names

WANDB_PADDING = -1
_old = [
    "LengthSampler", "add_suffix", "average_torch_dicts", "clip_by_value", "logprobs_from_logits", "masked_var",
    "masked_whiten", "pad_to_size", "respond_to_batch", "stack_dicts", "top_k_top_p_filtering", "whiten",
]  # fmt: skip
__getattr__ = lazy_names(__name__, {"trl.legacy.core": _old})[0]


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


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """Mean of the values where `mask` is 1, over `axis` or over everything."""
    if axis is None:
        return (values * mask).sum() / mask.sum()
    return (values * mask).sum(dim=axis) / mask.sum(dim=axis)


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
        """A context, and so a decorator: the cache is emptied after its body."""
        yield
        if cls.optimize_device_cache:
            gc.collect()
            _accelerator_module().empty_cache()
            gc.collect()
