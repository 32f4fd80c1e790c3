"""The memory of one process by formula: which engine a model of this size needs, and how a run fits where it is.

`memory_per_rank` reads a config and loads nothing; `memory_of` reads a model that is there. `room` says what is free,
and `fitted` chooses what was left open so that a run fits into it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from trl.kernels.head_tiles import CACHED_TILE, KEPT_ELEMENTS
from trl.models.unwrap import below_accelerate, below_value_head
from trl.models.zero import elements

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
    """whole weights of a sampler beside sharded ones or laid out for it, and its keys and values"""
    copies: float = 0.0
    """of weights, in half precision, which autocast keeps for a pass"""
    holes: float = 0.0
    """between activations in the heap of a CPU's process, which nothing fits into"""
    process: float = 0.0
    """Python, torch and the other libraries, and what else a process holds"""

    @property
    def total(self) -> float:
        """At the peak of the update or of the sampling before it, whose memory is given back."""
        update = self.gathered + self.gradients + self.activations + self.head + self.copies + self.holes
        return self.process + self.weights + self.optimizer + self.reference + max(update, self.rollout)


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
    return _sizes_of(model, config)


def _sizes_of(model: nn.Module, config: Any) -> _Sizes:
    text = config.get_text_config()
    weights = sum(map(elements, model.parameters()))
    blocks = next(each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each))
    inside = sum(map(elements, blocks.parameters()))
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    if experts := getattr(text, "num_experts_per_tok", None):
        inner = experts * (getattr(text, "moe_intermediate_size", None) or inner)
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
    copies = 2 if engine == "ddp" and ranks > 1 else 1
    sampler = 0 if whole or not rollout_tokens else of.weights * stored
    return RankMemory(
        weights=of.weights * stored * share("weights"),
        gathered=0.0 if whole else (of.outside + 2 * of.block) * float(computed),
        gradients=learned * stored * share("gradients") * copies,
        optimizer=learned * stored * states * share("optimizer"),
        reference=of.weights * stored * share("reference") * reference,
        activations=_activations(of, tokens, checkpointing) * computed,
        head=_head(of, tokens, scored),
        rollout=sampler + float(rollout_tokens * of.layers * of.key_values * computed),
    )


def _activations(of: _Sizes, tokens: int, checkpointing: bool, offload: bool = False, more: float = 0.0) -> float:
    """Numbers that autograd keeps of a pass on the device.

    offload: what is kept of each block is in main memory. more: numbers of a token and a block that an adapter
    adds.
    """
    a_layer = 6 * of.width + of.key_values + 4 * of.inner + more
    kept = (0 if offload else of.layers * of.width) + a_layer if checkpointing else of.layers * a_layer
    return tokens * (kept + 2 * of.width)


def _head(of: _Sizes, tokens: int, scored: int | None) -> float:
    probabilities = min((tokens if scored is None else scored) * of.words, KEPT_ELEMENTS)
    return float((probabilities + CACHED_TILE) * 4) if tokens else 0.0


# -- of a model that is there -----------------------------------------------------------------

PROCESS = 0.62e9
"""bytes of a process that has imported everything and holds nothing yet, on a CPU"""
HOLES = 0.1
"""on a CPU: bytes of the heap that nothing fits into, as a share of the activations (measured)"""


@dataclass(frozen=True)
class Load:
    """What a process computes at a time."""

    tokens: int
    """of the largest forward pass with gradients"""
    longest: int
    """of the longest row, which no pass can cut"""
    scored: int | None = None
    """how many tokens of the pass the loss reads; None: all"""
    rows: int = 0
    """completions that are sampled at a time"""
    row_tokens: int = 0
    """tokens of one of them, its share of a prompt included"""


def memory_of(
    model: nn.Module,
    load: Load,
    *,
    frozen: Iterable[nn.Module] = (),
    states: float = 2.0,
    computed: int = 4,
    checkpointing: bool = False,
    offload: bool = False,
    ranks: int = 1,
    engine: str = "ddp",
) -> RankMemory | None:
    """What this process will hold at most while it trains this model; None for one whose shape is not known.

    frozen: models beside it, which may share its weights. states, computed, engine: as `memory_per_rank` takes them.
    offload: what checkpointing keeps is in main memory.
    """
    network: Any = below_value_head(below_accelerate(model))
    try:
        of = _sizes_of(network, network.config)
    except (AttributeError, StopIteration, TypeError):
        return None
    shared = SHARED_OUT[engine] if ranks > 1 else frozenset[str]()

    def share(what: str) -> float:
        return 1 / ranks if what in shared else 1.0

    own = list(model.parameters())
    seen = {id(weight) for weight in own}
    beside = {id(weight): weight for other in frozen for weight in other.parameters() if id(weight) not in seen}
    weights, others = held(own), held(beside.values())
    learned = held(weight for weight in own if weight.requires_grad)
    on_cpu = own[0].device.type in ("cpu", "meta")
    half = computed < max(weight.element_size() for weight in own)
    adapted = [part for part in network.modules() if hasattr(part, "lora_A")]
    drops = any(getattr(rate, "p", 0) for part in adapted for rate in getattr(part, "lora_dropout", {}).values())
    more = (
        0.0 if not adapted else 0.25 * (6 * of.width + of.inner) if drops else -2.0 * of.inner
    )  # see kernels/adapters
    activations = computed * _activations(of, load.tokens, checkpointing, offload, more)
    whole = weights * (1 - share("weights")) if load.rows else 0.0
    laid_out = min(weights, 2**30) if on_cpu and load.rows else 0.0
    return RankMemory(
        weights=weights * share("weights"),
        gathered=0.0 if "weights" not in shared else (of.outside + 2 * of.block) * float(computed),
        gradients=learned * share("gradients") * (2 if engine == "ddp" and ranks > 1 else 1),
        optimizer=learned * states * share("optimizer"),
        reference=others * share("reference"),
        activations=activations,
        head=_head(of, load.tokens, load.scored),
        rollout=whole + laid_out + float(load.rows * load.row_tokens * of.layers * of.key_values * computed),
        copies=of.weights * 2.0 if half else 0.0,
        holes=activations * HOLES if on_cpu else 0.0,
        process=process_memory(weights + others) if on_cpu else 0.0,
    )


