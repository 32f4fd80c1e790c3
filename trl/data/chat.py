"""Renders conversations by the tokenizer's chat template, and finds the characters that the assistant says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from trl.data.encode import Span, common_prefix, unwrap_tokenizer

Message = dict[str, Any]
Messages = list[Message]

MARK = "\ue000content\ue001"
"""replaces a message's content to find its place in the rendering; its first and last characters occur in no text"""


class Rendered(NamedTuple):
    """A prompt's text and the texts that continue it."""

    prompt: str
    answers: list[str]
    rewritten: bool
    """the answers do not continue the generation prompt to the letter"""


class Conversation(NamedTuple):
    """A conversation's text and the character spans that the assistant says, stop token included."""

    text: str
    spans: list[Span]
    rewritten: bool
    """the template renders some turn differently once other messages follow it"""


def without_nones(value: Any) -> Any:
    """The value without dict entries that are None, at any depth: Arrow adds them where rows have different keys."""
    if isinstance(value, Mapping):
        return {k: without_nones(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [without_nones(v) for v in value]
    return value


def read_tools(tools: Any) -> list[Any] | None:
    """A row's tools (a list of JSON schemas or functions, or the list as JSON text); None when there are none."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"column 'tools' is text but not JSON: {error}") from None
    if tools is not None and not isinstance(tools, list | tuple):
        raise ValueError(f"column 'tools' should be a list of tools, got {type(tools)}")
    return [tool if callable(tool) else without_nones(tool) for tool in tools] if tools else None


class ChatTemplate:
    """Renders conversations; `kwargs` go to the template."""

    def __init__(self, processing_class: Any, kwargs: Mapping[str, Any] | None = None) -> None:
        self.tokenizer: PreTrainedTokenizerBase = unwrap_tokenizer(processing_class)
        self.kwargs = dict(kwargs or {})
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "the rows are conversations but the tokenizer has no chat template: set `tokenizer.chat_template`, "
                "or turn the conversations into text yourself"
            )

    def of_row(self, row: Mapping[str, Any]) -> ChatTemplate:
        """The template with the row's own `chat_template_kwargs`."""
        own = without_nones(row.get("chat_template_kwargs") or {})
        return ChatTemplate(self.tokenizer, {**self.kwargs, **own}) if own else self

    @cached_property
    def _specials(self) -> tuple[str, ...]:
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple({*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)})

    @cached_property
    def _source(self) -> str:
        template = self.tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else str(template)

    def needs_spelling(self, messages: Messages, tools: Sequence[Any] | None) -> bool:
        """Whether there are tools or tool calls that the template does not render."""
        calls = any(message.get("tool_calls") for message in messages)
        return bool(tools and "tools" not in self._source) or bool(calls and "tool_calls" not in self._source)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, open_turn: bool = False, **kwargs: Any
    ) -> str:
        """The template's text; `open_turn` adds the generation prompt."""
        plain: Messages = without_nones(list(messages))
        if self.needs_spelling(plain, tools):
            plain, tools = spell_tools(plain, tools), None
        try:
            text = self.tokenizer.apply_chat_template(
                plain,
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=open_turn,
                **{**self.kwargs, **kwargs},
            )
        except (TemplateError, TypeError) as error:
            roles = ", ".join(str(message.get("role")) for message in plain)
            raise ValueError(f"the chat template cannot render the roles {roles}: {error}") from error
        return str(text)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """The text that the model continues: a new assistant turn, or the last one when that is the assistant's."""
        if messages and messages[-1]["role"] == "assistant":
            return self.render(messages, tools, continue_final_message=True)
        return self.render(messages, tools, open_turn=True)

    def split(
        self, prompt: Messages, answers: Sequence[Messages], tools: Sequence[Any] | None = None, trim: bool = True
    ) -> Rendered:
        """The prompt's text and each answer's, so that prompt + answer is the rendering of the whole conversation.

        `trim`: an answer ends at its stop token, without the blanks that the template puts after it.
        """
        end = self._without_tail if trim else str
        opened = self.prompt(prompt, tools)
        whole = [self.render(_joined(prompt, answer), tools) for answer in answers]
        if all(text.startswith(opened) for text in whole):
            return Rendered(opened, [end(text[len(opened) :]) for text in whole], rewritten=False)
        closed = self.render(prompt, tools)
        for text in whole:
            if not text.startswith(closed):
                raise self._changed(closed, text, len(prompt))
        cuts = []
        for answer, text in zip(answers, whole, strict=True):
            marked = self.render(_joined(prompt, _marked(answer, 0)), tools)
            cuts.append(min(common_prefix(opened, text), common_prefix(marked, text)))
        cut = max(min(cuts), len(closed))
        return Rendered(whole[0][:cut], [end(text[cut:]) for text in whole], rewritten=True)

    def conversation(self, messages: Messages, tools: Sequence[Any] | None = None, first: int = 0) -> Conversation:
        """The text, and the spans of the assistant's turns from message `first` on.

        By the template's own `{% generation %}` marks where it has them; otherwise by rendering the conversation up to
        each turn. A template that renders earlier messages in another way once later ones follow: ValueError.
        """
        if re.search(r"\{%-?\s*generation\s*-?%\}", self._source) and first == 0:
            return self._by_generation_marks(messages, tools)
        text = self.render(messages, tools)
        spans: list[Span] = []
        rewritten = False
        for index, message in enumerate(messages):
            if message.get("role") != "assistant" or index < first:
                continue
            start = self._turn_start(messages, tools, index, text)
            end, changed = self._turn_end(messages, tools, index, text)
            if end < start or (spans and start < spans[-1][1]):
                raise self._changed("", text, index)
            end = start + len(self._without_tail(text[start:end]))
            spans.append((start, end))
            rewritten = rewritten or changed
        return Conversation(text, spans, rewritten)

    def _by_generation_marks(self, messages: Messages, tools: Sequence[Any] | None) -> Conversation:
        plain = without_nones(messages)
        if self.needs_spelling(plain, tools):
            plain, tools = spell_tools(plain, tools), None
        rendered: Any = render_jinja_template(  # annotated as text, gives texts and spans
            conversations=[plain],
            tools=list(tools) if tools else None,
            chat_template=self.tokenizer.get_chat_template(None, list(tools) if tools else None),
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.kwargs},
        )
        texts, spans = rendered
        return Conversation(texts[0], [(int(start), int(end)) for start, end in spans[0]], rewritten=False)

    def _turn_start(self, messages: Messages, tools: Sequence[Any] | None, index: int, text: str) -> int:
        """Where the assistant's words in message `index` begin: after the text that would prompt the model for them."""
        if index == 0:
            return common_prefix(self.render(_marked(messages, 0), tools), text)
        opened = self.render(messages[:index], tools, open_turn=True)
        if text.startswith(opened):
            return len(opened)
        closed = self.render(messages[:index], tools)
        if not text.startswith(closed):
            raise self._changed(closed, text, index)
        marked = self.render(_marked(messages, index), tools)
        return max(len(closed), min(common_prefix(opened, text), common_prefix(marked, text)))

    def _turn_end(self, messages: Messages, tools: Sequence[Any] | None, index: int, text: str) -> tuple[int, bool]:
        """Where the turn of message `index` ends, and whether the template rewrites it when others follow."""
        until = self.render(messages[: index + 1], tools)
        if text.startswith(until):
            return len(until), False
        in_place = self.render(_marked(messages, index), tools)
        at_end = self.render(_marked(messages[: index + 1], index), tools)
        if MARK[-1] not in in_place or MARK[-1] not in at_end:
            raise self._changed(until, text, index)
        after = in_place[in_place.rindex(MARK[-1]) + 1 :]
        if not text.endswith(after):
            raise self._changed(until, text, index)
        end = len(text) - len(after)
        tail = at_end[at_end.rindex(MARK[-1]) + 1 :]
        return end + (len(tail) if after.startswith(tail) else 0), True

    def _without_tail(self, text: str) -> str:
        """The text without the blanks that follow its stop token: nothing is sampled after that."""
        stripped = text.rstrip()
        return stripped if stripped.endswith(self._specials) else text

    def _changed(self, expected: str, text: str, index: int) -> ValueError:
        at = common_prefix(expected, text)
        return ValueError(
            f"the chat template renders what stands before message {index} in another way once later messages follow "
            f"(from character {at}: {expected[at : at + 30]!r} became {text[at : at + 30]!r}), so the assistant's "
            "tokens cannot be told apart: mark them with {% generation %} in the template, or train on the whole text"
        )


