"""DeepSpeed ZeRO on ranks of a CPU: accelerate turns it on for accelerators only."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def zero_on_the_cpu() -> None:
    """Make accelerate take its DeepSpeed plugin on ranks of a CPU too, and DeepSpeed compile nothing there."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.comm.torch

    deepspeed.comm.torch.build_shm_op = lambda: None
    make = AcceleratorState.__init__

    def init(self: Any, *args: Any, deepspeed_plugin: Any = None, **kwargs: Any) -> None:
        make(self, *args, deepspeed_plugin=deepspeed_plugin, **kwargs)
        if deepspeed_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.DEEPSPEED
            deepspeed_plugin.set_mixed_precision(self._mixed_precision)
            deepspeed_plugin.select(_from_accelerator_state=True)
            self.deepspeed_plugins = deepspeed_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = init


def zero_config(stage: int) -> dict[str, Any]:
    """A DeepSpeed config for this stage that shards the smallest weights too."""
    return {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip


def zero_plugin(stage: int) -> Any:
    """The same for an accelerator that no config of transformers makes."""
    from accelerate.utils import DeepSpeedPlugin

    return DeepSpeedPlugin(hf_ds_config={**zero_config(stage), "train_micro_batch_size_per_gpu": 1})


def whole(weight: torch.Tensor) -> torch.Tensor:
    """A weight, which ZeRO-3 may hold in parts; collective where it does."""
    if not hasattr(weight, "ds_id"):
        return weight
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone()


def begin_whole() -> None:
    """Forget an earlier trainer's ZeRO-3, in which models would be made in parts and with other random numbers."""
    unset_hf_deepspeed_config()


ROWS = (
    "SFT", "SFT, tied head", "SFT, gradient checkpointing", "Reward", "DPO", "DPO, moving reference",
    "DPO, precomputed reference", "KTO", "GRPO", "GRPO, groups across ranks", "GRPO, layer by layer", "RLOO",
)  # fmt: skip
ENGINES = {
    "zero3": ROWS,
    "zero3-lora": ("SFT", "DPO", "GRPO"),
    "zero2": ("SFT", "GRPO"),
}
"""an engine -> the rows of `sharded_runs.RUNS` that are run on it here"""


def deepspeed_folder() -> Path:
    """Where `make test` puts DeepSpeed, beside the other packages' folder."""
    return Path(sys.prefix) / "deepspeed"


def train_engines(rank: int, world: int, path: str) -> None:
    """Train the rows of each engine, or in one process each row once, and write what came of it to `path`."""
    from sharded_runs import train

    torch.set_num_threads(1)
    if world > 1:
        zero_on_the_cpu()
        runs = [(engine, row) for engine, rows in ENGINES.items() for row in rows]
    else:
        runs = [("one", row) for row in ROWS] + [("lora", row) for row in ENGINES["zero3-lora"]]
    found = {}
    for engine, row in runs:
        name = engine if world > 1 else "one"
        found[engine, row] = train(world, name, row, lora=engine.endswith("lora"))
    torch.save(found, f"{path}-{rank}")
