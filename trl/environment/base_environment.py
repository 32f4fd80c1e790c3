"""The text environment: a model that writes, calls tools and reads their answers, for as many rows as there are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl.data.records import Rollout
from trl.environment.own_environment import OwnEnvironment, accepted
from trl.environment.rollout import as_rollout
from trl.environment.text_history import TextHistory
from trl.environment.tool_calls import ToolCalls
from trl.environment.turn_loop import take_turns
from trl.environment.turns import ModelTurns, SampledTurns, Turns
from trl.generation.sampler import Sampler
from trl.generation.stop_criteria import StringStoppingCriteria
from trl.models.unwrap import below_value_head

__all__ = ["StringStoppingCriteria", "TextEnvironment", "TextHistory"]

Tool = Callable[[str], str]


class TextEnvironment:
    """Episodes in which `<request><Tool>query<call>` of the model is answered with `answer<response>`.

    An episode ends with `<submit>`, with the end token, with a turn that calls no tool, or when it is longer than
    `max_length` tokens (then it is `truncated`); after `max_turns` turns it is left as it is. The rows proceed
    independently: while some wait for their tools, others generate.
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
        environment_factory: Callable[[], Any] | None = None,
    ) -> None:
        """
        `tools`: by name, or a list of objects that go by the name of their class.
        `reward_fn`: takes the last segment of every episode, and what `run` was given besides the queries.
        `prompt`: stands before every query.
        `max_tool_reponse`: characters of a tool's answer that the model gets to read.
        `generation_kwargs`: keywords of transformers' `generate`.
        `tool_timeout`: seconds; a tool that takes longer is answered for with an error. Tools are called from
        several threads (at most `tool_workers`); None: one after another in the calling thread, without a limit.
        `environment_factory`: makes an object with `reset()` for every row; its public methods are tools of that row,
        its `reward` (a sum that grows) is what the row earned, a true `done` ends the episode.
        """
        if tool_timeout is not None and tool_timeout <= 0:
            raise ValueError(f"tool_timeout={tool_timeout}: give seconds above 0, or None for no limit")
        if tool_workers < 1:
            raise ValueError(f"tool_workers={tool_workers}: give 1 or more")
        if max_tool_reponse < 3:
            raise ValueError(f"max_tool_reponse={max_tool_reponse}: give 3 or more, the length of what marks a cut")
        self.model = model
        self.tokenizer: Any = tokenizer
        self.tools = _named([] if tools is None and environment_factory is not None else tools)
        self.reward_fn = reward_fn
        self.prompt = prompt or ""
        self.max_turns = max_turns
        self.max_tool_response = max_tool_reponse
        self.max_length = max_length
        self.generation_kwargs = dict(generation_kwargs or {})
        self.tool_timeout = tool_timeout
        self.tool_workers = tool_workers
        self.environment_factory = environment_factory
        self.request_token = "<request>"
        self.call_token = "<call>"
        self.response_token = "<response>"
        self.submit_token = "<submit>"
        self.is_encoder_decoder = hasattr(model, "is_encoder_decoder")
        self.current_device = torch.device("cpu") if model is None else below_value_head(model).device
        self._speaker: Turns | None = None
        self._samplers: dict[int, Sampler] = {}

    def run(
        self, queries: Iterable[str], **rewards_kwargs: Any
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Any], list[TextHistory]]:
        """`(queries, responses, masks, rewards, histories)` of one episode for each query.

        A response is all tokens behind the query; its mask is 1 where the model sampled the token.
        """
        queries = list(queries)
        columns = {name: values for name, values in rewards_kwargs.items() if _is_column(values, len(queries))}
        # Every row draws from its own seed, so that what it says does not depend on who speaks at the same time.
        seed = int(torch.randint(2**62, ()))
        histories = []
        for row, query in enumerate(queries):
            history = self._begin(query, {name: values[row] for name, values in columns.items()} | {"prompt": query})
            history.row, history.seed = row, seed + row
            histories.append(history)
        self._play(histories)
        self.compute_reward(histories, **rewards_kwargs)
        parts = [history.split_query_response_tokens() for history in histories]
        query_ids, response_ids, masks = ([part[i] for part in parts] for i in range(3))
        return query_ids, response_ids, masks, [history.reward for history in histories], histories

    def _begin(self, query: str, row: Mapping[str, Any], ids: Sequence[int] | None = None) -> TextHistory:
        """row: the columns that the row's own environment may ask for. ids: of the query, where they are known."""
        environment = None if self.environment_factory is None else OwnEnvironment(self.environment_factory)
        said = "" if environment is None else environment.reset(row)
        text = self.prompt + query + said
        if ids is None or self.prompt or said:
            history = TextHistory(text, self._tokens(text, add_special_tokens=True), system=True)
        else:
            history = TextHistory(text, torch.tensor(ids, device=self.current_device), system=True)
        history.environment = environment
        return history

    def _tokens(self, text: str, add_special_tokens: bool) -> Tensor:
        encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, return_tensors="pt")
        return encoded.input_ids[0].to(self.current_device)

    def _play(self, histories: list[TextHistory]) -> None:
        """Turns of all rows, until each is completed or has had `max_turns`."""
        turns = [0] * len(histories)
        calls = ToolCalls(self.tool_timeout, self.tool_workers)

        def speak(rows: list[int]) -> None:
            for row, history in zip(rows, self.generate([histories[row] for row in rows]), strict=True):
                histories[row] = history
                turns[row] += 1
                spoke = not history.completed  # its context may be full
                self._end_if_due(history)
                if history.completed and spoke:
                    history.turn_rewards.append(self.turn_reward(history))
                elif not history.completed:
                    calls.start(row, partial(self._answer, history))

        def answered(row: int, answer: str) -> bool:
            history = histories[row]
            self._append_response(history, answer)
            history.turn_rewards.append(self.turn_reward(history))
            self.tasks_end_check([history], model_turn=False)
            return not history.completed and turns[row] < self.max_turns

        rows = range(len(histories)) if self.max_turns > 0 else []
        take_turns(rows, speak, answered, calls, apart=self._model_turns().rows_are_apart)

    # --- training -------------------------------------------------------------------------------------------------

    @property
    def gives_rewards(self) -> bool:
        """Whether episodes have rewards without further functions."""
        kind = type(self)
        own = (kind.turn_reward, kind.compute_reward) != (TextEnvironment.turn_reward, TextEnvironment.compute_reward)
        return self.reward_fn is not None or self.environment_factory is not None or own

    def rollout(
        self, rows: Sequence[Mapping[str, Any]], turns: SampledTurns, seeds: Sequence[int], limit: int
    ) -> Rollout:
        """Episodes for training: one for each row of a data set, with at most `limit` tokens behind the prompt.

        `prompt_ids` are continued as they are, unless `prompt` or `reset` add something: then the text `prompt` of the
        row is tokenised with it. The other columns reach `reset` and `reward_fn`, as far as these take them.
        """
        stop_strings = (*turns.params.stop_strings, self.call_token, self.submit_token)
        own = self.generation_kwargs.get("max_new_tokens", turns.params.max_new_tokens)
        params = replace(turns.params, stop_strings=stop_strings, max_new_tokens=min(own, turns.params.max_new_tokens))
        histories = []
        for index, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
            text = row.get("prompt")
            text = text if isinstance(text, str) else self.tokenizer.decode(row["prompt_ids"])
            history = self._begin(text, row, row["prompt_ids"])
            history.row, history.seed = index, seed
            history.limit = min(len(history.tokens) + limit, turns.context or 2**62)
            histories.append(history)
        self._speaker = replace(turns, params=params)
        try:
            self._play(histories)
        finally:
            self._speaker = None
        if self.gives_rewards:
            columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "prompt_ids")}
            self.compute_reward(histories, **accepted(self.reward_fn or self.compute_reward, columns))
        return as_rollout(histories)

    def turn_reward(self, history: TextHistory) -> float:
        """What the model's last turn brought by itself, its answer included; for subclasses to say.

        Here it is the growth of `reward` of the row's own environment.
        """
        return 0.0 if history.environment is None else history.environment.new_reward()

    # --- one turn -------------------------------------------------------------------------------------------------

    def step(self, history: TextHistory) -> TextHistory:
        """Answer the last segment: end the episode, or append what its tool call gives."""
        self._end_if_due(history)
        if not history.completed:
            calls = ToolCalls(self.tool_timeout, self.tool_workers)
            calls.start(0, partial(self._answer, history))
            self._append_response(history, calls.collect(patience=0)[0])
        return history

    def _answer(self, history: TextHistory) -> str:
        if history.environment is None:
            return self.call_tool(history.last_text_segment)
        return self.call_tool(history.last_text_segment, {**self.tools, **history.environment.tools})

    def call_tool(self, text: str, tools: Mapping[str, Tool] | None = None) -> str:
        """The answer to the tool call in `text`. What goes wrong is said in words that the model reads.

        tools: by name, instead of the environment's own.
        """
        tools = self.tools if tools is None else tools
        name, query = self.parse_tool_call(text)
        if name is None or query is None:
            return f"Unknown tool call: {text}"
        if name not in tools:
            return f"Unknown tool {name}."
        try:
            answer = tools[name](query)
        except Exception as error:
            return f"Tool error: {error}"
        if not isinstance(answer, str):
            raise TypeError(f"tools[{name!r}] answered with {type(answer).__name__}; a tool answers with a string")
        return answer

    def _append_response(self, history: TextHistory, response: str) -> None:
        if len(response) > self.max_tool_response:
            response = response[: self.max_tool_response - 3] + "..."
        text = response + self.response_token
        history.append_segment(text, self._tokens(text, add_special_tokens=False), system=True)

    def parse_tool_call(self, text: str) -> tuple[str, str] | tuple[None, None]:
        """`(tool, query)` of `...<request><tool>query<call>...`; `(None, None)` if `text` holds no such call."""
        request = re.search(f"{re.escape(self.request_token)}(.*?){re.escape(self.call_token)}", text, re.DOTALL)
        tool = re.search(r"<(.*?)>", request.group(1)) if request else None
        if request is None or tool is None:
            return None, None
        return tool.group(1), request.group(1).split(">", 1)[1]

    # --- the end --------------------------------------------------------------------------------------------------

    def compute_reward(self, histories: list[TextHistory], **reward_kwargs: Any) -> list[TextHistory]:
        """Set every episode's reward: what `reward_fn` gives for its last segment, and what its turns brought."""
        if self.reward_fn is None and not self.gives_rewards:
            raise ValueError("reward_fn=None: no rewards can be computed; pass a function of the last text segments")
        rewards: Sequence[Any] = [0.0] * len(histories)
        if self.reward_fn is not None:
            rewards = self.reward_fn([history.last_text_segment for history in histories], **reward_kwargs)
        if len(rewards) != len(histories):
            raise ValueError(f"reward_fn gave {len(rewards)} rewards for {len(histories)} episodes; give one for each")
        for history, reward in zip(histories, rewards, strict=True):
            history.reward = reward + sum(history.turn_rewards) if any(history.turn_rewards) else reward
        return histories

    def tasks_end_check(self, histories: list[TextHistory], model_turn: bool = True) -> list[TextHistory]:
        """Complete the histories that `task_end_check` finds ended."""
        for history in histories:
            self._end_if_due(history, model_turn)
        return histories

    def _end_if_due(self, history: TextHistory, model_turn: bool = True) -> None:
        """Complete the history if `task_end_check` finds it ended."""
        if not history.completed:
            truncated, ended = self.task_end_check(history, model_turn=model_turn)
            if ended:
                history.complete(truncated=truncated)

    def task_end_check(self, history: TextHistory, model_turn: bool = True) -> tuple[bool, bool]:
        """`(truncated, ended)`, by the history's own tokens and text."""
        if history.completed:
            return False, False
        if self.max_length is not None and len(history.tokens) > self.max_length:
            return True, True
        segment = history.last_text_segment
        called = self.request_token in segment and self.call_token in segment
        end_token, said = self.tokenizer.eos_token, history.text[history.text_spans[0][1] :] or history.text
        over = self.submit_token in segment or (end_token is not None and end_token in said)
        if history.is_full and not over:
            return True, True
        done = history.environment is not None and history.environment.done and not model_turn
        return False, over or done or (model_turn and not called)

    # --- the model ------------------------------------------------------------------------------------------------

    def generate(self, histories: list[TextHistory]) -> list[TextHistory]:
        """Append a turn of the model to every history that is not completed.

        A history that fills the model's context is completed as truncated.
        """
        active = [history for history in histories if not history.completed]
        seeds = [history.seed for history in active if history.seed is not None]
        room = [None if history.limit is None else history.limit - len(history.tokens) for history in active]
        most = None if None in room else max((r for r in room if r is not None), default=None)
        turns = self._model_turns().speak([history.tokens for history in active], seeds or None, most)
        for history, own_room, (tokens, logprobs) in zip(active, room, turns, strict=True):
            if len(tokens):
                tokens, logprobs = tokens[:own_room], None if logprobs is None else logprobs[:own_room]
                history.extend(self.tokenizer.decode(tokens), tokens, system=False, logprobs=logprobs)
            else:
                history.complete(truncated=True)
        return histories

    def _generate_batched(
        self, query_tensors: Sequence[Tensor], batch_size: int = 16, pad_to_multiple_of: int | None = None
    ) -> list[Tensor]:
        """What the model adds to each 1-d tensor of ids, up to the first `<call>`, `<submit>` or end token."""
        turns = self._own_turns()
        if pad_to_multiple_of is None:
            return [tokens for tokens, _ in turns.speak(query_tensors, max_rows=batch_size)]
        return turns.generate(query_tensors, batch_size, pad_to_multiple_of)

    def _model_turns(self) -> Turns:
        if self._speaker is not None:
            return self._speaker
        return self._own_turns()

    def _own_turns(self) -> ModelTurns:
        stop_strings = (self.call_token, self.submit_token)
        return ModelTurns(self.model, self.tokenizer, self.generation_kwargs, stop_strings, self._samplers)


def _named(tools: Mapping[str, Tool] | Sequence[Tool] | None) -> dict[str, Tool]:
    if tools is None:
        raise TypeError("tools=None: pass a list of tools, a dict of tools by name, or [] for none")
    if isinstance(tools, Mapping):
        return dict(tools)
    named = {type(tool).__name__: tool for tool in tools}
    if len(named) < len(tools):
        raise ValueError("tools: several of one class would go by the same name; pass a dict of tools by name")
    return named


def _is_column(values: Any, rows: int) -> bool:
    """Whether these are a value for each row."""
    return (
        hasattr(values, "__getitem__")
        and hasattr(values, "__len__")
        and not isinstance(values, str | Mapping)
        and (len(values) == rows)
    )
