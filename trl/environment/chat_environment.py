"""The chat environment: conversations with tools, in the form of the model's chat template."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from transformers.utils.chat_template_utils import get_json_schema

from trl.data.any_text import encodable
from trl.data.chat import ChatTemplate, Messages
from trl.data.encode import TextEncoder
from trl.data.formats import maybe_convert_to_chatml
from trl.data.records import Rollout
from trl.environment.episodes import Environment, Episode, lacks_prompt
from trl.environment.factories import Factory, OwnEnvironment, Said
from trl.environment.text_history import TextHistory
from trl.environment.tool_calls import JsonCalls, Pending, Spoken, ToolCall, ToolParser, answer_of, call_id, error_text
from trl.environment.turns import SampledTurns

logger = logging.getLogger(__name__)


class ChatEnvironment(Environment):
    """Conversations in which the model's tool calls run and their results are appended as tool messages.

    A conversation ends with a turn that calls no tool, after `max_iterations` rounds of calls and the turn that follows
    them, when its own environment says `done`, or when there is no room left (then it is `truncated`).
    """

    def __init__(
        self,
        tools: Sequence[Callable[..., Any]] = (),
        environment_factory: Factory | Mapping[str, Factory] | None = None,
        *,
        max_iterations: int | None = None,
        max_tool_response: int | None = None,
        parser: ToolParser | None = None,
        tool_timeout: float | None = 30.0,
        tool_workers: int = 16,
        template_kwargs: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        end_ids: Sequence[int] | None = None,
    ) -> None:
        """
        `tools`: functions, also async ones, with type hints and a docstring that describes each argument.
        `environment_factory`: makes objects with `reset()`, of which each conversation has one; see `TextEnvironment`.
        `max_tool_response`: most characters of a result that the model reads; None: all.
        `parser`: finds the calls in a turn; None: JSON in `<tool_call>` tags.
        `tool_timeout`: seconds a call may take, see `TextEnvironment`.
        `template_kwargs`: variables for the chat template.
        `tokenizer`: its chat template renders the conversations; None: a trainer takes the policy's.
        `end_ids`: the tokens that end a turn; None: the policy's, without a trainer the tokenizer's.
        """
        super().__init__(tokenizer, environment_factory, tool_timeout, tool_workers)
        for name, value in (("max_iterations", max_iterations), ("max_tool_response", max_tool_response)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give 1 or more, or None for no limit")
        self.tools = {function.__name__: function for function in tools}
        self.max_iterations, self.max_tool_response = max_iterations, max_tool_response
        self.parser = parser or JsonCalls()
        self.template_kwargs = dict(template_kwargs or {})
        if len(self.tools) < len(tools):
            raise ValueError("tools: several have the same name (functions)")
        if not self.tools and self.factories is None:
            raise ValueError("tools: give at least one function, or an environment_factory with public methods")
        each = [schema for own in self._kinds() for schema in self._schemas(own)]
        self.schemas = list({schema["function"]["name"]: schema for schema in each}.values())
        """of all tools; those of a factory's objects are offered in their episodes only"""
        self.end_ids = end_ids
        self._renderers: dict[Any, TurnRenderer] = {}
        eos = getattr(tokenizer, "eos_token_id", None)
        self.renderer: Any = None if tokenizer is None else self._renderer([] if eos is None else [eos])

    def _kinds(self) -> list[OwnEnvironment | None]:
        """An object of each factory, or None where there is none."""
        return [None] if self.factories is None else list(self.factories.firsts().values())

    def _schemas(self, own: OwnEnvironment | None) -> list[dict[str, Any]]:
        """Of the tools in an episode that uses this object."""
        tools = {} if own is None else own.tools
        if shared := sorted(self.tools.keys() & tools.keys()):
            raise ValueError(f"tools: several have the same name ({', '.join(shared)})")
        return [_schema(name, function) for name, function in {**self.tools, **tools}.items()]

    def _renderer(self, end_ids: Sequence[int]) -> TurnRenderer:
        """Of the first kind of episodes; those of the other kinds are made too, as each may be refused."""
        self._ends, self._renderers = end_ids, {}
        first, *_ = [self._renderer_of(own) for own in self._kinds()]
        return first  # type: ignore[no-any-return]

    def _renderer_of(self, own: OwnEnvironment | None) -> Any:
        """Of the episodes that use this object; which tools it has may be known after its first `reset` only."""
        key = None if own is None else (own.factory, *own.tools)
        if key not in self._renderers:
            template, schemas = ChatTemplate(self.tokenizer, self.template_kwargs), self._schemas(own)
            kind = AnswerRenderer if schemas else TurnRenderer
            self._renderers[key] = kind(template, self._ends if self.end_ids is None else self.end_ids, schemas)
        return self._renderers[key]

    @property
    def is_ready(self) -> bool:
        """Whether it can play as it is."""
        return self.renderer is not None

    def for_policy(self, tokenizer: Any, end_ids: Sequence[int]) -> Self:
        """This environment if it has a tokenizer and its `end_ids`, else a copy that has those of the policy."""
        if self.is_ready and self.end_ids is not None:
            return self
        ready = copy.copy(self)
        ready.tokenizer = tokenizer if self.tokenizer is None else self.tokenizer
        ready.renderer = ready._renderer(end_ids)
        return ready

    def check_settings(self, tokenizer: Any, max_prompt_length: int | None = None, reward_funcs: Any = None) -> None:
        """ValueError for settings of a trainer that do not go with this environment."""
        super().check_settings(tokenizer, max_prompt_length, reward_funcs)
        if max_prompt_length is not None:
            raise ValueError("max_prompt_length: a prompt with tools cannot be cut; leave it out")

    def rollout(
        self, rows: Sequence[Mapping[str, Any]], turns: SampledTurns, seeds: Sequence[int], limit: int
    ) -> Rollout:
        """Play a conversation from each row's `prompt`, with at most `limit` tokens after it; columns reach `reset`.

        The metadata holds the messages of each (`completions`) and the rows' own `environments`.
        """
        rollout = super().rollout(rows, turns, seeds, limit)
        episodes = [history.episode for history in rollout.metadata["histories"]]
        rollout.metadata["completions"] = [episode.messages for episode in episodes]
        if self.environment_factory is not None:
            rollout.metadata["environments"] = [episode.own.instance for episode in episodes]
        return rollout

    # --- the loop's steps -----------------------------------------------------------------------------------------

    def _open(
        self, row: Mapping[str, Any], said: Said, ids: Sequence[int] | None, own: OwnEnvironment | None = None
    ) -> TextHistory:
        renderer = self._renderer_of(own)
        messages = _conversation(row, said)
        text = renderer.template.of_row(dict(row)).prompt(messages, renderer.schemas or None)
        encoder = renderer.encoder
        (tokens,) = encoder.encode([text])
        return TextHistory(text, torch.tensor(encoder.without_double_bos(tokens)), system=True)

    def _prompt(self, episode: Episode) -> Messages:
        return _conversation(episode.columns, episode.said)

    def _read_turn(self, episode: Episode) -> list[Callable[[], str | Pending]]:
        history, renderer = episode.history, self._renderer_of(episode.own)
        tokens = history.tokens[slice(*history.token_spans[-1])]
        closed = int(tokens[-1]) in renderer.ends
        text = str(renderer.template.tokenizer.decode(tokens[:-1] if closed else tokens))
        spoken = self._parsed(text) if renderer.schemas else Spoken(text)
        message: dict[str, Any] = {"role": "assistant", "content": encodable(spoken.content)}
        if spoken.calls:
            message["tool_calls"] = [call.message(place) for place, call in enumerate(spoken.calls)]
        episode.messages.append(message)
        enough = self.max_iterations is not None and len(episode.turn_rewards) >= self.max_iterations
        if episode.is_full and not (closed and not spoken.calls):
            history.complete(truncated=True)
        elif enough or not spoken.calls:
            history.complete()
        tools = self.tools if episode.own is None else {**self.tools, **episode.own.tools}
        return [partial(self._answer, tools, call) for call in spoken.calls]

    def _parsed(self, text: str) -> Spoken:
        """What the parser finds; if it fails, the turn is a call that cannot be read."""
        try:
            return self.parser(text)
        except Exception as error:
            logger.warning("parser: it failed on %r: %r; the model reads that its call cannot be read", text, error)
            return Spoken(text, [ToolCall("unknown", error=f"the call cannot be read ({type(error).__name__})")])

    def _answer(self, tools: Mapping[str, Callable[..., Any]], call: ToolCall) -> str | Pending:
        """The answer to a call. Errors become text that the model reads."""
        if call.error:
            return f"Tool error: {call.error}"
        if call.name not in tools:
            return f"Unknown tool {call.name}."
        return answer_of(self.late_calls, call.name, partial(tools[call.name], **call.arguments), _text_of)

    def _cut(self, text: str) -> str:
        """So much of an answer as the model reads."""
        text, most = encodable(text), self.max_tool_response
        return text if most is None or len(text) <= most else text[: max(most - 3, 0)] + "..."

    def _hear(self, episode: Episode) -> None:
        """Append the tools' answers as the template renders them."""
        history, renderer = episode.history, self._renderer_of(episode.own)
        known = {schema["function"]["name"] for schema in renderer.schemas}
        called = [call["function"]["name"] for call in episode.messages[-1]["tool_calls"]]
        names = [name if name in known else "unknown" for name in called]  # no template meets what a model made up
        answers = [Answer(*each) for each in zip(names, map(self._cut, episode.answers), strict=True)]
        text, ids = renderer(answers, closed=int(history.tokens[-1]) == renderer.end_id)
        history.append_segment(text, torch.tensor(ids), system=True)
        episode.messages += _messages_of(answers)


