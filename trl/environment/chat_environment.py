"""Conversations of a chat model with tools, in the words of its own template."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers.utils.chat_template_utils import get_json_schema

from trl.data.chat import ChatTemplate, Messages
from trl.data.encode import TextEncoder
from trl.data.formats import maybe_convert_to_chatml
from trl.data.records import Rollout
from trl.environment.answer_renderer import Answer, AnswerRenderer
from trl.environment.own_environment import OwnEnvironment
from trl.environment.rollout import as_rollout
from trl.environment.text_history import TextHistory
from trl.environment.tool_calls import ToolCalls
from trl.environment.tool_text import JsonCalls, ToolCall, ToolParser
from trl.environment.turn_loop import take_turns
from trl.environment.turns import SampledTurns


@dataclass(eq=False)
class _Talk:
    """One conversation under way."""

    history: TextHistory
    tools: Mapping[str, Callable[..., Any]]
    said: Messages = field(default_factory=list)
    """messages behind the prompt"""
    waiting: list[ToolCall] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    rounds: int = 0
    """of tool calls"""


class ChatEnvironment:
    """Conversations in which the model's tool calls are run and their results told to it as tool messages.

    A conversation ends with a turn that calls no tool, after `max_iterations` rounds of calls and the turn that follows
    them, when its own environment says `done`, or when there is no room left (then it is `truncated`).
    """

    def __init__(
        self,
        tools: Sequence[Callable[..., Any]] = (),
        environment_factory: Callable[[], Any] | None = None,
        *,
        max_iterations: int | None = None,
        max_tool_response: int | None = None,
        parser: ToolParser | None = None,
        tool_timeout: float | None = 30.0,
        tool_workers: int = 16,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """
        `tools`: functions with type hints and a docstring that describes each argument, async ones too.
        `environment_factory`: makes an object with `reset()` for every conversation; its public methods are tools.
        `max_tool_response`: characters of a result that the model gets to read; None: all.
        `parser`: finds the calls in a turn; None: JSON in `<tool_call>` tags.
        `tool_timeout`: seconds a call may take, see `TextEnvironment`.
        `template_kwargs`: variables for the chat template.
        """
        for name, value in (("max_iterations", max_iterations), ("max_tool_response", max_tool_response)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give 1 or more, or None for no limit")
        self.tools = {function.__name__: function for function in tools}
        self.environment_factory = environment_factory
        self.max_iterations, self.max_tool_response = max_iterations, max_tool_response
        self.parser = parser or JsonCalls()
        self.tool_timeout, self.tool_workers = tool_timeout, tool_workers
        self.template_kwargs = dict(template_kwargs or {})
        own = {} if environment_factory is None else OwnEnvironment(environment_factory).tools
        self.schemas = [_schema(name, function) for name, function in {**self.tools, **own}.items()]
        if not self.schemas:
            raise ValueError("tools: give at least one function, or an environment_factory with public methods")
        shared = set(self.tools) & set(own)
        if shared or len(self.tools) < len(tools):
            raise ValueError(f"tools: several go by the same name ({', '.join(sorted(shared)) or 'functions'})")

    def bind(self, tokenizer: Any, ends: Sequence[int]) -> None:
        """Speak as this tokenizer's chat template does; `ends`: tokens that can end a turn."""
        self.template = ChatTemplate(tokenizer, self.template_kwargs)
        self.encoder = TextEncoder(tokenizer)
        self.renderer = AnswerRenderer(self.template, ends, self.schemas)
        self.ends = frozenset(ends)

    @property
    def gives_rewards(self) -> bool:
        """Whether episodes have rewards without further functions."""
        return self.environment_factory is not None and OwnEnvironment(self.environment_factory).gives_rewards

    def rollout(
        self, rows: Sequence[Mapping[str, Any]], turns: SampledTurns, seeds: Sequence[int], limit: int
    ) -> Rollout:
        """A conversation from each row's `prompt`, with at most `limit` tokens behind it; columns reach `reset`.

        The metadata holds the messages of each (`completions`) and the rows' own `environments`.
        """
        talks = [self._begin(row) for row in rows]
        for index, (talk, seed) in enumerate(zip(talks, seeds, strict=True)):
            history = talk.history
            history.row, history.seed = index, seed
            history.limit = min(len(history.tokens) + limit, turns.context or 2**62)
        self._play(talks, turns)
        for talk in talks:
            talk.history.reward = sum(talk.history.turn_rewards)
        rollout = as_rollout([talk.history for talk in talks])
        rollout.metadata["completions"] = [talk.said for talk in talks]
        if self.environment_factory is not None:
            owners = [talk.history.environment for talk in talks]
            rollout.metadata["environments"] = [owner.instance for owner in owners if owner is not None]
        return rollout

    # --- one conversation -----------------------------------------------------------------------------------------

    def _begin(self, row: Mapping[str, Any]) -> _Talk:
        prompt = row.get("prompt")
        if not isinstance(prompt, Sequence) or isinstance(prompt, str):
            raise ValueError("prompt: tools need conversations; give a list of messages in each row")
        messages = list(maybe_convert_to_chatml({"prompt": prompt})["prompt"])
        own = None if self.environment_factory is None else OwnEnvironment(self.environment_factory)
        if own is not None:
            messages = _told(messages, own.reset(row))
        text = self.template.of_row(dict(row)).prompt(messages, self.schemas)
        (ids,) = self.encoder.encode([text])
        history = TextHistory(text, torch.tensor(self.encoder.without_double_bos(ids)), system=True)
        history.environment = own
        return _Talk(history, self.tools if own is None else {**self.tools, **own.tools})

    def _play(self, talks: Sequence[_Talk], turns: SampledTurns) -> None:
        calls = ToolCalls(self.tool_timeout, self.tool_workers)

        def speak(rows: list[int]) -> None:
            histories = [talks[row].history for row in rows]
            room = [(history.limit or 0) - len(history.tokens) for history in histories]
            seeds = [history.seed or 0 for history in histories]
            spoken = turns.speak([history.tokens for history in histories], seeds, max(room))
            for row, most, (tokens, logprobs) in zip(rows, room, spoken, strict=True):
                assert logprobs is not None  # there is room
                self._said(talks[row], tokens[:most], logprobs[:most])
                if not talks[row].history.completed:
                    self._call_next(row, talks[row], calls)

        def answered(row: int, text: str) -> bool:
            talk = talks[row]
            talk.answers.append(Answer(talk.waiting.pop(0).name, text))
            if talk.waiting:
                self._call_next(row, talk, calls)
                return False
            self._hear(talk)
            return not talk.history.completed

        rows = [row for row, talk in enumerate(talks) if self._has_room(talk.history)]
        take_turns(rows, speak, answered, calls, apart=turns.rows_are_apart)

    def _has_room(self, history: TextHistory) -> bool:
        if history.is_full:
            history.complete(truncated=True)
        return not history.completed

    def _said(self, talk: _Talk, tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Take a turn of the model, and see whether it is the last one."""
        history, tokenizer = talk.history, self.template.tokenizer
        history.extend(str(tokenizer.decode(tokens)), tokens, system=False, logprobs=logprobs)
        closed = int(tokens[-1]) in self.ends
        spoken = self.parser(str(tokenizer.decode(tokens[:-1] if closed else tokens)))
        message: dict[str, Any] = {"role": "assistant", "content": spoken.content}
        if spoken.calls:
            message["tool_calls"] = [call.message(place) for place, call in enumerate(spoken.calls)]
        talk.said.append(message)
        enough = self.max_iterations is not None and talk.rounds >= self.max_iterations
        if history.is_full and not (closed and not spoken.calls):
            history.complete(truncated=True)
        elif enough or not spoken.calls:
            history.complete()
        if history.completed:
            history.turn_rewards.append(_earned(history))
            return
        talk.waiting, talk.answers = list(spoken.calls), []
        talk.rounds += 1

    def _call_next(self, row: int, talk: _Talk, calls: ToolCalls) -> None:
        calls.start(row, partial(self._run, talk.tools, talk.waiting[0]))

    def _run(self, tools: Mapping[str, Callable[..., Any]], call: ToolCall) -> str:
        """The answer to a call. What goes wrong is said in words that the model reads."""
        if call.error:
            return f"Tool error: {call.error}"
        if call.name not in tools:
            return f"Unknown tool {call.name}."
        try:
            result = tools[call.name](**call.arguments)
            if inspect.isawaitable(result):
                result = asyncio.run(_awaited(result))
            text = result if isinstance(result, str) else "" if result is None else json.dumps(result, default=str)
        except Exception as error:
            text = f"Tool error: {error}"
        most = self.max_tool_response
        return text if most is None or len(text) <= most else text[: max(most - 3, 0)] + "..."

    def _hear(self, talk: _Talk) -> None:
        """Append the tools' answers as the template renders them."""
        history = talk.history
        text, ids = self.renderer(talk.answers, closed=int(history.tokens[-1]) == self.renderer.end_id)
        history.append_segment(text, torch.tensor(ids), system=True)
        talk.said += [
            {"role": "tool", "name": answer.name, "tool_call_id": f"call{place:05d}", "content": answer.text}
            for place, answer in enumerate(talk.answers)
        ]
        history.turn_rewards.append(_earned(history))
        if history.environment is not None and history.environment.done:
            history.complete()
        self._has_room(history)


def _earned(history: TextHistory) -> float:
    return 0.0 if history.environment is None else history.environment.new_reward()


def _schema(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return dict(get_json_schema(function))
    except Exception as error:
        raise ValueError(
            f"tools: {name} cannot be described to the model ({error}); give it type hints, and a docstring with an "
            "`Args:` section"
        ) from None


def _told(messages: Messages, said: str) -> Messages:
    """The conversation, with what the environment says at the end of its last message."""
    if not said:
        return messages
    if not messages or messages[-1].get("role") != "user":
        raise ValueError(
            "prompt: reset() says something, which belongs to the last message, and that is not the user's"
        )
    content = messages[-1]["content"]
    more = content + said if isinstance(content, str) else [*content, {"type": "text", "text": said}]
    return [*messages[:-1], {**messages[-1], "content": more}]


async def _awaited(result: Any) -> Any:
    return await result
