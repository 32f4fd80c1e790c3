"""The text environment: a model that writes, calls tools and reads their answers, for as many rows as there are."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl.environment.stopping import StringStoppingCriteria
from trl.environment.text_history import TextHistory
from trl.environment.tool_calls import ToolCalls
from trl.environment.turns import ModelTurns
from trl.generation.sampler import Sampler
from trl.models.scoring import backbone

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
    ) -> None:
        """
        `tools`: by name, or a list of objects that go by the name of their class.
        `reward_fn`: takes the last segment of every episode, and what `run` was given besides the queries.
        `prompt`: stands before every query.
        `max_tool_reponse`: characters of a tool's answer that the model gets to read.
        `generation_kwargs`: keywords of transformers' `generate`.
        `tool_timeout`: seconds; a tool that takes longer is answered for with an error. Tools are called from
        several threads (at most `tool_workers`); None: one after another in the calling thread, without a limit.
        """
        if tool_timeout is not None and tool_timeout <= 0:
            raise ValueError(f"tool_timeout={tool_timeout}: give seconds above 0, or None for no limit")
        if tool_workers < 1:
            raise ValueError(f"tool_workers={tool_workers}: give 1 or more")
        if max_tool_reponse < 3:
            raise ValueError(f"max_tool_reponse={max_tool_reponse}: give 3 or more, the length of what marks a cut")
        self.model = model
        self.tokenizer: Any = tokenizer
        self.tools = _named(tools)
        self.reward_fn = reward_fn
        self.prompt = prompt or ""
        self.max_turns = max_turns
        self.max_tool_response = max_tool_reponse
        self.max_length = max_length
        self.generation_kwargs = dict(generation_kwargs or {})
        self.tool_timeout = tool_timeout
        self.tool_workers = tool_workers
        self.request_token = "<request>"
        self.call_token = "<call>"
        self.response_token = "<response>"
        self.submit_token = "<submit>"
        self.is_encoder_decoder = hasattr(model, "is_encoder_decoder")
        self.current_device = torch.device("cpu") if model is None else backbone(model).device
        self._run_seed: int | None = None
        self._samplers: dict[int, Sampler] = {}

    def run(
        self, queries: Iterable[str], **rewards_kwargs: Any
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Any], list[TextHistory]]:
        """`(queries, responses, masks, rewards, histories)` of one episode for each query.

        A response is all tokens behind the query; its mask is 1 where the model sampled the token.
        """
        histories = [self._begin(row, query) for row, query in enumerate(queries)]
        # Every row draws from its own seed, so that what it says does not depend on who speaks at the same time.
        self._run_seed = int(torch.randint(2**62, ()))
        try:
            self._play(histories)
        finally:
            self._run_seed = None
        self.compute_reward(histories, **rewards_kwargs)
        parts = [history.split_query_response_tokens() for history in histories]
        query_ids, response_ids, masks = ([part[i] for part in parts] for i in range(3))
        return query_ids, response_ids, masks, [history.reward for history in histories], histories

    def _begin(self, row: int, query: str) -> TextHistory:
        text = self.prompt + query
        history = TextHistory(text, self._tokens(text, add_special_tokens=True), system=True)
        history.row = row
        return history

    def _tokens(self, text: str, add_special_tokens: bool) -> Tensor:
        encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, return_tensors="pt")
        return encoded.input_ids[0].to(self.current_device)

    def _play(self, histories: list[TextHistory]) -> None:
        """Turns of all rows, until each is completed or has had `max_turns`."""
        turns = [0] * len(histories)
        apart = self._model_turns().rows_are_apart
        calls = ToolCalls(self.tool_timeout, self.tool_workers)
        ready = list(range(len(histories))) if self.max_turns > 0 else []
        while ready or len(calls):
            began = time.monotonic()
            if ready:
                self._model_turn(histories, ready, calls)
            for row in ready:
                turns[row] += 1
            # As long as the others could generate, it pays to wait for a fuller batch.
            answers = calls.collect(patience=(time.monotonic() - began) if apart else math.inf)
            for row, answer in answers.items():
                self._append_response(histories[row], answer)
            self.tasks_end_check([histories[row] for row in answers], model_turn=False)
            ready = [row for row in sorted(answers) if not histories[row].completed and turns[row] < self.max_turns]

    def _model_turn(self, histories: list[TextHistory], ready: Sequence[int], calls: ToolCalls) -> None:
        for row, history in zip(ready, self.generate([histories[row] for row in ready]), strict=True):
            histories[row] = history
            self._end_if_due(history)
            if not history.completed:
                calls.start(row, partial(self.call_tool, history.last_text_segment))

    # --- one turn -------------------------------------------------------------------------------------------------

    def step(self, history: TextHistory) -> TextHistory:
        """Answer the last segment: end the episode, or append what its tool call gives."""
        self._end_if_due(history)
        if not history.completed:
            calls = ToolCalls(self.tool_timeout, self.tool_workers)
            calls.start(0, partial(self.call_tool, history.last_text_segment))
            self._append_response(history, calls.collect(patience=0)[0])
        return history

    def call_tool(self, text: str) -> str:
        """The answer to the tool call in `text`. What goes wrong is said in words that the model reads."""
        name, query = self.parse_tool_call(text)
        if name is None or query is None:
            return f"Unknown tool call: {text}"
        if name not in self.tools:
            return f"Unknown tool {name}."
        try:
            answer = self.tools[name](query)
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
        """Set every episode's reward to what `reward_fn` gives for its last segment."""
        if self.reward_fn is None:
            raise ValueError("reward_fn=None: no rewards can be computed; pass a function of the last text segments")
        rewards = self.reward_fn([history.last_text_segment for history in histories], **reward_kwargs)
        if len(rewards) != len(histories):
            raise ValueError(f"reward_fn gave {len(rewards)} rewards for {len(histories)} episodes; give one for each")
        for history, reward in zip(histories, rewards, strict=True):
            history.reward = reward
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
        end_token = self.tokenizer.eos_token
        said_end = end_token is not None and end_token in history.text
        return False, said_end or self.submit_token in segment or (model_turn and not called)

    # --- the model ------------------------------------------------------------------------------------------------

    def generate(self, histories: list[TextHistory]) -> list[TextHistory]:
        """Append a turn of the model to every history that is not completed.

        A history that fills the model's context is completed as truncated.
        """
        active = [history for history in histories if not history.completed]
        seeds = None if self._run_seed is None else [self._run_seed + history.row for history in active]
        turns = self._model_turns().speak([history.tokens for history in active], seeds)
        for history, (tokens, logprobs) in zip(active, turns, strict=True):
            if len(tokens):
                history.extend(self.tokenizer.decode(tokens), tokens, system=False, logprobs=logprobs)
            else:
                history.complete(truncated=True)
        return histories

    def _generate_batched(
        self, query_tensors: Sequence[Tensor], batch_size: int = 16, pad_to_multiple_of: int | None = None
    ) -> list[Tensor]:
        """What the model adds to each 1-d tensor of ids, up to the first `<call>`, `<submit>` or end token."""
        turns = self._model_turns()
        if pad_to_multiple_of is None:
            return [tokens for tokens, _ in turns.speak(query_tensors, max_rows=batch_size)]
        return turns.generate(query_tensors, batch_size, pad_to_multiple_of)

    def _model_turns(self) -> ModelTurns:
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
