"""Run by test_ddpo.py on two ranks: DDP and FSDP2 train the same diffusion models, save them, and resume."""

from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from ddpo_cases import build, letters_prompt, recorded, trainer
from sharded_runs import shard_on_the_cpu

from trl.models.unwrap import is_fsdp2
from trl.models.weight_files import on_host, saved_whole
from trl.trainer import ddpo_trainer

RUNS = [
    ("lora", "ddp", ""), ("whole", "ddp", ""), ("lora", "fsdp2", ""),
    ("lora", "fsdp2", "lora-fsdp2"), ("whole", "fsdp2", "whole-ddp"),
]  # fmt: skip
"""pipeline, engine, and the run whose first checkpoint it resumes from; accelerate never leaves FSDP again"""


def name_of(kind: str, engine: str, resumed: str) -> str:
    return f"{kind}-{engine}{'-resumed' * bool(resumed)}"


def train_all(rank: int, world: int, folder: Path) -> None:
    """Do all runs and write what came of them to a file of the rank.

    The optimizer is SGD with momentum: Adam would make whole steps of the rounding of a gradient near zero.
    """
    torch.set_num_threads(1)
    shard_on_the_cpu()
    ddpo_trainer.create_optimizer = lambda config, weights: torch.optim.SGD(weights, lr=1.0, momentum=0.5)
    found = {name_of(*run): train(folder, *run) for run in RUNS}
    torch.save(found, folder / f"rank{rank}")


def train(folder: Path, kind: str, engine: str, resumed: str) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    own, before = folder / name_of(kind, engine, resumed), folder / resumed / "logs" / "checkpoints" / "checkpoint_1"
    plugin = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap" if kind == "lora" else "no_wrap"}
    built = trainer(
        own, build(kind, folder / "sd"), prompt=letters_prompt, num_epochs=3, sample_num_steps=2,
        sample_num_batches_per_epoch=1, train_batch_size=2, resume_from=str(before) if resumed else "",
        accelerator_kwargs={"fsdp_plugin": FullyShardedDataParallelPlugin(**plugin)} if engine == "fsdp2" else {},
    )  # fmt: skip
    unet, main = built.sd_pipeline.unet, built.accelerator.is_main_process
    assert is_fsdp2(unet) == (engine == "fsdp2")
    start, begin, logs = whole(unet.state_dict()), built.first_epoch, recorded(built)
    built.train()
    if engine == "fsdp2":
        built.save_pretrained(own / "saved")
    with saved_whole(unet, keep=main):
        part = torch.nn.ModuleDict({"unet": unet}).state_dict() if main else {}
    return {
        "begin": begin,
        "start": start,
        "weights": whole(unet.state_dict()),
        "as a part": {key: value.shape for key, value in part.items()},
        "moments": whole({key: each["momentum_buffer"] for key, each in built.optimizer.state_dict()["state"].items()}),
        "approx_kl": [entry["approx_kl"] for entry in logs if "approx_kl" in entry],
        "reward": [entry["reward_mean"] for entry in logs if "reward_mean" in entry],
    }


def whole(tensors: dict) -> dict:
    return {key: value.detach().clone() for key, value in on_host(tensors, keep=True).items()}
