"""The update of step-driven trainers: one optimizer step from micro-batches, divided once by the count of all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trl.losses.loss_sum import LossSum

Piece = TypeVar("Piece")


class Meters:
    """Sums and counts of metrics over the micro-batches of an optimizer step."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, loss: LossSum) -> None:
        for name, measure in {"loss": loss.total.detach(), **loss.metrics}.items():
            total, count = measure if isinstance(measure, tuple) else (measure, loss.count)
            pair = (total.detach().float(), torch.as_tensor(count, device=total.device).float())
            old = self._sums.get(name)
            self._sums[name] = pair if old is None else (old[0] + pair[0], old[1] + pair[1])

    def means(self, accelerator: Any = None) -> dict[str, Tensor]:
        """Mean of each metric; with an accelerator, over all processes, in one reduction."""
        if not self._sums:
            return {}
        sums = torch.stack([torch.stack(pair) for pair in self._sums.values()])
        totals, counts = (sums if accelerator is None else accelerator.reduce(sums, "sum")).unbind(1)
        return dict(zip(self._sums, totals / counts.clamp(min=1e-9), strict=True))


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
) -> dict[str, Tensor]:
    """One optimizer step from the micro-batches `pieces`; every process must bring equally many.

    `count(piece)` is what `objective(piece)` will be summed over; known beforehand, it makes the step the same
    however it is cut into micro-batches and processes. Where `accept` refuses the step's mean metrics nothing is
    stepped (DeepSpeed steps inside its backward pass: there it comes too late). Gradients end as None: the next
    backward pass writes them instead of adding to zeros. `leave_zeros` is for those who look at them afterwards.
    """
    local = torch.stack([torch.as_tensor(count(piece), device=accelerator.device).float() for piece in pieces]).sum()
    whole = accelerator.reduce(local, "sum").clamp(min=1)
    # DDP averages over processes and accelerate divides by the number of micro-batches: both are undone here.
    scale = accelerator.num_processes * len(pieces) / whole
    meters = Meters()
    accelerator.step, accelerator.gradient_accumulation_steps = 0, len(pieces)
    accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
    for piece in pieces:
        with accelerator.accumulate(*models):
            loss = objective(piece)
            meters.add(loss)
            accelerator.backward(loss.total * scale)
            if accelerator.sync_gradients:
                means = meters.means(accelerator)
                if accept is None or accept(means):
                    if max_grad_norm is not None:
                        accelerator.clip_grad_norm_(parameters, max_grad_norm)
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return means


def leave_zeros(parameters: Iterable[nn.Parameter]) -> None:
    """Zeros as the gradients of what is trained, as the seed left them behind a step."""
    for parameter in parameters:
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
