"""Makes token trees of tokenised rows, or of padded batches from the collators of release 0.7.7."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from typing import Any

from torch import Tensor

from trl.data.columns import check_ids, flags_in, whole_numbers
from trl.data.encode import Ids, common_prefix
from trl.data.records import ROWS, Batch, Branch, PackedBatch, TokenTree


def sequences_of(row: Mapping[str, Any]) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """`(ids, loss mask)` of each sequence in a tokenised row; a packed row holds several."""
    ids, mask = row["input_ids"], row["loss_mask"]
    start = 0
    for length in row.get("seq_lengths") or [len(ids)]:
        yield ids[start : start + length], mask[start : start + length]
        start += length


def sequence_trees(rows: Sequence[Mapping[str, Any]]) -> list[TokenTree]:
    """Supervised rows as trees: one tree per sequence, in which the learned tokens are scored."""
    return [TokenTree([], [Branch(ids, mask)]) for row in rows for ids, mask in sequences_of(row)]


def pair_tree(row: Mapping[str, Any]) -> TokenTree:
    """The prompt with two branches, chosen and rejected, from any of the known sets of tokenised columns."""
    ids = row if "prompt_ids" in row else pair_ids(row)
    sides = [Branch(ids[f"{side}_ids"], ids.get(f"{side}_mask")) for side in ("chosen", "rejected")]
    return TokenTree(ids["prompt_ids"], sides)


def pair_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenised pair with the columns that the collators of older releases read, for reward models and for DPO."""
    prompt = list(row["prompt_ids"])
    columns: dict[str, Any] = {name: value for name, value in row.items() if not name.endswith(("_ids", "_mask"))}
    columns |= {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for side in ("chosen", "rejected"):
        answer = list(row[f"{side}_ids"])
        ids, mask = prompt + answer, [1] * (len(prompt) + len(answer))
        columns |= {f"input_ids_{side}": ids, f"attention_mask_{side}": mask}
        columns |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask}
        scored = row.get(f"{side}_mask") or [1] * len(answer)
        labels = [token if counts else -100 for token, counts in zip(answer, scored, strict=True)]
        columns[f"{side}_labels"] = [-100] * len(prompt) + labels
    return columns


PADDED_PAIRS = tuple(f"{side}_{name}" for side in ("chosen", "rejected") for name in ROWS)
"""columns of whole sequences, prompt included, as `DPOTrainer` of release 0.7.7 had them in a batch"""


def padded_pairs(packed: PackedBatch, label_pad_token_id: int = -100, padding_value: int = 0) -> dict[str, Tensor]:
    """The rows of packed pairs, chosen and rejected apart, padded on the right. [pairs, L] each"""
    batch = Batch(packed=packed)
    ids_BL, mask_BL, labels_BL = (batch[name] for name in ROWS)
    columns = {
        "input_ids": ids_BL.masked_fill(mask_BL == 0, padding_value),
        "attention_mask": mask_BL,
        "labels": labels_BL.masked_fill(labels_BL == -100, label_pad_token_id),
    }
    sides = (("chosen", slice(0, None, 2)), ("rejected", slice(1, None, 2)))
    return {f"{side}_{name}": column[rows] for side, rows in sides for name, column in columns.items()}


def rows_of_padded(batch: Mapping[str, Any], collator: str = "the data collator") -> list[dict[str, Any]]:
    """Supervised rows of a batch with `input_ids`, `labels` and perhaps `attention_mask`, padded on either side."""
    if any(batch.get(name) is None for name in ("input_ids", "labels")):
        found = sorted(name for name, value in batch.items() if value is not None)
        raise ValueError(
            f"{collator} returned {found}: it must give `input_ids` and `labels`; leave it out, or take "
            "DataCollatorForLanguageModeling(tokenizer, mlm=False), which makes labels"
        )
    _refuse_pixels(batch, collator)
    rows = []
    mask_BL = batch.get("attention_mask")
    for index, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        real = slice(None) if mask_BL is None else mask_BL[index].bool()
        ids, labels = ids[real], labels[real]
        if bool(((labels != -100) & (labels != ids)).any()):
            raise ValueError(
                "labels differ from input_ids at learned positions: a causal model learns its own next token"
            )
        learned = (labels != -100) & (ids >= 0)  # tokens of pictures are below 0
        rows.append({"input_ids": ids.tolist(), "loss_mask": learned.long().tolist()})
    return rows


def _refuse_pixels(batch: Mapping[str, Any], collator: str) -> None:
    """ValueError where a collator read pictures itself: its tensors do not say which row they belong to."""
    pixels = [name for name, value in batch.items() if "pixel" in name and value is not None]
    if pixels:
        raise ValueError(
            f"{collator} returned {', '.join(pixels)}: the trainer reads pictures itself; leave the collator and "
            "skip_prepare_dataset out, and give the processor as `processing_class` and rows with `images` or with "
            "parts of kind 'image'"
        )


