"""Continuations by the model's own `generate`, for settings that the samplers do not know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList

from trl.generation.stop_criteria import StringStoppingCriteria


def plain_generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[Tensor],
    generation_kwargs: Mapping[str, Any],
    stop_strings: Sequence[str],
    batch_size: int = 16,
    pad_to_multiple_of: int | None = None,
) -> list[Tensor]:
    """What `model.generate` adds to each of the 1-d `queries`, up to the first stop string or end token, included."""
    continuations: list[Tensor] = []
    for start in range(0, len(queries), batch_size):
        inputs = _padded(queries[start : start + batch_size], tokenizer, pad_to_multiple_of, _is_encoder_decoder(model))
        stopping = StringStoppingCriteria(stop_strings, tokenizer)
        criteria = StoppingCriteriaList([*(generation_kwargs.get("stopping_criteria") or []), stopping])
        generated = model.generate(**inputs, **{**generation_kwargs, "stopping_criteria": criteria})
        given = 1 if _is_encoder_decoder(model) else inputs["input_ids"].shape[1]
        ends = _end_ids(model, generation_kwargs)
        for row, count in zip(generated[:, given:], stopping.generated_tokens, strict=True):
            continuations.append(_until_end(row[:count], ends))
    return continuations


def _is_encoder_decoder(model: Any) -> bool:
    return bool(model.config.is_encoder_decoder)


def _padded(
    queries: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase, multiple: int | None, right: bool
) -> dict[str, Tensor]:
    width = max(len(query) for query in queries)
    width += -width % (multiple or 1)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # under a mask: any id does
    ids = queries[0].new_full((len(queries), width), padding)
    mask = torch.zeros_like(ids)
    for row, query in enumerate(queries):
        place = slice(0, len(query)) if right else slice(width - len(query), width)
        ids[row, place] = query
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _end_ids(model: Any, generation_kwargs: Mapping[str, Any]) -> list[int]:
    if "eos_token_id" in generation_kwargs:
        ends = generation_kwargs["eos_token_id"]
    else:
        given = generation_kwargs.get("generation_config")
        ends = (given or getattr(model, "pretrained_model", model).generation_config).eos_token_id
    return [] if ends is None else torch.as_tensor(ends).flatten().tolist()


def _until_end(ids: Tensor, ends: list[int]) -> Tensor:
    stops = torch.isin(ids, ids.new_tensor(ends)).nonzero()
    return ids[: int(stops[0]) + 1] if len(stops) else ids
