"""Sources of rollouts: a sampler, `generate`, an environment, or a function of the user; a trainer chooses one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trl.data.records import Rollout, own
from trl.environment.chat_environment import ChatEnvironment
from trl.environment.episodes import Environment
from trl.environment.turns import SampledTurns
from trl.generation.sampler import Sampler, SamplingParams

Rows = Sequence[Mapping[str, Any]]
"""of a data set, each with `prompt_ids`"""
Seed = int | tuple[int, ...] | None


class Source(Protocol):
    """Completes prompts."""

    def draw(self, rows: Rows, group: int = 1, seed: int | None = None, places: Sequence[int] | None = None) -> Rollout:
        """`group` completions of each row's prompt, one row after the other.

        seed: None draws from torch's generator. places: of the rows among those of all ranks; rows at different places
        get different random numbers. None, for evaluation: equal prompts get equal completions.
        """
        ...


@dataclass
class SamplerSource:
    """Completions by a sampler of this process, which shares the policy's weights."""

    sampler: Sampler
    params: Callable[[Seed], SamplingParams]
    reshaped: bool = False
    """whether filters change the distribution; the log-probabilities are then the model's, at temperature 1"""
    measure: Callable[[Rollout], list[list[float]]] | None = None
    """the policy's log-probabilities, where the sampler's are of another distribution"""

    def draw(self, rows: Rows, group: int = 1, seed: int | None = None, places: Sequence[int] | None = None) -> Rollout:
        prompts = [list(row["prompt_ids"]) for row in rows]
        own = seed if seed is None or places is None else tuple(seed * 2**20 + place for place in places)
        groups = self.sampler.sample(prompts, self.params(own), n=group)
        flat = [completion for completions in groups for completion in completions]
        rollout = Rollout(
            prompts=[prompt for prompt in prompts for _ in range(group)],
            completions=[completion.ids for completion in flat],
            logprobs=[c.raw_logprobs if self.reshaped else c.logprobs for c in flat],
            masks=[[1] * len(completion.ids) for completion in flat],
            metadata={"truncated": [completion.finish_reason == "length" for completion in flat]},
        )
        if self.measure is not None:
            rollout.logprobs = self.measure(rollout)
        return rollout


@dataclass
class GenerateSource:
    """Completions by a model's own `generate`, for what no sampler can do. Their log-probabilities are unknown."""

    generate: Callable[[list[Tensor]], list[Tensor]]
    """responses to a batch of 1-d prompts"""
    device: Any
    max_rows: int = 128

    def draw(self, rows: Rows, group: int = 1, seed: int | None = None, places: Sequence[int] | None = None) -> Rollout:
        if seed is not None:
            raise ValueError(f"seed={seed}: `generate` draws from torch's generator; seed that")
        prompts = [list(row["prompt_ids"]) for row in rows for _ in range(group)]
        completions: list[list[int]] = []
        for start in range(0, len(prompts), self.max_rows):
            part = [torch.tensor(ids, device=self.device) for ids in prompts[start : start + self.max_rows]]
            completions += [response.tolist() for response in self.generate(part)]
        return Rollout(prompts, completions, logprobs=[], masks=[[1] * len(ids) for ids in completions])


@dataclass
class EnvironmentSource:
    """Episodes of an environment, in which a sampler makes the policy's turns."""

    environment: Any
    """a `TextEnvironment`, a `ChatEnvironment`, or an object with their `rollout`"""
    sampler: Sampler
    params: Callable[[Seed], SamplingParams]
    context: int | None
    """most tokens of a prompt and its completion together; None: no limit is known"""
    limit: int
    """most tokens of a completion"""
    rank: int = 0
    measure: Callable[[Rollout], list[list[float]]] | None = None
    """the policy's log-probabilities, where the sampler's are of another distribution"""

    def draw(self, rows: Rows, group: int = 1, seed: int | None = None, places: Sequence[int] | None = None) -> Rollout:
        own = [row for row in rows for _ in range(group)]
        if seed is None:
            first = int(torch.randint(2**62, ()))
            seeds = list(range(first, first + len(own)))
        else:
            places = range(self.rank * len(rows), (self.rank + 1) * len(rows)) if places is None else places
            seeds = [seed * 2**20 + place * group + i for place in places for i in range(group)]
        turns = SampledTurns(self.sampler, self.params(seed), self.context)
        rollout: Rollout = self.environment.rollout(own, turns, seeds, self.limit)
        if self.measure is not None:
            rollout.logprobs = self.measure(rollout)
        return rollout


@dataclass
class FunctionSource:
    """Rollouts of a user's function, which may ask another engine."""

    function: Callable[[list[dict[str, Any]]], Rollout]
    """called with a row of the data set for each completion"""

    def draw(self, rows: Rows, group: int = 1, seed: int | None = None, places: Sequence[int] | None = None) -> Rollout:
        rollout = self.function([own(dict(row)) for row in rows for _ in range(group)])
        if len(rollout) != len(rows) * group:
            raise ValueError(f"rollout_func gave {len(rollout)} completions for {len(rows) * group} rows")
        return rollout


# -- environments ------------------------------------------------------------------------------


def make_environment(
    environment: Any,
    tools: Sequence[Callable[..., Any]] | None,
    factory: Callable[[], Any] | None,
    *,
    max_iterations: int | None,
    template_kwargs: Mapping[str, Any] | None,
) -> Any:
    """The environment that was given, or one made of tools and a factory; None if nothing was given."""
    made_of_tools = tools is not None or factory is not None
    if environment is None and not made_of_tools:
        if max_iterations is not None:
            raise ValueError("max_tool_calling_iterations: no effect without `tools` or an `environment_factory`")
        return None
    if environment is None:
        return ChatEnvironment(tools or (), factory, max_iterations=max_iterations, template_kwargs=template_kwargs)
    if made_of_tools:
        raise ValueError("environment: it has its own tools; give it those of `tools` and `environment_factory`")
    if max_iterations is not None:
        raise ValueError("max_tool_calling_iterations: the environment has its own limit; set it there")
    return environment


def environment_for_policy(
    environment: Any,
    tokenizer: Any,
    end_ids: Sequence[int],
    *,
    reward_funcs: Any,
    needs_rewards: bool = True,
    max_prompt_length: int | None = None,
) -> Any:
    """The environment, ready to play with this tokenizer; ValueError for arguments that do not go together.

    end_ids: tokens that end a turn.
    """
    if isinstance(environment, Environment):
        environment.check_settings(tokenizer, max_prompt_length, reward_funcs)
        environment = environment.for_policy(tokenizer, end_ids)
    if needs_rewards and reward_funcs is None and not environment.gives_rewards:
        raise ValueError("reward_funcs: the environment gives no rewards; give reward functions, or it a `reward`")
    return environment
