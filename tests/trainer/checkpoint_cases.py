"""Runs of four steps with a checkpoint after each, which the tests of checkpoints damage, resume and compare."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from conformity import CASES, build, history

ENDED = 7
"""exit code of a process that was ended amid a save"""


@dataclass(frozen=True)
class Kind:
    """How a trainer is built and resumed."""

    start: Callable[..., Any]
    """`(folder, **settings) -> trainer`"""
    resume: Callable[[Any, Any], None]
    """`(trainer, True or a path)`: train, from a checkpoint on"""
    prefix: str = "checkpoint-"
    inside: str = ""
    """where in the folder checkpoints lie"""
    last: int = 4
    """number of the last checkpoint"""

    def checkpoint(self, folder: Path, number: int) -> Path:
        return folder / self.inside / f"{self.prefix}{number}"

    def run(self, folder: Path, resume: Any = None, **settings: Any) -> torch.Tensor:
        """The weights at the end of a run."""
        trainer = self.start(folder, **settings)
        self.resume(trainer, resume)
        return weights(trainer)


def weights(trainer: Any) -> torch.Tensor:
    model = trainer.sd_pipeline.unet if hasattr(trainer, "sd_pipeline") else trainer.model
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def with_transformers(name: str) -> Kind:
    def start(folder: Path, **settings: Any) -> Any:
        return build(name, folder, **{"max_steps": 4, "save_strategy": "steps", "save_steps": 1, **settings})

    return Kind(start, lambda trainer, resume: trainer.train(resume_from_checkpoint=resume))


def start_ppo(folder: Path, **settings: Any) -> Any:
    from ppo_runs import trainer_for

    numbers = {"batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 2, "steps": 16, "max_new_tokens": 4,
               "learning_rate": 1e-2, "save_steps": 1, "save_total_limit": 9, "use_score_scaling": True}  # fmt: skip
    return trainer_for(output_dir=str(folder), **{**numbers, **settings})


def start_ddpo(folder: Path, **settings: Any) -> Any:
    from ddpo_cases import trainer

    AcceleratorState._reset_state(reset_partial_state=True)
    return trainer(folder, **{"num_epochs": 5, "num_checkpoint_limit": 9, "sample_num_steps": 2, **settings})


def resume_ddpo(trainer: Any, resume: Any) -> None:
    """`resume_from` is read when a trainer is built, so it is set and read once more."""
    if resume:
        trainer.config.resume_from = str(Path(trainer.config.logdir, "checkpoints") if resume is True else resume)
        trainer.first_epoch = trainer._resume()
    trainer.train()


KINDS = {
    "dpo": with_transformers("dpo-state"),
    "grpo": with_transformers("grpo"),
    "ppo": Kind(start_ppo, lambda trainer, resume: trainer.train(resume_from_checkpoint=resume)),
    "ddpo": Kind(start_ddpo, resume_ddpo, "checkpoint_", "logs/checkpoints"),
}


def in_a_process(work: Callable[[], None]) -> int:
    """The exit code of a process of its own that does `work`; it ends without any clean-up."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1 if sys.exc_info()[0] else 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ended_at(operation: int, work: Callable[[], None]) -> int:
    """Do `work` in a process that ends at its n-th operation on files: before it is done, as a kill would end it."""
    left = [operation]

    def counted(call: Any) -> Any:
        def one(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] <= 0:
                os._exit(ENDED)
            return call(*args, **kwargs)

        return one

    def go() -> None:
        for module, name in (
            (os, "rename"), (os, "replace"), (os, "unlink"), (os, "link"), (os, "fsync"), (os, "mkdir"),
            (os, "makedirs"), (shutil, "rmtree"), (torch, "save"),
        ):  # fmt: skip
            setattr(module, name, counted(getattr(module, name)))
        work()

    return in_a_process(go)


def two_ranks(rank: int, world: int, out: str, **settings: Any) -> None:
    """A run of the case "dpo-state" with a checkpoint after each step; its weights in `out-RANK`."""
    torch.set_num_threads(1)
    resume = settings.pop("resume", None)
    trainer = build(
        "dpo-state", Path(out), per_device_train_batch_size=4 // world, max_steps=4, save_strategy="steps",
        save_steps=1, use_cpu=True, **({"ddp_backend": "gloo"} if world > 1 else {}), **settings,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    torch.save({"weights": weights(trainer), "loss": history(trainer, "loss")}, f"{out}-{rank}")


def two_ranks_resume(rank: int, world: int, out: str) -> None:
    two_ranks(rank, world, out, resume=True)


__all__ = ["CASES", "ENDED", "KINDS", "ended_at", "in_a_process", "two_ranks", "two_ranks_resume", "weights"]


def whole_runs(tmp_path_factory):
    """Of each kind: a run with all its checkpoints, and its weights at the end."""
    runs = {}

    def of(kind):
        if kind not in runs:
            folder = tmp_path_factory.mktemp(kind)
            torch.manual_seed(0)
            runs[kind] = (folder, KINDS[kind].run(folder))
        return runs[kind]

    return of
