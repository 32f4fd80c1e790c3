"""The chat environment: conversations with tools, in the form of the model's chat template."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from trl.data.any_text import encodable
from trl.data.chat import ChatTemplate, Messages
from trl.data.encode import TextEncoder
from trl.data.formats import maybe_convert_to_chatml
from trl.data.pictures import reader_of
from trl.data.records import Rollout
from trl.environment.call_formats import CallReader, Spoken, ToolCall, ToolParser, call_id
from trl.environment.episodes import Environment, Episode, lacks_prompt
from trl.environment.factories import Factory, OwnEnvironment, Said
from trl.environment.learned_calls import learned_reader
from trl.environment.pictures import (
    Part,
    PicturedAnswer,
    answer_with_pictures,
    cut_parts,
    shown_pictures,
    with_numbers,
    without_marks,
)
from trl.environment.text_history import TextHistory
from trl.environment.tool_calls import FailedCall, Pending, answer_of, error_text
from trl.environment.tool_schemas import named_tools, schema_of, with_members
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
        `tools`: functions, also async ones, with type hints and a docstring that describes each argument; methods,
        `functools.partial` and objects with `__call__` too; a dict gives them names.
        `environment_factory`: makes objects with `reset()`, of which each conversation has one; see `TextEnvironment`.
        `max_tool_response`: most characters of a result that the model reads; None: all.
        `parser`: finds the calls in a turn; None: they are read as the chat template writes them.
        `tool_timeout`: seconds a call may take, see `TextEnvironment`.
        `template_kwargs`: variables for the chat template.
        `tokenizer`: its chat template renders the conversations; None: a trainer takes the policy's.
        `end_ids`: the tokens that end a turn; None: the policy's, without a trainer the tokenizer's. The token by which
        the template ends a call does too.
        """
        super().__init__(tokenizer, environment_factory, tool_timeout, tool_workers)
        for name, value in (("max_iterations", max_iterations), ("max_tool_response", max_tool_response)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give 1 or more, or None for no limit")
        self.tools = named_tools(tools)
        self.max_iterations, self.max_tool_response = max_iterations, max_tool_response
        self.parser = parser
        self.template_kwargs = dict(template_kwargs or {})
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
        return [schema_of(name, function) for name, function in {**self.tools, **tools}.items()]

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
            made = kind(template, self._ends if self.end_ids is None else self.end_ids, schemas)
            if isinstance(made, AnswerRenderer) and self.parser is None:
                made.reader = learned_reader(template, made.end_texts, schemas)
                made.warn_of_unlisted_tools()
            self._renderers[key] = made
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

        The metadata holds the messages of each (`completions`), how many calls were answered (`tools_called`) and how
        many of them by an error (`tools_failed`), and the rows' own `environments`.
        """
        known = list(self._renderers.values())
        if self.is_ready and (self.end_ids is not None or any(renderer.adds_end for renderer in known)):
            turns = turns.stopping_at(end for renderer in known for end in renderer.ends)
        rollout = super().rollout(rows, turns, seeds, limit)
        episodes = [history.episode for history in rollout.metadata["histories"]]
        rollout.metadata["completions"] = [episode.messages for episode in episodes]
        rollout.metadata["tools_called"] = [episode.called for episode in episodes]
        rollout.metadata["tools_failed"] = [episode.failed for episode in episodes]
        if self.environment_factory is not None:
            rollout.metadata["environments"] = [episode.own.instance for episode in episodes]
        return rollout

    # --- the loop's steps -----------------------------------------------------------------------------------------

    def _open(
        self, row: Mapping[str, Any], said: Said, ids: Sequence[int] | None, own: OwnEnvironment | None = None
    ) -> TextHistory:
        renderer = self._renderer_of(own)
        messages, numbers = with_numbers(row, _conversation(row, said), renderer.pictures)
        text = renderer.template.of_row(dict(row)).prompt(messages, renderer.schemas or None)
        tokens = renderer.encoder.without_double_bos(renderer.ids_of(text, numbers))
        return TextHistory(text, torch.tensor(tokens), system=True)

    def _prompt(self, episode: Episode) -> Messages:
        return _conversation(episode.columns, episode.said)

    def _read_turn(self, episode: Episode) -> list[Callable[[], str | Pending]]:
        history, renderer = episode.history, self._renderer_of(episode.own)
        tokens = history.tokens[slice(*history.token_spans[-1])]
        closed = int(tokens[-1]) in renderer.ends
        decode = renderer.template.tokenizer.decode
        text = str(decode(tokens[:-1] if closed else tokens, clean_up_tokenization_spaces=False))
        start = history.text_spans[-1][0]
        before = history.text[max(start - 200, 0) : start]
        spoken = self._parsed(renderer.reader or self.parser, text, before) if renderer.schemas else Spoken(text)
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

    @staticmethod
    def _parsed(parser: Any, text: str, before: str) -> Spoken:
        """What the parser finds in a turn after that text; if it fails, the turn is a call that cannot be read."""
        try:
            spoken: Spoken = parser.read(text, before) if isinstance(parser, CallReader) else parser(text)
            return spoken
        except Exception as error:
            logger.warning("parser: it failed on %r: %r; the model reads that its call cannot be read", text, error)
            return Spoken(text, [ToolCall("unknown", error=f"the call cannot be read ({type(error).__name__})")])

    def _answer(self, tools: Mapping[str, Callable[..., Any]], call: ToolCall) -> str | Pending:
        """The answer to a call. Errors become text that the model reads."""
        if call.error:
            return FailedCall(f"Tool error: {call.error}")
        if call.name not in tools:
            return FailedCall(f"Unknown tool {call.name}.")
        tool = tools[call.name]
        try:
            arguments = with_members(tool, call.arguments)
        except ValueError as error:
            return error_text(error)
        return answer_of(self.late_calls, call.name, partial(tool, **arguments), self._said_by)

    def _said_by(self, result: Any) -> str:
        """What the model reads of a tool's result."""
        try:
            pictured = answer_with_pictures(result, self.renderer.pictures is not None, _text_of)
        except Exception as error:  # a picture that cannot be read, or whose parts have faults of their own
            return error_text(error)
        return _text_of(result) if pictured is None else pictured

    def _cut(self, text: str) -> str:
        """So much of an answer as the model reads."""
        if isinstance(text, PicturedAnswer):
            return cut_parts(text, self._cut_text, self.max_tool_response)
        return self._cut_text(text, self.max_tool_response)

    def _cut_text(self, text: str, most: int | None) -> str:
        text = without_marks(encodable(text), self.renderer.pictures)
        return text if most is None or len(text) <= most else text[: max(most - 3, 0)] + "..."[:most]

    def _hear(self, episode: Episode) -> None:
        """Append the tools' answers as the template renders them."""
        history, renderer = episode.history, self._renderer_of(episode.own)
        known = {schema["function"]["name"] for schema in renderer.schemas}
        called = [call["function"]["name"] for call in episode.messages[-1]["tool_calls"]]
        names = [name if name in known else "unknown" for name in called]  # no template meets what a model made up
        answers = [Answer(*each) for each in zip(names, map(self._cut, episode.answers), strict=True)]
        episode.called += len(answers)
        episode.failed += sum(isinstance(answer, FailedCall) for answer in episode.answers)
        text, ids = renderer(answers, closed=int(history.tokens[-1]) == renderer.end_id)
        history.append_segment(text, torch.tensor(ids), system=True)
        episode.messages += shown_pictures(_messages_of(answers))


def _text_of(result: Any) -> str:
    """What the model reads of a tool's result: a text as it stands, JSON, or what `str` makes of other objects."""
    if isinstance(result, str):
        return result
    if isinstance(result, Iterator | AsyncIterator):
        return FailedCall(f"Tool error: the tool gave a {type(result).__name__} and not what it holds; return a list")
    try:
        plain = result if isinstance(result, _JSON) else _plain(result)
        return plain if isinstance(plain, str) else json.dumps(plain, default=_plain, ensure_ascii=False)
    except (TypeError, ValueError):  # keys that JSON does not know, or a list that holds itself
        return str(result)
    except Exception as error:
        return error_text(error)


_JSON = (dict, list, tuple, int, float)


def _plain(value: Any) -> Any:
    """What JSON can say of a value that it does not know; letters of any script stay readable."""
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return value.tolist()
    if isinstance(value, bytes | bytearray):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, set | frozenset):
        return list(value)
    return "" if value is None else str(value)


