"""A table of three steps of each trainer, on one process and on two ranks of an engine: DDP, FSDP2, FSDP2 with LoRA.

accelerate turns FSDP2 on for accelerators only: `shard_on_the_cpu` makes it do so on ranks of a CPU.
"""

import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.tensor import DTensor

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]  # for scripts, which have no conftest

from conformity import CASES, build, config, history
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma2Config
from zero_runs import begin_whole, whole_weights, zero_config

from trl.models.forward import plan_of

GEMMA = {"head_dim": 8, "final_logit_softcapping": 2.0, "tie_word_embeddings": False}


def seeded(kind: str) -> torch.nn.Module:
    """The same model on every rank."""
    torch.manual_seed(0)
    if kind == "reward":
        return AutoModelForSequenceClassification.from_config(config(num_labels=1))
    if kind == "soft-cap":
        sizes = config().to_dict()
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip
        return AutoModelForCausalLM.from_config(Gemma2Config(**{name: sizes[name] for name in names}, **GEMMA))
    return AutoModelForCausalLM.from_config(config(tie_word_embeddings=kind == "tied"))


def shard_on_the_cpu() -> None:
    """Make accelerate take its FSDP plugin on ranks of a CPU too. Call it before the first Accelerator is made."""
    make = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = init


@dataclass(frozen=True)
class Run:
    """A row of the table."""

    case: str
    """of the conformity suite"""
    kind: str = ""
    """of the model, see `seeded`; "": that of the case"""
    settings: dict[str, Any] = field(default_factory=dict)
    rows: int = 4
    """of an optimizer step, over all ranks"""
    lora: bool = True
    """whether it has a column with an adapter"""
    packs: bool = True
    rate: float = 0.1


ROLLOUT = {"max_completion_length": 6, "num_generations": 2, "save_rollouts": False}
RUNS: dict[str, Run] = {
    "SFT": Run("sft", "plain"),
    "SFT, packed to blocks": Run("sft-packing", settings={"max_length": 14}, lora=False),
    "SFT, tied head": Run("sft", "tied"),
    "SFT, soft-capped logits": Run("sft", "soft-cap", lora=False),
    "SFT, gradient checkpointing": Run("sft", "plain", {"gradient_checkpointing": True}),
    "Reward": Run("reward", "reward"),
    "PRM": Run("prm"),
    "DPO": Run("dpo-sigmoid", "plain"),
    "DPO, moving reference": Run("dpo-many", lora=False),
    "DPO, precomputed reference": Run("dpo-sigmoid", settings={"precompute_ref_log_probs": True}),
    "KTO": Run("kto", "plain"),
    "ORPO": Run("orpo"),
    "CPO": Run("cpo"),
    "GRPO": Run("grpo", settings={**ROLLOUT, "beta": 0.1, "num_iterations": 2}),
    "GRPO, groups across ranks": Run("grpo", settings={**ROLLOUT, "num_generations": 4}),
    "GRPO, moving reference": Run(
        "grpo",
        settings={**ROLLOUT, "beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
        lora=False,
    ),
    "GRPO, layer by layer": Run("grpo", settings={**ROLLOUT, "beta": 0.1, "gather": "layers"}),
    "RLOO": Run("rloo", settings=ROLLOUT),
    "Online DPO": Run("online-dpo", settings={**ROLLOUT, "dynamic_sampling": False, "generation_batch_size": None}),
    "RAFT": Run("raft", settings={**ROLLOUT, "keep_best": 1}),
    "Distillation": Run("distillation", settings={**ROLLOUT, "num_iterations": 1}),
    "GKD": Run("gkd", settings={"max_completion_length": 6, "save_rollouts": False}),
}
"""the name of a row -> how it is run"""
ENGINES = ("ddp", "fsdp2", "fsdp2-lora")
LOGGED = (
    "loss", "grad_norm", "kl", "reward", "entropy", "ratio", "rewards/margins", "rewards/accuracies", "logps/chosen",
    "mean_token_accuracy", "accuracy", "completions/mean_length", "num_tokens",
)  # fmt: skip


def runs_of(engine: str) -> list[str]:
    """The rows that this engine has."""
    return [name for name, run in RUNS.items() if run.lora or not engine.endswith("lora")]


def engine_settings(engine: str, layer: str = "LlamaDecoderLayer") -> dict[str, Any]:
    """What a config says for it."""
    if engine == "one":
        return {}
    settings: dict[str, Any] = {"ddp_backend": "gloo"}
    if engine.startswith("fsdp2"):
        settings |= {"fsdp": True, "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": [layer]}}
    if engine.startswith("zero"):
        settings |= {"deepspeed": zero_config(int(engine[4]))}
    return settings


def train_all(rank: int, world: int, path: str, engine: str, names: list[str], lora: bool) -> None:
    """`train` each of the rows and write what came of it to `path`, after each."""
    torch.set_num_threads(1)
    import faulthandler

    faulthandler.dump_traceback_later(int(__import__("os").environ.get("DUMP", "60")), exit=True)
    if engine.startswith("fsdp2"):
        shard_on_the_cpu()
    found = {}
    for name in names:
        found[name] = train(world, engine, name, lora)
        torch.save(found, f"{path}-{rank}")


def train(world: int, engine: str, name: str, lora: bool) -> dict[str, Any]:
    """Losses, gradient norms, other numbers, and weights after three steps."""
    run = RUNS[name]
    case = CASES[run.case]
    layer = "Gemma2DecoderLayer" if run.kind == "soft-cap" else "LlamaDecoderLayer"
    settings: dict[str, Any] = {"max_steps": 3, "use_cpu": True, "optim": "sgd", "learning_rate": run.rate}
    settings |= {**run.settings, **engine_settings(engine, layer)}
    if engine.startswith("zero"):
        begin_whole()
    if run.kind:
        case = replace(case, model=lambda: seeded(run.kind))
    CASES["at hand"] = replace(case, settings={**case.settings, **run.settings})
    with tempfile.TemporaryDirectory() as folder:
        trainer = build("at hand", Path(folder), lora, per_device_train_batch_size=run.rows // world, **settings)
        trainer.train()
    assert trainer.args.world_size == world
    assert trainer.is_fsdp_enabled == engine.startswith("fsdp2")
    return results(trainer)


def results(trainer: Any) -> dict[str, Any]:
    """What came of a trainer."""
    weights = dict(trainer.model.named_parameters())
    parts = whole_weights(trainer.model)
    numbers = {key: history(trainer, key) for key in LOGGED}
    return {
        "numbers": {key: values for key, values in numbers.items() if values},
        "packed": plan_of(trainer.model).packed,
        "sharded": all(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in weights.values()),
        "weights": {
            key: parts.get(key, _whole(weight)).detach().clone()
            for key, weight in weights.items()
            if weight.requires_grad
        },
    }


def _whole(weight: Any) -> torch.Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
