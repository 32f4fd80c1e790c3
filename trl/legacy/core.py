"""Functions of `trl.core` that only scripts for release 0.7.7 call: statistics, padding, sampling without a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trl.core import WANDB_PADDING, masked_mean


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


def pad_to_size(tensor: Tensor, size: int, dim: int = 1, padding: float = 50256) -> Tensor:
    """`tensor` padded at its end along `dim` to `size`; the same object if it has that size already."""
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
    """`txt_len` sampled ids after each of the equally long `queries` [B, P]; every step runs the model on all ids.

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
