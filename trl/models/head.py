"""The language-model head on scored positions only, in chunks: `[S, V]` logits never exist whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**23
"""logits that exist at a time (32 MiB in float32)"""
KEPT_ELEMENTS = 2**25
"""gradients of logits that a trained head keeps from forward to backward (128 MiB in float32)"""


def chunk_rows(vocabulary: int) -> int:
    """Scored positions whose logits exist at a time."""
    return max(16, CHUNK_ELEMENTS // vocabulary)


@dataclass(frozen=True)
class Head:
    """An output embedding and what the model does to its logits afterwards."""

    module: nn.Module
    vocabulary: int
    scale: float = 1.0
    """logits are multiplied by it (cohere's `logit_scale`, granite's `1 / logits_scaling`)"""
    softcap: float | None = None
    """then softcap * tanh(logits / softcap) (gemma2, gemma3)"""

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """[S, V] in float32."""
        logits = self.module(hidden_SD).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_of(model: Any) -> Head:
    """The head of a transformers or PEFT model; ValueError where it has none."""
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None:
        raise ValueError(f"{type(model).__name__} has no language-model head (`get_output_embeddings()` is None)")
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    if getattr(config, "logits_scaling", None):
        scale /= config.logits_scaling
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(module, config.vocab_size, scale, softcap)


def map_logits(
    head: Head, hidden_SD: Tensor, function: Callable[..., tuple[Tensor, ...]], *columns_S: Tensor
) -> tuple[Tensor, ...]:
    """`function(logits_chunk, *column_chunks)` for every chunk of positions, joined again.

    Logits are computed again in the backward pass; `function` returns tensors whose first axis is the chunk's.
    """

    def of_chunk(hidden: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
        return function(head.logits(hidden), *columns)

    rows = chunk_rows(head.vocabulary)
    pieces = [
        checkpoint(of_chunk, *piece, use_reentrant=False) if torch.is_grad_enabled() else of_chunk(*piece)
        for piece in zip(*(column.split(rows) for column in (hidden_SD, *columns_S)), strict=True)
    ]
    return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))


def entropy_of(logits: Tensor, log_z: Tensor | None = None) -> Tensor:
    """Entropy of softmax(logits) over the last axis, in nats."""
    log_z = torch.logsumexp(logits, -1) if log_z is None else log_z
    return log_z - ((logits - log_z[..., None]).exp() * logits).sum(-1)


def logprobs_and_entropy(
    head: Head, hidden_SD: Tensor, target_S: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log p of the targets and the entropies, both differentiable. [S], [S]"""

    def measure(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits / temperature
        log_z = torch.logsumexp(logits, -1)
        return logits.gather(1, targets[:, None]).squeeze(1) - log_z, entropy_of(logits, log_z)

    both = map_logits(head, hidden_SD, measure, target_S)
    return both[0], both[1]


def _chunks(count: int, vocabulary: int) -> Iterator[slice]:
    rows = chunk_rows(vocabulary)
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


class _LinearLogprobs(torch.autograd.Function):
    """log softmax(post(h Wᵀ + b) / temperature) at the targets, and the entropy (not differentiable).

    A frozen head needs only the gradient of h, known up to a factor per row in the forward pass: the logits are
    then computed once. A trained head keeps the gradients of the first `KEPT_ELEMENTS` logits, and computes the rest
    again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        temperature: float,
        want_entropy: bool,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        count = hidden.shape[0]
        logprobs = torch.empty(count, dtype=torch.float32, device=hidden.device)
        log_zs, entropies = torch.empty_like(logprobs), torch.zeros_like(logprobs)
        head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        gradient = torch.empty_like(hidden) if learns and hidden.requires_grad and not head_trains else None
        room = KEPT_ELEMENTS if learns and head_trains else 0
        ctx.slopes = []
        for part in _chunks(count, head.vocabulary):
            logits = _LinearLogprobs.logits(hidden[part], weight, bias, head, temperature)
            log_z = torch.logsumexp(logits, -1)
            log_zs[part] = log_z
            logprobs[part] = logits.gather(1, targets[part, None]).squeeze(1) - log_z
            if want_entropy:
                entropies[part] = entropy_of(logits, log_z)
            keeps = logits.numel() <= room
            if gradient is None and not keeps:
                continue
            slope = _LinearLogprobs.slope(logits, log_z, targets[part], head, temperature).to(weight.dtype)
            if gradient is not None:
                gradient[part] = slope @ weight
            else:
                room -= slope.numel()
                ctx.slopes.append(slope)
        ctx.head, ctx.temperature = head, temperature
        ctx.save_for_backward(hidden, weight, bias, targets, log_zs, gradient)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, temperature: float) -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight, bias).float()
        factor = head.scale if head.softcap is not None else head.scale / temperature
        if factor != 1.0:
            logits = logits.mul_(factor)
        if head.softcap is not None:
            logits = logits.div_(head.softcap).tanh_().mul_(head.softcap / temperature)
        return logits

    @staticmethod
    def slope(logits: Tensor, log_z: Tensor, targets: Tensor, head: Head, temperature: float) -> Tensor:
        """d logprob / d (h Wᵀ + b), [chunk, V]; overwrites `logits` where nothing needs them afterwards."""
        if head.softcap is None:
            slope = logits.sub_(log_z[:, None]).exp_().neg_()
            slope.scatter_add_(1, targets[:, None], torch.ones_like(log_z)[:, None])
            return slope.mul_(head.scale / temperature) if head.scale != temperature else slope
        capped = 1 - (logits * (temperature / head.softcap)) ** 2
        slope = logits.sub(log_z[:, None]).exp_().neg_()
        slope.scatter_add_(1, targets[:, None], torch.ones_like(log_z)[:, None])
        return slope.mul_(capped).mul_(head.scale / temperature)

    @staticmethod
    def backward(ctx: Any, grad_S: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, log_zs, gradient = ctx.saved_tensors
        if gradient is not None:
            return (gradient * grad_S[:, None].to(gradient.dtype), *[None] * 7)
        wants_hidden = ctx.needs_input_grad[0]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if weight.requires_grad else None
        grad_bias = torch.zeros_like(bias) if bias is not None and bias.requires_grad else None
        slopes, ctx.slopes = ctx.slopes[::-1], []
        for part in _chunks(hidden.shape[0], ctx.head.vocabulary):
            if slopes:
                slope = slopes.pop()
            else:
                logits = _LinearLogprobs.logits(hidden[part], weight, bias, ctx.head, ctx.temperature)
                slope = _LinearLogprobs.slope(logits, log_zs[part], targets[part], ctx.head, ctx.temperature)
            slope = slope.mul_(grad_S[part, None]).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = slope @ weight
            if grad_weight is not None:
                grad_weight.addmm_(slope.t(), hidden[part])
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def token_logprobs(
    head: Head, hidden_SD: Tensor, target_S: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """log p of the targets (differentiable) and entropies (detached; zeros unless asked for). [S], [S] float32"""
    if type(head.module) is nn.Linear:
        module = head.module
        return _LinearLogprobs.apply(  # type: ignore[no-any-return]
            hidden_SD, module.weight, module.bias, target_S, head, temperature, entropy, torch.is_grad_enabled()
        )
    logprobs, entropies = logprobs_and_entropy(head, hidden_SD, target_S, temperature)
    return logprobs, entropies.detach()


def mean_logits(head: Head, hidden_SD: Tensor) -> Tensor:
    """Mean of each position's logits over the vocabulary, detached. [S]"""
    with torch.no_grad():
        if type(head.module) is nn.Linear and head.softcap is None:
            bias = 0.0 if head.module.bias is None else head.module.bias.float().mean()
            return (hidden_SD.float() @ head.module.weight.float().mean(0) + bias) * head.scale
        return map_logits(head, hidden_SD, lambda logits: (logits.mean(-1),))[0]


def log_collision(head: Head, hidden_SD: Tensor) -> Tensor:
    """`log sum_v p(v)^2` of each position: the log-probability of an average sample, detached. [S]"""
    with torch.no_grad():
        return map_logits(head, hidden_SD, lambda logits: ((2 * logits.log_softmax(-1)).logsumexp(-1),))[0]
