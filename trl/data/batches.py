"""From tokenised rows, or from a padded batch of the older collators, to token trees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from trl.data.packing import tree_from_sequences
from trl.data.records import Branch, TokenTree


def sequences_of(row: Mapping[str, Any]) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """`(ids, loss mask)` of each sequence in a tokenised row; a packed row holds several."""
    ids, mask = row["input_ids"], row["loss_mask"]
    start = 0
    for length in row.get("seq_lengths") or [len(ids)]:
        yield ids[start : start + length], mask[start : start + length]
        start += length


def sequence_trees(rows: Sequence[Mapping[str, Any]]) -> list[TokenTree]:
    """Supervised rows: each sequence a tree of its own, its learned tokens scored."""
    return [TokenTree([], [Branch(ids, mask)]) for row in rows for ids, mask in sequences_of(row)]


def pair_tree(row: Mapping[str, Any]) -> TokenTree:
    """Chosen, then rejected, below their prompt: from `prompt_ids` and what follows it, or from two whole sequences."""
    if "prompt_ids" in row:
        return TokenTree(row["prompt_ids"], [Branch(row["chosen_ids"]), Branch(row["rejected_ids"])])
    return tree_from_sequences([_real(row, "chosen"), _real(row, "rejected")])


def _real(row: Mapping[str, Any], which: str) -> list[int]:
    ids, mask = row[f"input_ids_{which}"], row.get(f"attention_mask_{which}")
    return list(ids) if mask is None else [i for i, keep in zip(ids, mask, strict=True) if keep]


def rows_of_padded(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Supervised rows of a batch with `input_ids`, `labels` and perhaps `attention_mask`, padded on either side."""
    missing = [name for name in ("input_ids", "labels") if name not in batch]
    if missing:
        raise ValueError(f"the data collator returned {sorted(batch)}: it must give `input_ids` and `labels`")
    rows = []
    mask_BL = batch.get("attention_mask")
    for index, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        real = slice(None) if mask_BL is None else mask_BL[index].bool()
        ids, labels = ids[real], labels[real]
        if bool(((labels != -100) & (labels != ids)).any()):
            raise ValueError(
                "labels differ from input_ids at learned positions: a causal model learns its own next token"
            )
        rows.append({"input_ids": ids.tolist(), "loss_mask": (labels != -100).long().tolist()})
    return rows


def pair_rows_of_padded(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pair rows of a padded batch with `input_ids_chosen`, `attention_mask_chosen` and the same of rejected."""
    names = [f"{kind}_{which}" for which in ("chosen", "rejected") for kind in ("input_ids", "attention_mask")]
    missing = [name for name in names if name not in batch]
    if missing:
        raise ValueError(f"the data collator returned {sorted(batch)}: {', '.join(missing)} missing")
    lists = {name: value.tolist() for name, value in batch.items() if isinstance(value, Tensor)}
    return [{name: values[i] for name, values in lists.items()} for i in range(len(lists["input_ids_chosen"]))]
