"""Small on-policy runs whose groups lie within a rank or across ranks; tests start them in processes of their own."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parent.parent
LOGGED = ("loss", "grad_norm", "kl", "ratio", "entropy", "eval_loss")
SAID = ("reward", "completions/", "episodes/", "unscored", "frac_")

GRPO: dict[str, Any] = {"num_generations": 4, "beta": 0.1, "num_iterations": 2, "scale_rewards": "batch"}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "grpo": ("grpo", 4, {**GRPO, "dynamic_sampling": True}),
    "grpo-whole": ("grpo", 8, GRPO),
    "grpo-steps": (
        "grpo", 2,
        {"num_generations": 4, "steps_per_generation": 6, "top_entropy_quantile": 0.7, "dynamic_sampling": True},
    ),
    "grpo-ahead": ("grpo", 4, {**GRPO, "num_iterations": 1, "max_staleness": 1, "dynamic_sampling": True}),
    "rloo": ("rloo", 6, {"num_generations": 2, "normalize_advantages": True, "missing_eos_penalty": 0.3}),
    "online-dpo": ("online-dpo", 6, {"num_generations": 2, "dynamic_sampling": False, "generation_batch_size": None}),
    "online-dpo-four": (
        "online-dpo", 4, {"num_generations": 4, "dynamic_sampling": False, "generation_batch_size": None},
    ),
    "raft": ("raft", 6, {"num_generations": 6, "keep_best": 3}),
    "distillation": ("distillation", 6, {"num_generations": 2, "num_iterations": 1}),
    "episodes": ("grpo", 4, {**GRPO, "turn_level_credit": True, "max_completion_length": 20}),
    "function": ("grpo", 6, {"num_generations": 6, "num_iterations": 1}),
}  # fmt: skip
"""trainer; completions of an optimizer step; settings"""


def runs(rank: int, world: int, out: str) -> None:
    """Two steps of each case on `world` ranks; what came of them in `out`."""
    sys.path.insert(0, str(TESTS))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path(f"{out}-{rank}-files")
    results: dict[str, Any] = {name: run(name, world, folder) for name in CASES}
    results["evaluated"] = {f"{name}-{rows}": evaluated(name, rows, world, folder) for name, rows in EVALUATED}
    if rank == 0:
        torch.save(results, out)


def run(name: str, world: int, folder: Path) -> dict[str, Any]:
    import conformity

    base, rows, settings = CASES[name]
    case = conformity.CASES[base]
    arguments = MORE.get(name, case.arguments)
    trainer = _build(
        replace(case, arguments=arguments, settings={**case.settings, **settings}), folder,
        per_device_train_batch_size=rows // world, per_device_eval_batch_size=4 // world, max_steps=2, optim="sgd",
        learning_rate=0.5, use_cpu=True, save_rollouts=False,
    )  # fmt: skip
    trainer.train()
    assert trainer.args.world_size == world
    trainer.evaluate()
    logs = {
        key: conformity.history(trainer, key)
        for key in sorted({key for line in trainer.state.log_history for key in line})
        if key in LOGGED or key.removeprefix("eval_").startswith(SAID)
    }
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return {"weights": weights, "logs": logs}


def _build(case: Any, folder: Path, **settings: Any) -> Any:
    import conformity

    conformity.CASES["at hand"] = case
    try:
        return conformity.build("at hand", folder, **settings)
    finally:
        del conformity.CASES["at hand"]


def ranked(prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """The place of a completion in its group by what it says; so it must see the whole group."""
    places = []
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        group = [other for text, other in zip(prompts, completion_ids, strict=True) if text == prompt]
        places.append(sorted(group).index(ids) / len(group))
    return places


def told(rows: list[dict[str, Any]], trainer: Any) -> dict[str, list[Any]]:
    """Completions of a user's own engine: the further copies of a prompt are the longer ones."""
    seen: Counter[str] = Counter()
    completions = []
    for row in rows:
        seen[row["prompt"]] += 1
        completions.append([5 + len(row["prompt"]) % 7] * seen[row["prompt"]])
    prompts = [row["prompt_ids"] for row in rows]
    return {"prompt_ids": prompts, "completion_ids": completions, "rewards": [float(len(ids)) for ids in completions]}


def _episodes() -> dict[str, Any]:
    from environments_for_tests import talkative

    return {"environment": talkative()}


def _with_group() -> dict[str, Any]:
    from conformity import early_letters

    return {"reward_funcs": [early_letters, ranked]}


EVALUATED = (
    ("sft", 5), ("sft-stream", 5), ("sft-stream", 1), ("reward", 3), ("dpo-sigmoid", 1), ("dpo-state", 7), ("kto", 5),
    ("kto-bco", 6), ("prm", 3), ("orpo", 5),
)  # fmt: skip
"""trainers, and the rows that two processes of two rows each cannot share evenly"""


def evaluated(name: str, rows: int, world: int, folder: Path) -> dict[str, float]:
    """What an evaluation says; also the number and the mean of what `compute_metrics` sees."""
    import conformity

    base = name.removesuffix("-stream")
    case = conformity.CASES[base]
    held = case.rows().select(range(rows))
    if name != base:
        held = held.to_iterable_dataset(num_shards=min(rows, 2))
    trainer = _build(
        replace(case, arguments=lambda: {**case.arguments(), "eval_dataset": held}), folder,
        per_device_train_batch_size=4 // world, per_device_eval_batch_size=4 // world, use_cpu=True,
    )  # fmt: skip
    torch.manual_seed(1)
    for parameter in trainer.model.parameters():  # away from the reference
        parameter.data += 0.05 * torch.randn_like(parameter)
    trainer.compute_metrics = lambda seen: {
        "seen": len(seen.label_ids), "mean": float(seen.predictions[seen.label_ids != -100].mean())
    }  # fmt: skip
    found = trainer.evaluate()
    return {key: value for key, value in found.items() if not key.endswith(("_runtime", "_per_second", "_time"))}


MORE: dict[str, Callable[[], dict[str, Any]]] = {
    **dict.fromkeys(("grpo", "grpo-ahead", "grpo-steps", "rloo"), _with_group), "episodes": _episodes,
    "function": lambda: {"rollout_func": told},
}  # fmt: skip
