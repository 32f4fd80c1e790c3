"""Prompts in an endless shuffled order that is a function of the position alone: a run resumes anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@lru_cache(maxsize=4)
def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class PromptStream:
    """Reads the rows over and over, in another order each time."""

    rows: Any
    """a map-style data set"""
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.rows, Mapping):
            raise ValueError(f"train_dataset: a dict of data sets ({', '.join(self.rows)}); pass one of them")
        if not hasattr(self.rows, "__len__") or not hasattr(self.rows, "__getitem__"):
            raise ValueError(
                f"train_dataset: prompts are drawn by their place, a {type(self.rows).__name__} has none; give a "
                "map-style data set"
            )
        if not len(self.rows):
            raise ValueError("train_dataset: it has no rows; give prompts")

    def take(self, position: int, count: int) -> list[dict[str, Any]]:
        """The rows from `position` on."""
        return [self.rows[self._place(position + i)] for i in range(count)]

    def _place(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.rows))
        return int(_order(len(self.rows), self.seed * 1_000_003 + epoch)[offset]) if self.shuffle else offset
