"""The rows: what is done, against whom, and the ratio that is aimed at."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness import TOLERANCE


@dataclass(frozen=True)
class Row:
    """A job, the same on both sides unless `peer_job` names another."""

    name: str
    work: str
    peer: str | None
    """a key of `environments.PEERS`; None: nobody does the same"""
    setting: str
    """how the peer is set up, in words"""
    job: str
    peer_job: str | None = None
    ours: Mapping[str, Any] = field(default_factory=dict)
    theirs: Mapping[str, Any] = field(default_factory=dict)
    target: float | None = None
    """theirs over ours in CPU seconds of a step, at least"""
    memory_target: float | None = None
    seconds_target: float | None = None
    """ours alone, at most"""
    tolerance: float = TOLERANCE
    per_unit: bool = False
    """what is done differs a little (drawn lengths): cost for each token"""
    compares: tuple[str, ...] | None = None
    """what the gate looks at; None: everything that the jobs report"""
    seeds: bool = False
    """every pair has a seed of its own"""
    real: bool = False
    """on the real model and real text, which `trl quickstart` fetches"""


DPO = "DPO step: 8 pairs, prompt ~200, completion ~60"
SFT = "SFT step: 16 prompt-completion rows, ~250 tokens"
REWARD = "Reward step: 8 pairs, prompt ~200, completion ~60"
KTO = "KTO step: 16 rows, prompt ~200, completion ~60"
GRPO = "GRPO step: 8 prompts x 8, prompt ~200, 64 new tokens, beta 0.04, generation included"
DRAWN = "GRPO step: the same, completions that end by themselves (mean ~25, at most 64)"
PPO = "PPOTrainer.step: batch 32, mini 8, 4 epochs, prompt ~100, response ~40"
LORA = "SFT step with LoRA: SmolLM2-135M, r=16 on all linear layers, 8 rows, prompt ~200, completion ~100"
LORA_DPO = "DPO step with LoRA: the same model, 4 pairs, prompt ~200, completion ~50"
NOW, OLD, PLAIN_GENERATION = "trl 1.16.0", "trl 0.7.7", "transformers 5.23.0"
NO_CHECKPOINTS = {"gradient_checkpointing": False}
PLAIN = "defaults (float32)"
BEST = "checkpointing off"

ROWS = [
    Row("dpo", DPO, NOW, PLAIN, "dpo", target=8, memory_target=4),
    Row(
        "dpo-best",
        DPO,
        NOW,
        BEST + ", padding-free",
        "dpo",
        theirs={**NO_CHECKPOINTS, "padding_free": True},
        target=8,
        memory_target=4,
    ),
    Row("sft", SFT, NOW, PLAIN, "sft", target=4),
    Row("sft-best", SFT, NOW, BEST, "sft", theirs=NO_CHECKPOINTS, target=4),
    Row("sft-packing", SFT, NOW, BEST + ", packing", "sft", theirs={**NO_CHECKPOINTS, "packing": True}, target=2.5),
    Row("reward", REWARD, NOW, PLAIN, "reward", target=3),
    Row("reward-best", REWARD, NOW, BEST, "reward", theirs=NO_CHECKPOINTS, target=3),
    Row("kto", KTO, NOW, PLAIN, "kto", target=4),
    Row("kto-best", KTO, NOW, BEST, "kto", theirs=NO_CHECKPOINTS, target=4),
    Row("grpo", GRPO, NOW, PLAIN, "grpo", ours={"steps": 1}, theirs={"steps": 1}, target=12, memory_target=4),
    Row(
        "grpo-best",
        GRPO,
        NOW,
        BEST,
        "grpo",
        ours={"steps": 1},
        theirs={"steps": 1, **NO_CHECKPOINTS},
        target=12,
        memory_target=4,
    ),
    Row(
        "grpo-drawn",
        DRAWN,
        NOW,
        BEST,
        "grpo",
        ours={"steps": 1, "model": "stopping"},
        theirs={"steps": 1, "model": "stopping", **NO_CHECKPOINTS},
        target=12,
        memory_target=4,
        tolerance=0.3,
        per_unit=True,
        compares=("tokens a completion",),
        seeds=True,
    ),
    Row("ppo-step", PPO, OLD, PLAIN, "ppo_step", ours={"steps": 1}, theirs={"steps": 1}, target=4, memory_target=2),
    Row("lora", LORA, NOW, BEST, "lora_sft", theirs=NO_CHECKPOINTS, target=3, memory_target=3, real=True),
    Row(
        "lora-dpo",
        LORA_DPO,
        NOW,
        BEST + ", padding-free",
        "lora_dpo",
        theirs={**NO_CHECKPOINTS, "padding_free": True},
        target=3,
        memory_target=3,
        real=True,
    ),
    Row(
        "sampling",
        "Sampling: 8 prompts x 8, 48 tokens each, greedy",
        PLAIN_GENERATION,
        "`generate`",
        "sample_local",
        "sample_generate",
        ours={"tokens": 48},
        theirs={"tokens": 48},
        target=3,
    ),
    Row(
        "sampling-drawn",
        "Sampling: 8 prompts x 8, completions that end by themselves (mean ~27, at most 128)",
        PLAIN_GENERATION,
        "`generate`",
        "sample_local",
        "sample_generate",
        ours={"tokens": 128, "drawn": True},
        theirs={"tokens": 128, "drawn": True},
        target=5,
        tolerance=0.3,
        per_unit=True,
        seeds=True,
    ),
    Row("import", "`import trl`", NOW, "defaults", "imports", seconds_target=0.1),
    Row("help", "`trl --help`", NOW, "defaults", "help", seconds_target=0.5),
]
USEFUL_TARGET = 0.6
"""share of the processor's peak that the useful operations of a step of SFT or DPO reach, at least"""

BY_NAME = {row.name: row for row in ROWS}
