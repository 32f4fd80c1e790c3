"""Preference batches as older releases hold them: chosen and rejected padded to one width, with whole logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trl.legacy.collators import pad_to_length
from trl.models.unwrap import is_encoder_decoder


def concatenated_inputs(
    batch: Mapping[str, Any],
    is_encoder_decoder: bool = False,
    label_pad_token_id: int = -100,
    padding_value: int = 0,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """Chosen rows, then rejected rows, padded to one width: `concatenated_{input_ids, attention_mask, labels}`.

    Encoder-decoders get their prompt's ids twice, and the labels of both.
    """
    sides = ("chosen", "rejected")
    width = max(batch[f"{side}_{'labels' if is_encoder_decoder else 'input_ids'}"].shape[1] for side in sides)

    def pad_of(key: str) -> int:
        if "labels" in key or is_encoder_decoder:
            return label_pad_token_id
        return padding_value if key.endswith("_input_ids") else 0

    joined: dict[str, Tensor] = {}
    for side in sides:
        for key, value in batch.items():
            if not key.startswith(side) or not isinstance(value, Tensor) or value.dim() != 2:
                continue
            name = key.replace(side, "concatenated", 1)
            padded = pad_to_length(value, width, pad_of(key))
            joined[name] = torch.cat([joined[name], padded]) if name in joined else padded
    if is_encoder_decoder:
        joined["concatenated_input_ids"] = batch["prompt_input_ids"].repeat(2, 1)
        joined["concatenated_attention_mask"] = batch["prompt_attention_mask"].repeat(2, 1)
    return joined if device is None else {name: value.to(device) for name, value in joined.items()}


def get_batch_logps(
    logits: Tensor,
    labels: Tensor,
    average_log_prob: bool = False,
    label_pad_token_id: int = -100,
    is_encoder_decoder: bool = False,
) -> Tensor:
    """Log-probability of each row's labels, summed (or averaged) over those that are not padding. [B]"""
    if logits.shape[:-1] != labels.shape:
        raise ValueError("Logits (batch and sequence length dim) and labels must have the same shape.")
    if not is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counts = labels != label_pad_token_id
    targets = labels.masked_fill(~counts, 0)
    logprobs = logits.log_softmax(-1).gather(2, targets.unsqueeze(2)).squeeze(2) * counts
    return logprobs.sum(-1) / counts.sum(-1) if average_log_prob else logprobs.sum(-1)


def concatenated_forward(
    model: nn.Module, batch: Mapping[str, Any], label_pad_token_id: int = -100, padding_value: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(chosen_logps, rejected_logps, chosen_logits, rejected_logits)` with one forward of both sides."""
    encoder_decoder = is_encoder_decoder(model)
    device = next(model.parameters()).device
    joined = concatenated_inputs(batch, encoder_decoder, label_pad_token_id, padding_value, device)
    labels = joined["concatenated_labels"]
    inputs = {"input_ids": joined["concatenated_input_ids"], "attention_mask": joined["concatenated_attention_mask"]}
    if encoder_decoder:
        inputs["labels"] = labels
    logits = model(**inputs, use_cache=False).logits.float()
    logps = get_batch_logps(logits, labels, False, label_pad_token_id, encoder_decoder)
    pairs = batch["chosen_labels"].shape[0]
    return logps[:pairs], logps[pairs:], logits[:pairs], logits[pairs:]
