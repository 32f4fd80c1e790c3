"""Two ranks of which one fails, hangs, is killed, or disagrees; what each of them has said at its end."""

import json
import os
import signal
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import ppo_runs
import torch
from conformity import CASES, build, causal_lm, text, tokenizer
from datasets import Dataset
from process_group import join_group, leave_group
from transformers import TrainerCallback

import trl
from trl.models.unwrap import below_accelerate
from trl.trainer import ranks


def reward(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def failing_reward(completions: list[str], **columns: Any) -> list[float]:
    raise KeyError("the judge of this machine")


def slow_reward(completions: list[str], **columns: Any) -> list[float]:
    time.sleep(60)
    return [0.0 for _ in completions]


def killing_reward(completions: list[str], **columns: Any) -> list[float]:
    time.sleep(1.5)
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def grpo(folder: Path, reward: Any, **settings: Any) -> Any:
    settings = {"num_generations": 2, "max_completion_length": 3, "per_device_train_batch_size": 2, **settings}
    args = trl.GRPOConfig(output_dir=str(folder), max_steps=1, report_to="none", use_cpu=True, **settings)
    rows = CASES["grpo"].rows()
    return trl.GRPOTrainer(causal_lm(), reward, args, train_dataset=rows, processing_class=tokenizer())


def slow_collator(rows: list[Any]) -> Any:
    time.sleep(60)


def case_of(name: str, rank: int, folder: Path, world: int) -> Any:
    """A trainer on one of the ranks."""
    settings: dict[str, Any] = {"ddp_backend": "gloo", "use_cpu": True, "ddp_timeout": 5, "optim": "sgd"}
    own = rank == world - 1
    if name in ("fails", "hangs", "killed"):
        there = {"fails": failing_reward, "hangs": slow_reward, "killed": killing_reward}[name]
        return grpo(folder, there if own else reward, ddp_backend="gloo", ddp_timeout=4)
    if name == "ppo":
        rate = 1e-3 * (1 + own)
        return ppo_runs.trainer_for(steps=4, max_new_tokens=3, batch_size=2, mini_batch_size=1, learning_rate=rate)
    if name == "data":
        rows = [{"text": text(4, 2 if own and row == 6 else row)} for row in range(8)]
        CASES["sft"] = replace(CASES["sft"], rows=lambda: Dataset.from_list(rows))
    more = {
        "seed": {"seed": 3 + own},
        "config": {"learning_rate": 0.5 if own else 0.1},
        "saving": {"save_strategy": "steps", "save_steps": 1 + own},
        "output": {"output_dir": str(folder / str(rank)), "run_name": f"run {rank}", "fsdp": True},
    }
    trainer_of = "dpo-sigmoid" if name == "reference" else "sft"
    if name == "weights":
        CASES["sft"] = replace(CASES["sft"], model=lambda: causal_lm(rank))
    if name == "reference":
        arguments = {"ref_model": causal_lm(rank)}
        CASES[trainer_of] = replace(CASES[trainer_of], arguments=lambda: arguments)
    if name == "new weights":
        CASES["sft"] = replace(CASES["sft"], model=lambda: _seeded_anew(rank))
    trainer = build(trainer_of, folder, name == "new weights", **{**settings, **more.get(name, {})})
    if name == "slow rows" and own:
        trainer.data_collator = slow_collator
    return trainer


def _seeded_anew(rank: int) -> torch.nn.Module:
    """The same model on every rank; what is made after it differs."""
    model = causal_lm()
    torch.manual_seed(10 + rank)
    return model


class KilledAt(TrainerCallback):
    """Kills this process behind a step, before that is saved."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def started(name: str, folder: str) -> None:
    """One rank of a case, started by torchrun's agent: it says what it ended with, or raises."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank, world, restart = (int(os.environ[f"{each}"]) for each in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))
    os.environ.update(ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1")
    sys.stderr = open(Path(folder, f"rank-{rank}.{restart}.err"), "w", buffering=1)  # noqa: SIM115
    if name == "fails":
        case_of(name, rank, Path(folder, "run"), world).train()
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "ddp_backend": "gloo", "use_cpu": True}
    trainer = build("sft", Path(folder, "run"), per_device_train_batch_size=2, **settings)
    if name == "killed" and rank and not restart:
        trainer.add_callback(KilledAt(3))
    trainer.train()
    weights = {name: weight.detach() for name, weight in below_accelerate(trainer.model).named_parameters()}
    torch.save(weights, Path(folder, f"end-{rank}.pt"))
    del trainer
    leave_group()


def play(name: str, rank: int, world: int, port: int, folder: str) -> None:
    """One rank of a case; its error, or what it ended with, in `rank-N.json`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ranks.GRACE = 1.0
    Path(folder).mkdir(exist_ok=True)
    sys.stderr = open(Path(folder, f"rank-{rank}.err"), "w", buffering=1)  # noqa: SIM115
    join_group(rank, world, port)
    found: dict[str, Any] = {}
    try:
        trainer = case_of(name, rank, Path(folder, "run"), world)
        trainer.train()
        weights = below_accelerate(trainer.model).named_parameters()
        found["end"] = {name: float(weight.double().sum()) for name, weight in weights}
        del trainer, weights
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(found))
    if "end" in found:
        leave_group()
    os._exit(0 if "end" in found else 1)
