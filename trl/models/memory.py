"""The memory of one process by formula, before anything is loaded: which engine a model of this size needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from trl.kernels.head_tiles import CACHED_TILE, KEPT_ELEMENTS

SHARED_OUT: dict[str, frozenset[str]] = {
    "ddp": frozenset(),
    "zero1": frozenset({"optimizer"}),
    "zero2": frozenset({"optimizer", "gradients"}),
    "zero3": frozenset({"optimizer", "gradients", "weights", "reference"}),
    "fsdp2": frozenset({"optimizer", "gradients", "weights", "reference"}),
}
"""engine -> what each process holds its share of"""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one process at the peak of a step."""

    weights: float
    gathered: float
    """what FSDP2 and ZeRO-3 put together for a pass: embeddings, head, and two blocks"""
    gradients: float
    """with the buckets in which DDP sends them"""
    optimizer: float
    reference: float
    activations: float
    head: float
    """probabilities that the head keeps for its backward pass"""
    rollout: float
    """whole weights of a sampler beside sharded ones, and its keys and values"""

    @property
    def total(self) -> float:
        """At the peak of the update or of the sampling before it, whose memory is given back."""
        update = self.gathered + self.gradients + self.activations + self.head
        return self.weights + self.optimizer + self.reference + max(update, self.rollout)


@dataclass(frozen=True)
class _Sizes:
    """Numbers of a decoder: weights, those outside its blocks, those of a block; widths of its layers."""

    weights: int
    outside: int
    block: int
    layers: int
    width: int
    inner: int
    key_values: int
    words: int


def _sizes(config: Any) -> _Sizes:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    weights = sum(weight.numel() for weight in model.parameters())
    blocks = next(each for each in model.modules() if isinstance(each, torch.nn.ModuleList))
    inside = sum(weight.numel() for weight in blocks.parameters())
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return _Sizes(
        weights, weights - inside, inside // len(blocks), len(blocks), text.hidden_size, inner, 2 * heads * size,
        text.vocab_size,
    )  # fmt: skip


def memory_per_rank(
    config: Any,
    *,
    engine: str = "ddp",
    ranks: int = 1,
    tokens: int = 0,
    scored: int | None = None,
    stored: int = 4,
    computed: int = 4,
    states: float = 2.0,
    trained: int | None = None,
    reference: bool = False,
    checkpointing: bool = False,
    rollout_tokens: int = 0,
) -> RankMemory:
    """What a process of `ranks` holds at most while it trains a decoder with this config. Bytes.

    engine: a key of `SHARED_OUT`. tokens, scored: of a micro-batch, and how many of them the loss reads (None: all).
    stored, computed: bytes of a stored weight, and of a number in a pass (bf16: 2). states: numbers that the optimizer
    keeps for each weight (Adam 2, SGD 0). trained: how many weights (LoRA); None: all. rollout_tokens: prompt and
    completion tokens that a process samples at a time. What a framework and its libraries take comes on top: some
    300 MB on a CPU, 0.5 to 1 GB on a GPU.
    """
    if engine not in SHARED_OUT:
        raise ValueError(f"engine={engine!r}: choose one of {', '.join(SHARED_OUT)}")
    of, shared = _sizes(config), SHARED_OUT[engine]
    learned = of.weights if trained is None else trained

    def share(what: str) -> float:
        return 1 / ranks if what in shared else 1.0

    whole = "weights" not in shared or ranks == 1
    a_layer = 6 * of.width + of.key_values + 4 * of.inner
    kept = of.layers * (of.width if checkpointing else a_layer) + (a_layer if checkpointing else 0) + 2 * of.width
    probabilities = min((tokens if scored is None else scored) * of.words, KEPT_ELEMENTS)
    copies = 2 if engine == "ddp" and ranks > 1 else 1
    sampler = 0 if whole or not rollout_tokens else of.weights * stored
    return RankMemory(
        weights=of.weights * stored * share("weights"),
        gathered=0.0 if whole else (of.outside + 2 * of.block) * float(computed),
        gradients=learned * stored * share("gradients") * copies,
        optimizer=learned * stored * states * share("optimizer"),
        reference=of.weights * stored * share("reference") * reference,
        activations=float(tokens * kept * computed),
        head=float((probabilities + CACHED_TILE) * 4) if tokens else 0.0,
        rollout=sampler + float(rollout_tokens * of.layers * of.key_values * computed),
    )
