"""Responses to queries, in the way of the seed: lists of tensors in, lists of tensors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trl.trainer.ppo_padded import padded_pair


def up_to_eos(response: Tensor, eos_token_ids: Sequence[int]) -> Tensor:
    """The response up to its first end token, that one included. [T]"""
    ends = torch.isin(response, torch.tensor(list(eos_token_ids), device=response.device)).nonzero()
    return response[: int(ends[0]) + 1] if len(ends) else response


def end_tokens(tokenizer: Any, kwargs: dict[str, Any]) -> list[int]:
    """The ids that end a response: `eos_token_id` of the keywords, else the tokenizer's."""
    eos = kwargs.get("eos_token_id", tokenizer.eos_token_id)
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else [int(token) for token in eos]


@torch.no_grad()
def generate_padded(
    model: Any, tokenizer: Any, queries: Sequence[Tensor], kwargs: dict[str, Any], is_encoder_decoder: bool
) -> list[Tensor]:
    """One call of the model's `generate` over left-padded queries; each response without padding. B x [T]

    An encoder-decoder's response begins with its start token.
    """
    if kwargs.get("num_return_sequences", 1) != 1:
        raise ValueError("num_return_sequences: one response for each query; repeat the query for more")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids, mask = padded_pair(queries, 0 if pad is None else pad, "left")
    given = {"pad_token_id": pad, **kwargs} if pad is not None else kwargs
    output = model.generate(input_ids=ids, attention_mask=mask, **given)
    if not isinstance(output, Tensor):  # return_dict_in_generate
        output = output.sequences
    ends = end_tokens(tokenizer, kwargs)
    if is_encoder_decoder:
        return [torch.cat([row[:1], up_to_eos(row[1:], ends)]) for row in output]
    return [up_to_eos(row, ends) for row in output[:, ids.shape[1] :]]


Respond = Callable[[Sequence[Tensor], dict[str, Any]], list[Tensor]]


def responder(model: Any, tokenizer: Any, is_encoder_decoder: bool) -> Respond:
    """What answers some queries under the keywords of `generate`."""
    return lambda queries, kwargs: generate_padded(model, tokenizer, queries, kwargs, is_encoder_decoder)


def in_batches(
    respond: Respond,
    queries: Sequence[Tensor],
    batch_size: int,
    length_sampler: Callable[[], int] | None,
    kwargs: dict[str, Any],
) -> list[Tensor]:
    """`respond` to `batch_size` queries at a time; `length_sampler` sets `max_new_tokens` for each of those batches."""
    responses: list[Tensor] = []
    for start in range(0, len(queries), batch_size):
        length = {} if length_sampler is None else {"max_new_tokens": int(length_sampler())}
        responses += respond(queries[start : start + batch_size], {**kwargs, **length})
    return responses
