"""Methods of other releases that a user's subclass overrides: training calls them, or construction refuses them.

`TABLE` is the one list of them. An override counts wherever it stands: in a subclass, in a mixin before the trainer,
on the trainer itself (`trainer.dpo_loss = f`), or put in the place of our own method (`DPOTrainer.dpo_loss = f`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trl.losses.loss_sum import LossSum


@dataclass(frozen=True)
class Refused:
    """Why nothing calls a method, and what to override in its place."""

    way_out: str
    unless: tuple[str, ...] = ()
    """methods whose override may call it: with one of them it is the user's own matter"""


Outcome = str | Refused
CALLED = "called"
ROWS = "rows are prepared in _prepare_dataset(dataset, ...): override it"


def _refused(names: str, way_out: str, unless: tuple[str, ...] = ()) -> dict[str, Outcome]:
    return {name: Refused(way_out, unless) for name in names.split()}


def _called(names: str) -> dict[str, Outcome]:
    return dict.fromkeys(names.split(), CALLED)


OBJECTIVE = "override objective(model, batch) -> LossSum"
MODEL_CALLS = "a step reads log-probabilities and values of packed rows: override compute_rewards, compute_advantages "
MODEL_CALLS += "or loss, or the whole step"
SAMPLING = "completions come from a source: give a rollout_func, or override make_source() -> Source"
POLICY = "override policy_objective(model, batch) -> LossSum"

TABLE: dict[str, dict[str, Outcome]] = {
    "ObjectiveTrainer": _called("compute_loss _prepare_dataset")
    | _refused("_compute_loss", OBJECTIVE, unless=("compute_loss",)),
    "SFTTrainer": _refused("_prepare_packed_dataloader _prepare_non_packed_dataloader tokenize_row", ROWS),
    "PairTrainer": _refused(
        "get_batch_loss_metrics concatenated_forward concatenated_inputs get_batch_logps cpo_loss odds_ratio_loss "
        "simpo_loss",
        OBJECTIVE,
        unless=("compute_loss", "objective"),
    )
    | _refused("tokenize_row build_tokenized_answer", ROWS)
    | _refused("store_metrics", "metrics go through record(name, total, count) and log(logs): override log"),
    "DPOTrainer": _called(
        "dpo_loss get_batch_loss_metrics concatenated_forward concatenated_inputs get_batch_logps tokenize_row "
        "build_tokenized_answer compute_reference_log_probs store_metrics"
    )
    | _refused("compute_ref_log_probs", "override compute_reference_log_probs(padded_batch)")
    | _refused("process_row", "override tokenize_row(feature) or _prepare_dataset(dataset, ...)"),
    "KTOTrainer": _called("kto_loss get_batch_loss_metrics")
    | _refused(
        "forward bco_loss get_batch_logps compute_reference_log_probs",
        "override kto_loss(...), get_batch_loss_metrics(model, batch) or objective(model, batch)",
        unless=("get_batch_loss_metrics", "compute_loss"),
    ),
    "RolloutTrainer": _called("_calculate_rewards")
    | _refused("_compute_loss", POLICY, unless=("compute_loss",))
    | _refused(
        "_compute_advantages",
        "override advantages(scores_BF, weights_F, kl_B) of GRPO and RLOO, or experience(rollout, rewards, rows)",
    )
    | _refused("_generate _generate_single_turn generate_on_policy_outputs", SAMPLING)
    | _refused(
        "_generate_and_score_completions",
        "override experience(rollout, rewards, rows) for what is learned of completions and _calculate_rewards for "
        "their rewards; rollout_func makes the completions",
    )
    | _refused(
        "_get_per_token_logps _get_per_token_logps_and_entropies",
        "override scored(model, rows), or policy_objective(model, batch) for the loss",
        unless=("compute_loss",),
    )
    | _refused("_get_train_sampler", "prompts are drawn by seed, data_seed and shuffle_dataset: set those"),
    "PPOTrainer": _called("compute_rewards compute_advantages loss _kl_penalty prepare_dataloader")
    | _refused("batched_forward_pass train_minibatch prepare_model_inputs", MODEL_CALLS, unless=("step",)),
}
"""trainer -> method -> what becomes of an override; a subclass's entry goes before that of its base"""

