"""Episodes of an environment as the batch of a PPO step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trl.data.records import Rollout
from trl.environment.episodes import Environment
from trl.environment.turns import SampledTurns
from trl.generation import make_sampler
from trl.generation.generate_kwargs import asked_end_tokens, sampling_params
from trl.generation.stopping import end_tokens
from trl.models.prepare import context_length
from trl.models.unwrap import below_accelerate, below_value_head


def check_environment(trainer: Any, environment: Any, reward_funcs: Any) -> None:
    """ValueError for what does not go together with the trainer's other arguments."""
    if trainer.is_encoder_decoder:
        raise ValueError("environment: an encoder-decoder cannot go on from an answer; train a causal model")
    if trainer.config.missing_eos_penalty is not None:
        raise ValueError("missing_eos_penalty: episodes of an environment end in other ways too; leave it out")
    if isinstance(environment, Environment):
        environment.check_settings(trainer.tokenizer, reward_funcs=reward_funcs)
    if reward_funcs is None and not environment.gives_rewards:
        raise ValueError("reward_funcs: the environment gives no rewards; give reward functions, or it a `reward`")


def play(trainer: Any, rows: Sequence[Mapping[str, Any]], kwargs: dict[str, Any]) -> Rollout:
    """An episode from each row, with at most `max_new_tokens` behind its prompt; kwargs: of `generate`.

    rows: with `prompt` and `prompt_ids`.
    """
    policy, environment = below_accelerate(trainer.model), trainer.environment
    params = sampling_params(policy, kwargs)
    if params is None:
        raise ValueError("generation_kwargs: the turns of an environment are sampled, and only `generate` knows these")
    if isinstance(environment, Environment):
        ends = end_tokens(policy, trainer.tokenizer, asked_end_tokens(kwargs))
        environment = environment.for_policy(trainer.tokenizer, ends)
    sampler = make_sampler(policy, trainer.tokenizer, max_rows=len(rows))
    first = int(torch.randint(2**62, ()))
    turns = SampledTurns(sampler, params, context_length(below_value_head(policy)))
    seeds = range(first, first + len(rows))
    rollout: Rollout = environment.rollout(rows, turns, seeds, trainer.config.max_new_tokens)
    return rollout
