"""How a run fits into the memory of its device: what its settings left open is chosen before it begins, and said."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from trl.models import memory
from trl.models.memory import Load, Open, Plan, RankMemory, fitted, memory_of
from trl.models.precision import HALF, optimizer_states, size_text

logger = logging.getLogger(__name__)

ZERO = {1: "zero1", 2: "zero2", 3: "zero3"}


def plan_of(
    model: nn.Module,
    frozen: Sequence[nn.Module],
    load: Load,
    *,
    optimizer: Any,
    left: Open,
    checkpointing: bool,
    mixed: str | None,
    device: torch.device,
    engine: str,
    ranks: int,
) -> Plan | None:
    """How this run fits on this device; None where its memory cannot be told.

    optimizer: the object, or its name. checkpointing: it is set already. mixed: accelerate's mixed precision. engine:
    a key of `memory.SHARED_OUT`.
    """
    states = optimizer_states(optimizer)
    half = mixed in ("bf16", "fp16") or all(weight.dtype in HALF for weight in model.parameters())
    of = partial(
        memory_of, model, frozen=frozen, states=2.0 if states is None else states, computed=2 if half else 4,
        ranks=ranks, engine=engine,
    )  # fmt: skip
    if of(load) is None:
        return None

    def estimate(load: Load, again: bool, offload: bool) -> RankMemory:
        found = of(load, checkpointing=again or checkpointing, offload=offload)
        assert found is not None
        return found

    plan = fitted(estimate, load, memory.room(device), left, device.type)
    return plan if ranks == 1 else of_all(plan)


def of_all(plan: Plan) -> Plan:
    """Collective: the plan of the rank that has least room, as all must compute alike."""
    plans = gather_object([plan])
    return max(plans, key=lambda one: (one.checkpointing, one.offload, one.before is not None))  # type: ignore[no-any-return]


def said_of(plan: Plan, load: Load) -> list[str]:
    """One line for what was chosen, or for what does not fit; nothing where all fits as it is."""
    if plan.room is None or plan.before is None:
        return []
    chosen = []
    if plan.load.rows < load.rows:
        chosen.append(f"sampling_max_rows={plan.load.rows:,}")
    if plan.checkpointing:
        chosen.append("gradient_checkpointing=True" + (" with offload" if plan.offload else ""))
    if plan.load.tokens < load.tokens:
        chosen.append(f"passes of at most {plan.load.tokens:,} tokens")
    needs = f"about {size_text(plan.before.total)} needed, {size_text(plan.room)} there"
    if plan.fits:
        return [f"memory plan: {needs}; {', '.join(chosen)}: {size_text(plan.memory.total)}"]
    so = f"; even with {', '.join(chosen)} {size_text(plan.memory.total)}" if chosen else ""
    return [
        f"memory plan: {needs}{so}, of which {largest(plan.memory)}; it may not fit: an adapter (peft_config), a "
        "smaller optimizer (optim='adafactor', 'adamw_8bit' on a GPU), shorter rows or fsdp2 on more GPUs take less"
    ]


def largest(found: RankMemory) -> str:
    """The two largest parts."""
    parts = sorted(asdict(found).items(), key=lambda part: -part[1])[:2]
    return " and ".join(f"{name} {size_text(size)}" for name, size in parts)


def facts_of(plan: Plan, load: Load) -> dict[str, Any]:
    """The plan for a record of the run: bytes, by part and in all, and what was chosen."""
    parts = {name: round(size) for name, size in asdict(plan.memory).items() if size}
    chosen: Mapping[str, Any] = {
        "gradient_checkpointing": plan.checkpointing or None,
        "tokens_of_a_pass": plan.load.tokens if plan.load.tokens < load.tokens else None,
        "sampling_max_rows": plan.load.rows if plan.load.rows < load.rows else None,
    }
    return {
        "bytes": round(plan.memory.total),
        "parts": parts,
        "tokens_of_a_pass": plan.load.tokens,
        "room": None if plan.room is None else round(plan.room),
        "chosen": {name: value for name, value in chosen.items() if value is not None},
    }
