"""The padded tensors of release 0.7.7, for scripts that call the parts of a PPO step. `PPOTrainer.step` packs its rows.

Shape letters: B rows, L tokens of the longest row (query and response), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trl.data.any_text import console, visible
from trl.generation.plain_generate import padded as padded
from trl.generation.plain_generate import padded_pair
from trl.legacy.core import logprobs_from_logits
from trl.models.unwrap import accepts
from trl.rollout.experience import PolicyBatch


def causal_inputs(queries: Sequence[Tensor], responses: Sequence[Tensor], pad: int, side: str) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of query and response together. [B, L]"""
    ids, mask = padded_pair([torch.cat(pair) for pair in zip(queries, responses, strict=True)], pad, side)
    return {"input_ids": ids, "attention_mask": mask}


def encoder_decoder_inputs(
    queries: Sequence[Tensor], responses: Sequence[Tensor], pad: int, side: str
) -> dict[str, Tensor]:
    """Queries for the encoder, responses (decoder start token included) for the decoder. [B, L]"""
    ids, mask = padded_pair(queries, pad, side)
    decoder_ids, decoder_mask = padded_pair(responses, pad, side)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": decoder_mask,
    }


def response_mask(
    attention_BL: Tensor,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    response_masks: Sequence[Tensor] | None,
    is_encoder_decoder: bool,
) -> Tensor:
    """1 where a position predicts a token of the response. [B, L - 1]

    Position p predicts token p + 1. Encoder-decoders: from the second prediction on, as in release 0.7.7.
    """
    mask_BL = torch.zeros_like(attention_BL[:, 1:])
    for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
        first = int(attention_BL[row].argmax())  # padding on the left
        begin, skip = (first, 1) if is_encoder_decoder else (first + len(query) - 1, 0)
        counted = torch.ones_like(response) if response_masks is None else response_masks[row].to(response)
        if is_encoder_decoder:
            counted = counted[1:]  # nothing predicts the start token
        start = max(begin + skip, 0)
        counted = counted[start - begin :]
        mask_BL[row, start : start + len(counted)] = counted
    return mask_BL


def forward_chunk(
    model: nn.Module, inputs: Mapping[str, Tensor], temperature: float, is_encoder_decoder: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities [B, L - 1], logits [B, L - 1, V], values [B, L - 1]) of padded inputs."""
    columns: dict[str, Any] = dict(inputs)
    attention = inputs["attention_mask"]
    if not is_encoder_decoder and accepts(
        model, "position_ids"
    ):  # real tokens must not see how much padding is left of them
        columns["position_ids"] = (attention.cumsum(1) - attention) * attention
    logits, _, values = model(**columns)
    logits = logits[:, :-1] / temperature
    labels = inputs["decoder_input_ids" if is_encoder_decoder else "input_ids"][:, 1:]
    return logprobs_from_logits(logits, labels), logits, values[:, :-1]


def as_batch(mask: Tensor, old_logprobs: Tensor, advantages: Tensor, values: Tensor, returns: Tensor) -> PolicyBatch:
    """Padded tensors as the record of a micro-batch; its tokens are nowhere, the model has run already. [B, T] each"""
    nothing: Any = None
    return PolicyBatch(
        packed=nothing,
        counted=mask.sum(),
        mask_BT=mask,
        old_logprobs_BT=old_logprobs,
        advantages_BT=advantages,
        values_BT=values,
        returns_BT=returns,
    )


def show_tokens(tokenizer: Any, tokens: Tensor, masks: Tensor) -> None:
    """Print tokens in two colours, by their mask."""
    from rich.text import Text

    text = Text()
    for token, mask in zip(tokens.tolist(), masks.tolist(), strict=True):
        text.append(visible(tokenizer.decode([token])), style="black on deep_sky_blue3" if mask else "black on cyan3")
        text.append(" ")
    console().print(text)
