"""Lists of queries in, lists of responses out, by a model's own `generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList

from trl.generation.engine import picture_tokens, pictured_inputs
from trl.generation.generate_kwargs import asked_end_tokens
from trl.generation.probe import generates
from trl.generation.stopping import StringStoppingCriteria, end_tokens, until_end
from trl.models.unwrap import is_encoder_decoder, own_pace


def plain_generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[Tensor],
    generation_kwargs: Mapping[str, Any],
    stop_strings: Sequence[str],
    batch_size: int = 16,
    pad_to_multiple_of: int | None = None,
) -> list[Tensor]:
    """`generate_padded` for any number of queries, without the start token of an encoder-decoder."""
    start = int(is_encoder_decoder(model))
    return [
        response[start:]
        for part in _batches(queries, batch_size)
        for response in generate_padded(model, tokenizer, part, generation_kwargs, stop_strings, pad_to_multiple_of)
    ]


@torch.no_grad()
def generate_padded(
    model: Any,
    tokenizer: Any,
    queries: Sequence[Tensor],
    kwargs: Mapping[str, Any],
    stop_strings: Sequence[str] = (),
    pad_to_multiple_of: int | None = None,
    *,
    several: bool = False,
) -> list[Tensor]:
    """What one call of `model.generate` adds to each query, up to its first stop string or end token. B x [T]

    Queries are padded on the left, those of an encoder on the right; a model that does not bear that gets those of one
    length in a call. The stop string or end token belongs to the response; an encoder-decoder's response begins with
    the start token.
    several: `num_return_sequences` may be above 1; the responses to a query then follow each other.
    """
    if not several and kwargs.get("num_return_sequences", 1) != 1:
        raise ValueError("num_return_sequences: one response for each query; repeat the query for more")
    encodes = is_encoder_decoder(model)
    how = generates(model)
    if not how.with_cache:
        kwargs = {"use_cache": False, **kwargs}
    if not how.behind_padding:
        pad_to_multiple_of = None
        if len(set(map(len, queries))) > 1:
            return _by_length(queries, partial(generate_padded, model, tokenizer, kwargs=kwargs, several=several,
                                               stop_strings=stop_strings))  # fmt: skip
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    given = dict(kwargs) if padding is None else {"pad_token_id": padding, **kwargs}
    if shows := any(bool((query < 0).any()) for query in queries):
        queries, given = _for_pictures(queries, given)
    ids, mask = padded_pair(queries, padding or 0, "right" if encodes else "left", pad_to_multiple_of)
    stopping = StringStoppingCriteria(stop_strings, tokenizer) if stop_strings else None
    if stopping is not None:
        given["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), stopping])
    barred = list(picture_tokens(model))
    if barred:
        given["suppress_tokens"] = [*(kwargs.get("suppress_tokens") or []), *barred]
    inputs = pictured_inputs(model, ids, mask) if shows else {"input_ids": ids, "attention_mask": mask}
    output = model.generate(**inputs, **{**own_pace(model), **given})
    rows = output if isinstance(output, Tensor) else output.sequences  # return_dict_in_generate
    start = 1 if encodes else ids.shape[1]
    counts = [rows.shape[1]] * len(rows) if stopping is None else stopping.generated_tokens
    ends = end_tokens(model, tokenizer, asked_end_tokens(kwargs))
    answers = [until_end(row[start:][:count], ends) for row, count in zip(rows, counts, strict=True)]
    return [torch.cat([row[:1], answer]) for row, answer in zip(rows, answers, strict=True)] if encodes else answers


def _for_pictures(queries: Sequence[Tensor], kwargs: dict[str, Any]) -> tuple[Sequence[Tensor], dict[str, Any]]:
    """Queries with pictures, each as often as it is answered: `generate` itself would mix up those of several rows."""
    config = kwargs.get("generation_config")
    if max(kwargs.get("num_beams") or 1, getattr(config, "num_beams", None) or 1) > 1:
        raise ValueError("num_beams: prompts with pictures are sampled without beams; leave it out")
    copies = kwargs.get("num_return_sequences") or getattr(config, "num_return_sequences", None) or 1
    return [query for query in queries for _ in range(copies)], {**kwargs, "num_return_sequences": 1}


def _by_length(queries: Sequence[Tensor], generate: Callable[[Sequence[Tensor]], list[Tensor]]) -> list[Tensor]:
    """What `generate` says of the queries of each length, in the order of the queries."""
    said: dict[int, list[Tensor]] = {}
    for length in sorted(set(map(len, queries))):
        places = [place for place, query in enumerate(queries) if len(query) == length]
        answers = generate([queries[place] for place in places])
        copies = len(answers) // len(places)
        said |= {place: answers[i * copies : (i + 1) * copies] for i, place in enumerate(places)}
    return [answer for place in range(len(queries)) for answer in said[place]]


def padded(rows: Sequence[Tensor], value: float, side: str) -> Tensor:
    """1-d tensors as the rows of a 2-d one, padded on `side`. [B, L]"""
    return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)


def padded_pair(
    rows: Sequence[Tensor], pad_token_id: int, side: str, multiple: int | None = None
) -> tuple[Tensor, Tensor]:
    """(ids, attention mask) of the rows, [B, L] each; L is a multiple of `multiple`."""
    ids_BL, mask_BL = padded(rows, pad_token_id, side), padded([torch.ones_like(row) for row in rows], 0, side)
    room = -ids_BL.shape[1] % (multiple or 1)
    places = (room, 0) if side == "left" else (0, room)
    return pad(ids_BL, places, value=pad_token_id), pad(mask_BL, places)


def _batches(queries: Sequence[Tensor], size: int) -> list[Sequence[Tensor]]:
    return [queries[start : start + size] for start in range(0, len(queries), size)]