def _text_of(result: Any) -> str:
    """What the model reads of a tool's result."""
    try:
        return result if isinstance(result, str) else "" if result is None else json.dumps(result, default=str)
    except Exception as error:
        return error_text(error)


class Answer(NamedTuple):
    """A tool's answer."""

    name: str
    text: str


class TurnRenderer:
    """What conversations are rendered with, where the model is offered these schemas of tools.

    ends: the tokens that can end a turn.
    """

    def __init__(self, template: ChatTemplate, ends: Sequence[int], schemas: Sequence[Any] = ()) -> None:
        self.template, self.schemas = template, list(schemas)
        self.encoder = TextEncoder(template.tokenizer)
        self.ends = frozenset(ends)


class AnswerRenderer(TurnRenderer):
    """Renders tools' answers and a new generation prompt, as text and tokens that follow an assistant's turn.

    The template renders a stand-in conversation with and without the answers; only the difference is tokenised and
    appended. So nothing that the model has seen or said is rendered or tokenised again. The constructor
    checks that the template would render a whole conversation in the same way; other templates are a ValueError.

    ends: the tokens that can end a turn.
    """

    def __init__(self, template: ChatTemplate, ends: Sequence[int], schemas: Sequence[Any] = ()) -> None:
        super().__init__(template, ends, schemas)
        self.end_id = self._end_of_turns(ends)
        self._end = str(template.tokenizer.decode([self.end_id]))
        self._refuse_rewriting()

    def __call__(self, answers: Sequence[Answer], closed: bool) -> tuple[str, list[int]]:
        """`(text, ids)` that follow the turn; closed: the turn has its end token already."""
        text = self._suffix(_stand_in("x", [answer.name for answer in answers]), answers)
        text = text if closed else self._end + text
        return text, self.encoder.continuations([text])[0]

    def _suffix(self, spoken: Messages, answers: Sequence[Answer]) -> str:
        before = self.template.render(spoken, self.schemas)
        after = self.template.render([*spoken, *_messages_of(answers)], self.schemas, open_turn=True)
        cut = before.rindex(self._end) + len(self._end)
        if not after.startswith(before[:cut]):
            raise ValueError(
                "the chat template renders an assistant's turn in another way once tools have answered, so the tokens "
                "that the model sampled would not be what it sees; use a template that leaves earlier turns as they are"
            )
        return after[cut:]

    def _end_of_turns(self, ends: Sequence[int]) -> int:
        text = self.template.render(_stand_in("x", ["tool"]), self.schemas)
        places = {end: text.rfind(str(self.template.tokenizer.decode([end]))) for end in ends}
        last = max(places, key=lambda end: places[end], default=None)
        if last is None or places[last] < text.index("tool"):
            names = ", ".join(str(self.template.tokenizer.decode([end])) for end in ends) or "none"
            raise ValueError(
                f"the chat template ends an assistant's turn with none of the model's end tokens ({names}); set "
                "`generation_config.eos_token_id` to the one that it uses"
            )
        return last

    def _refuse_rewriting(self) -> None:
        """ValueError if the template renders answers in another way in a later round than in the first."""
        answers = [Answer("tool", "four"), Answer("tool", "five")]
        once = _stand_in("x", ["tool", "tool"])
        told = _messages_of([Answer("tool", "six")] * 2)
        twice = [*_stand_in("Another question?", ["tool", "tool"]), *told, *once[1:]]
        if self._suffix(once, answers) != self._suffix(twice, answers):
            raise ValueError(
                "the chat template renders a tool's answer in another way in later rounds, so it cannot be appended to "
                "what the model has seen; use a template that renders every round alike"
            )


