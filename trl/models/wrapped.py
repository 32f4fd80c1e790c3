"""Models on many processes: what belongs inside a wrapped forward (DDP, FSDP, DeepSpeed), and equal weights before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from trl.losses.loss_sum import LossSum

Result = TypeVar("Result")


def within_forward(model: nn.Module, function: Callable[[nn.Module], LossSum]) -> LossSum:
    """`function` of the model below its wrapper, run as if it were the model's forward.

    The head works outside the forward of the model it belongs to. DDP takes a parameter that the output of its forward
    does not reach for unused and reduces it too early; FSDP frees it. Inside, both see what is really computed.
    """
    if extract_model_from_parallel(model) is model:
        return function(model)
    results: list[LossSum] = []

    def run(inner: nn.Module) -> Tensor:
        results.append(function(inner))
        return results[0].total

    total = _as_forward(model, run)
    return replace(results[0], total=total)


def _as_forward(model: nn.Module, function: Callable[[nn.Module], Result]) -> Result:
    inner: Any = extract_model_from_parallel(model)
    own = inner.__dict__.get("forward")

    def put_back() -> None:
        if own is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.forward = own

    def forward_once() -> Result:
        put_back()  # `function` calls the model's own
        return function(inner)

    inner.forward = forward_once
    try:
        result: Result = model()
        return result
    finally:
        put_back()


@torch.no_grad()
def equalise(model: nn.Module) -> None:
    """Give every process the first one's weights, as DDP will: a copy for reference that is made before is right then.

    Collective. Processes differ where a model was initialised without a seed. Sharded and unmaterialised weights stay.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()) or is_deepspeed_zero3_enabled():
        return
    device = PartialState().device
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_meta or type(tensor.data) is not Tensor:
            continue
        first = tensor.data.to(device)
        torch.distributed.broadcast(first, 0)
        tensor.data.copy_(first)
