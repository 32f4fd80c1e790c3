"""Every trainer as a run that may end at any moment: started again, it goes on from its newest whole checkpoint."""

from __future__ import annotations

import math
import os
import resource
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoint_cases
import ddpo_cases  # noqa: F401  # imported here once for all the runs that are forked off
import environment_runs
import peft  # noqa: F401
import ppo_runs
import torch
from conformity import build, causal_lm, text, tokenizer
from transformers import PrinterCallback, TrainerCallback

import trl
from trl.models.unwrap import below_accelerate

AfterStep = Callable[[int], None]
"""called with a step's number when it is done, before it is saved"""


class Announcer(TrainerCallback):
    def __init__(self, after: AfterStep):
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after(state.global_step)


@dataclass(frozen=True)
class Job:
    """How a trainer of a run is built, and how it trains from its newest checkpoint on."""

    start: Callable[..., Any]
    """`(folder, steps, **settings) -> trainer`"""
    go: Callable[[Any, AfterStep], None]


def train(trainer: Any, after: AfterStep) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Announcer(after))
    trainer.train(resume_from_checkpoint=True)


def with_transformers(case: str, lora: bool = False, **own: Any) -> Job:
    def start(folder: str, steps: int, **settings: Any) -> Any:
        return build(case, Path(folder), lora, **{
            "max_steps": steps, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3, **own, **settings,
        })  # fmt: skip

    return Job(start, train)


def in_environment(folder: str, steps: int, **settings: Any) -> Any:
    return environment_runs.trainer_for(
        folder, per_device_train_batch_size=4, max_steps=steps, steps_per_generation=2,
        **{"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3, "save_rollouts": True, **settings},
    )  # fmt: skip


def ppo(critic: bool = False, **own: Any) -> Job:
    def start(folder: str, steps: int, **settings: Any) -> Any:
        return ppo_runs.trainer_for(critic=critic, **{
            "batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 2, "steps": 4 * steps, "learning_rate": 1e-3,
            "max_new_tokens": 4, "output_dir": folder, "save_steps": 1, "save_total_limit": 3,
            "use_score_scaling": True, "anneal_learning_rate": True, **own, **settings,
        })  # fmt: skip

    def go(trainer: Any, after: AfterStep) -> None:
        trainer.train(resume_from_checkpoint=True, callback=lambda step, *_: after(step))

    return Job(start, go)


def start_ddpo(folder: str, steps: int, **settings: Any) -> Any:
    more = {"num_epochs": steps + 1, "num_checkpoint_limit": 3, "save_freq": 1, "sample_num_steps": 2, **settings}
    return checkpoint_cases.start_ddpo(Path(folder), resume_from=str(Path(folder, "logs", "checkpoints")), **more)


def train_ddpo(trainer: Any, after: AfterStep) -> None:
    save = trainer._save_checkpoint

    def announced(epoch: int) -> None:
        after(epoch)
        save(epoch)

    trainer._save_checkpoint = announced
    trainer.train()


RUNS: dict[str, Job] = {
    "sft": with_transformers("sft"),
    "sft-packing": with_transformers("sft-packing"),
    "sft-lora": with_transformers("sft", lora=True),
    "reward": with_transformers("reward"),
    "prm": with_transformers("prm"),
    "dpo": with_transformers("dpo-sigmoid"),
    "dpo-running-mean": with_transformers("dpo-state"),
    "dpo-synced-reference": with_transformers("dpo-many"),
    "dpo-lora": with_transformers("dpo-sigmoid", lora=True),
    "kto": with_transformers("kto"),
    "kto-bco": with_transformers("kto-bco"),
    "orpo": with_transformers("orpo"),
    "cpo": with_transformers("cpo"),
    "simpo": with_transformers("simpo"),
    "grpo": with_transformers("grpo"),
    "grpo-synced-reference": with_transformers("grpo-many"),
    "grpo-lora": with_transformers("grpo", lora=True),
    "grpo-environment": Job(in_environment, train),
    "rloo": with_transformers("rloo"),
    "online-dpo": with_transformers("online-dpo"),
    "raft": with_transformers("raft"),
    "distillation": with_transformers("distillation"),
    "gkd": with_transformers("gkd"),
    "ppo": ppo(),
    "ppo-critic": ppo(critic=True),
    "ddpo": Job(start_ddpo, train_ddpo),
}


# -- what befalls a run --------------------------------------------------------------------------


@dataclass(frozen=True)
class Trouble:
    """Something that befalls a run when a step is done, before it is saved."""

    step: int
    poison: bool = False
    """a weight becomes NaN"""
    file_limit: int | None = None
    """no file can become larger than so many bytes, as on a disk that is full"""
    lost: bool = False
    """the process is killed"""

    def befall(self, trainer: Any) -> None:
        if self.lost:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.file_limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_limit, self.file_limit))
        if self.poison:
            trained = [p for p in model_of(trainer).parameters() if p.requires_grad]
            with torch.no_grad():
                trained[-1].view(-1)[0] = math.nan


def model_of(trainer: Any) -> torch.nn.Module:
    return below_accelerate(trainer.sd_pipeline.unet if hasattr(trainer, "sd_pipeline") else trainer.model)


def run(
    name: str, folder: str, steps: int, trouble: Trouble | None = None, settings: dict[str, Any] | None = None
) -> None:
    """One of `RUNS`, from its newest checkpoint on. It prints a step's number before it saves; its end in `end.pt`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    job = RUNS[name]
    trainer = job.start(folder, steps, **(settings or {}))

    def after(step: int) -> None:
        print(step, flush=True)
        if trouble is not None and step == trouble.step:
            trouble.befall(trainer)

    job.go(trainer, after)
    keep_end(trainer, folder)


def keep_end(trainer: Any, folder: str) -> None:
    """The weights in `end.pt`, which is there whole or not at all."""
    end = [parameter.detach().clone() for parameter in model_of(trainer).parameters()]
    beside = Path(folder, f"end-{os.getpid()}")
    torch.save(end, beside)
    os.replace(beside, Path(folder, "end.pt"))


def iterative_sft(folder: str, steps: int) -> None:
    """`IterativeSFTTrainer` has no loop of its own and saves models, not states: a run always begins anew."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    args = trl.IterativeSFTConfig(
        output_dir=folder, max_steps=steps, report_to="none", per_device_train_batch_size=2, save_strategy="steps",
        save_steps=1, learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.IterativeSFTTrainer(causal_lm(), args, processing_class=tokenizer())
    for step in range(steps):
        trainer.step(texts=[text(4, step), text(3, step + 1)])
        print(step + 1, flush=True)
    keep_end(trainer, folder)


# -- ranks ---------------------------------------------------------------------------------------


def on_rank(rank: int, world: int, port: int, name: str, folder: str, steps: int, trouble: Trouble | None) -> None:
    """`run` as one of several ranks; trouble befalls the last one."""
    from process_group import join_group, leave_group

    join_group(rank, world, port)
    sizes = {"batch_size": 2, "mini_batch_size": 1} if name.startswith("ppo") else {"ddp_backend": "gloo"}
    run(name, folder, steps, trouble if rank == world - 1 else None, sizes)
    leave_group()
