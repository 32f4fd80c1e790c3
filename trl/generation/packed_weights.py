"""Linear layers on the CPU, with their weights laid out once for all steps of a sampling run.

A step of sampling multiplies a few rows by every weight. The BLAS behind `nn.Linear` lays the weights out anew in each
call; oneDNN takes them ready (measured, 32,000 x 384: 26 -> 16 ms for 64 rows, 8.8 -> 3.3 ms for 4; 384 x 1024: 78 ->
96 GFLOP/s for 64 rows, 29 -> 54 for 8).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trl.generation.sampling_mode import base_model
from trl.models.stand_in import stand_in

_LARGE = 2**16
"""elements of a weight that is worth it"""
_MOST = 2**28
"""elements that are laid out in all (1 GiB), the output layer first: they are copies"""
_ROWS = 64
"""a hint: the layout is as good for other numbers of rows"""
_MANY = 256
"""rows beyond which a call lays the weights out in no time"""
_STEP = 8
"""rows are filled up to a multiple: oneDNN makes and keeps a program for each number it meets"""


@contextmanager
def packed_weights(model: Any) -> Iterator[None]:
    """While it lasts, large fp32 linear layers on the CPU work on packed weights; others stay as they are."""
    inner = base_model(model)
    head, room = inner.get_output_embeddings(), _MOST
    with ExitStack() as stack:
        for module in [head, *(each for each in inner.modules() if each is not head)]:
            if _packs(module) and room >= module.weight.numel():
                room -= module.weight.numel()
                stack.enter_context(stand_in(module, _forward(module)))
        yield


def _forward(linear: nn.Linear) -> Any:
    packed, bias = _pack(linear.weight.detach()), None if linear.bias is None else linear.bias.detach()

    def forward(hidden: Tensor) -> Tensor:
        rows = hidden.numel() // hidden.shape[-1]
        if hidden.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or not 0 < rows <= _MANY:
            return F.linear(hidden, linear.weight, linear.bias)
        flat = hidden.flatten(0, -2)
        missing = -rows % _STEP
        out = _multiply(F.pad(flat, (0, 0, 0, missing)) if missing else flat, packed, bias)
        return out[:rows].view(*hidden.shape[:-1], -1)

    return forward


def _packs(module: Any) -> bool:
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and module.weight.numel() >= _LARGE
        and _works()
    )


@cache
def _works() -> bool:
    """Whether this build of torch has the two operators, and they multiply."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    hidden, weight = torch.ones(2, 3), torch.arange(12.0).view(4, 3)
    try:
        return torch.equal(_multiply(hidden, _pack(weight), None), hidden @ weight.T)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _pack(weight_VD: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight_VD, _ROWS)


def _multiply(hidden: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(hidden, packed, bias, "none", [], "")
