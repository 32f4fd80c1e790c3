"""Runs with pictures on some ranks, which tests start in processes of their own."""

import sys
import warnings
from pathlib import Path

import torch

HERE = Path(__file__).parent
RUNS = (
    ("sft", "gemma3", 8), ("sft", "qwen2_5_vl", 2), ("dpo", "smolvlm", 8), ("dpo", "llava", 2),
    ("grpo", "qwen2_5_vl", 8), ("grpo", "internvl", 4), ("rloo", "gemma3", 8),
)  # fmt: skip
"""trainer, family, rows of a step: of the few of a small one a rank may have none with a picture"""


def runs(rank: int, world: int, out: str) -> None:
    """Two steps of each case on `world` ranks; the weights and logs in `out`."""
    sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "trainer")]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    from conformity import build, history
    from picture_cases import case

    results = {}
    for kind, name, batch in RUNS:
        trainer = build(
            case(kind, name), Path(f"{out}-{rank}-files"), per_device_train_batch_size=batch // world, optim="sgd",
            learning_rate=0.1, use_cpu=True, max_steps=2 if batch == 8 else 4,
        )  # fmt: skip
        trainer.train()
        assert trainer.args.world_size == world
        weights = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
        results[kind, name, batch] = (weights, history(trainer, "loss"), history(trainer, "grad_norm"))
    if rank == 0:
        torch.save(results, out)