def held(weights: Iterable[torch.Tensor]) -> int:
    """Bytes of these weights, whole."""
    return sum(elements(weight) * weight.element_size() for weight in weights)


def process_memory(weights: float) -> float:
    """Bytes that this process holds beside its weights, some of which may not be read from their file yet."""
    now = resident()
    return max(now - weights, min(now, PROCESS)) if now else PROCESS


def resident() -> float:
    """Bytes that this process holds in main memory now; 0 where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        return float(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0.0


def room(device: torch.device) -> float | None:
    """Bytes that this process may hold on a device: what it has there now, and what is free; None: not known.

    Of main memory, the limit of a container counts too.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    if device.type != "cpu":
        return None
    free = list(_free())
    return min(free) + resident() if free else None


GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""of a container: the folder, the files of its limit and of what is used, and what of that is cached files, which give
way"""


def _free() -> Iterator[float]:
    with suppress(OSError, ValueError, StopIteration, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        yield 1024.0 * float(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    for folder, limit, used, cached in GROUPS:
        with suppress(OSError, ValueError):  # "max": there is none
            most, now = (float(Path(folder, name).read_text()) for name in (limit, used))
            yield max(0.0, most - now + _named(Path(folder, "memory.stat"), cached))


def _named(file: Path, name: str) -> float:
    """The number of a line that begins with this name; 0 where there is none."""
    with suppress(OSError, ValueError):
        rows = map(str.split, file.read_text().splitlines())
        return next((float(row[1]) for row in rows if row[:1] == [name]), 0.0)
    return 0.0


# -- what was left open -----------------------------------------------------------------------

MARGIN = 1.1
"""by how much a prediction is widened: allocators leave gaps"""
LEAST_TOKENS = {"cpu": 256, "cuda": 4096}
"""tokens of a pass below which a device computes slower, so that layers are rather computed again"""


@dataclass(frozen=True)
class Open:
    """What a run's settings left open."""

    checkpointing: bool
    tokens: bool
    rows: bool = False
    offload: bool = False


@dataclass(frozen=True)
class Plan:
    """How a run fits."""

    memory: RankMemory
    room: float | None
    load: Load
    checkpointing: bool
    offload: bool = False
    before: RankMemory | None = None
    """without what was chosen"""

    @property
    def fits(self) -> bool:
        return self.room is None or self.memory.total * MARGIN <= self.room


Estimate = Callable[[Load, bool, bool], RankMemory]
"""`(load, checkpointing, offload) -> memory`"""


def fitted(estimate: Estimate, load: Load, room: float | None, left: Open, kind: str = "cpu") -> Plan:
    """A plan that fits into `room`, with as little changed as that takes; the smallest one where none fits."""
    plain = estimate(load, False, False)
    tried = Plan(plain, room, load, False)
    if tried.fits:
        return tried
    load = _fewer_rows(estimate, load, room) if left.rows else load
    ways = (
        [(False, False)] + [(True, False)] * left.checkpointing + [(True, True)] * (left.checkpointing & left.offload)
    )
    for checkpointing, offload in ways:
        for tokens in _budgets(load, left.tokens, LEAST_TOKENS.get(kind, 4096)):
            smaller = replace(load, tokens=tokens)
            memory = estimate(smaller, checkpointing, offload)
            tried = Plan(memory, room, smaller, checkpointing, offload, plain)
            if tried.fits:
                return tried
    return tried


def _budgets(load: Load, may_cut: bool, least: int) -> Iterator[int]:
    """Tokens of a pass to try: all, then half of that and so on."""
    tokens, floor = load.tokens, max(load.longest, min(least, load.tokens))
    yield tokens
    while may_cut and tokens > floor:
        tokens = max(floor, tokens // 2)
        yield tokens


def _fewer_rows(estimate: Estimate, load: Load, room: float | None) -> Load:
    """As many completions at a time as fit while nothing is trained."""
    rows = load.rows
    while rows > 1 and room is not None:
        alone = estimate(replace(load, tokens=0, rows=rows), False, False)
        if replace(alone, gradients=0.0).total * MARGIN <= room:
            break
        rows //= 2
    return replace(load, rows=rows)
