"""Runs with pictures on some ranks, which tests start in processes of their own."""

import sys
import warnings
from pathlib import Path

import torch

HERE = Path(__file__).parent
RUNS = (
    ("sft", "gemma3", 8), ("sft", "qwen2_5_vl", 2), ("dpo", "smolvlm", 8), ("dpo", "llava", 2),
    ("grpo", "qwen2_5_vl", 8), ("grpo", "internvl", 4), ("rloo", "gemma3", 8), ("kto", "qwen3_vl", 8),
    ("reward", "gemma3", 8), ("online-dpo", "smolvlm", 8), ("distillation", "qwen2_5_vl", 8),
)  # fmt: skip
"""trainer, family, rows of a step: of the few of a small one a rank may have none with a picture"""
SHARDED = (("sft", "qwen2_5_vl", 8), ("sft", "qwen2_5_vl", 2), ("dpo", "qwen2_5_vl", 8), ("grpo", "qwen2_5_vl", 8))
LAYERS = ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"]
"""of which each process holds a part there: all call the tower in each pass"""


def runs(rank: int, world: int, out: str, of: tuple[tuple[str, str, int], ...] = RUNS, sharded: bool = False) -> None:
    """Two steps of each case on `world` ranks, or four small ones; the weights and logs in `out`."""
    sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "trainer")]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    from conformity import build, history
    from picture_cases import case

    settings = {}
    if sharded:
        from sharded_runs import engine_settings, shard_on_the_cpu

        shard_on_the_cpu()
        settings = engine_settings("fsdp2")
        settings["fsdp_config"]["transformer_layer_cls_to_wrap"] = LAYERS
    results = {}
    for kind, name, batch in of:
        trainer = build(
            case(kind, name), Path(f"{out}-{rank}-files"), per_device_train_batch_size=batch // world, optim="sgd",
            learning_rate=0.1, use_cpu=True, max_steps=2 if batch == 8 else 4, **settings,
        )  # fmt: skip
        trainer.train()
        assert trainer.args.world_size == world
        assert trainer.is_fsdp_enabled == sharded
        whole = [getattr(weight, "full_tensor", lambda own=weight: own)() for weight in trainer.model.parameters()]
        weights = torch.cat([weight.detach().flatten() for weight in whole])
        results[kind, name, batch] = (weights, history(trainer, "loss"), history(trainer, "grad_norm"))
    if rank == 0:
        torch.save(results, out)
