"""The numbers of a training step: sums and counts of metrics, which stay on the device until their means are read.

Also whether losses and gradients are finite, and the file that what was logged goes to.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from trl.data.records import moved_ahead
from trl.losses.loss_sum import Extreme, LossSum

logger = logging.getLogger(__name__)

Number = Tensor | float

METRICS = "metrics.jsonl"
"""file of a run's folder with a line for each log"""


class Tally:
    """Sums and counts of metrics. A read takes one stack, one reduce over the ranks and one transfer to the host.

    Extremes, where there are any, take the same once more.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._sums: dict[str, tuple[Number, Number]] = {}
        self._extremes: dict[str, Extreme] = {}

    def add(self, name: str, total: Number, count: Number = 1.0) -> None:
        """Add to a metric; nothing waits for the device."""
        old_total, old_count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (old_total + _wide(total), old_count + _wide(count))

    def add_extreme(self, name: str, found: Extreme) -> None:
        """Keep the least or the most of what a metric was; nothing waits for the device."""
        old = self._extremes.get(name)
        if old is not None:
            further = torch.maximum if found.largest else torch.minimum
            found = Extreme(further(old.value, found.value), found.largest)
        self._extremes[name] = found

    def add_loss(self, result: LossSum, loss: bool = True) -> None:
        """Add a loss under the name "loss", and its metrics. loss: False for the metrics alone."""
        if loss:
            self.add("loss", result.total.detach(), result.count)
        for name, value in result.metrics.items():
            if isinstance(value, Extreme):
                self.add_extreme(name, value)
                continue
            total, count = value if isinstance(value, tuple) else (value, result.count)
            self.add(name, total, count)

    def tensors(self, accelerator: Accelerator | None = None) -> dict[str, Tensor]:
        """The mean of each metric, on the device; over all ranks if an accelerator is given; no extremes. [] each

        Every rank must have added the same metrics in the same order. The tally keeps its sums.
        """
        if not self._sums:
            return {}
        totals, counts = self._reduced(list(self._sums), accelerator).unbind(1)
        return dict(zip(self._sums, totals / counts.clamp(min=1e-9), strict=True))

    def means(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """Each metric's mean or extreme, on the host; over all ranks if an accelerator is given. Empties the tally.

        A rank may lack metrics that others have: those of a reward function that had no opinion of its completions.
        A metric that counts nothing is left out.
        """
        shared = accelerator is not None and accelerator.num_processes > 1
        kinds = [(name, None) for name in self._sums] + [(name, it.largest) for name, it in self._extremes.items()]
        kinds = sorted(set(gather_object(kinds) if shared else kinds), key=str)
        names = [name for name, largest in kinds if largest is None]
        pairs = self._reduced(names, accelerator).tolist() if names else []
        found = {name: total / count for name, (total, count) in zip(names, pairs, strict=True) if count}
        found |= self._farthest([(name, largest) for name, largest in kinds if largest is not None], accelerator)
        self._sums, self._extremes = {}, {}
        return found

    def _farthest(self, kinds: Sequence[tuple[str, bool]], accelerator: Accelerator | None) -> dict[str, float]:
        """The extremes over all ranks; one of nothing is left out. kinds: name, and whether it is the largest."""
        if not kinds:
            return {}
        signs = [1.0 if largest else -1.0 for _, largest in kinds]
        mine = [self._extremes[name].value.float() if name in self._extremes else None for name, _ in kinds]
        stacked = torch.stack(
            [
                torch.tensor(-torch.inf, device=self._device) if value is None else (sign * value).to(self._device)
                for sign, value in zip(signs, mine, strict=True)
            ]
        )
        everywhere = stacked[None] if accelerator is None else accelerator.gather(stacked[None])
        values = everywhere.amax(0).tolist()
        named = zip(kinds, signs, values, strict=True)
        return {name: sign * value for (name, _), sign, value in named if value != -torch.inf}

    def _reduced(self, names: Sequence[str], accelerator: Accelerator | None) -> Tensor:
        """Sums and counts over all ranks, in float32: not every device has float64. [metrics, 2]"""
        values = [value for name in names for value in self._sums.get(name, (0.0, 0.0))]
        there = [i for i, value in enumerate(values) if _is_elsewhere(value)]
        here = [0.0 if _is_elsewhere(value) else float(value) for value in values]
        stacked = moved_ahead(torch.tensor(here, dtype=torch.float32), self._device)
        if there:
            columns = torch.stack([torch.as_tensor(values[i]).detach().to(self._device).float() for i in there])
            stacked[moved_ahead(torch.tensor(there), self._device)] = columns
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


class StepWatch:
    """Whether the losses and the gradient norm of one optimizer step are finite, on all ranks, by a single read."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        """of each micro-batch, on the device"""
        self.norm: Any = None
        """of the whole gradient; None where it is not known"""

    def read(
        self, accelerator: Accelerator, asked: bool = False, also: Iterable[Tensor] = ()
    ) -> tuple[bool, bool, list[float]]:
        """Whether all is finite; whether any rank asked for something; and further numbers, as they are here.

        In fp16 an infinite gradient is no news: the scaler leaves that step out and lowers its scale.
        """
        device = accelerator.device
        losses = torch.stack([loss.float() for loss in self.losses]).sum() if self.losses else torch.zeros(())
        # nan unless finite; `full` makes a number there, which nothing waits for
        shared = torch.stack([losses.to(device) * 0.0, torch.full((), float(asked), device=device)])
        if accelerator.num_processes > 1:
            shared = accelerator.reduce(shared, "sum")
        whole = self.norm.full_tensor() if hasattr(self.norm, "full_tensor") else self.norm
        known = 0.0 if whole is None or accelerator.scaler is not None else whole
        norm = known.to(device) if isinstance(known, Tensor) else torch.full((), float(known), device=device)
        rest = [value.detach().reshape(1).float() for value in also]
        loss, asked_by, gradient, *numbers = torch.cat([shared, norm.float().reshape(1), *rest]).tolist()
        return math.isfinite(loss) and math.isfinite(gradient), asked_by > 0, numbers

    def clear(self) -> None:
        """Begin the next step."""
        self.losses, self.norm = [], None


def write_metrics(folder: str | os.PathLike[str], line: Mapping[str, Any]) -> None:
    """Add a line to the run's `metrics.jsonl`; a number that is not finite becomes null, which JSON can hold."""
    plain = {str(key): value for key, value in ((k, _in_json(v)) for k, v in line.items()) if value is not _LEFT_OUT}
    try:
        with open(Path(folder) / METRICS, "ab+") as file:
            _cut_torn_line(file)
            file.write(json.dumps(plain).encode() + b"\n")
    except (OSError, ValueError) as error:  # a number with too many digits
        logger.warning("%s: a line of step %s is not written (%s)", Path(folder) / METRICS, line.get("step"), error)


def _cut_torn_line(file: BinaryIO) -> None:
    """Remove the end of a file behind its last line's end: a kill or a full disk has torn it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read() not in (b"", b"\n"):
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


_LEFT_OUT = object()


def _in_json(value: Any) -> Any:
    """A number or a text as JSON knows it; arrays and tables are left out."""
    if isinstance(value, Tensor) or hasattr(value, "item"):
        if getattr(value, "size", 1) != 1 and not isinstance(value, Tensor):
            return _LEFT_OUT
        if isinstance(value, Tensor) and value.numel() != 1:
            return _LEFT_OUT
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else _LEFT_OUT
