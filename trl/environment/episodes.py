"""Episodes: a model and its tools take turns, each row at its own pace."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Self

from trl.data.records import Rollout
from trl.data.user_functions import results_of
from trl.environment.factories import Factories, Factory, OwnEnvironment, Said
from trl.environment.text_history import TextHistory
from trl.environment.tool_calls import Answer, LateCalls, ToolCalls
from trl.environment.turns import SampledTurns, Turns


@dataclass(eq=False)
class Episode:
    """One row that an environment plays. Hooks of environments get histories; `history.episode` is the way back."""

    history: TextHistory
    row: int = 0
    """its number in this run"""
    seed: int | None = None
    """of the row's random numbers; None: every turn draws from torch's global generator"""
    limit: int | None = None
    """most tokens of the history that training takes; None: no limit"""
    own: OwnEnvironment | None = None
    """the object whose methods are tools of this row alone"""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """of its row"""
    said: Said = ""
    """what `reset` of that object added to the prompt"""
    turn_rewards: list[float] = field(default_factory=list)
    """reward of each turn of the model so far"""
    messages: list[dict[str, Any]] = field(default_factory=list)
    """in a chat: the messages that follow the prompt"""
    calls: list[Answer] = field(default_factory=list)
    """the tool calls of the last turn; they run one after the other"""
    answers: list[str] = field(default_factory=list)
    """the answers to those calls so far"""
    called: int = 0
    """calls of the whole episode that were answered"""
    failed: int = 0
    """those of them that were answered by an error"""

    def __post_init__(self) -> None:
        self.history.episode = self

    @classmethod
    def of(cls, history: TextHistory) -> Episode:
        """The episode of this history; a new one where it has none yet."""
        return history.episode or cls(history)

    @property
    def room(self) -> int | None:
        """How many more tokens fit; None: no limit."""
        return None if self.limit is None else self.limit - len(self.history.tokens)

    @property
    def is_full(self) -> bool:
        return self.room is not None and self.room <= 0


class Environment:
    """The loop that text and chat environments share. A subclass says how a model calls tools and reads answers."""

    needs_rewards = False
    """whether episodes must have rewards: a trainer has no reward functions"""
    asks_rewards = True
    """whether `get_reward` is called: a trainer has no reward functions"""

    def __init__(
        self,
        tokenizer: Any,
        environment_factory: Factory | Mapping[str, Factory] | None,
        tool_timeout: float | None,
        tool_workers: int,
    ) -> None:
        if tool_timeout is not None and tool_timeout <= 0:
            raise ValueError(f"tool_timeout={tool_timeout}: give seconds above 0, or None for no limit")
        if tool_workers < 1:
            raise ValueError(f"tool_workers={tool_workers}: give 1 or more")
        self.tokenizer = tokenizer
        self.environment_factory = environment_factory
        self.factories = None if environment_factory is None else Factories(environment_factory, tool_timeout)
        self.tool_timeout = tool_timeout
        self.tool_workers = tool_workers
        self.late_calls = LateCalls(tool_timeout)

    # --- what trainers ask ----------------------------------------------------------------------------------------

    @property
    def gives_rewards(self) -> bool:
        """Whether episodes may have rewards without further functions: objects of a factory show it after `reset`."""
        return self.factories is not None or self._judges()

    def _judges(self) -> bool:
        """Whether the environment itself gives rewards, not the objects of its factory."""
        return type(self).turn_reward is not Environment.turn_reward

    @property
    def reward_names(self) -> dict[str | None, str] | None:
        """Under what the rewards are logged, by the factory; None: as those of the environment as a whole."""
        if self.factories is None or self._judges():
            return None
        judged = any(first.judges for first in self.factories.firsts().values())
        return self.factories.labels() if judged or self.factories.names else None

    def close(self) -> None:
        """Close the objects of its factory; episodes that follow get new ones."""
        if self.factories is not None:
            self.factories.close()

    def check_settings(self, tokenizer: Any, max_prompt_length: int | None = None, reward_funcs: Any = None) -> None:
        """ValueError for settings of a trainer that do not go with this environment."""
        known = self.tokenizer
        if known is not None and known is not tokenizer and known.get_vocab() != tokenizer.get_vocab():
            raise ValueError("environment: its tokenizer has another vocabulary than the trainer's; give them the same")

    @property
    def is_ready(self) -> bool:
        """Whether it can play as it is."""
        return self.tokenizer is not None

    def for_policy(self, tokenizer: Any, end_ids: Sequence[int]) -> Self:
        """An environment that is ready to play: this one if it has a tokenizer, else a copy that has this one.

        end_ids: the tokens that end a turn of the policy.
        """
        if self.is_ready:
            return self
        ready = copy.copy(self)
        ready.tokenizer = tokenizer
        return ready

    def rollout(
        self, rows: Sequence[Mapping[str, Any]], turns: SampledTurns, seeds: Sequence[int], limit: int
    ) -> Rollout:
        """Play one episode from each row, with at most `limit` tokens after its prompt.

        The row's columns reach the `reset` of its own environment, as far as it has parameters for them. A row without
        a prompt gets it from there; the metadata holds the `prompts` of all rows, where there is a factory.
        """
        episodes = self._begin(rows, seeds, [row.get("prompt_ids") for row in rows])
        for episode in episodes:
            episode.limit = min(len(episode.history.tokens) + limit, turns.context or 2**62)
        self._play(episodes, turns)
        self._score(episodes, rows)
        rollout = as_rollout([episode.history for episode in episodes])
        if self.factories is not None:
            rollout.metadata["prompts"] = [self._prompt(episode) for episode in episodes]
        return rollout

    def turn_reward(self, history: TextHistory) -> float:
        """The reward of the model's last turn and the answers to it. Subclasses may compute their own.

        Here it is the growth of `reward` in the row's own environment.
        """
        own = Episode.of(history).own
        return 0.0 if own is None else own.new_reward()

    # --- the loop -------------------------------------------------------------------------------------------------

    def _begin(
        self, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int], ids: Sequence[Sequence[int] | None] | None = None
    ) -> list[Episode]:
        """An episode of each row; `ids`: of the prompts, where they are known."""
        if not self.is_ready:
            raise ValueError(
                "tokenizer=None: an environment needs one to play; construct it with one, or take "
                "`environment.for_policy(tokenizer, end_ids)`"
            )
        objects: Sequence[OwnEnvironment | None] = [None] * len(rows)
        said: Sequence[Said] = [""] * len(rows)
        if self.factories is not None:
            given = [row.get("seed") if lacks_prompt(row) else None for row in rows]
            drawn = [int(seed) if isinstance(seed, Integral) else None for seed in given]
            objects, said = self.factories.begin(rows, drawn)
            self._check_rewarded(objects)
        episodes = []
        for index, (row, seed, own, own_said) in enumerate(zip(rows, seeds, objects, said, strict=True)):
            history = self._open(row, own_said, None if ids is None else ids[index], own)
            episodes.append(Episode(history, index, seed, own=own, columns=row, said=own_said))
        return episodes

    def _check_rewarded(self, objects: Sequence[OwnEnvironment]) -> None:
        """ValueError for an object without rewards, where they are needed."""
        poor = None if self._judges() else next((each for each in objects if not each.gives_rewards), None)
        if self.needs_rewards and poor is not None:
            raise ValueError(
                f"reward_funcs: the environment gives no rewards: {poor.name} has no get_reward(), and no `reward` "
                "after reset(); give it one of them, or give reward functions"
            )

    def _play(self, episodes: Sequence[Episode], turns: Turns) -> None:
        """Let the model and its tools take turns until every episode is over. Episodes stand in the order of `row`."""
        calls = ToolCalls(self.tool_timeout, self.tool_workers)
        ready = [episode for episode in episodes if self._goes_on(episode)]
        while ready or len(calls):
            began = time.monotonic()
            if ready:
                self._speak(ready, turns)
                for episode in ready:
                    self._start_calls(episode, calls)
            # Waiting as long as a turn took fills the next batch. Rows that depend on their batch wait for all others.
            patience = time.monotonic() - began if turns.rows_are_apart else math.inf
            answers = calls.collect(patience)
            ready = [episodes[row] for row in sorted(answers) if self._take(episodes[row], answers[row], calls)]

    def _speak(self, episodes: Sequence[Episode], turns: Turns) -> None:
        """Append a turn of the model to each history; one without room for a token is completed as truncated."""
        rooms = [episode.room for episode in episodes]
        most = None if None in rooms else max((room for room in rooms if room is not None), default=None)
        seeds = [episode.seed for episode in episodes if episode.seed is not None]
        said = turns.speak([episode.history.tokens for episode in episodes], seeds or None, most)
        for episode, room, (tokens, logprobs) in zip(episodes, rooms, said, strict=True):
            history = episode.history
            if len(tokens):
                tokens, logprobs = tokens[:room], None if logprobs is None else logprobs[:room]
                history.extend(str(self.tokenizer.decode(tokens)), tokens, system=False, logprobs=logprobs)
            else:
                history.complete(truncated=True)

    def _start_calls(self, episode: Episode, calls: ToolCalls) -> None:
        if episode.history.completed:  # there was no room for a turn
            return
        episode.calls, episode.answers = self._read_turn(episode), []
        if episode.history.completed:
            episode.turn_rewards.append(self.turn_reward(episode.history))
        else:
            calls.start(episode.row, episode.calls[0])

    def _take(self, episode: Episode, answer: str, calls: ToolCalls) -> bool:
        """Take the answer to the last call. Whether the model speaks next."""
        episode.answers.append(answer)
        if len(episode.answers) < len(episode.calls):
            calls.start(episode.row, episode.calls[len(episode.answers)])
            return False
        self._hear(episode)
        episode.turn_rewards.append(self.turn_reward(episode.history))
        self._end_after_answers(episode)
        return self._goes_on(episode)

    def _goes_on(self, episode: Episode) -> bool:
        """Whether the model speaks next; a full episode is completed as truncated."""
        if episode.is_full and not episode.history.completed:
            episode.history.complete(truncated=True)
        return not episode.history.completed

    # --- what a subclass says -------------------------------------------------------------------------------------

    def _open(
        self, row: Mapping[str, Any], said: Said, ids: Sequence[int] | None, own: OwnEnvironment | None = None
    ) -> TextHistory:
        """The prompt of a row; `said`: what `reset` of its own environment adds to it."""
        raise NotImplementedError

    def _prompt(self, episode: Episode) -> Any:
        """The prompt of an episode, as reward functions read it."""
        return episode.history.text[: episode.history.text_spans[0][1]]

    def _read_turn(self, episode: Episode) -> list[Answer]:
        """The tool calls of the turn that the model has just taken. A turn without any completes the history."""
        raise NotImplementedError

    def _hear(self, episode: Episode) -> None:
        """Append `episode.answers` to the history."""
        raise NotImplementedError

    def _end_after_answers(self, episode: Episode) -> None:
        """Complete the history if its own environment is done."""
        if episode.own is not None and episode.own.done and not episode.is_full:
            episode.history.complete()

    def _score(self, episodes: Sequence[Episode], rows: Sequence[Mapping[str, Any]]) -> None:
        """Set the reward of each history."""
        for episode, reward in zip(episodes, self._earned(episodes), strict=True):
            episode.history.reward = reward

    def _earned(self, episodes: Sequence[Episode]) -> list[float]:
        """What each episode got: from `get_reward` of its own environment, else by its turns; nan: no opinion.

        All episodes are asked at once, where the methods are async.
        """
        earned = [sum(episode.turn_rewards) if self._turns_count(episode) else 0.0 for episode in episodes]
        owned = [(place, each.own) for place, each in enumerate(episodes) if each.own is not None]
        judges = [(place, own) for place, own in owned if own.judges and self.asks_rewards]
        calls = [functools.partial(own.begin_reward, self._columns(episodes[place])) for place, own in judges]
        rewards = results_of(calls, lambda i, begun: judges[i][1].reward(begun))
        for (place, _), reward in zip(judges, rewards, strict=True):
            earned[place] += reward
        return earned

    def _turns_count(self, episode: Episode) -> bool:
        """Whether the rewards of turns are part of the reward; those of an object are not if its `get_reward` is it."""
        own_turns = type(self).turn_reward is not Environment.turn_reward
        return own_turns or episode.own is None or not episode.own.judges

    def _columns(self, episode: Episode) -> dict[str, Any]:
        """What `get_reward` may have parameters for."""
        said = episode.messages or episode.history.text[episode.history.text_spans[0][1] :]
        return {**episode.columns, "prompt": self._prompt(episode), "completion": said}


def lacks_prompt(row: Mapping[str, Any]) -> bool:
    """Whether the environment has to say the prompt of a row."""
    return not any(row.get(name) is not None and len(row[name]) for name in ("prompt", "prompt_ids"))


def as_rollout(histories: Sequence[TextHistory]) -> Rollout:
    """Finished episodes as training takes them: the first segment is the prompt, the mask is 1 where the model spoke.

    An episode with a `limit` is cut there. The metadata says which episodes were `completed` and which `truncated`, and
    of each turn its reward (`turn_rewards`) and where in the completion it ended (`turn_ends`). Turns that only
    `generate` can sample have no log-probabilities: ValueError.
    """
    rollout = Rollout(prompts=[], completions=[], logprobs=[], masks=[])
    episodes = [Episode.of(history) for history in histories]
    for index, (history, episode) in enumerate(zip(histories, episodes, strict=True)):
        if history.token_logprobs.isnan().any():
            raise ValueError(
                f"histories[{index}]: log-probabilities of sampled tokens are unknown; leave out the generation_kwargs "
                "that only `generate` knows, so that a sampler makes the turns"
            )
        start, end = history.token_spans[0][1], _end_of(history, episode.limit)
        rollout.prompts.append(history.tokens[:start].tolist())
        rollout.completions.append(history.tokens[start:end].tolist())
        rollout.masks.append(history.token_masks[start:end].tolist())
        rollout.logprobs.append(history.token_logprobs[start:end].tolist())
        rollout.rewards.append(float(history.reward))
        rollout.texts.append(history.text[history.text_spans[0][1] :])
    rollout.metadata = {
        "completed": [history.completed for history in histories],
        "truncated": [history.truncated for history in histories],
        "turn_rewards": [episode.turn_rewards for episode in episodes],
        "turn_ends": [_turn_ends(history) for history in histories],
        "histories": list(histories),
    }
    return rollout


def _end_of(history: TextHistory, limit: int | None) -> int | None:
    """Where training's part of the tokens ends: within the limit, before an answer whose pictures would be cut."""
    if limit is None:
        return None
    spans = zip(history.token_spans[1:], history.system_spans[1:], strict=True)
    cut = [start for (start, end), system in spans if system and start < limit < end]
    return cut[0] if cut and bool((history.tokens[cut[0] :] < 0).any()) else limit


def _turn_ends(history: TextHistory) -> list[int]:
    start = history.token_spans[0][1]
    spans = zip(history.token_spans[1:], history.system_spans[1:], strict=True)
    return [end - start for (_, end), system in spans if not system]
