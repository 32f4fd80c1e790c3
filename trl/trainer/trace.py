"""A file for each optimizer step: its rows, losses, gradient and weights, so that two runs can be held side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trl.data.records import PackedBatch

FOLDER = "trace"
_WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def file_of(folder: Path, step: int, rank: int = 0) -> Path:
    """The file of a step in a run's folder."""
    return folder / FOLDER / (f"step-{step}.json" if not rank else f"step-{step}-rank-{rank}.json")


def checksum(tensors: Iterable[Tensor | None]) -> str:
    """16 digits that differ where a bit of the tensors differs, or almost surely so; of what this process holds."""
    found = 0
    for tensor in tensors:
        if tensor is None:
            found = (found * 1_000_003 + 1) % 2**64
            continue
        local = getattr(tensor, "_local_tensor", tensor).detach().contiguous().flatten()
        bits = local.view(_WIDTHS[local.element_size()]).long()
        weight = torch.arange(1, len(bits) + 1, device=bits.device)
        found = (found * 1_000_003 + int((bits * weight).sum())) % 2**64
    return f"{found:016x}"


class StepTrace:
    """Collects what an optimizer step did and writes it."""

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank = folder, rank
        self._losses: list[Tensor] = []
        self._entry: dict[str, Any] = {}

    def loss(self, loss: Tensor) -> None:
        """Of a micro-batch."""
        self._losses.append(loss.detach())

    def before(self, step: int, packs: Sequence[PackedBatch], model: nn.Module, norm: Any) -> None:
        """The gradient is there, clipped, and the weights are still those of before."""
        learned = [weight for weight in model.parameters() if weight.requires_grad]
        self._entry = {
            "step": step,
            "rows": [packed.ids_N[packed.row_indices(row)].tolist() for packed in packs for row in range(packed.rows)],
            "learned": [int((packed.row_S == row).sum()) for packed in packs for row in range(packed.rows)],
            "losses": [float(loss) for loss in self._losses],
            "grad_norm": None if norm is None else float(norm),
            "weights_before": checksum(learned),
            "gradient": checksum(weight.grad for weight in learned),
        }
        self._losses = []

    def after(self, model: nn.Module) -> None:
        """The weights have moved."""
        if not self._entry:
            return
        self._entry["weights_after"] = checksum(weight for weight in model.parameters() if weight.requires_grad)
        file = file_of(self.folder, self._entry["step"], self.rank)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self._entry) + "\n")
        self._entry = {}


def read(file: Path) -> dict[str, Any] | None:
    """What was written of a step; None where there is nothing to read."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("rows"), list) else None


def steps(folder: Path) -> list[int]:
    """The steps that a run has traced, in their order."""
    names = (file.stem.removeprefix("step-") for file in (folder / FOLDER).glob("step-*.json"))
    return sorted(int(name) for name in names if name.isdigit())