def _messages_of(answers: Sequence[Answer]) -> Messages:
    return [
        {"role": "tool", "name": answer.name, "tool_call_id": call_id(place), "content": answer.text}
        for place, answer in enumerate(answers)
    ]


def _stand_in(question: str, names: Sequence[str]) -> Messages:
    calls = [ToolCall(name).message(place) for place, name in enumerate(names)]
    thoughts = "<think>\nWhat is it?\n</think>\n\nI look it up."  # some templates drop thoughts from earlier turns
    return [{"role": "user", "content": question}, {"role": "assistant", "content": thoughts, "tool_calls": calls}]


def _schema(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return dict(get_json_schema(function))
    except Exception as error:
        raise ValueError(
            f"tools: {name} cannot be described to the model ({error}); give it type hints, and a docstring with an "
            "`Args:` section"
        ) from None


def _conversation(row: Mapping[str, Any], said: Said) -> Messages:
    """The prompt of a row with what `reset` said: its messages, or a text at the end of the last one, the user's."""
    given = row.get("prompt")
    prompt = [] if lacks_prompt(row) or given is None else given
    if not isinstance(prompt, Sequence) or isinstance(prompt, str):
        raise ValueError("prompt: tools need conversations; give a list of messages in each row")
    messages = list(maybe_convert_to_chatml({"prompt": prompt})["prompt"]) if len(prompt) else []
    if not said:
        if not messages:
            raise ValueError("prompt: the row has none, and reset() gave none; one of them has to say it")
        return messages
    if not isinstance(said, str):
        return [*messages, *said]
    last = messages[-1] if messages else {"role": "system"}
    if last.get("role") == "system":
        return [*messages, {"role": "user", "content": said}]
    if last.get("role") != "user":
        raise ValueError("prompt: what reset() returns is added to the last message, which is not the user's")
    content = last["content"]
    more = content + said if isinstance(content, str) else [*content, {"type": "text", "text": said}]
    return [*messages[:-1], {**last, "content": more}]
