"""The reference's log-probabilities as columns of the data: computed once, before training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor


def with_reference_columns(
    dataset: Any,
    names: Sequence[str],
    collate: Callable[[list[Mapping[str, Any]]], Mapping[str, Any]],
    reference_sums: Callable[[dict[str, Any]], Sequence[Tensor]],
    *,
    batch_size: int,
    device: torch.device,
) -> Any:
    """The rows with a column for each of `names`; each row is scored once, without gradient.

    Data sets without a length, and those that have the columns already, go through as they are.
    """
    if not isinstance(dataset, Dataset) or names[0] in dataset.column_names:
        return dataset

    @torch.no_grad()
    def scored(rows: dict[str, list[Any]]) -> dict[str, list[float]]:
        listed = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        batch = {name: value.to(device) for name, value in collate(listed).items()}
        return {name: sums.tolist() for name, sums in zip(names, reference_sums(batch), strict=False)}

    return dataset.map(scored, batched=True, batch_size=batch_size, desc="reference log-probabilities")
