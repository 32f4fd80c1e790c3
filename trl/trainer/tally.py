"""Sums and counts of metrics, which stay on the device until somebody reads their means."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from trl.losses.loss_sum import LossSum

Number = Tensor | float


class Tally:
    """Sums and counts of metrics. A read takes one stack, one reduce over the ranks and one transfer to the host."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._sums: dict[str, tuple[Number, Number]] = {}

    def add(self, name: str, total: Number, count: Number = 1.0) -> None:
        """Add to a metric; nothing waits for the device."""
        old_total, old_count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (old_total + _wide(total), old_count + _wide(count))

    def add_loss(self, result: LossSum) -> None:
        """Add a loss under the name "loss", and its metrics."""
        self.add("loss", result.total.detach(), result.count)
        for name, value in result.metrics.items():
            total, count = value if isinstance(value, tuple) else (value, result.count)
            self.add(name, total, count)

    def tensors(self, accelerator: Accelerator | None = None) -> dict[str, Tensor]:
        """The mean of each metric, on the device; over all ranks if an accelerator is given. [] each

        Every rank must have added the same metrics in the same order. The tally keeps its sums.
        """
        if not self._sums:
            return {}
        totals, counts = self._reduced(list(self._sums), accelerator).unbind(1)
        return dict(zip(self._sums, totals / counts.clamp(min=1e-9), strict=True))

    def means(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """The mean of each metric, on the host; over all ranks if an accelerator is given. The tally is empty then.

        A rank may lack metrics that others have: those of a reward function that had no opinion of its completions.
        A metric that counts nothing is left out.
        """
        shared = accelerator is not None and accelerator.num_processes > 1
        names = sorted(set(gather_object(list(self._sums)) if shared else self._sums))
        if not names:
            return {}
        pairs = self._reduced(names, accelerator).tolist()
        self._sums = {}
        return {name: total / count for name, (total, count) in zip(names, pairs, strict=True) if count}

    def _reduced(self, names: Sequence[str], accelerator: Accelerator | None) -> Tensor:
        """Sums and counts over all ranks, in float32: not every device has float64. [metrics, 2]"""
        values = [value for name in names for value in self._sums.get(name, (0.0, 0.0))]
        there = [i for i, value in enumerate(values) if _is_elsewhere(value)]
        here = [0.0 if _is_elsewhere(value) else float(value) for value in values]
        stacked = torch.tensor(here, dtype=torch.float32).to(self._device)
        if there:
            columns = torch.stack([torch.as_tensor(values[i]).detach().to(self._device).float() for i in there])
            stacked[torch.tensor(there, device=self._device)] = columns
        return (stacked if accelerator is None else accelerator.reduce(stacked, "sum")).view(-1, 2)


class Appended:
    """Metrics as code of other releases keeps them: `trainer._metrics["train"]["name"].append(value)`."""

    def __init__(self, tally: Callable[[], Tally], name: str = "") -> None:
        self._tally, self._name = tally, name

    def __getitem__(self, name: str) -> Appended:
        return Appended(self._tally, name)

    def append(self, value: Number) -> None:
        """Add a value, which counts once in the mean of the next log."""
        self._tally().add(self._name, value)


def _wide(value: Number) -> Number:
    """A number in at least 32 bits, so that long sums keep their digits."""
    return value.detach().float() if isinstance(value, Tensor) and value.element_size() < 4 else value


def _is_elsewhere(value: Number) -> bool:
    """Whether reading a number would wait for a device."""
    return isinstance(value, Tensor) and value.device.type != "cpu"
