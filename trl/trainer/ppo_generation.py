"""Responses to queries, in the way of the seed: lists of tensors in, lists of tensors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trl.legacy.ppo_padded import padded_pair
from trl.models.unwrap import below_value_head


def end_tokens(model: Any, tokenizer: Any, kwargs: Mapping[str, Any]) -> set[int]:
    """The ids that end a response: `eos_token_id` of the keywords, else the model's and the tokenizer's."""
    config = getattr(below_value_head(model), "generation_config", None)
    own = [getattr(config, "eos_token_id", None), tokenizer.eos_token_id]
    ends: set[int] = set()
    for each in [kwargs["eos_token_id"]] if "eos_token_id" in kwargs else own:
        ends |= set() if each is None else {int(each)} if isinstance(each, int) else {int(end) for end in each}
    return ends


def up_to_end(response: Tensor, ends: set[int]) -> Tensor:
    """The response up to its first end token, that one included. [T]"""
    found = torch.isin(response, torch.tensor(sorted(ends), device=response.device, dtype=response.dtype)).nonzero()
    return response[: int(found[0]) + 1] if len(found) else response


@torch.no_grad()
def generate_padded(
    model: Any, tokenizer: Any, queries: Sequence[Tensor], kwargs: Mapping[str, Any], is_encoder_decoder: bool
) -> list[Tensor]:
    """One call of the model's `generate` over left-padded queries; each response without padding. B x [T]

    An encoder-decoder's response begins with its start token.
    """
    if kwargs.get("num_return_sequences", 1) != 1:
        raise ValueError("num_return_sequences: one response for each query; repeat the query for more")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids, mask = padded_pair(queries, 0 if pad is None else pad, "left")
    given = dict(kwargs) if pad is None else {"pad_token_id": pad, **kwargs}
    output = model.generate(input_ids=ids, attention_mask=mask, **given)
    if not isinstance(output, Tensor):  # return_dict_in_generate
        output = output.sequences
    ends = end_tokens(model, tokenizer, kwargs)
    if is_encoder_decoder:
        return [torch.cat([row[:1], up_to_end(row[1:], ends)]) for row in output]
    return [up_to_end(row, ends) for row in output[:, ids.shape[1] :]]
