"""The text environment: tags in the model's text call tools and end the episode."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl.data.any_text import encodable
from trl.data.pictures import plain_ids
from trl.data.records import Rollout
from trl.data.user_functions import Begun, accepted, in_order
from trl.environment.episodes import Environment, Episode
from trl.environment.factories import Factory, OwnEnvironment, Said
from trl.environment.text_history import TextHistory
from trl.environment.tool_calls import LONGEST_CALL, Answer, Pending, ToolCalls, answer_of
from trl.environment.turns import ModelTurns, SampledTurns, Turns
from trl.generation.sampler import Sampler
from trl.generation.stopping import StringStoppingCriteria
from trl.models.unwrap import below_value_head, is_encoder_decoder

__all__ = ["StringStoppingCriteria", "TextEnvironment", "TextHistory"]

Tool = Callable[[str], str]


class TextEnvironment(Environment):
    """Episodes in which `<request><Tool>query<call>` of the model is answered with `answer<response>`.

    An episode ends with `<submit>`, with the end token, with a turn that calls no tool, or when it is longer than
    `max_length` tokens (then it is `truncated`); after `max_turns` turns it stops without being `completed`. The rows
    proceed independently: while some wait for their tools, others generate.
    """

    def __init__(
        self,
        model: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        tools: Mapping[str, Tool] | Sequence[Tool] | None = None,
        reward_fn: Callable[..., Sequence[Any]] | None = None,
        prompt: str | None = None,
        max_turns: int = 4,
        max_tool_reponse: int = 100,
        max_length: int | None = None,
        generation_kwargs: Mapping[str, Any] | None = None,
        *,
        tool_timeout: float | None = 30.0,
        tool_workers: int = 16,
        environment_factory: Factory | Mapping[str, Factory] | None = None,
    ) -> None:
        """
        `tools`: by name, or a list of objects; the name of such a tool is the name of its class.
        `reward_fn`: gets the last segment of every episode, and the keywords of `run`.
        `prompt`: stands before every query.
        `max_tool_reponse`: most characters of a tool's answer that the model reads.
        `generation_kwargs`: keywords of transformers' `generate`.
        `tool_timeout`: seconds; the model reads an error if a tool takes longer. Tools run in several threads (at most
        `tool_workers`); None: one after the other in the calling thread, without a limit.
        `environment_factory`: makes objects with `reset()`, of which each row has one; its public methods are tools of
        that row, its `get_reward()` or `reward` (the sum so far) is the reward, a true `done` ends the episode. Of a
        dict of factories a row's column `environment` names its own.
        """
        super().__init__(tokenizer, environment_factory, tool_timeout, tool_workers)
        if max_tool_reponse < 3:
            raise ValueError(f"max_tool_reponse={max_tool_reponse}: give 3 or more; a cut answer ends with three dots")
        self.model = model
        self.tools = _named([] if tools is None and environment_factory is not None else tools)
        self.reward_fn = reward_fn
        self.prompt = prompt or ""
        self.max_turns = max_turns
        self.max_tool_response = max_tool_reponse
        self.max_length = max_length
        self.generation_kwargs = dict(generation_kwargs or {})
        self.request_token = "<request>"
        self.call_token = "<call>"
        self.response_token = "<response>"
        self.submit_token = "<submit>"
        self.is_encoder_decoder = model is not None and is_encoder_decoder(model)
        self.current_device = torch.device("cpu") if model is None else below_value_head(model).device
        self._samplers: dict[int, Sampler] = {}

    def run(
        self, queries: Iterable[str], **rewards_kwargs: Any
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Any], list[TextHistory]]:
        """`(queries, responses, masks, rewards, histories)` of one episode for each query.

        A response is all tokens after the query; its mask is 1 where the model sampled the token.
        """
        queries = list(queries)
        columns = {name: values for name, values in rewards_kwargs.items() if _is_column(values, len(queries))}
        # Every row has a seed, so that its turns do not depend on which rows share its batches.
        seed = int(torch.randint(2**62, ()))
        rows = [
            {name: values[index] for name, values in columns.items()} | {"prompt": query}
            for index, query in enumerate(queries)
        ]
        episodes = self._begin(rows, [seed + index for index in range(len(rows))])
        self._play(episodes, self._own_turns())
        histories = [episode.history for episode in episodes]
        self.compute_reward(histories, **rewards_kwargs)
        parts = [history.split_query_response_tokens() for history in histories]
        query_ids, response_ids, masks = ([part[i] for part in parts] for i in range(3))
        return query_ids, response_ids, masks, [history.reward for history in histories], histories

    # --- training -------------------------------------------------------------------------------------------------

    def _judges(self) -> bool:
        computes = type(self).compute_reward is not TextEnvironment.compute_reward
        return self.reward_fn is not None or computes or super()._judges()

    def check_settings(self, tokenizer: Any, max_prompt_length: int | None = None, reward_funcs: Any = None) -> None:
        """ValueError for settings of a trainer that do not go with this environment."""
        super().check_settings(tokenizer, max_prompt_length, reward_funcs)
        other = set(self.generation_kwargs) - {"max_new_tokens"}
        if other:
            raise ValueError(
                f"environment: generation_kwargs {', '.join(sorted(other))} have no effect in a trainer, whose config "
                "says how to sample; only max_new_tokens, the length of a turn, belongs to the environment"
            )
        if self.prompt and max_prompt_length is not None:
            raise ValueError(
                f"max_prompt_length={max_prompt_length}: the environment's own prompt comes before it; leave it out"
            )
        if self.reward_fn is not None and reward_funcs is not None:
            raise ValueError("reward_funcs: the environment has a reward_fn already; give one of them")

    def rollout(
        self, rows: Sequence[Mapping[str, Any]], turns: SampledTurns, seeds: Sequence[int], limit: int
    ) -> Rollout:
        """Play one episode from each row, with at most `limit` tokens after its prompt.

        `prompt_ids` are continued as they are, unless `prompt` or `reset` add something: then the text `prompt` of the
        row is tokenised with it. The other columns reach `reset` and `reward_fn`, as far as these have parameters.
        """
        stop_strings = (*turns.params.stop_strings, self.call_token, self.submit_token)
        own = self.generation_kwargs.get("max_new_tokens", turns.params.max_new_tokens)
        params = replace(turns.params, stop_strings=stop_strings, max_new_tokens=min(own, turns.params.max_new_tokens))
        return super().rollout(rows, replace(turns, params=params), seeds, limit)

    # --- the loop's steps -----------------------------------------------------------------------------------------

    def _open(
        self, row: Mapping[str, Any], said: Said, ids: Sequence[int] | None, own: OwnEnvironment | None = None
    ) -> TextHistory:
        if not isinstance(said, str):
            raise TypeError(f"{type(own.instance).__name__ if own else 'it'}.reset() gave messages; give a text here")
        query = row.get("prompt")
        if not isinstance(query, str):
            words = self.tokenizer
            query = row["prompt"] if ids is None and query else words.decode(plain_ids(words, ids or []))
        text = self.prompt + query + said
        if not text and not ids:
            raise ValueError("prompt: the row has none, and reset() gave none; one of them has to say it")
        if (self.prompt or said) and min(ids or [0]) < 0:
            raise ValueError(
                "prompt: it has pictures, and what the environment adds to a prompt is read with it as one text: leave "
                "out its `prompt` and what reset() says, or take a ChatEnvironment"
            )
        if ids is None or not len(ids) or self.prompt or said:
            return TextHistory(text, self._tokens(text, add_special_tokens=True), system=True)
        return TextHistory(text, torch.tensor(ids, device=self.current_device), system=True)

    def _tokens(self, text: str, add_special_tokens: bool) -> Tensor:
        encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, return_tensors="pt")
        return encoded.input_ids[0].to(self.current_device)

    def _speak(self, episodes: Sequence[Episode], turns: Turns) -> None:
        # Scripts of release 0.7.7 replace `generate(histories)`: only training hands it the turns.
        given = {} if isinstance(turns, ModelTurns) else {"turns": turns}
        histories = self.generate([episode.history for episode in episodes], **given)
        for episode, history in zip(episodes, histories, strict=True):
            episode.history, history.episode = history, episode

    def _read_turn(self, episode: Episode) -> list[Answer]:
        self.tasks_end_check([episode.history])
        return [partial(self._answer, episode.history)]

    def _hear(self, episode: Episode) -> None:
        self._append_response(episode.history, episode.answers[0])

    def _end_after_answers(self, episode: Episode) -> None:
        self.tasks_end_check([episode.history], model_turn=False)

    def _goes_on(self, episode: Episode) -> bool:
        return len(episode.turn_rewards) < self.max_turns and super()._goes_on(episode)

    def _score(self, episodes: Sequence[Episode], rows: Sequence[Mapping[str, Any]]) -> None:
        if self.gives_rewards:
            columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "prompt_ids")}
            histories = [episode.history for episode in episodes]
            self.compute_reward(histories, **accepted(self.reward_fn or self.compute_reward, columns))

    # --- one turn -------------------------------------------------------------------------------------------------

    def step(self, history: TextHistory) -> TextHistory:
        """Answer the last segment: end the episode, or append the answer to its tool call."""
        self.tasks_end_check([history])
        if not history.completed:
            calls = ToolCalls(self.tool_timeout, self.tool_workers)
            calls.start(0, partial(self._answer, history))
            self._append_response(history, calls.collect(patience=0)[0])
        return history

    def _answer(self, history: TextHistory) -> str | Pending:
        own = Episode.of(history).own
        tools = self.tools if own is None else {**self.tools, **own.tools}
        if type(self).call_tool is TextEnvironment.call_tool:
            return self._begin_call(history.last_text_segment, tools)
        return self.call_tool(history.last_text_segment, *([] if own is None else [tools]))

    def call_tool(self, text: str, tools: Mapping[str, Tool] | None = None) -> str:
        """The answer to the tool call in `text`. Errors become text that the model reads.

        tools: by name; None: those of the environment.
        """
        answer = self._begin_call(text, self.tools if tools is None else tools)
        return answer if isinstance(answer, str) else answer.text(self.tool_timeout)

    def _begin_call(self, text: str, tools: Mapping[str, Tool]) -> str | Pending:
        """The answer to the tool call in `text`, which may be awaited."""
        name, query = self.parse_tool_call(text)
        if query is not None and len(query) > LONGEST_CALL:
            return f"Tool error: the call is longer than {LONGEST_CALL} characters"
        if name is None or query is None:
            return f"Unknown tool call: {text}"
        if name not in tools:
            return f"Unknown tool {name}."
        return answer_of(self.late_calls, name, partial(tools[name], query), partial(_checked_answer, name))

    def _append_response(self, history: TextHistory, response: str) -> None:
        response = encodable(response)
        if len(response) > self.max_tool_response:
            response = response[: self.max_tool_response - 3] + "..."
        text = response + self.response_token
        history.append_segment(text, self._tokens(text, add_special_tokens=False), system=True)

    def parse_tool_call(self, text: str) -> tuple[str, str] | tuple[None, None]:
        """`(tool, query)` of `...<request><tool>query<call>...`; `(None, None)` if `text` holds no such call."""
        start = text.find(self.request_token)
        end = -1 if start < 0 else text.find(self.call_token, start + len(self.request_token))
        request = text[start + len(self.request_token) : max(end, 0)]
        for line in request.split("\n"):
            opening = line.find("<")
            closing = line.find(">", opening)
            if 0 <= opening < closing:
                return line[opening + 1 : closing], request.split(">", 1)[1]
        return None, None

    # --- the end --------------------------------------------------------------------------------------------------

    def compute_reward(self, histories: list[TextHistory], **reward_kwargs: Any) -> list[TextHistory]:
        """Set every episode's reward: `reward_fn` of its last segment plus the rewards of its turns."""
        if self.reward_fn is None and not self.gives_rewards:
            raise ValueError("reward_fn=None: no rewards can be computed; pass a function of the last text segments")
        rewards: Sequence[Any] = [0.0] * len(histories)
        if self.reward_fn is not None:
            try:
                texts = [history.last_text_segment for history in histories]
                rewards = Begun(partial(self.reward_fn, texts), **reward_kwargs).result()
            except SystemExit as error:
                raise RuntimeError(f"reward_fn asked the program to end: {error!r}; return a reward instead") from error
        try:
            rewards = rewards if isinstance(rewards, Tensor) else in_order(rewards)
        except TypeError as error:
            raise ValueError(f"reward_fn gave {error}") from None
        if len(rewards) != len(histories):
            raise ValueError(f"reward_fn gave {len(rewards)} rewards for {len(histories)} episodes; give one for each")
        earned = self._earned([Episode.of(history) for history in histories])
        for history, reward, more in zip(histories, rewards, earned, strict=True):
            reward = math.nan if reward is None else reward  # no opinion
            history.reward = reward + more if more else reward
        return histories

    def tasks_end_check(self, histories: list[TextHistory], model_turn: bool = True) -> list[TextHistory]:
        """Complete the histories that `task_end_check` finds ended. model_turn: the model has just spoken."""
        for history in histories:
            if not history.completed:
                truncated, ended = self.task_end_check(history, model_turn=model_turn)
                if ended:
                    history.complete(truncated=truncated)
        return histories

    def task_end_check(self, history: TextHistory, model_turn: bool = True) -> tuple[bool, bool]:
        """`(truncated, ended)` of this history."""
        if history.completed:
            return False, False
        if self.max_length is not None and len(history.tokens) > self.max_length:
            return True, True
        segment = history.last_text_segment
        called = self.request_token in segment and self.call_token in segment
        end_token, said = self.tokenizer.eos_token, history.text[history.text_spans[0][1] :] or history.text
        over = self.submit_token in segment or (end_token is not None and end_token in said)
        episode = Episode.of(history)
        if episode.is_full and not over:
            return True, True
        done = episode.own is not None and episode.own.done and not model_turn
        return False, over or done or (model_turn and not called)

    # --- the model ------------------------------------------------------------------------------------------------

    def generate(self, histories: list[TextHistory], turns: Turns | None = None) -> list[TextHistory]:
        """Append a turn of the model to every history that is not completed.

        A history that fills the model's context is completed as truncated. turns: the policy of a trainer; None: the
        environment's own model.
        """
        active = [Episode.of(history) for history in histories if not history.completed]
        super()._speak(active, turns or self._own_turns())
        return histories

    def _generate_batched(
        self, query_tensors: Sequence[Tensor], batch_size: int = 16, pad_to_multiple_of: int | None = None
    ) -> list[Tensor]:
        """What the model adds to each 1-d tensor of ids, up to the first `<call>`, `<submit>` or end token."""
        turns = self._own_turns()
        if pad_to_multiple_of is None:
            return [tokens for tokens, _ in turns.speak(query_tensors, max_rows=batch_size)]
        return turns.generate(query_tensors, batch_size, pad_to_multiple_of)

    def _own_turns(self) -> ModelTurns:
        stop_strings = (self.call_token, self.submit_token)
        return ModelTurns(self.model, self.tokenizer, self.generation_kwargs, stop_strings, self._samplers)


def _checked_answer(name: str, answer: Any) -> str:
    if not isinstance(answer, str):
        raise TypeError(f"tools[{name!r}] answered with {type(answer).__name__}; a tool answers with a string")
    return answer


def _named(tools: Mapping[str, Tool] | Sequence[Tool] | None) -> dict[str, Tool]:
    if tools is None:
        raise TypeError("tools=None: pass a list of tools, a dict of tools by name, or [] for none")
    if isinstance(tools, Mapping):
        return dict(tools)
    named = {type(tool).__name__: tool for tool in tools}
    if len(named) < len(tools):
        raise ValueError("tools: several of one class would get the same name; pass a dict of tools by name")
    return named


def _is_column(values: Any, rows: int) -> bool:
    """Whether `values` holds one value for each row."""
    return (
        hasattr(values, "__getitem__")
        and hasattr(values, "__len__")
        and not isinstance(values, str | Mapping)
        and (len(values) == rows)
    )
