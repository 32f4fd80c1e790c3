"""The Triton kernels of `paged_attention`. Without a GPU, `TRITON_INTERPRET=1` runs them on the CPU, slowly."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trl.kernels.paged_attention import Scores, Sequences

MOST_QUERIES = 64
"""queries that a program holds"""
LEAST = 16
"""the smallest side of a product of tiles"""


@cache
def is_available() -> bool:
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for."""
    return os.environ.get("TRITON_INTERPRET") == "1" and is_available()


def part(
    query_RHJD: Tensor, keys: Tensor, values: Tensor, position_R: Tensor, seen: Sequences, scores: Scores,
    outs: Tensor, logsums: Tensor,
) -> None:  # fmt: skip
    """Write what each row sees of these sequences: outs [S, R, H, J, E] and logsums [S, R, H, J], a part a split."""
    _, heads, group, width = query_RHJD.shape
    sequences, members = seen.member_XG.shape
    splits, rows = outs.shape[:2]
    queries = min(MOST_QUERIES, max(LEAST, power_above(members * group)))
    blocks = -(-members * group // queries)
    exact = query_RHJD.dtype == torch.float32
    _kernels().attend[(sequences, heads, splits * blocks)](
        query_RHJD, keys, values, outs, logsums, seen.pages_XC, seen.length_X, seen.start_X, seen.member_XG,
        position_R, scores.scale, scores.softcap or 0.0, scores.window or 0, rows, members,
        seen.pages_XC.stride(0), splits, heads,
        J=group, D=width, E=values.shape[-1], PAGE=keys.shape[1], M=queries,
        WIDE_D=max(LEAST, power_above(width)), WIDE_E=max(LEAST, power_above(values.shape[-1])),
        CAPPED=scores.softcap is not None, WINDOWED=scores.window is not None,
        EXACT=exact and not torch.backends.cuda.matmul.allow_tf32,
        num_warps=4,
    )  # fmt: skip


def merged(outs: Tensor, logsums: Tensor, sinks_HJ: Tensor | None) -> Tensor:
    """The parts, [S, R, H, J, E], weighted with their shares of the softmax's denominator. [R, H, J, E] float32"""
    parts, *shape, width = outs.shape
    merged = torch.empty_like(outs[0])
    count = merged.numel() // width
    _kernels().merge[(count,)](
        outs, logsums, merged, logsums if sinks_HJ is None else sinks_HJ.float().contiguous(), count,
        shape[1] * shape[2], S=parts, WIDE_S=power_above(parts), E=width, WIDE_E=power_above(width),
        SINKS=sinks_HJ is not None, num_warps=1,
    )  # fmt: skip
    return merged


def power_above(number: int) -> int:
    """The smallest power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


class _Kernels:
    attend: Any
    merge: Any


@cache
def _kernels() -> _Kernels:
    from trl.kernels import paged_kernels

    found = _Kernels()
    found.attend, found.merge = paged_kernels.attend, paged_kernels.merge
    return found