_AS_MADE: dict[type, dict[str, Any]] = {}


def remember(cls: type) -> type:
    """Keep what a class of this package holds, so that a method which is replaced later is known as the user's."""
    if _is_ours(cls):
        _AS_MADE[cls] = dict(vars(cls))
    return cls


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("trl.")


def table_of(kind: type) -> dict[str, Outcome]:
    """The methods that an override of a trainer is asked about."""
    found: dict[str, Outcome] = {}
    for cls in reversed(kind.__mro__):
        found |= TABLE.get(cls.__name__, {}) if _is_ours(cls) else {}
    return found


def _is_overridden(kind: type, on_itself: Collection[str], name: str) -> bool:
    if name in on_itself:
        return True
    for cls in kind.__mro__:
        if not _is_ours(cls):
            if name in vars(cls):
                return True
        elif name in vars(cls):
            return cls in _AS_MADE and vars(cls)[name] is not _AS_MADE[cls].get(name)
        elif TABLE.get(cls.__name__, {}).get(name) is not None:
            return False  # what stands behind this class overrides nothing of it
    return False


def own_methods(kind: type, on_itself: Collection[str]) -> frozenset[str]:
    """The methods of the table that are the user's; ValueError for one that nothing would call.

    on_itself: the attributes of the trainer, which may be methods put there.
    """
    table = table_of(kind)
    own = frozenset(name for name in table if _is_overridden(kind, on_itself, name))
    for name in sorted(own):
        outcome = table[name]
        if isinstance(outcome, Refused) and not any(_is_overridden(kind, on_itself, other) for other in outcome.unless):
            raise ValueError(
                f"{kind.__name__}.{name}: training never calls it here, so an override would have no effect; "
                f"{outcome.way_out}"
            )
    return own


def known_to(function: Callable[..., Any], given: Mapping[str, Any], passes_on: bool = True) -> dict[str, Any]:
    """Those of the keywords that a function takes: the methods of one name differ between releases.

    passes_on: give all of them to one that takes any keyword, and may pass them on to our method.
    """
    parameters = inspect.signature(function).parameters
    if passes_on and any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return dict(given)
    return {name: value for name, value in given.items() if name in parameters}


def check_own_losses(name: str, given: Any, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the losses that a user's method gives for rows, and the rewards of chosen and rejected.

    The losses are one number for each row, several of them one behind the other, or their mean.
    """
    if not isinstance(given, tuple | list) or len(given) < 3 or not all(map(torch.is_tensor, given[:3])):
        raise ValueError(f"{name}: it gave {type(given).__name__}; give (losses, chosen_rewards, rejected_rewards)")
    losses, chosen, rejected = given[:3]
    if losses.dim() == 0:
        total = losses * rows
    elif losses.numel() and losses.numel() % rows == 0:
        total = losses.reshape(-1, rows).mean(0).sum()
    else:
        raise ValueError(f"{name}: its losses have shape {tuple(losses.shape)}; give one for each of {rows} rows")
    return total, chosen, rejected


def own_batch_loss(own: Callable[..., Any], model: nn.Module, batch: dict[str, Any], rows: int) -> LossSum:
    """What a user's `get_batch_loss_metrics` gives for a batch of so many rows: its mean loss, and means."""
    mode = {"train_eval": "train" if model.training else "eval"}
    loss, metrics = own(model, batch, **known_to(own, mode, passes_on=False))
    if loss.dim():
        raise ValueError(f"get_batch_loss_metrics: its loss has shape {tuple(loss.shape)}; give the batch's mean")
    sums = {name: torch.as_tensor(value).detach().float().mean() * rows for name, value in metrics.items()}
    return LossSum(loss * rows, rows, {name.removeprefix("eval_"): (total, rows) for name, total in sums.items()})
