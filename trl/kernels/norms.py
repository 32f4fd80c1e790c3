"""Root-mean-square norms on the CPU as one step of autograd: less is kept, and fewer passes go over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trl.kernels.swapped_forward import computes_again, stand_in

_plain: dict[type[nn.Module], bool] = {}
"""classes of norms, and whether they compute `rms_norm`"""


class _RMSNorm(torch.autograd.Function):
    """y = w x r with r = (mean x^2 + eps)^(-1/2): arXiv:1910.07467, eq. 4."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        scaled = x * inverse
        both = grad * scaled
        of_weight = both.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        share = (both @ weight)[..., None].mul_(inverse)
        return (grad * weight).mul_(inverse).addcmul_(scaled, share, value=-1 / x.shape[-1]), of_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x over its root mean square along the last axis, times the weight. [..., D]"""
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return]


@contextmanager
def fused_norms(network: nn.Module) -> Iterator[None]:
    """Within it the norms of a network on the CPU in float32 are `rms_norm`, where that is what they compute."""
    if computes_again(network):
        yield
        return
    with ExitStack() as stack:
        for module in network.modules():
            if type(module).__name__.endswith("RMSNorm") and _is_plain(module):
                stack.enter_context(stand_in(module, _forward(module)))
        yield


def _is_plain(module: Any) -> bool:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or not isinstance(eps, float) or "forward" in vars(module):
        return False
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.dim() != 1:
        return False
    if type(module) not in _plain:
        with torch.no_grad():
            x = torch.linspace(-1.0, 2.0, 2 * len(weight)).view(2, -1)
            _plain[type(module)] = torch.allclose(module(x), rms_norm(x, weight, eps), rtol=1e-5, atol=1e-6)
    return _plain[type(module)]


def _forward(module: Any) -> Callable[[Tensor], Tensor]:
    own = module.forward

    def forward(x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return own(x)
        return rms_norm(x, module.weight, module.variance_epsilon)

    return forward
