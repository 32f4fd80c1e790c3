"""Exact resume of PPO: everything that the next step depends on, written beside and renamed."""

from __future__ import annotations

import math
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch import nn

from trl.models.unwrap import below_accelerate

PREFIX = "checkpoint-"
SHARED, OWN = "trainer_state.pt", "random_state-{rank}.pt"


def state_of(trainer: Any) -> dict[str, Any]:
    """What all processes have in common."""
    models = {"model": trainer.model, "value_model": trainer.value_model}
    return {
        "weights": {name: _trained(model) for name, model in models.items() if model is not None},
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": None if trainer.lr_scheduler is None else trainer.lr_scheduler.state_dict(),
        "kl_coef": trainer.kl_ctl.value,
        "running": {name: getattr(trainer.running, name) for name in ("mean", "std", "var", "count")},
        "counters": {name: getattr(trainer, name) for name in ("current_step", "logged_steps", "data_position")},
        "highest_reward": trainer.highest_reward,
        "reference": fingerprint(trainer.ref_model),
        "world_size": trainer.accelerator.num_processes,
    }


def restore(trainer: Any, state: Mapping[str, Any]) -> None:
    """Put a state back into a trainer that was built in the same way."""
    if state["world_size"] != trainer.accelerator.num_processes:
        raise ValueError(
            f"the checkpoint was written by {state['world_size']} processes, this run has "
            f"{trainer.accelerator.num_processes}: resume with as many"
        )
    if not same_model(state["reference"], fingerprint(trainer.ref_model)):
        raise ValueError(
            "the reference model is not the one of the checkpoint: build the trainer from the model that training "
            "started with, `load_state` brings the trained weights"
        )
    for name, weights in state["weights"].items():
        _load(getattr(trainer, name), weights, name)
    trainer.optimizer.load_state_dict(state["optimizer"])
    if (state["scheduler"] is None) != (trainer.lr_scheduler is None):
        raise ValueError("lr_scheduler: the checkpoint was written with one and this trainer has none, or the reverse")
    if trainer.lr_scheduler is not None:
        trainer.lr_scheduler.load_state_dict(state["scheduler"])
    trainer.kl_ctl.value = state["kl_coef"]
    for name, value in state["running"].items():
        setattr(trainer.running, name, value)
    for name, value in state["counters"].items():
        setattr(trainer, name, value)
    trainer.highest_reward = state["highest_reward"]


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in below_accelerate(model).named_parameters() if p.requires_grad}


@torch.no_grad()
def _load(model: nn.Module | None, weights: Mapping[str, torch.Tensor], name: str) -> None:
    own: dict[str, Any] = {} if model is None else _trained(model)
    if own.keys() != weights.keys():
        odd = sorted(own.keys() ^ weights.keys())
        raise ValueError(f"{name} trains other weights than the checkpoint's ({odd[0]!r} is only in one of them)")
    for key, parameter in own.items():
        parameter.copy_(weights[key])


def fingerprint(model: nn.Module | None) -> list[float] | None:
    """Sums over the parameters, which tell one model from another."""
    if model is None:
        return None
    with torch.no_grad():
        return [float(p.double().sum()) for p in below_accelerate(model).parameters()]


def same_model(one: list[float] | None, other: list[float] | None) -> bool:
    """Whether two fingerprints are of the same model, but for the order in which sums were taken."""
    if one is None or other is None or len(one) != len(other):
        return one is other
    return all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in zip(one, other, strict=True))


def random_state() -> dict[str, Any]:
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def save_state(trainer: Any, directory: str | os.PathLike[str]) -> None:
    """See `PPOTrainer.save_state`."""
    accelerator, target = trainer.accelerator, Path(directory)
    _refuse_sharded(accelerator)
    beside = target.with_name(f".saving-{target.name}")
    if accelerator.is_main_process:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        _write(beside / OWN.format(rank=accelerator.process_index), random_state())
        if accelerator.is_main_process:
            _write(beside / SHARED, state_of(trainer))
            model: Any = below_accelerate(trainer.model)
            model.save_pretrained(beside)
            trainer.tokenizer.save_pretrained(beside)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise OSError(f"could not save to {str(target)!r}: {error}; what was there is unchanged") from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _swap(beside, target)
    accelerator.wait_for_everyone()


def _write(path: Path, state: Mapping[str, Any]) -> None:
    with open(path, "wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())


def _former(target: Path) -> Path:
    return target.with_name(f".former-{target.name}")


def _swap(beside: Path, target: Path) -> None:
    """Put the new folder in the old one's place; at every moment one of them is whole."""
    former = _former(target)
    if target.exists():
        shutil.rmtree(former, ignore_errors=True)
        os.rename(target, former)
    os.rename(beside, target)
    shutil.rmtree(former, ignore_errors=True)


def load_state(trainer: Any, directory: str | os.PathLike[str]) -> None:
    """See `PPOTrainer.load_state`."""
    source = Path(directory)
    if not source.exists() and _former(source).exists():  # killed between the two renames
        source = _former(source)
    if not (source / SHARED).is_file():
        raise ValueError(f"{str(directory)!r} holds no {SHARED}: give a folder that `save_state` or `train` wrote")
    restore(trainer, torch.load(source / SHARED, map_location="cpu", weights_only=False))
    own = source / OWN.format(rank=trainer.accelerator.process_index)
    set_random_state(torch.load(own, map_location="cpu", weights_only=False))


def _refuse_sharded(accelerator: Any) -> None:
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise NotImplementedError(
            f"save_state does not gather weights that {kind.value} has spread: use `trainer.accelerator.save_state`"
        )


def checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def find_checkpoint(resume: bool | str | os.PathLike[str] | None, output_dir: str | None) -> Path | None:
    """The folder to resume from: True asks for the newest of `output_dir`, which may have none yet."""
    if resume is None or resume is False:
        return None
    if resume is not True:
        return Path(resume)
    if output_dir is None:
        raise ValueError(
            "resume_from_checkpoint=True looks in `output_dir`, which is not set: set it, or pass a folder"
        )
    found = checkpoints(output_dir)
    return found[-1] if found else None


def keep_newest(output_dir: str | os.PathLike[str], limit: int) -> None:
    """Remove all but the newest `limit` checkpoints. A folder is renamed first: none is ever seen half removed."""
    for path in checkpoints(output_dir)[:-limit]:
        doomed = path.with_name(f".removing-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