class Answer(NamedTuple):
    """A tool's answer."""

    name: str
    text: str
    """a `PicturedAnswer` where it has pictures"""

    @property
    def content(self) -> str | list[Part]:
        return list(self.text.parts) if isinstance(self.text, PicturedAnswer) else self.text

    @property
    def numbers(self) -> list[int]:
        """Its pictures."""
        return self.text.numbers if isinstance(self.text, PicturedAnswer) else []


class TurnRenderer:
    """What conversations are rendered with, where the model is offered these schemas of tools.

    ends: the tokens that can end a turn.
    """

    def __init__(self, template: ChatTemplate, ends: Sequence[int], schemas: Sequence[Any] = ()) -> None:
        self.template, self.schemas = template, list(schemas)
        self.encoder = TextEncoder(template.tokenizer)
        self.pictures = reader_of(template.tokenizer)
        """what reads pictures; None: the model reads text only"""
        self.ends = frozenset(ends)
        self.adds_end = False
        """whether a token ends turns that is none of the ends given"""

    def ids_of(self, text: str, numbers: Sequence[int], continues: bool = False) -> list[int]:
        """The tokens of a rendered text with these pictures; continues: it follows another text."""
        encode = self.encoder.continuations if continues else self.encoder.encode
        if self.pictures is None:
            return encode([text])[0]
        return self.pictures.tokens(encode([self.pictures.expand(text, (), numbers).text])[0], numbers)


