"""A few steps of several trainers on this rank; rank 0 prints their losses and gradient norms. Run by a test."""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import conformity
import torch
from conformity import CASES, build, history

NAMES = ("sft", "sft-packing", "reward", "dpo-sigmoid", "dpo-state", "kto", "kto-bco", "prm", "sft-stream", "dpo-ahead")


def case_of(name: str) -> None:
    """Evaluation sets that ranks can share evenly, and two cases that only matter here."""
    base = {"sft-stream": "sft", "dpo-ahead": "dpo-sigmoid"}.get(name, name)
    rows = CASES[base].rows
    CASES[name] = replace(CASES[base], arguments=lambda: {"eval_dataset": rows()})
    if name == "sft-stream":
        CASES[name] = replace(CASES[name], rows=lambda: _Stream(rows()))


class _Stream:
    """`build` asks rows for a part of them; a stream has none."""

    def __new__(cls, dataset):
        stream = dataset.to_iterable_dataset()
        stream.select = lambda which: stream
        return stream


def run(name: str, world: int) -> dict[str, list[float]]:
    case_of(name)
    more = {"precompute_ref_log_probs": True} if name == "dpo-ahead" else {}
    more |= {"max_length": 14} if name == "sft-packing" else {}  # four rows: no batch has to be filled up
    more |= {"ddp_backend": "gloo"} if world > 1 else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(
            name, Path(folder), per_device_train_batch_size=4 // world, per_device_eval_batch_size=4 // world,
            use_cpu=True, **more,
        )  # fmt: skip
        trainer.train()
        metrics = trainer.evaluate()
    assert trainer.args.world_size == world
    return {
        "loss": history(trainer, "loss"),
        "grad_norm": history(trainer, "grad_norm"),
        "eval_loss": [metrics["eval_loss"]],
        "kl": history(trainer, "kl"),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    conformity.tokenizer()
    results = {name: run(name, int(sys.argv[1])) for name in NAMES}
    Path(sys.argv[2]).write_text(json.dumps(results))
