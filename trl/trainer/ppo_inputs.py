"""What a user hands to a PPO step, checked and brought into the form that it computes with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trl.rollout.measure import Sample


def checked_batch(
    batch_size: int,
    queries: list[Tensor],
    responses: list[Tensor],
    scores: list[Tensor],
    masks: list[Tensor] | None,
    device: Any,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor] | None]:
    """The lists on `device`, scores 0-d; ValueError for what is not a batch."""
    given = {"queries": queries, "responses": responses, "scores": scores}
    if masks is not None:
        given["masks"] = masks
    for name, rows in given.items():
        if not isinstance(rows, list):
            raise ValueError(f"{name} must be a list of tensors - got {type(rows)}")
        wrong = next((row for row in rows if not isinstance(row, Tensor)), None)
        if wrong is not None:
            raise ValueError(f"Elements in {name} must be tensors - got {type(wrong)}")
        if batch_size is not None and len(rows) != batch_size:
            raise ValueError(
                f"Batch size ({batch_size}) does not match number of examples - but got {len(rows)} for: {name}"
            )
        given[name] = [row.to(device) for row in rows]
    empty = next((row for row, query in enumerate(given["queries"]) if not query.numel()), None)
    if empty is not None:
        raise ValueError(f"queries[{empty}] is empty: give at least one token, such as the beginning-of-text token")
    if not any(response.numel() for response in given["responses"]):
        raise ValueError("responses: all of them are empty, there is nothing to learn from")
    given["scores"] = [_score(row, score) for row, score in enumerate(given["scores"])]
    for row, (response, mask) in enumerate(zip(given["responses"], given.get("masks", []), strict=False)):
        if response.shape != mask.shape:
            raise ValueError(
                f"masks[{row}] has shape {tuple(mask.shape)}, its response {tuple(response.shape)}: they must agree"
            )
    return given["queries"], given["responses"], given["scores"], given.get("masks")


def _score(row: int, score: Tensor) -> Tensor:
    if score.dim() > 1:
        raise ValueError(f"Scores must be 1-dimensional - got {score.dim()} for {score}")
    if score.numel() != 1:
        raise ValueError(f"scores[{row}] holds {score.numel()} numbers: give one score for each response")
    if not torch.isfinite(score).all():
        raise ValueError(f"scores[{row}]={score.item()} is not finite: give every response a number")
    return score.reshape(())


def samples_of(
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    masks: Sequence[Tensor] | None,
    start_token_id: int | None = None,
) -> list[Sample]:
    """Samples of the lists; a leading `start_token_id` (an encoder-decoder's) is no part of what was chosen."""
    samples = []
    for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
        ids = response.tolist()
        mask = [1] * len(ids) if masks is None else [int(kept) for kept in masks[row].tolist()]
        skip = int(start_token_id is not None and ids[:1] == [start_token_id])
        samples.append(Sample(query.tolist(), ids[skip:], mask[skip:]))
    return samples


def show_tokens(tokenizer: Any, tokens: Tensor, masks: Tensor) -> None:
    """Print tokens in two colours, by their mask."""
    from rich import print as rich_print
    from rich.text import Text

    text = Text()
    for token, mask in zip(tokens.tolist(), masks.tolist(), strict=True):
        text.append(tokenizer.decode([token]), style="black on deep_sky_blue3" if mask else "black on cyan3")
        text.append(" ")
    rich_print(text)
