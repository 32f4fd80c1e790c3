"""The language-model head on scored positions only, in chunks: `[S, V]` logits never exist whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trl.models.gradient_place import Place, place_of
from trl.models.onednn import rows_times, suits

CHUNK_ELEMENTS = 3 * 2**21
"""logits that exist at a time (24 MiB in float32: larger blocks glibc takes from the system anew each time)"""
KEPT_ELEMENTS = 2**25
"""softmaxes of logits that a trained head keeps from forward to backward (128 MiB in float32)"""

CACHED_ELEMENTS = 2**19
"""logits that a CPU exponentiates at a time: they stay in its cache from one pass over them to the next"""

LARGE_HEAD = 2**20
"""elements of a weight that oneDNN multiplies faster than the BLAS does"""


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


@dataclass(frozen=True)
class _Slope:
    """d log p(target) / d logits of a chunk, before the division by the sum of its exponentials."""

    weights_SV: Tensor
    """exp(logits - their maximum), times the slope of the soft-cap where there is one"""
    total_S: Tensor
    """sums of the exponentials"""
    chosen_S: Tensor
    """the entry at the target, in float32: in half precision 1 - p would lose its digits where p is near 1"""

    def times(self, targets_S: Tensor, grad_S: Tensor) -> Tensor:
        """The slope times a number for each row, [S, V]; takes the place of the weights."""
        slope = self.weights_SV.mul_((-grad_S / self.total_S)[:, None])
        return slope.scatter_(1, targets_S[:, None], (grad_S * self.chosen_S)[:, None].to(slope.dtype))


def _exponentiate(logits: Tensor, want_mean: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The maxima, the sums of exp(logits - maximum) and, if wanted, those of that times (logits - maximum). [S] each

    The exponentials take the place of the logits.
    """
    peak = logits.amax(-1, keepdim=True)
    below = logits.sub_(peak)
    if not want_mean:
        return peak.squeeze(1), below.exp_().sum(-1), None
    weights = below.exp()
    mean = torch.linalg.vecdot(weights, below)
    return peak.squeeze(1), below.copy_(weights).sum(-1), mean


class _LinearLogprobs(torch.autograd.Function):
    """log softmax(post(h Wᵀ + b) / temperature) at the targets, and the entropy (not differentiable).

    A frozen head needs only the gradient of h, known up to a factor per row in the forward pass: the logits are
    then computed once. A trained head keeps the softmax of the first `KEPT_ELEMENTS` logits, and computes the rest
    again in the backward pass. Each pass over a chunk of logits counts, so all of them work in place.
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
        place: Place | None,
    ) -> tuple[Tensor, Tensor]:
        count = hidden.shape[0]
        logprobs = torch.empty(count, dtype=torch.float32, device=hidden.device)
        entropies = torch.zeros_like(logprobs)
        head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        gradient = torch.empty_like(hidden) if learns and hidden.requires_grad and not head_trains else None
        room = KEPT_ELEMENTS if learns and head_trains else 0
        ctx.kept = []
        for part in _chunks(count, head.vocabulary):
            logits = _LinearLogprobs.logits(hidden[part], weight, bias, head, temperature)
            room -= logits.numel()
            learned = gradient is not None or room >= 0
            capped = _LinearLogprobs.capped(logits, head, temperature) if learned else None
            logprobs[part], entropies[part], slope = _LinearLogprobs.measure(
                logits, targets[part], want_entropy, capped
            )
            if gradient is not None:
                factor_S = torch.full_like(slope.total_S, head.scale / temperature)
                gradient[part] = slope.times(targets[part], factor_S).to(weight.dtype) @ weight
            elif learned:
                ctx.kept.append(replace(slope, weights_SV=slope.weights_SV.to(weight.dtype)))
        ctx.head, ctx.temperature, ctx.place = head, temperature, place
        ctx.save_for_backward(hidden, weight, bias, targets, gradient)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, temperature: float) -> Tensor:
        full = len(hidden) == chunk_rows(head.vocabulary)  # always one shape: oneDNN makes a program for each it meets
        fast = full and hidden.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")
        multiply = rows_times if fast and suits(weight, LARGE_HEAD) else torch.nn.functional.linear
        logits = multiply(hidden, weight, bias).float()
        factor = head.scale if head.softcap is not None else head.scale / temperature
        if factor != 1.0:
            logits = logits.mul_(factor)
        if head.softcap is not None:
            logits = logits.div_(head.softcap).tanh_().mul_(head.softcap / temperature)
        return logits

    @staticmethod
    def capped(logits: Tensor, head: Head, temperature: float) -> Tensor | None:
        return None if head.softcap is None else 1 - (logits * (temperature / head.softcap)) ** 2

    @staticmethod
    def measure(
        logits: Tensor, targets: Tensor, want_entropy: bool, capped: Tensor | None
    ) -> tuple[Tensor, Tensor, _Slope]:
        """log p of the targets, the entropies (0 unless wanted) and the slope, which takes the logits' place."""
        chosen_S, peak_S = logits.gather(1, targets[:, None]).squeeze(1), torch.empty_like(logits[:, 0])
        total_S, mean_S = torch.empty_like(peak_S), torch.zeros_like(peak_S)
        rows = max(1, CACHED_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            peak_S[part], total_S[part], mean = _exponentiate(logits[part], want_entropy)
            if mean is not None:
                mean_S[part] = mean
        log_total_S = total_S.log()
        logprobs_S = chosen_S - peak_S - log_total_S
        entropies_S = log_total_S - mean_S / total_S if want_entropy else mean_S
        slope_S = -logprobs_S.expm1()
        if capped is not None:
            logits.mul_(capped)
            slope_S = slope_S * capped.gather(1, targets[:, None]).squeeze(1)
        return logprobs_S, entropies_S, _Slope(logits, total_S, slope_S)

    @staticmethod
    def backward(ctx: Any, grad_S: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, gradient = ctx.saved_tensors
        if gradient is not None:
            return (gradient * grad_S[:, None].to(gradient.dtype), *[None] * 8)
        wants_hidden = ctx.needs_input_grad[0]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if weight.requires_grad and ctx.place is None else None
        grad_bias = torch.zeros_like(bias) if bias is not None and bias.requires_grad else None
        kept, ctx.kept = ctx.kept[::-1], []
        for part in _chunks(hidden.shape[0], ctx.head.vocabulary):
            if kept:
                of_chunk = kept.pop()
            else:
                logits = _LinearLogprobs.logits(hidden[part], weight, bias, ctx.head, ctx.temperature)
                capped = _LinearLogprobs.capped(logits, ctx.head, ctx.temperature)
                of_chunk = _LinearLogprobs.measure(logits, targets[part], False, capped)[2]
            slope = of_chunk.times(targets[part], grad_S[part] * (ctx.head.scale / ctx.temperature)).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = slope @ weight
            if ctx.place is not None:
                ctx.place.add_product(slope.t(), hidden[part])
            elif grad_weight is not None:
                grad_weight.addmm_(slope.t(), hidden[part])
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        return grad_hidden, grad_weight, grad_bias, *[None] * 6


def token_logprobs(
    head: Head, hidden_SD: Tensor, target_S: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """log p of the targets (differentiable) and entropies (detached; zeros unless asked for). [S], [S] float32"""
    if type(head.module) is nn.Linear:
        module = head.module
        return _LinearLogprobs.apply(  # type: ignore[no-any-return]
            hidden_SD, module.weight, module.bias, target_S, head, temperature, entropy, torch.is_grad_enabled(),
            place_of(module.weight),
        )  # fmt: skip
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
