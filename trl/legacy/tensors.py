"""Tensor helpers that third-party trainers import from `trl.trainer.utils`; the trainers here need none of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def pad(
    tensors: Sequence[Tensor],
    padding_value: float = 0,
    padding_side: str = "right",
    pad_to_multiple_of: int | None = None,
) -> Tensor:
    """Stack tensors of one number of dimensions, each dimension as long as the longest; the first one to a multiple."""
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side={padding_side!r}: choose 'left' or 'right'")
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    if pad_to_multiple_of is not None:
        shape[0] = -(-shape[0] // pad_to_multiple_of) * pad_to_multiple_of
    padded = tensors[0].new_full((len(tensors), *shape), padding_value)
    for row, tensor in zip(padded, tensors, strict=True):
        first = slice(shape[0] - len(tensor), None) if padding_side == "left" else slice(len(tensor))
        row[(first, *map(slice, tensor.shape[1:]))] = tensor
    return padded


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """`logits.log_softmax(-1)` at `index`. [..., V], [...] -> [...]; with an index [..., K] -> [..., K]"""
    several = index.dim() == logits.dim()
    picked = logits.gather(-1, index if several else index[..., None])
    values = picked - logits.logsumexp(-1, keepdim=True)
    return values if several else values.squeeze(-1)


def flush_left(mask: Tensor, *tensors: Tensor) -> Any:
    """Move each row so that no column before its first 1 of the mask is left, and cut the empty columns. [B, T]

    The mask, and the tensors moved with it; what comes in from the right is 0.
    """
    longest = mask.shape[1]
    columns = torch.arange(longest, device=mask.device)
    index = columns + mask.argmax(1, keepdim=True)
    inside = index < longest
    index = index.clamp(max=longest - 1)
    moved = [tensor.gather(1, index) * inside for tensor in (mask, *tensors)]
    width = int((moved[0] != 0).any(0).nonzero().max()) + 1 if moved[0].any() else 0
    cut = [tensor[:, :width] for tensor in moved]
    return cut[0] if not tensors else tuple(cut)


def nanmin(tensor: Tensor) -> Tensor:
    """The smallest number that is not NaN; NaN where there is none. []"""
    known = tensor[~tensor.isnan()]
    return known.min() if known.numel() else tensor.new_tensor(torch.nan)


def nanmax(tensor: Tensor) -> Tensor:
    """The largest number that is not NaN; NaN where there is none. []"""
    known = tensor[~tensor.isnan()]
    return known.max() if known.numel() else tensor.new_tensor(torch.nan)


def nanstd(tensor: Tensor) -> Tensor:
    """The standard deviation, divided by n - 1, of the numbers that are not NaN. []"""
    return tensor[~tensor.isnan()].std()


def split_tensor_dict(tensor_dict: dict[str, Tensor | None], num_chunks: int) -> list[dict[str, Tensor | None]]:
    """The tensors cut along their first dimension into equal chunks; None stays None."""
    chunks: list[dict[str, Tensor | None]] = [{} for _ in range(num_chunks)]
    for name, tensor in tensor_dict.items():
        if tensor is not None and len(tensor) % num_chunks:
            raise ValueError(f"num_chunks={num_chunks}: {name!r} has {len(tensor)} rows, which it does not divide")
        parts = [None] * num_chunks if tensor is None else tensor.chunk(num_chunks)
        for chunk, part in zip(chunks, parts, strict=True):
            chunk[name] = part
    return chunks
