"""Log-probabilities, values and scores of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trl.data.records import PackedBatch
from trl.models.forward import encoder_decoder_inputs, in_head, in_module, is_encoder, padded_inputs_of, virtual_tokens
from trl.models.head import Head, logprobs_and_entropy, token_logprobs
from trl.models.unwrap import below_accelerate, below_peft, below_value_head, is_encoder_decoder


@dataclass(frozen=True)
class Scores:
    """Numbers for the scored tokens; 0 where a position is not scored."""

    logprobs_BT: Tensor
    entropy_BT: Tensor | None = None
    values_BT: Tensor | None = None


def score(
    model: nn.Module,
    packed: PackedBatch,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    entropy_gradient: bool = False,
    values: bool = False,
) -> Scores:
    """Log-probabilities of the scored tokens, and on demand entropies and the value head's values. [B, T] each

    A token's value is the one at the position that predicts it. `entropy_gradient` makes the entropies
    differentiable, at the price of a second pass through the head.
    """
    v_head = below_accelerate(model).v_head if values else None
    names = ["logprobs_BT"] + ["entropy_BT"] * (entropy or entropy_gradient) + ["values_BT"] * values

    def measure(head: Head, states_SD: Tensor) -> list[Tensor]:
        if entropy_gradient:
            found = logprobs_and_entropy(head, states_SD, packed.target_S, temperature)
        else:
            found = token_logprobs(head, states_SD, packed.target_S, temperature=temperature, entropy=entropy)
        columns = dict(zip(("logprobs_BT", "entropy_BT"), found, strict=True))
        if v_head is not None:
            columns["values_BT"] = v_head(states_SD[None]).float().squeeze(0).squeeze(-1)
        return [columns[name] for name in names]

    columns_S = in_head(model, packed, measure)
    return Scores(**{name: packed.spread(column_S) for name, column_S in zip(names, columns_S, strict=True)})


def logits_and_labels(model: nn.Module, packed: PackedBatch) -> tuple[Tensor, Tensor]:
    """Whole logits of the padded rows, for metrics that need them, and labels (-100 where nothing is scored).

    [B, L, V] and [B, L], a label at its own token; [B, T, V] and [B, T] of an encoder-decoder's answers.
    """
    if is_encoder_decoder(model):
        logits, place = model(**encoder_decoder_inputs(model, packed)).logits, packed.slot_S
    else:
        logits = model(**padded_inputs_of(model, packed)).logits
        place = packed.position_N[packed.scored_S] + 1 + virtual_tokens(packed, logits)
    labels = torch.full(logits.shape[:2], -100, device=logits.device)
    labels[packed.row_S, place] = packed.target_S
    return logits, labels


def classifier_of(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into scores, in models for sequence or token classification."""
    network = below_peft(model)
    for name in ("score", "classifier", "classification_head"):
        if isinstance(getattr(network, name, None), nn.Module):
            return getattr(network, name)  # type: ignore[no-any-return]
    raise ValueError(f"{type(network).__name__} has no score head: load it with AutoModelForSequenceClassification")


def scores_at(model: nn.Module, packed: PackedBatch, index_S: Tensor, row_S: Tensor) -> Tensor:
    """The score head's outputs at packed positions, for causal models (value models, process rewards). [S, labels]"""
    module = classifier_of(model)
    own = module.forward
    (scores_SC,) = in_module(model, module, packed, lambda states_SD: own(states_SD).float(), index_S, row_S)
    return scores_SC


def rewards(model: nn.Module, packed: PackedBatch) -> Tensor:
    """The reward of each row, read at its last real token; encoders read it where they always do. [B]"""
    network = below_value_head(model)
    if network.config.num_labels != 1:
        raise ValueError(f"num_labels={network.config.num_labels}: a reward model has 1")
    if is_encoder(model) or is_encoder_decoder(model):
        inputs = padded_inputs_of(model, packed)
        return model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits[:, 0].float()  # type: ignore[no-any-return]
    rows = torch.arange(packed.rows, device=packed.ids_N.device)
    return scores_at(model, packed, packed.last_B, rows)[:, 0]
