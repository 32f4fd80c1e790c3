"""Rollouts of an environment: who plays, with which random numbers, and what each turn is credited with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from trl.data.records import Rollout
from trl.environment.base_environment import TextEnvironment
from trl.environment.turns import SampledTurns
from trl.models.prepare import context_length
from trl.models.scoring import backbone
from trl.trainer.rollout_rewards import Rewards


def environment_of(config: Any, tokenizer: Any, environment: Any, reward_funcs: Any, rollout_func: Any) -> Any:
    """The environment of a trainer's arguments, checked against the others."""
    if rollout_func is not None:
        raise ValueError("rollout_func and an environment both make the rollouts: give one of them")
    if isinstance(environment, TextEnvironment):
        _check_text_environment(environment, config, tokenizer, reward_funcs)
    if environment.tokenizer is None:
        environment.tokenizer = tokenizer
    return environment


def _check_text_environment(environment: TextEnvironment, config: Any, tokenizer: Any, reward_funcs: Any) -> None:
    known = environment.tokenizer
    if known is not None and known is not tokenizer and known.get_vocab() != tokenizer.get_vocab():
        raise ValueError("environment: its tokenizer has another vocabulary than the trainer's; give them the same")
    other = set(environment.generation_kwargs) - {"max_new_tokens"}
    if other:
        raise ValueError(
            f"environment: generation_kwargs {', '.join(sorted(other))} have no effect in a trainer, whose config says "
            "how to sample; only max_new_tokens, the length of a turn, belongs to the environment"
        )
    if environment.prompt and config.max_prompt_length is not None:
        raise ValueError(
            f"max_prompt_length={config.max_prompt_length}: the environment's own prompt comes before it; leave it out"
        )
    if environment.reward_fn is not None and reward_funcs is not None:
        raise ValueError("reward_funcs: the environment has a reward_fn already; give one of them")
    if not environment.gives_rewards and reward_funcs is None:
        raise ValueError("reward_funcs: the environment gives no rewards; give reward functions, or it a reward_fn")


def play(trainer: Any, rows: Sequence[Mapping[str, Any]], group: int, seed: int) -> Rollout:
    """`group` episodes from each row, by the trainer's sampler; every episode has random numbers of its own."""
    own = [row for row in rows for _ in range(group)]
    turns = SampledTurns(trainer.sampler, trainer.sampling_params(seed), context_length(backbone(trainer.model)))
    first = seed * 2**20 + trainer.args.process_index * len(own)
    limit = trainer.args.max_completion_length
    return trainer.environment.rollout(own, turns, range(first, first + len(own)), limit)


def credit_turns(
    rewards: Rewards, rollout: Rollout, advantages: Callable[[Rewards], Tensor], world_size: int
) -> list[list[float]]:
    """A number for each token: the advantage of its turn, by the rewards from that turn on.

    A turn is compared with the same turn of the episodes that `advantages` compares with, as far as these have one:
    what came before it, it cannot have caused. A tool's tokens get the number of the turn that follows; they are
    masked.
    """
    turn_rewards, turn_ends = rollout.metadata["turn_rewards"], rollout.metadata["turn_ends"]
    longest = [max(map(len, turn_ends), default=0)]
    most = max(gather_object(longest) if world_size > 1 else longest)
    credited: list[list[float]] = [[] for _ in turn_ends]
    for turn in range(most):
        scores_BF = rewards.scores_BF.clone()
        scores_BF[:, 0] -= torch.tensor([sum(earned[:turn]) for earned in turn_rewards])
        absent_B = torch.tensor([turn >= len(ends) for ends in turn_ends])
        advantages_B = advantages(replace(rewards, scores_BF=scores_BF.masked_fill(absent_B[:, None], torch.nan)))
        for row, ends, advantage in zip(credited, turn_ends, advantages_B.tolist(), strict=True):
            if turn < len(ends):
                row += [advantage] * (ends[turn] - len(row))
    widths = map(len, rollout.completions)
    return [row + [0.0] * (width - len(row)) for row, width in zip(credited, widths, strict=True)]
