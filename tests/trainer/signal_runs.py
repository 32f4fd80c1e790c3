"""Runs that send themselves SIGTERM amid a step, for tests that start them in processes of their own."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from checkpoint_cases import KINDS, weights
from conformity import build
from transformers import TrainerCallback


class Sender(TrainerCallback):
    """Sends a signal to this process amid a step, or the evaluation after it, `times` times."""

    def __init__(self, step: int, times: int = 1, amid: str = "step"):
        self.step, self.times, self.amid = step, times, amid

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.amid == "step" and state.global_step + 1 == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGTERM)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.amid == "evaluation" and state.global_step == self.step:
            self.step = -1
            os.kill(os.getpid(), signal.SIGTERM)


def run(
    name: str, folder: str, *, at: int | None = None, times: int = 1, amid: str = "step", resume: bool = False,
    **more: Any,
) -> Any:  # fmt: skip
    """A run of five steps without regular checkpoints; the weights at its end in `FOLDER.pt`."""
    torch.set_num_threads(1)
    settings = {"max_steps": 5, "num_train_epochs": 9, "save_strategy": "no", "enable_jit_checkpoint": True,
                "logging_steps": 2, "use_cpu": True, "gradient_accumulation_steps": 1, **more}  # fmt: skip
    trainer = build(name, Path(folder), **settings)
    if at is not None:
        trainer.add_callback(Sender(at, times, amid))
    trainer.train(resume_from_checkpoint=resume or None)
    torch.save(weights(trainer), f"{folder}.pt")
    return trainer


def on_rank(rank: int, world: int, out: str) -> None:
    """Of one of two ranks, in `OUT/RANK`: the codes of a run that only rank 1 is asked to end, and of its resumption;
    whether that equals a whole run; and the error of a run whose loss is infinite on rank 1 only."""
    from trl.losses.loss_sum import LossSum
    from trl.trainer.guard import NonFiniteError

    more = {"ddp_backend": "gloo", "per_device_train_batch_size": 2}
    end = weights(run("sft", f"{out}/whole", **more))
    seen: dict[str, Any] = {}
    try:
        run("sft", f"{out}/cut", at=2 if rank else None, **more)
    except SystemExit as error:
        seen["code"] = error.code
    torch.distributed.barrier()
    seen["checkpoints"] = sorted(path.name for path in Path(f"{out}/cut").glob("checkpoint-*"))
    seen["equal"] = torch.equal(weights(run("sft", f"{out}/cut", resume=True, **more)), end)
    trainer = build("sft", Path(f"{out}/bad"), save_strategy="steps", save_steps=1, use_cpu=True, **more)
    objective, bad = trainer.objective, rank == 1

    def spoilt(model: Any, batch: Any) -> LossSum:
        loss = objective(model, batch)
        factor = torch.inf if bad and trainer.state.global_step == 1 else 1.0
        return LossSum(loss.total * factor, loss.count, loss.metrics)

    trainer.objective = spoilt
    try:
        trainer.train()
    except NonFiniteError as error:
        seen["error"] = str(error)
    Path(out, str(rank)).write_text(json.dumps(seen))


def ppo(folder: str, *, at: int | None = None, resume: bool = False) -> Any:
    """PPO, with a checkpoint only at the end."""
    trainer = KINDS["ppo"].start(Path(folder), enable_jit_checkpoint=True, save_steps=99)
    step = trainer.step

    def signalled(*args: Any) -> Any:
        if trainer.data_position == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    trainer.step = signalled
    trainer.train(resume_from_checkpoint=resume or None)
    torch.save(weights(trainer), f"{folder}.pt")
    return trainer


def ddpo(folder: str, *, at: int | None = None, resume: bool = False) -> Any:
    """DDPO, whose checkpoints are far apart."""
    more = {"resume_from": str(Path(folder, "logs", "checkpoints"))} if resume else {}
    trainer = KINDS["ddpo"].start(Path(folder), enable_jit_checkpoint=True, save_freq=9, **more)
    step = trainer.step

    def signalled(epoch: int, global_step: int) -> int:
        if epoch == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(epoch, global_step)

    trainer.step = signalled
    trainer.train()
    torch.save(weights(trainer), f"{folder}.pt")
    return trainer
