"""Attention of single queries over keys and values in pages: a step of sampling on a GPU.

A sequence is a list of pages and the queries that see all of it: a prompt with the rows of its group, or what one row
has added with that row alone. So a prompt that a group shares is read once for the group. What a row sees of several
sequences, and of several runs of pages of one, is merged by its softmax denominators.

Shape letters: R rows, X sequences, G rows that see a sequence, C pages of a sequence, H key/value heads, J query heads
of each key/value head, D width of keys, E width of values, S parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trl.kernels import paged_triton

PAGE = 32
"""tokens of a page"""


@dataclass(frozen=True)
class Sequences:
    """Keys and values in pages, and who sees them."""

    pages_XC: Tensor
    """int32: the pages of each sequence, in order; what stands behind its last page is not read"""
    length_X: Tensor
    """int32: tokens; 0 where there is no sequence"""
    start_X: Tensor
    """int32: position of the first token"""
    member_XG: Tensor
    """int32: the rows that see it; -1 where there is none"""


@dataclass(frozen=True)
class Scores:
    """What an architecture does to its scores."""

    scale: float
    softcap: float | None = None
    window: int | None = None
    """a key is seen if it is less than this many positions back"""


def paged_attention(
    query_RHJD: Tensor, keys: Tensor, values: Tensor, position_R: Tensor, sequences: list[Sequences], scores: Scores,
    sinks_HJ: Tensor | None = None, splits: int = 1,
) -> Tensor:  # fmt: skip
    """Attention of each row over all sequences that it sees, [R, H, J, E] in the type of the values.

    keys, values: [pages, PAGE, H, D or E]. splits: runs of pages into which each sequence is cut, to fill a GPU.
    sinks_HJ: logits that take part in the softmax and have no value.
    """
    on_gpu = query_RHJD.is_cuda and paged_triton.is_available()
    part = paged_triton.part if on_gpu or paged_triton.interpreted() else _part
    splits = splits if part is not _part else 1
    rows, heads, group, _ = query_RHJD.shape
    outs = query_RHJD.new_empty(splits * len(sequences), rows, heads, group, values.shape[-1], dtype=torch.float32)
    logsums = outs.new_full(outs.shape[:-1], -torch.inf)
    for index, each in enumerate(sequences):
        at = slice(index * splits, (index + 1) * splits)
        part(query_RHJD, keys, values, position_R, each, scores, outs[at], logsums[at])
    merged = paged_triton.merged if part is not _part else _merged
    return merged(outs, logsums, sinks_HJ).to(values.dtype)


@torch.autocast("cpu", enabled=False)
def _part(
    query_RHJD: Tensor, keys: Tensor, values: Tensor, position_R: Tensor, seen: Sequences, scores: Scores,
    outs: Tensor, logsums: Tensor,
) -> None:  # fmt: skip
    """`paged_triton.part` by plain operations: outs [1, R, H, J, E], logsums [1, R, H, J] of the rows that see it."""
    rows_XG, tokens = seen.member_XG.long(), seen.pages_XC.shape[1] * PAGE
    at_K = torch.arange(tokens, device=keys.device)
    known_XC = torch.where(at_K[::PAGE] < seen.length_X[:, None], seen.pages_XC, 0).long()
    keys_XKHD, values_XKHE = keys[known_XC].flatten(1, 2).float(), values[known_XC].flatten(1, 2).float()
    query_XGHJD = query_RHJD[rows_XG.clamp(min=0)].float()
    found = torch.einsum("xghjd,xkhd->xghjk", query_XGHJD, keys_XKHD) * scores.scale
    if scores.softcap is not None:
        found = scores.softcap * torch.tanh(found / scores.softcap)
    hidden_XGK = (at_K >= seen.length_X[:, None])[:, None].expand(-1, rows_XG.shape[1], -1)
    if scores.window is not None:
        back_XGK = position_R[rows_XG.clamp(min=0)][..., None] - (seen.start_X[:, None] + at_K)[:, None]
        hidden_XGK = hidden_XGK | (back_XGK >= scores.window)
    found = found.masked_fill(hidden_XGK[:, :, None, None], -torch.inf)
    logsum_XGHJ = found.logsumexp(-1)
    probs = (found - logsum_XGHJ.clamp(min=torch.finfo(torch.float32).min)[..., None]).exp()
    is_there = rows_XG >= 0
    logsums[0, rows_XG[is_there]] = logsum_XGHJ[is_there]
    outs[0, rows_XG[is_there]] = torch.einsum("xghjk,xkhe->xghje", probs, values_XKHE)[is_there]


def _merged(outs: Tensor, logsums: Tensor, sinks_HJ: Tensor | None) -> Tensor:
    """The parts' outputs, weighted with their shares of the softmax's denominator; 0 where nothing was seen."""
    peak = logsums.amax(0)
    if sinks_HJ is not None:
        peak = torch.maximum(peak, sinks_HJ.float())
    peak = peak.clamp(min=torch.finfo(torch.float32).min)
    weights = (logsums - peak).exp()
    total = weights.sum(0)
    if sinks_HJ is not None:
        total = total + (sinks_HJ.float() - peak).exp()
    seen = torch.where(weights[..., None] > 0, outs, 0.0)  # what nobody wrote may be anything
    return (seen * weights[..., None]).sum(0) / total.clamp(min=torch.finfo(torch.float32).tiny)[..., None]


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 of anything else."""
    if device.type != "cuda":
        return 1
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count)


def splits_for(sequences: int, heads: int, longest: int, device: torch.device) -> int:
    """Into how many runs of pages a sequence is cut: enough to fill the GPU four times, each of two pages or more."""
    wanted = -(-4 * processors(device) // max(1, sequences * heads))
    return max(1, min(wanted, -(-longest // (2 * PAGE)), 16))
