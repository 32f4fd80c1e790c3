"""DeepSpeed ZeRO on ranks of a CPU: accelerate turns it on for accelerators only."""

import os
import sys
from dataclasses import replace
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
    AcceleratorState._reset_state(reset_partial_state=True)


ROWS = (
    "SFT", "SFT, tied head", "Reward", "DPO", "DPO, moving reference",
    "DPO, precomputed reference", "KTO", "GRPO", "GRPO, layer by layer", "RLOO",
    "PPO, step", "PPO, step, critic", "PPO, train (greedy)",
)  # fmt: skip
ENGINES = {
    "zero3": ROWS,
    "zero3-lora": ("DPO", "GRPO", "PPO, step"),
    "zero2": ("SFT", "GRPO", "PPO, step", "PPO, step, critic"),
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
        common = Path(path).parent if engine == "zero3" else None
        found[engine, row] = train(world, name, row, engine.endswith("lora"), common)
    if world > 1:
        found["given"] = given_to_an_engine(Path(path).parent)
        found |= {"saved": saved_and_resumed(Path(path).parent), "skipped": left_out(Path(path).parent)}
        found["PPO saved"] = [ppo_saved(engine, Path(path).parent / engine) for engine in ("zero3", "zero2")]
    found |= {name: from_files(world, name, Path(path).parent) for name in ("DPO", "GRPO")}
    torch.save(found, f"{path}-{rank}")


def made(name: str, folder: Path, world: int = 2, **settings: Any) -> Any:
    """A trainer of the row `name`, under ZeRO-3 where there are two ranks."""
    from conformity import build
    from sharded_runs import RUNS, engine_settings

    begin_whole()
    given = {"use_cpu": True, "per_device_train_batch_size": 4 // world, "output_dir": str(folder)}
    return build(RUNS[name].case, folder, **{**given, **engine_settings("zero3" if world > 1 else "one"), **settings})


def saved_and_resumed(folder: Path) -> dict[str, float]:
    """How far a resumed run, and the model that was saved, are from the run that went on; leaves `folder/final`."""
    from transformers import AutoModelForCausalLM

    settings = {"max_steps": 4, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    ended, resumed = (made("SFT", folder / "run", **settings) for _ in range(2))
    ended.train()
    ended.save_model(str(folder / "final"))
    resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    want, again = ({name: whole(w) for name, w in each.model.named_parameters()} for each in (ended, resumed))
    begin_whole()
    saved = dict(AutoModelForCausalLM.from_pretrained(folder / "final").named_parameters())
    assert saved.keys() == want.keys()
    return {
        name: max(float((each[key] - weight).abs().max()) for key, weight in want.items())
        for name, each in (("saved", saved), ("resumed", again))
    }


def ppo_saved(engine: str, folder: Path) -> dict[str, float]:
    """How far policy and critic move in a step, are then from the state that accelerate has saved, and from files."""
    from sharded_runs import ppo_step, ppo_trainer

    from trl import AutoModelForCausalLMWithValueHead

    def weights() -> dict[str, torch.Tensor]:
        models = {"policy": trainer.model, "critic": trainer.value_model}
        return {
            f"{who}.{key}": whole(w).clone() for who, model in models.items() for key, w in model.named_parameters()
        }

    def apart(now: dict[str, torch.Tensor], who: str) -> float:
        return max(float((now[name] - weight).abs().max()) for name, weight in saved.items() if name.startswith(who))

    trainer = ppo_trainer(2, engine, lora=False, critic=True)
    ppo_step(trainer, 2)
    saved = weights()
    trainer.save_model(folder / "model")
    trainer.accelerator.save_state(str(folder / "state"))
    ppo_step(trainer, 2)
    moved = weights()
    trainer.accelerator.load_state(str(folder / "state"))
    back = weights()
    begin_whole()
    files = AutoModelForCausalLMWithValueHead.from_pretrained(folder / "model").named_parameters()
    return {
        "policy moved": apart(moved, "policy"), "critic moved": apart(moved, "critic"),
        "back": apart(back, ""), "files": apart({f"policy.{name}": weight for name, weight in files}, "policy"),
    }  # fmt: skip


def given_to_an_engine(folder: Path) -> dict[str, float]:
    """How far an engine's weights are from those in parts that two ranks gave it, whole and as an adapter."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "generation"))
    from conformity import CASES, build
    from loading_engine import LoadingEngine
    from sharded_runs import RUNS, engine_settings

    from trl.generation.vllm.sync import ADAPTER, AdapterSync, FolderSync

    ids, found = torch.arange(4, 20)[None], {}
    for lora in (False, True):
        begin_whole()
        network = CASES[RUNS["SFT"].case].model()
        given = {
            "use_cpu": True,
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "optim": "sgd",
            "learning_rate": 0.1,
        }
        trainer = build(RUNS["SFT"].case, folder / f"given-{lora}", lora, **given, **engine_settings("zero3"))
        trainer.train()
        engine, adapted = LoadingEngine(network), LoadingEngine(network)
        FolderSync(trainer.model, folder).push(engine, "run-0")
        if lora:
            AdapterSync(trainer.model, folder).push(adapted, "run-0")
        want = {name: whole(weight).clone() for name, weight in trainer.model.named_parameters()}
        if torch.distributed.get_rank():
            assert not engine.calls
            assert not adapted.calls
        elif lora:
            merged, beside = engine.model(ids).logits, adapted.adapters[ADAPTER](ids).logits
            found["merged"] = float((merged - beside).abs().max())
            own = dict(adapted.adapters[ADAPTER].named_parameters())
            found["adapter"] = max(float((own[name] - want[name]).abs().max()) for name in own if "lora_" in name)
        else:
            own = dict(engine.model.named_parameters())
            assert own.keys() == want.keys()
            found["whole"] = max(float((own[name] - want[name]).abs().max()) for name in own)
            found["moved"] = max(float((own[n] - w).abs().max()) for n, w in network.named_parameters())
    return found


def left_out(folder: Path) -> tuple[int, list[float]]:
    """Steps that are left out, and the losses, where that of the second step is nan on one rank."""
    from conformity import history

    trainer = made("SFT", folder / "skip", max_steps=3, on_non_finite="skip")
    own, calls = trainer.objective, []

    def objective(model: Any, batch: Any) -> Any:
        calls.append(own(model, batch))
        spoilt = len(calls) == 2 and trainer.args.process_index == 1
        return replace(calls[-1], total=calls[-1].total * float("nan")) if spoilt else calls[-1]

    trainer.objective = objective
    trainer.train()
    return trainer._non_finite.skipped, history(trainer, "loss")


def from_files(world: int, name: str, folder: Path) -> dict[str, list[float]]:
    """Of a policy that the trainer loads from `folder/final`, in parts under ZeRO-3, and of which it makes a copy."""
    from conformity import CASES, history
    from sharded_runs import RUNS

    run = RUNS[name]
    CASES[run.case] = replace(CASES[run.case], model=lambda: str(folder / "final"))
    trainer = made(name, folder / f"{name}-{world}", world, max_steps=2, **run.settings)
    trainer.train()
    return {key: history(trainer, key) for key in ("loss", "grad_norm")}
