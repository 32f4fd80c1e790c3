"""Runs whose checkpoints are read by other numbers of processes and on weights that are held otherwise."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from conformity import build
from sharded_runs import seeded, shard_on_the_cpu
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from trl.models.unwrap import below_accelerate

STEPS = 5
SHAPES = {
    "sft": {"per_device_train_batch_size": 4},
    "dpo": {"per_device_train_batch_size": 4},
    "grpo": {
        "per_device_train_batch_size": 8,
        "generation_batch_size": 16,
        "num_iterations": 2,
        "learning_rate": 0.05,
    },
}
"""of one process; of two, each has half of the rows"""
CASES = {"sft": "sft", "dpo": "dpo-state", "grpo": "grpo"}
LOGGED = ("loss", "grad_norm", "learning_rate", "num_tokens", "reward")
SMOOTH = {"learning_rate": 0.5, "adam_epsilon": 0.1, "lr_scheduler_type": "linear"}
"""an optimizer with a state, in which rounding of small gradients stays small"""


def trainer_of(kind: str, folder: Path, world: int = 1, form: str | None = None, **settings: Any) -> Any:
    """A trainer with a checkpoint after each step; form: FSDP's, if the weights are sharded."""
    import conformity

    name = CASES[kind]
    own: dict[str, Any] = {
        **SMOOTH, **SHAPES[kind], "max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "use_cpu": True,
        "ddp_timeout": 60, **settings,
    }  # fmt: skip
    own["per_device_train_batch_size"] //= world
    if world > 1:
        own["ddp_backend"] = "gloo"
    if form is not None:
        layers = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": form}
        own |= {"fsdp": True, "fsdp_config": layers}
    model = own.pop("model", "plain")
    whole = conformity.CASES[name]
    conformity.CASES[name] = type(whole)(**{**vars(whole), "model": lambda: seeded(model)})
    try:
        return build(name, folder, lora=own.pop("lora", False), **own)
    finally:
        conformity.CASES[name] = whole


def result_of(trainer: Any) -> dict[str, Any]:
    """The weights at the end, and what was logged of each step."""
    weights = {name: _whole(p).detach().clone() for name, p in trainer.model.named_parameters()}
    rows = trainer.state.log_history
    return {"weights": weights, "logs": [{k: row[k] for k in LOGGED if k in row} for row in rows if "loss" in row]}


def run(kind: str, folder: Path, world: int = 1, form: str | None = None, resume: Any = None, **more: Any) -> Any:
    trainer = trainer_of(kind, folder, world, form, **more)
    trainer.train(resume_from_checkpoint=resume)
    return result_of(trainer)


def _whole(weight: Any) -> torch.Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def two_ranks(rank: int, world: int, path: str) -> None:
    """All cases of two processes, one after another; what came of them in `path/RANK.pt`."""
    torch.set_num_threads(1)
    shard_on_the_cpu()
    root, found = Path(path), dict[str, Any]()
    work = Work(rank, world, root, found)
    for case in (*DDP_CASES, *SHARDED_CASES):
        AcceleratorState._reset_state(reset_partial_state=True)
        case(work)
        torch.save(found, root / f"{rank}.pt")
    killed(work)


class Work:
    """What the cases of one rank share."""

    def __init__(self, rank: int, world: int, root: Path, found: dict[str, Any]):
        self.rank, self.world, self.root, self.found = rank, world, root, found

    def run(self, name: str, kind: str, form: str | None = None, **more: Any) -> None:
        folder = more.pop("folder", self.root / name)
        self.found[name] = run(kind, folder, self.world, form, **more)

    def copied(self, name: str, to: str, change: Callable[[Path], None] = lambda folder: None) -> Path:
        """A copy of a run's folder, made and changed by the first rank."""
        if self.rank == 0:
            shutil.copytree(self.root / name, self.root / to)
            change(self.root / to)
        torch.distributed.barrier()
        return self.root / to


def ddp_reads_one(work: Work) -> None:
    """1 -> 2 with DDP."""
    for kind in ("sft", "grpo"):
        work.run(f"{kind}-1-2", kind, resume=work.root / f"{kind}-1" / f"checkpoint-{MIDST[kind]}")


