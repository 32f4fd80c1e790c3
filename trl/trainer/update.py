"""One optimizer step from several micro-batches, for the trainers that are driven by `step`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trl.kernels.step_memory import place_of
from trl.losses.loss_sum import LossSum
from trl.models.zero import step_norm
from trl.trainer.tally import StepWatch, Tally

Piece = TypeVar("Piece")


def optimizer_step(
    accelerator: Any,
    models: Sequence[nn.Module],
    optimizer: Any,
    pieces: Sequence[Piece],
    objective: Callable[[Piece], LossSum],
    count: Callable[[Piece], Tensor | float],
    *,
    parameters: Sequence[nn.Parameter] = (),
    max_grad_norm: float | None = None,
    accept: Callable[[dict[str, Tensor]], bool] | None = None,
    non_finite: Callable[[StepWatch], None] | None = None,
) -> dict[str, Tensor]:
    """One optimizer step from the micro-batches `pieces`; every process must bring equally many.

    `count(piece)` is what `objective(piece)` will be summed over. It is known beforehand, so the step is the same
    however it is cut into micro-batches and processes. If `accept` refuses the step's mean metrics, nothing is stepped
    (DeepSpeed steps inside its backward pass: there it comes too late). Nor is it where a loss or the gradient is not
    finite, which DeepSpeed sees by itself: then `non_finite` is called, on all processes, and may raise. Gradients end
    as None: the next backward pass writes them instead of adding to zeros. `leave_zeros` is for those who look at them
    afterwards.
    """
    torch.clear_autocast_cache()  # of weights as they were, or without their gradient, where one context spans steps
    local = torch.stack([torch.as_tensor(count(piece), device=accelerator.device).float() for piece in pieces]).sum()
    whole = accelerator.reduce(local, "sum").clamp(min=1)
    # DDP averages over processes and `backward` divides by accelerate's own accumulation: both are undone here.
    scale = accelerator.num_processes * accelerator.gradient_accumulation_steps / whole
    tally, watch = Tally(accelerator.device), StepWatch()
    for place, piece in enumerate(pieces, 1):
        accelerator.sync_gradients = place == len(pieces)
        with ExitStack() as silent:
            if not accelerator.sync_gradients:
                for model in models:
                    silent.enter_context(accelerator.no_sync(model))
            loss = objective(piece)
            tally.add_loss(loss)
            watch.losses.append(loss.total.detach())
            accelerator.backward(loss.total * scale)
    means = tally.tensors(accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        watch.norm = step_norm(accelerator)
    elif max_grad_norm is None:
        watch.norm = gradient_norm(parameters)
    else:
        watch.norm = accelerator.clip_grad_norm_(parameters, max_grad_norm)
    finite, _, numbers = watch.read(accelerator, also=means.values())
    if not finite and non_finite is not None:
        non_finite(watch)
    read = {name: torch.tensor(value) for name, value in zip(means, numbers, strict=True)}
    if finite and (accept is None or accept(read)):
        optimizer.step()
        torch.clear_autocast_cache()
    elif accelerator.scaler is not None:  # of fp16, which has unscaled the gradient and waits for the step
        accelerator.scaler.update(accelerator.scaler.get_scale())
    optimizer.zero_grad(set_to_none=True)
    return means


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of the whole gradient, which is left as it is; on the device. []"""
    norm = torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm  # of sharded weights


def leave_zeros(parameters: Iterable[nn.Parameter]) -> None:
    """Give trained parameters without a gradient a gradient of zeros, as release 0.7.7 left them after a step."""
    for parameter in parameters:
        if parameter.requires_grad and parameter.grad is None:
            place = place_of(parameter)  # the memory that the last gradient had, where it was kept
            parameter.grad = torch.zeros_like(parameter) if place is None else place.gradient()
