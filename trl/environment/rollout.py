"""Finished episodes as the records that training takes."""

from __future__ import annotations

from collections.abc import Sequence

from trl.data.records import Rollout
from trl.environment.text_history import TextHistory


def as_rollout(histories: Sequence[TextHistory]) -> Rollout:
    """One row for each episode: the query as prompt, all that follows as completion, masked to what was sampled.

    The metadata says which episodes were `completed` and which `truncated`. Needs the log-probabilities that the
    samplers give; turns by `generate` alone have none.
    """
    rollout = Rollout(prompts=[], completions=[], logprobs=[], masks=[])
    for index, history in enumerate(histories):
        if history.token_logprobs.isnan().any():
            raise ValueError(
                f"histories[{index}]: log-probabilities of sampled tokens are unknown; leave out the generation_kwargs "
                "that only `generate` knows, so that a sampler makes the turns"
            )
        query, response, mask = history.split_query_response_tokens()
        rollout.prompts.append(query.tolist())
        rollout.completions.append(response.tolist())
        rollout.masks.append(mask.tolist())
        rollout.logprobs.append(history.token_logprobs[len(query) :].tolist())
        rollout.rewards.append(float(history.reward))
        rollout.texts.append(history.text[history.text_spans[0][1] :])
    rollout.metadata = {
        "completed": [history.completed for history in histories],
        "truncated": [history.truncated for history in histories],
    }
    return rollout
