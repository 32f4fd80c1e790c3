"""Products of rows and weights by oneDNN, on a CPU in float32.

They are faster than the BLAS of `nn.Linear` for a few hundred rows, most of all where the weight is large or was laid
out before.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 8
"""rows are padded to a multiple of it: oneDNN compiles and keeps a program for each number of rows"""
MUCH = 2**20
"""multiplications from which a program is worth while"""
_ROWS = 64
"""a hint: the layout is as good for other numbers of rows"""


def suits(weight: Tensor, elements: int) -> bool:
    """Whether oneDNN can take this weight, and the weight has at least this number of elements."""
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()
    return plain and weight.numel() >= elements and works()


@cache
def works() -> bool:
    """Whether this build of torch has the two operators, and their products are right."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    hidden, weight = torch.ones(2, 3), torch.arange(12.0).view(4, 3)
    try:
        return all(torch.equal(rows_times(hidden, w, None), hidden @ weight.T) for w in (weight, laid_out(weight)))
    except (AttributeError, RuntimeError, TypeError):
        return False


def laid_out(weight_VD: Tensor) -> Tensor:
    """The weight in oneDNN's own order, a copy."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_VD, _ROWS)  # type: ignore[no-any-return]


@cache
def leads() -> bool:
    """Whether oneDNN multiplies much faster here than MKL: on AMD with AVX-512, which MKL does not use there."""
    cpuinfo = Path("/proc/cpuinfo")
    amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
    return amd and torch.backends.cpu.get_cpu_capability() == "AVX512" and works()


def _grid(count: int) -> int:
    return max(64, 1 << max(count.bit_length() - 5, 0))


def rows_with_room(count: int) -> int:
    """The next number of rows that a program is made for: a sixteenth apart, and 64 at least."""
    return -(-count // _grid(count)) * _grid(count)


def with_room(rows_ND: Tensor) -> Tensor:
    """The rows and some more with any numbers, `rows_with_room` in all; a view where it can be.

    Passes of every length then need few programs. For what is computed of each row alone; rows that oneDNN does not
    multiply come back as they are.
    """
    count, width = rows_with_room(len(rows_ND)), rows_ND.shape[1]
    if count == len(rows_ND) or rows_ND.device.type != "cpu" or rows_ND.dtype != torch.float32:
        return rows_ND
    end = (rows_ND.storage_offset() + count * width) * rows_ND.element_size()
    if rows_ND.is_contiguous() and end <= rows_ND.untyped_storage().nbytes():
        return rows_ND.as_strided((count, width), (width, 1))
    return F.pad(rows_ND, (0, 0, 0, count - len(rows_ND)))


def rows_times(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear(hidden, weight, bias)` without a gradient; the weight as it is or laid out. [..., D] -> [..., V]"""
    flat = hidden.flatten(0, -2)
    missing = -len(flat) % STEP
    filled = F.pad(flat, (0, 0, 0, missing)) if missing else flat
    out = torch.ops.mkldnn._linear_pointwise(filled, weight, bias, "none", [], "")[: len(flat)]
    return out.view(*hidden.shape[:-1], -1)  # type: ignore[no-any-return]


def times(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` without a gradient, by oneDNN where it can and there is much to do; the weight may be transposed.

    With room behind it. [N, D] -> [N, O]
    """
    plain = weight if weight.is_contiguous() else weight.T
    if len(rows) * plain.numel() < MUCH or not suits(plain, 1):
        return F.linear(rows, weight, bias)
    return rows_times(with_room(rows), weight, bias)[: len(rows)]


def between(left_NO: Tensor, right_ND: Tensor) -> Tensor:
    """`left.T @ right`, a sum over rows, likewise: over as many rows as a program is made for, and the rest."""
    count, grid = len(left_NO), _grid(len(left_NO))
    first = count // grid * grid
    if first * left_NO.shape[1] * right_ND.shape[1] < MUCH or not suits(right_ND, 1):
        return left_NO.T @ right_ND
    out = torch.ops.mkldnn._linear_pointwise(left_NO[:first].T, right_ND[:first].T, None, "none", [], "")
    return out if first == count else out.addmm_(left_NO[first:].T, right_ND[first:])  # type: ignore[no-any-return]
