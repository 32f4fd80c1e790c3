"""Rollouts of an environment: who plays, with which random numbers, and what each turn is credited with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from trl.data.records import Rollout
from trl.environment.chat_environment import ChatEnvironment
from trl.environment.episodes import Environment
from trl.environment.turns import SampledTurns
from trl.generation.stopping import end_tokens
from trl.models.prepare import context_length
from trl.rollout.rewards import Rewards


@dataclass(frozen=True)
class Played:
    """What a trainer was given to make its rollouts with."""

    environment: Any = None
    """a `TextEnvironment`, a `ChatEnvironment`, or an object with their `rollout`"""
    tools: Sequence[Callable[..., Any]] | None = None
    environment_factory: Callable[[], Any] | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in (self.environment, self.tools, self.environment_factory))

    def prepare(self, trainer: Any, reward_funcs: Any) -> Any:
        """The environment, checked against the trainer's other arguments; None if there is none."""
        config, environment = trainer.args, self.environment
        if not self:
            if config.max_tool_calling_iterations is not None:
                raise ValueError("max_tool_calling_iterations: no effect without `tools` or an `environment_factory`")
            return None
        if trainer.rollout_func is not None:
            raise ValueError("rollout_func and an environment both make the rollouts: give one of them")
        if environment is None:
            environment = ChatEnvironment(
                self.tools or (),
                self.environment_factory,
                max_iterations=config.max_tool_calling_iterations,
                template_kwargs=config.chat_template_kwargs,
            )
        elif self.tools is not None or self.environment_factory is not None:
            raise ValueError("environment: it has its own tools; give it those of `tools` and `environment_factory`")
        elif config.max_tool_calling_iterations is not None:
            raise ValueError("max_tool_calling_iterations: the environment has its own limit; set it there")
        if isinstance(environment, Environment):
            environment.check_settings(trainer.processing_class, config.max_prompt_length, reward_funcs)
            environment = environment.for_policy(trainer.processing_class, end_ids(trainer))
        if trainer.needs_rewards and reward_funcs is None and not environment.gives_rewards:
            raise ValueError("reward_funcs: the environment gives no rewards; give reward functions, or it a `reward`")
        return environment


def end_ids(trainer: Any) -> list[int]:
    """The tokens that end a turn of the model."""
    return list(end_tokens(trainer.model, trainer.processing_class, trainer.sampling_params(0).stop_token_ids))


def play(
    trainer: Any, rows: Sequence[Mapping[str, Any]], group: int, seed: int, places: Sequence[int] | None = None
) -> Rollout:
    """`group` episodes from each row, by the trainer's sampler; every episode has random numbers of its own.

    places: of the rows among those of all ranks; None: one rank's rows behind another's.
    """
    own = [row for row in rows for _ in range(group)]
    rank = trainer.args.process_index
    places = range(rank * len(rows), (rank + 1) * len(rows)) if places is None else places
    seeds = [seed * 2**20 + place * group + i for place in places for i in range(group)]
    turns = SampledTurns(trainer.sampler, trainer.sampling_params(seed), context_length(trainer.model))
    return trainer.environment.rollout(own, turns, seeds, trainer.args.max_completion_length)


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
