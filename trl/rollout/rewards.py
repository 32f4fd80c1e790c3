"""The rewards of a rollout: who is asked, with what, and what the answers add up to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from trl.data.formats import is_conversational
from trl.data.records import Rollout
from trl.losses.policy import soft_overlong_punishment
from trl.rewards.named import reward_panel
from trl.rewards.panel import RewardPanel


@dataclass
class Rewards:
    """What each reward function said of each completion, NaN where it had no opinion."""

    names: list[str]
    scores_BF: Tensor
    weights_F: Tensor
    timed_out: list[bool]

    def total_B(self) -> Tensor:
        """The weighted sum; NaN for a completion that no function scored."""
        return weighted_total(self.scores_BF, self.weights_F)

    def informative_groups(self, group: int) -> Tensor:
        """Whether a group holds two scored completions of different reward. [groups]"""
        total = self.total_B().view(-1, group)
        highest, lowest = total.nan_to_num(nan=-torch.inf).amax(1), total.nan_to_num(nan=torch.inf).amin(1)
        return highest - lowest > 1e-6


def weighted_total(scores_BF: Tensor, weights_F: Tensor) -> Tensor:
    """The weighted sum of what there is; NaN where there is nothing. [B]"""
    unscored_B = scores_BF.isnan().all(-1)
    return (scores_BF.nan_to_num() @ weights_F).masked_fill(unscored_B, torch.nan)


class RolloutRewards:
    """Scores rollouts with reward functions, and with the soft overlong punishment where it is asked for."""

    def __init__(self, panel: RewardPanel | None, weights: Sequence[float], overlong: tuple[int, int] | None = None):
        self.panel, self.overlong = panel, overlong
        names = ["reward"] if panel is None else panel.names
        if len(weights) != len(names):
            raise ValueError(
                f"reward_weights={list(weights)}: give one weight for each of the {len(names)} reward functions"
            )
        self.names = [*names, *(["overlong"] if overlong else [])]
        self.weights_F = torch.tensor([*weights, *([1.0] if overlong else [])], dtype=torch.float32)

    @classmethod
    def of(cls, config: Any, functions: Any, tokenizers: Any, device: torch.device) -> RolloutRewards:
        """From a trainer's arguments; without functions the rollouts carry their own rewards."""
        panel = None if functions is None else reward_panel(functions, tokenizers, config.reward_timeout, device)
        weights = config.reward_weights or [1.0] * (1 if panel is None else len(panel.functions))
        limits = None if config.overlong_cache is None else (config.max_completion_length, config.overlong_cache)
        return cls(panel, weights, limits)

    def __call__(self, rollout: Rollout, columns: Mapping[str, Sequence[Any]], state: Any) -> Rewards:
        """columns: those of the data set, a value per completion; they reach the functions by their names."""
        if self.panel is None:
            if len(rollout.rewards) != len(rollout):
                raise ValueError(
                    f"rollout_func gave {len(rollout.rewards)} rewards for {len(rollout)} completions: fill "
                    "`Rollout.rewards`, or give `reward_funcs`"
                )
            scores, late = [rollout.rewards], [False]
        else:
            verdict = self.panel(len(rollout), asked_of(rollout, columns, state))
            scores, late = verdict.scores, verdict.timed_out
        scores_BF = torch.tensor(scores, dtype=torch.float32).T
        if self.overlong is not None:
            lengths_B = torch.tensor([float(len(ids)) for ids in rollout.completions])
            punishment_B = soft_overlong_punishment(lengths_B, *self.overlong)
            punishment_B = punishment_B.masked_fill(scores_BF.isnan().all(-1), torch.nan)
            scores_BF, late = torch.cat([scores_BF, punishment_B[:, None]], 1), [*late, False]
        return Rewards(self.names, scores_BF, self.weights_F, late)


def asked_of(rollout: Rollout, columns: Mapping[str, Sequence[Any]], state: Any) -> dict[str, Any]:
    """The keywords of a reward function."""
    prompts = columns.get("prompt", [])
    chat = bool(len(prompts)) and is_conversational({"prompt": prompts[0]})
    given = {name: values for name, values in columns.items() if name not in ("prompt", "prompt_ids")}
    extra = {name: values for name, values in rollout.metadata.items() if name not in ("truncated", "completions")}
    said = [[{"role": "assistant", "content": t}] for t in rollout.texts] if chat else rollout.texts
    return {
        **given,
        **extra,
        "prompts": list(prompts),
        "completions": rollout.metadata.get("completions", said),
        "completion_ids": rollout.completions,
        "trainer_state": state,
    }


LIVE = ("histories", "environments")
"""metadata that only reward functions read: objects that stay on their process"""


def replace_groups(
    rows: list[Any],
    rollout: Rollout,
    rewards: Rewards,
    further: tuple[list[Any], Rollout, Rewards | None],
    group: int,
    places: Sequence[int] | None = None,
    gather: Callable[[list[Any]], list[Any]] = list,
) -> None:
    """Put the further groups that are informative in the places of those that are not, in place.

    places: of the groups among those of all ranks; gather: the list of all ranks from each one's part. Groups move in
    the order of their places, so it does not matter how many ranks share a rollout.
    """
    new_rows, new_rollout, new_rewards = further
    assert new_rewards is not None
    places = range(len(rows)) if places is None else places
    for name in LIVE:
        rollout.metadata.pop(name, None)
    here = {place: slice(i * group, (i + 1) * group) for i, place in enumerate(places)}
    useful, fresh = (of.informative_groups(group).tolist() for of in (rewards, new_rewards))
    holes = gather([place for place, kept in zip(places, useful, strict=True) if not kept])
    theirs = _columns(new_rollout, rollout)
    taken = [
        (place, row, [column[here[place]] for column in theirs], new_rewards.scores_BF[here[place]])
        for place, row, wanted in zip(places, new_rows, fresh, strict=True)
        if wanted
    ]
    moved = dict(zip(sorted(holes), sorted(gather(taken), key=itemgetter(0)), strict=False))
    for i, place in enumerate(places):
        if place in moved:
            _, rows[i], columns, rewards.scores_BF[here[place]] = moved[place]
            for mine, values in zip(_columns(rollout, rollout), columns, strict=True):
                if mine:
                    mine[here[place]] = values


def _columns(rollout: Rollout, like: Rollout) -> list[list[Any]]:
    """All that a rollout knows of its completions, in the order of another one's metadata."""
    names = ("prompts", "completions", "logprobs", "masks", "texts", "rewards")
    return [*(getattr(rollout, name) for name in names), *(rollout.metadata[name] for name in like.metadata)]