class AnswerRenderer(TurnRenderer):
    """Renders tools' answers and a new generation prompt, as text and tokens that follow an assistant's turn.

    The template renders a stand-in conversation with and without the answers; only the difference is tokenised and
    appended. So nothing that the model has seen or said is rendered or tokenised again. The constructor
    checks that the template would render a whole conversation in the same way; other templates are a ValueError.
    Where a template knows no tools' answers, they are said by the user, in `<tool_response>` tags.

    ends: the tokens that can end a turn; the one by which the template ends a call is added.
    """

    def __init__(self, template: ChatTemplate, ends: Sequence[int], schemas: Sequence[Any] = ()) -> None:
        super().__init__(template, ends, schemas)
        self.reader: CallReader | None = None
        """what finds the calls of a turn, where no parser was given"""
        self.by_user = False
        self.most_calls: int | None = None
        self.most_calls = self._find_most_calls()
        self.by_user = not self._prints_answers()
        self.end_id, self._is_inside = self._end_of_calls(ends)
        self.ends = frozenset([*ends, self.end_id])
        self.adds_end = self.end_id not in ends
        self._end = self._text_of(self.end_id)
        self._refuse_rewriting()

    @property
    def end_texts(self) -> list[str]:
        """The texts of the tokens that can end a turn: of all that are special, and of the one that ends a call."""
        return [text for text in map(self._text_of, self.ends) if text in self._specials or text == self._end]

    def warn_of_unlisted_tools(self) -> None:
        """A line where the template does not print the tools, so that the model does not know of them."""
        asked: Messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}]
        names = [schema["function"]["name"] for schema in self.schemas]
        for messages in (asked[1:], asked):
            try:
                text = self.template.render(messages, self.schemas, open_turn=True)
            except ValueError:
                continue
            names = [name for name in names if name not in text]
        if names:
            logger.warning(
                "tools: the chat template does not list %s in the prompt, so the model knows of them only what the "
                "rows say; use a template that prints `tools`", ", ".join(names),
            )  # fmt: skip

    @cached_property
    def _specials(self) -> dict[str, int]:
        added = self.template.tokenizer.added_tokens_decoder
        return {token.content: number for number, token in added.items() if token.special and token.content}

    def _text_of(self, token: int) -> str:
        return str(self.template.tokenizer.decode([token]))

    def __call__(self, answers: Sequence[Answer], closed: bool) -> tuple[str, list[int]]:
        """`(text, ids)` that follow the turn; closed: the turn has its end token already."""
        text = self._pictured(answers) if any(answer.numbers for answer in answers) else self._printed(answers)
        text = text if closed else self._end + text
        return text, self.ids_of(text, [number for answer in answers for number in answer.numbers], continues=True)

    def _printed(self, answers: Sequence[Answer], by_user: bool = False) -> str:
        """What follows a turn. by_user: the user tells the answers, whatever the template can do."""
        return self._suffix(self._stand_in("x", [answer.name for answer in answers]), answers, by_user)

    def _pictured(self, answers: Sequence[Answer]) -> str:
        """Answers with pictures, by the user where the template prints none that tools give."""
        assert self.pictures is not None
        wanted = sum(len(answer.numbers) for answer in answers)
        for by_user in (self.by_user, True):
            try:
                text = self._printed(answers, by_user)
            except ValueError:
                continue
            if text.count(self.pictures.placeholder) == wanted:
                return text
        raise ValueError(
            "a tool gave a picture, and the chat template prints none in a tool's or a user's message: set the "
            "template of the model's processor"
        )

    def _stand_in(self, question: str, names: Sequence[str]) -> Messages:
        calls = [ToolCall(name).message(place) for place, name in enumerate(names[: self.most_calls])]
        thoughts = "<think>\nWhat is it?\n</think>\n\nI look it up."  # some templates drop thoughts from earlier turns
        return [{"role": "user", "content": question}, {"role": "assistant", "content": thoughts, "tool_calls": calls}]

    def _told(self, answers: Sequence[Answer], by_user: bool = False) -> Messages:
        """The messages that tell the answers to the model."""
        if not (self.by_user or by_user):
            return _messages_of(answers)
        if any(answer.numbers for answer in answers):
            parts = [part for place, answer in enumerate(answers) for part in _framed(answer, first=not place)]
            return [{"role": "user", "content": parts}]
        said = "\n".join(f"<tool_response>\n{answer.text}\n</tool_response>" for answer in answers)
        return [{"role": "user", "content": said}]

    def _find_most_calls(self) -> int | None:
        """How many calls a turn may have in this template; None: no limit."""
        try:
            self.template.render(self._stand_in("x", ["tool", "tool"]), self.schemas)
        except ValueError:
            return 1
        return None

    def _prints_answers(self) -> bool:
        try:
            told = self._rendered([Answer("tool", "zqanswer")])[1]
        except ValueError:
            return False
        return "zqanswer" in told

    def _rendered(self, answers: Sequence[Answer]) -> tuple[str, str]:
        """A stand-in that calls, without and with these answers."""
        spoken = self._stand_in("x", [answer.name for answer in answers])
        after = self.template.render([*spoken, *self._told(answers)], self.schemas, open_turn=True)
        return self.template.render(spoken, self.schemas), after

    def _suffix(self, spoken: Messages, answers: Sequence[Answer], by_user: bool = False) -> str:
        before = self.template.render(spoken, self.schemas)
        after = self.template.render([*spoken, *self._told(answers, by_user)], self.schemas, open_turn=True)
        cut = before.rindex(self._end) + len(self._end) if self._is_inside else len(before.rstrip())
        if not after.startswith(before[:cut]):
            raise ValueError(
                "the chat template renders an assistant's turn in another way once tools have answered, so the tokens "
                "that the model sampled would not be what it sees; use a template that leaves earlier turns as they are"
            )
        return after[cut:] if self._is_inside else after[cut:].lstrip().removeprefix(self._end)

    def _end_of_calls(self, ends: Sequence[int]) -> tuple[int, bool]:
        """The token that ends a turn with calls, and whether it belongs to the turn: else it opens the answers.

        It is one of the ends; where the template prints them after other turns only, the special token of this one.
        """
        before, after = self._rendered([Answer("zqtool", "zqanswer")])
        said = before[max(before.rfind("zqtool"), before.rfind("I look it up."), 0) :].rstrip()
        follows = after[len(before.rstrip()) :].lstrip() if after.startswith(before.rstrip()) else ""
        known = {self._text_of(end): end for end in ends}
        special = self._specials
        marks = {text: end for text, end in known.items() if text in special}
        inside = {said.index(text): end for text, end in marks.items() if text in said}
        if inside:
            return inside[min(inside)], True
        for texts in (marks, special if self._ends_answers(marks) else {}):
            for whole, is_inside in ((said, True), (follows, False)):
                found = [text for text in texts if (whole.endswith(text) if is_inside else whole.startswith(text))]
                if found:
                    return texts[max(found, key=len)], is_inside
        words = {said.rfind(text): end for text, end in known.items() if text and text in said}
        if words:
            return words[max(words)], True
        names = ", ".join(known) or "none"
        raise ValueError(
            f"the chat template ends an assistant's turn with none of the model's end tokens ({names}); set "
            "`generation_config.eos_token_id` to the one that it uses"
        )

    def _ends_answers(self, ends: Iterable[str]) -> bool:
        """Whether the template prints one of these texts after an answer of the assistant."""
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "zqsaid"}]
        alone = self.template.render(messages, self.schemas).partition("zqsaid")[2]
        followed = self.template.render([*messages, {"role": "user", "content": "zqmore"}], self.schemas)
        followed = followed.partition("zqsaid")[2].partition("zqmore")[0]
        return any(end and (end in alone or end in followed) for end in ends)

    def _refuse_rewriting(self) -> None:
        """ValueError if the template renders answers in another way in a later round than in the first."""
        answers = [Answer("tool", "four"), Answer("tool", "five")]
        once = self._stand_in("x", ["tool", "tool"])
        told = self._told([Answer("tool", "six")] * 2)
        twice = [*self._stand_in("Another question?", ["tool", "tool"]), *told, *once[1:]]
        if self._suffix(once, answers) != self._suffix(twice, answers):
            raise ValueError(
                "the chat template renders a tool's answer in another way in later rounds, so it cannot be appended to "
                "what the model has seen; use a template that renders every round alike"
            )


def _messages_of(answers: Sequence[Answer]) -> Messages:
    return [
        {"role": "tool", "name": answer.name, "tool_call_id": call_id(place), "content": answer.content}
        for place, answer in enumerate(answers)
    ]


def _framed(answer: Answer, first: bool) -> list[Part]:
    """An answer with pictures, or beside one that has some, as parts of what the user says."""
    content = answer.content if isinstance(answer.content, list) else [{"type": "text", "text": answer.content}]
    opening = {"type": "text", "text": "<tool_response>\n" if first else "\n<tool_response>\n"}
    return [opening, *content, {"type": "text", "text": "\n</tool_response>"}]


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