def pair_rows_of_padded(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pair rows of a padded batch: `input_ids_chosen`, `attention_mask_chosen`, ... or `chosen_input_ids`,
    `chosen_attention_mask`, `chosen_labels`, ... or, for encoder-decoders, `prompt_input_ids` and the labels."""
    _refuse_pixels(batch, "the data collator")
    lists = {name: value.tolist() for name, value in batch.items() if isinstance(value, Tensor) and value.dim() == 2}
    forms = (
        ("input_ids_chosen", "attention_mask_chosen", "input_ids_rejected", "attention_mask_rejected"),
        ("chosen_input_ids", "chosen_attention_mask", "chosen_labels", "rejected_input_ids", "rejected_labels"),
        ("prompt_input_ids", "prompt_attention_mask", "chosen_labels", "rejected_labels"),
    )
    found = next((form for form in forms if set(form) <= lists.keys()), None)
    if found is None:
        ways = ", or ".join(" + ".join(form) for form in forms)
        raise ValueError(f"the data collator returned {sorted(batch)}: it must give {ways}")
    kept = {name: rows for name, rows in lists.items() if name in found or name.endswith("attention_mask")}
    rows = [{name: values[i] for name, values in kept.items()} for i in range(len(lists[found[0]]))]
    return [_unpadded_labels(row) for row in rows]


def _unpadded_labels(row: dict[str, Any]) -> dict[str, Any]:
    """Labels without the padding that their ids lose with the attention mask."""
    for side in ("chosen", "rejected"):
        mask = row.get(f"{side}_attention_mask")
        if mask is not None and f"{side}_labels" in row:
            row[f"{side}_labels"] = [label for label, m in zip(row[f"{side}_labels"], mask, strict=True) if m]
    return row


def _attended(row: Mapping[str, Any], column: str, mask: str, *, of_ids: str | None = None) -> Ids:
    """The entries of the column that the mask lets through; `of_ids`: labels that go with the ids of that column."""
    entries = whole_numbers(row, column, "a list of token ids")
    attended = None if row.get(mask) is None else flags_in(row, mask)
    if of_ids is not None:  # labels may have lost their padding already
        size = len(whole_numbers(row, of_ids, "a list of token ids"))
        if len(entries) not in (size, size if attended is None else sum(attended)):
            raise ValueError(f"column '{column}' has {len(entries)} entries for {size} in '{of_ids}'")
        attended = attended if len(entries) == size else None
    if attended is not None:
        if len(attended) != len(entries):
            raise ValueError(f"column '{mask}' has {len(attended)} entries for {len(entries)} in '{column}'")
        entries = list(compress(entries, attended))
    if of_ids is None:
        check_ids(entries, f"column '{column}'")
    return entries


_MASKS = {
    ("input_ids_chosen", "input_ids_rejected"): ("attention_mask_chosen", "attention_mask_rejected"),
    ("chosen_input_ids", "rejected_input_ids"): ("chosen_attention_mask", "rejected_attention_mask"),
    ("chosen_ids", "rejected_ids"): ("chosen_attention_mask", "rejected_attention_mask"),
}
"""columns of whole sequences, and of their attention masks"""
_WHOLE = tuple(_MASKS)


def pair_ids(row: Mapping[str, Any], label_pad_token_id: int = -100) -> dict[str, Ids]:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of a row with the tokenised columns of release 0.7.7.

    Takes the columns of `DPOTrainer` (`chosen_input_ids`, `chosen_labels`, ...; the answer is what the labels keep) and
    of `RewardTrainer` (`input_ids_chosen`, ..., or `chosen_ids` and `chosen_input_ids` alone; the prompt is what both
    share, or `prompt_input_ids`).
    """
    masks: dict[str, Ids] = {}
    if "chosen_labels" not in row:
        names = next((pair for pair in _WHOLE if row.keys() >= set(pair)), None)
        if names is None:
            ways = ", or ".join(" + ".join(pair) for pair in _WHOLE)
            raise ValueError(f"a tokenised pair needs the columns {ways}; columns found: {', '.join(row)}")
        chosen, rejected = (_attended(row, ids, mask) for ids, mask in zip(names, _MASKS[names], strict=True))
        split = max(0, min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1))
        if row.get("prompt_input_ids") is not None:
            prompt = _attended(row, "prompt_input_ids", "prompt_attention_mask")
            if prompt != chosen[: len(prompt)] or prompt != rejected[: len(prompt)]:  # the answers stand apart
                return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            split = len(prompt)
    elif "prompt_input_ids" in row and "chosen_input_ids" not in row:
        prompt = _attended(row, "prompt_input_ids", "prompt_attention_mask")
        answers = {}
        for side in ("chosen", "rejected"):
            labels = whole_numbers(row, f"{side}_labels", "a list of token ids")
            answers[f"{side}_ids"] = [label for label in labels if label != label_pad_token_id]
            check_ids(answers[f"{side}_ids"], f"column '{side}_labels'")
        return {"prompt_ids": prompt, **answers}
    else:
        chosen = _attended(row, "chosen_input_ids", "chosen_attention_mask")
        rejected = _attended(row, "rejected_input_ids", "rejected_attention_mask")
        of_side = {
            side: _attended(row, f"{side}_labels", f"{side}_attention_mask", of_ids=f"{side}_input_ids")
            for side in ("chosen", "rejected")
        }
        marks = {side: [int(label != label_pad_token_id) for label in own] for side, own in of_side.items()}
        starts = [mask.index(1) if 1 in mask else len(mask) for mask in marks.values()]
        split = min(common_prefix(chosen, rejected), *starts)
        masks = {f"{side}_mask": mask[split:] for side, mask in marks.items()}
    ids = {"prompt_ids": chosen[:split], "chosen_ids": chosen[split:], "rejected_ids": rejected[split:]}
    return ids | (masks if any(0 in mask for mask in masks.values()) else {})