def ddp_from_the_start(work: Work) -> None:
    """For 2 -> 1."""
    for kind in ("sft", "grpo"):
        work.run(f"{kind}-2", kind)


MIDST = {"sft": 3, "dpo": 3, "grpo": 1}
"""amid an epoch, amid a rollout"""


def fsdp_reads_one(work: Work) -> None:
    """1 -> 2, from whole weights, in both forms."""
    for form in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        work.run(f"sft-1-{form}", "sft", form, resume=work.root / "sft-1" / "checkpoint-3")


def fsdp_from_the_start(work: Work) -> None:
    for form in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        trainer = trainer_of("sft", work.root / f"sft-{form}", work.world, form, model="tied", save_total_limit=4)
        trainer.train()
        trainer.save_model(str(work.root / f"model-{form}"))
        work.found[f"sft-{form}"] = {**result_of(trainer), "gathered": len(trainer._gathered_weights())}


def fsdp_resumes(work: Work) -> None:
    """On as many ranks, with a shard of the newest checkpoint cut off, or with one missing."""

    def cut(folder: Path) -> None:
        shutil.rmtree(folder / "checkpoint-5")
        shard = folder / "checkpoint-4" / "optimizer_0" / "__1_0.distcp"
        shard.write_bytes(shard.read_bytes()[:-9])

    def lose(folder: Path) -> None:
        shutil.rmtree(folder / "checkpoint-5")
        (folder / "checkpoint-4" / "optimizer.bin").unlink()

    for form, change in (("SHARDED_STATE_DICT", cut), ("FULL_STATE_DICT", lose)):
        folder = work.copied(f"sft-{form}", f"again-{form}", change)
        work.run(f"again-{form}", "sft", form, folder=folder, resume=True, model="tied")
    other = work.copied("sft-SHARDED_STATE_DICT", "other-form", lambda folder: shutil.rmtree(folder / "checkpoint-5"))
    work.run("other-form", "sft", "FULL_STATE_DICT", folder=other, resume=True, model="tied")
    work.run("dpo-2", "dpo", "SHARDED_STATE_DICT")
    work.run("dpo-2-again", "dpo", "SHARDED_STATE_DICT", resume=work.root / "dpo-2" / "checkpoint-3")


def fsdp_with_adapters(work: Work) -> None:
    for form in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        trainer = trainer_of("sft", work.root / f"lora-{form}", work.world, form, lora=True)
        trainer.train()
        trainer.save_model(str(work.root / f"adapter-{form}"))
        work.found[f"lora-{form}"] = result_of(trainer)
    work.run("lora-1-2", "sft", "SHARDED_STATE_DICT", lora=True, resume=work.root / "lora-1" / "checkpoint-3")


def ppo(folder: Path, rank: int, world: int, resume: Path | None = None, sharded: bool = False) -> dict[str, Any]:
    """Two steps of PPO on rows that are given, with the state saved between them; resume: that of another run."""
    from ppo_runs import trainer_for

    rows, more = 4 // world, {}
    if sharded:
        from accelerate.utils import FullyShardedDataParallelPlugin

        more["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )  # fmt: skip
    trainer = trainer_for(
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9), batch_size=rows, mini_batch_size=1,
        gradient_accumulation_steps=rows, ppo_epochs=2, use_score_scaling=True, use_score_norm=True, target=0.1,
        horizon=20, accelerator_kwargs=more,
    )  # fmt: skip
    g, part = torch.Generator().manual_seed(1), slice(rank * rows, (rank + 1) * rows)
    data = [torch.randint(4, 100, (3 + i % 3,), generator=g) for i in range(16)]
    ends = []
    for turn in range(3):
        if turn == 1:
            trainer.save_state(folder)
        if turn == 2:
            trainer.load_state(folder if resume is None else resume)
        if turn == 2 or resume is None:
            now = data[:8] if turn == 0 else data[8:]
            trainer.step(now[:4][part], now[4:][part], [torch.tensor(float(i)) for i in (3, 0, 1, -2)][part])
        own = below_accelerate(trainer.model)
        ends.append({name: _whole(p).detach().clone() for name, p in own.named_parameters()})
    again = resume is not None or all(torch.equal(ends[1][name], ends[2][name]) for name in ends[1])
    return {"weights": ends[2], "again": again, "kl_coef": trainer.kl_ctl.value, "sharded": _is_sharded(trainer)}


