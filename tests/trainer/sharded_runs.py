"""Three steps of a trainer on whole or on sharded weights: FSDP2, which accelerate turns on for accelerators only."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from conformity import CASES, build, history
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma2Config, LlamaConfig

from trl.models.forward import plan_of

SIZES = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "plain": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "soft-cap": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0, tie_word_embeddings=False),
}


RUNS = (
    ("sft", "plain"), ("dpo-sigmoid", "plain"), ("kto", "plain"), ("reward", "reward"),
    ("sft", "tied"), ("dpo-sigmoid", "tied"), ("sft", "soft-cap"),
)  # fmt: skip


def seeded(kind: str) -> torch.nn.Module:
    """The same model on every rank."""
    torch.manual_seed(0)
    if kind == "reward":
        return AutoModelForSequenceClassification.from_config(LlamaConfig(**SIZES, num_labels=1))
    return AutoModelForCausalLM.from_config(CONFIGS[kind])


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


def train_all(rank: int, world: int, path: str) -> None:
    """`train` each case and write what came of it to `path`."""
    torch.set_num_threads(1)
    if world > 1:
        shard_on_the_cpu()
    torch.save({case: train(world, *case) for case in RUNS}, f"{path}-{rank}")


def train(world: int, name: str, kind: str) -> dict[str, Any]:
    """Losses, gradient norms and weights of the conformity case `name` on a model of this kind."""
    settings: dict[str, Any] = {"max_steps": 3, "use_cpu": True, "optim": "sgd", "learning_rate": 0.1}
    if world > 1:
        layer = "Gemma2DecoderLayer" if kind == "soft-cap" else "LlamaDecoderLayer"
        settings |= {"fsdp": True, "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": [layer]}}
        settings["ddp_backend"] = "gloo"
    CASES[name] = replace(CASES[name], model=lambda: seeded(kind))
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(name, Path(folder), per_device_train_batch_size=4 // world, **settings)
        trainer.train()
    assert trainer.is_fsdp_enabled == (world > 1)
    weights = dict(trainer.model.named_parameters())
    return {
        "loss": history(trainer, "loss"),
        "grad_norm": history(trainer, "grad_norm"),
        "packed": plan_of(trainer.model).packed,
        "sharded": all(isinstance(weight, DTensor) for weight in weights.values()),
        "weights": {name: _whole(weight).detach().clone() for name, weight in weights.items()},
    }


def _whole(weight: Any) -> torch.Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