def _joined(prompt: Messages, answer: Messages) -> Messages:
    """Prompt and answer as one conversation; an answer that continues the assistant's last message is joined to it."""
    if not (prompt and answer and prompt[-1]["role"] == "assistant" == answer[0].get("role")):
        return [*prompt, *answer]
    begun, rest = prompt[-1].get("content"), answer[0].get("content")
    if not (isinstance(begun, str) and isinstance(rest, str)):
        return [*prompt, *answer]
    return [*prompt[:-1], {**answer[0], "content": begun + rest}, *answer[1:]]


def _marked(messages: Messages, index: int) -> Messages:
    """The conversation with the content of message `index` replaced by the mark."""
    content: Any = MARK
    if isinstance(messages[index].get("content"), list):
        content = [{"type": "text", "text": MARK}]
    return [*messages[:index], {**messages[index], "content": content}, *messages[index + 1 :]]


def spell_tools(messages: Sequence[Message], tools: Sequence[Any] | None) -> Messages:
    """The conversation with tools listed in its system message and calls as `<tool_call>` text, in Hermes' manner."""
    spelled: Messages = []
    for message in messages:
        plain = {key: value for key, value in message.items() if key != "tool_calls"}
        calls = [json.dumps(call.get("function", call)) for call in message.get("tool_calls") or []]
        texts = [plain.get("content") or "", *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]
        spelled.append({**plain, "content": "\n".join(filter(None, texts))} if calls else plain)
    if tools:
        from transformers.utils.chat_template_utils import get_json_schema

        schemas = [get_json_schema(tool) if callable(tool) else tool for tool in tools]
        listed = "\n".join(json.dumps(schema) for schema in schemas)
        notice = (
            f"You may call these functions:\n<tools>\n{listed}\n</tools>\nCall one with a JSON object in "
            '<tool_call></tool_call>: {"name": ..., "arguments": ...}.'
        )
        if spelled and spelled[0].get("role") == "system":
            notice = f"{spelled[0].get('content') or ''}\n\n{notice}"
            spelled = spelled[1:]
        spelled.insert(0, {"role": "system", "content": notice})
    return spelled
