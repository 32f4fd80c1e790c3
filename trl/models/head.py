"""The language-model head on scored positions only, in chunks: `[S, V]` logits never exist whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trl.kernels.head_tiles import LinearLogprobs
from trl.kernels.step_memory import place_of

CHUNK_ELEMENTS = 3 * 2**21
"""logits that exist at a time (24 MiB in float32: glibc takes larger blocks from the system anew each time)"""


def chunk_rows(vocabulary: int) -> int:
    """Scored positions whose logits exist at a time."""
    return max(16, CHUNK_ELEMENTS // vocabulary)


@dataclass(frozen=True)
class Head:
    """An output embedding and what the model does to its logits afterwards.

    `project` is the module's own forward, for a function that runs inside a call of the module (`forward.in_head`).
    """

    module: nn.Module
    vocabulary: int
    scale: float = 1.0
    """logits are multiplied by it (cohere's `logit_scale`, granite's `1 / logits_scaling`)"""
    softcap: float | None = None
    """then softcap * tanh(logits / softcap) (gemma2, gemma3)"""
    project: Callable[[Tensor], Tensor] | None = None
    """None: the module is called, with its hooks"""

    @property
    def linear(self) -> nn.Linear | None:
        """The module if it computes `nn.Linear`, as the classes that FSDP makes of it do; an adapter does not."""
        plain = isinstance(self.module, nn.Linear) and type(self.module).forward is nn.Linear.forward
        return self.module if plain else None  # type: ignore[return-value]

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """[S, V] in float32."""
        logits = (self.project or self.module)(hidden_SD).float()
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

    Logits are computed again in the backward pass. The first axis of the tensors that `function` returns is the chunk.
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


def token_logprobs(
    head: Head, hidden_SD: Tensor, target_S: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """log p of the targets (differentiable) and entropies (detached; zeros unless asked for). [S], [S] float32"""
    if (module := head.linear) is not None:
        return LinearLogprobs.apply(  # type: ignore[no-any-return]
            hidden_SD, module.weight, module.bias, target_S, head, temperature, entropy, torch.is_grad_enabled(),
            place_of(module.weight),
        )  # fmt: skip
    logprobs, entropies = logprobs_and_entropy(head, hidden_SD, target_S, temperature)
    return logprobs, entropies.detach()


def mean_logits(head: Head, hidden_SD: Tensor) -> Tensor:
    """Mean of each position's logits over the vocabulary, detached. [S]"""
    with torch.no_grad():
        if (module := head.linear) is not None and head.softcap is None:
            bias = 0.0 if module.bias is None else module.bias.float().mean()
            return (hidden_SD.float() @ module.weight.float().mean(0) + bias) * head.scale
        return map_logits(head, hidden_SD, lambda logits: (logits.mean(-1),))[0]


def log_collision(head: Head, hidden_SD: Tensor) -> Tensor:
    """`log sum_v p(v)^2` of each position: the log-probability of an average sample, detached. [S]"""
    with torch.no_grad():
        return map_logits(head, hidden_SD, lambda logits: ((2 * logits.log_softmax(-1)).logsumexp(-1),))[0]
