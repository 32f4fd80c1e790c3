"""Finished episodes as the records that training takes."""

from __future__ import annotations

from collections.abc import Sequence

from trl.data.records import Rollout
from trl.environment.text_history import TextHistory


def as_rollout(histories: Sequence[TextHistory]) -> Rollout:
    """One row for each episode: the query as prompt, all that follows as completion, masked to what was sampled.

    Episodes with a `limit` are cut there: what the model did not go on from is of no use. The metadata says which
    episodes were `completed` and which `truncated`, what each turn brought (`turn_rewards`) and where in the completion
    it ended (`turn_ends`). Needs the log-probabilities that the samplers give; turns by `generate` alone have none.
    """
    rollout = Rollout(prompts=[], completions=[], logprobs=[], masks=[])
    for index, history in enumerate(histories):
        if history.token_logprobs.isnan().any():
            raise ValueError(
                f"histories[{index}]: log-probabilities of sampled tokens are unknown; leave out the generation_kwargs "
                "that only `generate` knows, so that a sampler makes the turns"
            )
        start, end = history.token_spans[0][1], history.limit
        rollout.prompts.append(history.tokens[:start].tolist())
        rollout.completions.append(history.tokens[start:end].tolist())
        rollout.masks.append(history.token_masks[start:end].tolist())
        rollout.logprobs.append(history.token_logprobs[start:end].tolist())
        rollout.rewards.append(float(history.reward))
        rollout.texts.append(history.text[history.text_spans[0][1] :])
    rollout.metadata = {
        "completed": [history.completed for history in histories],
        "truncated": [history.truncated for history in histories],
        "turn_rewards": [history.turn_rewards for history in histories],
        "turn_ends": [_turn_ends(history) for history in histories],
        "histories": list(histories),
    }
    return rollout


def _turn_ends(history: TextHistory) -> list[int]:
    start = history.token_spans[0][1]
    spans = zip(history.token_spans[1:], history.system_spans[1:], strict=True)
    return [end - start for (_, end), system in spans if not system]
