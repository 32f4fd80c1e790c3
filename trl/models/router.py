"""The balance loss of a mixture's routers, which keeps its experts equally busy (eq. 4 to 6 of arXiv:2101.03961)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trl.data.records import PackedBatch, moved_ahead
from trl.losses.loss_sum import LossSum
from trl.models.forward import Routes, watched_routers
from trl.models.unwrap import below_peft, below_value_head, is_encoder_decoder

FUNCTION = "load_balancing_loss_func"
"""what transformers calls it, in the module of each mixture that has one"""


def balance_weight(model: nn.Module, asked: float | None) -> float:
    """The weight of the balance loss: as asked, else as the model's config says; 0 where there is nothing to balance.

    ValueError for a mixture of which transformers has no such loss, if one was asked for.
    """
    network = below_peft(below_value_head(model))
    text: Any = network.config.get_text_config()  # type: ignore[operator, union-attr]
    own = next((v for v in (getattr(network, name, None) for name in ("router_aux_loss_coef", "aux_loss_coef"))
                if v is not None), None)  # fmt: skip
    if _function_of(network) is not None and own is not None and not is_encoder_decoder(model):
        if asked is not None:
            return float(asked)
        says = getattr(network.config, "output_router_logits", False) or getattr(text, "output_router_logits", False)
        return float(own) if says else 0.0
    if asked and any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise ValueError(
            f"router_aux_loss_coef={asked!r}: transformers has no balance loss for {type(network).__name__}; leave it "
            "out"
        )
    return 0.0


def _function_of(network: nn.Module) -> Callable[..., Tensor] | None:
    modules = (sys.modules.get(kind.__module__) for kind in type(network).__mro__)
    return next((function for module in modules if (function := getattr(module, FUNCTION, None))), None)


def with_balance(model: nn.Module, weight: float, function: Callable[[], LossSum]) -> LossSum:
    """The loss, plus `weight` times the balance loss of the passes with gradient that it makes.

    The balance loss is that of the tokens of these passes; in the mean of an optimizer step each micro-batch's weighs
    as its count does. It is a product of two means over tokens, so it is not that of the step's tokens together.
    """
    seen: list[Routes] = []
    with watched_routers(seen):
        result = function()
    if not seen:
        return result
    auxiliary = balance_loss(model, seen)
    share = auxiliary.detach() * result.count
    total = result.total + weight * auxiliary.to(result.total.device) * result.count
    return LossSum(total, result.count, result.metrics | {"aux_loss": (share, result.count)})


def balance_loss(model: nn.Module, seen: list[Routes]) -> Tensor:
    """The balance loss of passes, those of several weighed by their tokens; each token of a row counts once. []"""
    network: Any = below_peft(below_value_head(model))
    function = _function_of(network)
    assert function is not None
    losses, tokens = [], []
    for logits, packed, mask_BL in seen:
        if not logits or not logits[0].requires_grad:
            raise ValueError(
                f"router_aux_loss_coef: the routers of {type(network).__name__} give nothing to learn from (frozen, "
                "or reentrant checkpoints: set gradient_checkpointing_kwargs={'use_reentrant': False}); leave it out"
            )
        if packed.piece is not None:
            logits = tuple(packed.piece.whole(of_layer) for of_layer in logits)
        weight_BL = token_counts(packed)[None] if mask_BL is None else _with_virtual(mask_BL, len(logits[0]))
        losses.append(function(logits, network.num_experts, network.num_experts_per_tok, weight_BL))
        tokens.append(weight_BL.sum())
    weight = torch.stack(tokens).float()
    return (torch.stack(losses) * (weight / weight.sum()).to(losses[0].device)).sum()


def token_counts(packed: PackedBatch) -> Tensor:
    """In how many rows of the batch each packed token stands. [N]"""
    rows = [0] * len(packed.segments)
    for segment in packed.row_segment:
        while segment >= 0:
            rows[segment] += 1
            segment = packed.segments[segment].parent
    counts_N = torch.zeros(packed.segments[-1].end, dtype=torch.float32)
    for (start, end, _), count in zip(packed.segments, rows, strict=True):
        counts_N[start:end] = count
    return moved_ahead(counts_N, packed.ids_N.device)


def _with_virtual(mask_BL: Tensor, routed: int) -> Tensor:
    """The mask with ones for the tokens that a PEFT adapter has put before each row."""
    return nn.functional.pad(mask_BL, (routed // len(mask_BL) - mask_BL.shape[1], 0), value=1)