def _is_sharded(trainer: Any) -> bool:
    return all(isinstance(p, DTensor) for p in trainer.model.parameters())


def ppo_of_two(work: Work) -> None:
    for name, more in (("ppo-2", {}), ("ppo-1-2", {"resume": work.root / "ppo-1"})):
        work.found[name] = ppo(work.root / name, work.rank, work.world, **more)


def ppo_sharded(work: Work) -> None:
    for name, more in (("ppo-fsdp", {}), ("ppo-1-fsdp", {"resume": work.root / "ppo-1"})):
        work.found[name] = ppo(work.root / name, work.rank, work.world, sharded=True, **more)


def grpo_sharded(work: Work) -> None:
    """From the start, from its own checkpoint, and from one process's, amid a rollout; with a moving reference."""
    for form in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        work.run(f"grpo-{form}", "grpo", form)
        work.run(f"grpo-again-{form}", "grpo", form, resume=work.root / f"grpo-{form}" / "checkpoint-1")
        work.run(f"grpo-1-{form}", "grpo", form, resume=work.root / "grpo-1" / "checkpoint-1")
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 1, "beta": 0.1, "max_steps": 3}
    work.run("moving", "grpo", "SHARDED_STATE_DICT", **moving)
    work.run("moving-again", "grpo", "SHARDED_STATE_DICT", resume=work.root / "moving" / "checkpoint-2", **moving)


class Terminate(TrainerCallback):
    def __init__(self, rank: int):
        self.rank = rank

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and self.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def fsdp_terminated(work: Work) -> None:
    form = "SHARDED_STATE_DICT"
    trainer = trainer_of("sft", work.root / "term", work.world, form, save_steps=99, enable_jit_checkpoint=True)
    trainer.add_callback(Terminate(work.rank))
    try:
        trainer.train()
    except SystemExit as end:
        work.found["term"] = (end.code, trainer.state.global_step)


def fsdp_best(work: Work) -> None:
    form = "SHARDED_STATE_DICT"
    trainer = trainer_of(
        "sft", work.root / "best", work.world, form, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        greater_is_better=True, metric_for_best_model="loss", save_total_limit=2, max_steps=3,
    )  # fmt: skip
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    work.found["best"] = (losses, trainer.state.best_model_checkpoint, trainer.evaluate()["eval_loss"])


def fsdp_model_only(work: Work) -> None:
    """Checkpoints without optimizer, and a model that goes to the Hub with each checkpoint of shards."""
    trainer = trainer_of("sft", work.root / "only", work.world, "FULL_STATE_DICT", save_only_model=True, max_steps=2)
    trainer.train()
    work.run("only-again", "sft", "FULL_STATE_DICT", resume=work.root / "only" / "checkpoint-2", max_steps=3)
    trainer = trainer_of("sft", work.root / "pushed", work.world, "SHARDED_STATE_DICT", max_steps=1)
    pushed: list[Any] = []
    trainer.args.push_to_hub, trainer._hub_strategy = True, "every_save"
    trainer._seal._sealed = lambda folder: pushed.append((folder.name, trainer._model_files))
    trainer.train()
    work.found["pushed"] = pushed


class Killed(TrainerCallback):
    """Ends the process when the files of its second checkpoint are there, and the manifest is not."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            torch.distributed.barrier()
            os.kill(os.getpid(), signal.SIGKILL)


def killed(work: Work) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = trainer_of("sft", work.root / "killed", work.world, "SHARDED_STATE_DICT")
    trainer.add_callback(Killed())
    trainer.train()


DDP_CASES = (ddp_reads_one, ddp_from_the_start, ppo_of_two)
SHARDED_CASES = (
    fsdp_reads_one, fsdp_from_the_start, fsdp_resumes, fsdp_with_adapters, fsdp_terminated, fsdp_best,
    fsdp_model_only, ppo_sharded, grpo_sharded,
)  # fmt: skip
