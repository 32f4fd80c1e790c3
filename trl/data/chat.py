"""Renders conversations by the tokenizer's chat template, and finds the characters that the assistant says."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import (
    DocstringParsingException,
    TypeHintParsingException,
    render_jinja_template,
)

from trl.data.columns import UNREADABLE
from trl.data.encode import Span, common_prefix, unwrap_tokenizer
from trl.data.messages import (
    Message,
    Messages,
    TemplateHabits,
    is_learned,
    read_tools,
    spell_calls,
    spell_tools,
    template_arguments,
    without_nones,
)
from trl.data.rendering import Reader, Reading

_OF_TEMPLATES = (
    TemplateError, DocstringParsingException, TypeHintParsingException, *UNREADABLE, MemoryError, UnicodeError,
)  # fmt: skip
"""what a template can raise"""
_ROW_TEMPLATES = 16
"""templates with a row's own arguments that are kept"""


class Rendered(NamedTuple):
    """A prompt's text and the texts that continue it."""

    prompt: str
    answers: list[str]
    spans: list[list[Span]]
    """for each answer its characters that the assistant says: not what tools or users do"""
    readings: list[Reading]
    """the whole conversations"""
    rewritten: bool
    """when the model answers, it sees earlier messages in another way than here"""


class Conversation(NamedTuple):
    """A conversation's text and the character spans that the assistant says, stop token included."""

    text: str
    spans: list[Span]
    reading: Reading


class ChatTemplate:
    """Renders conversations.

    `kwargs` go to the template. `ends`: ids of the model's end tokens, from its generation config, of which the special
    tokens count; the tokenizer's EOS and what the template prints after an assistant's turn end turns as well.
    `keep_nulls`: a None inside a tool call was said by the row; otherwise Arrow may have added it and it is dropped.
    """

    def __init__(
        self,
        processing_class: Any,
        kwargs: Mapping[str, Any] | None = None,
        ends: Sequence[int] = (),
        keep_nulls: bool = False,
    ) -> None:
        self.tokenizer: PreTrainedTokenizerBase = unwrap_tokenizer(processing_class)
        self.kwargs = dict(kwargs or {})
        self.ends, self.keep_nulls = tuple(ends), keep_nulls
        self._of_rows: dict[str, ChatTemplate] = {}
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "the rows are conversations but the tokenizer has no chat template: set `tokenizer.chat_template` "
                "(in SFT `chat_template_path` does it), or turn the conversations into text yourself"
            )

    def of_row(self, row: Mapping[str, Any]) -> ChatTemplate:
        """The template with the row's own `chat_template_kwargs`."""
        own = template_arguments(row)
        if not own:
            return self
        key = json.dumps(own, sort_keys=True, default=repr)
        if key not in self._of_rows:
            if len(self._of_rows) >= _ROW_TEMPLATES:
                self._of_rows.clear()
            made = ChatTemplate(self.tokenizer, {**self.kwargs, **own}, self.ends, self.keep_nulls)
            self._of_rows[key] = made
        return self._of_rows[key]

    @cached_property
    def _specials(self) -> tuple[str, ...]:
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple({*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)})

    @cached_property
    def _source(self) -> str:
        template = self.tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else str(template)

    @cached_property
    def _habits(self) -> TemplateHabits:
        return TemplateHabits(self._raw, self._source)

    @cached_property
    def _reader(self) -> Reader:
        known = self.tokenizer.added_tokens_decoder  # a model's end token that is none of the tokenizer's is left out
        ends = [known[end].content for end in self.ends if end in known and known[end].special]
        ends.append(str(self.tokenizer.eos_token or ""))
        return Reader(self._raw, self._ready_alone, self._specials, ends)

    @property
    def end_texts(self) -> tuple[str, ...]:
        """The texts that end an assistant's turn: of the model's end tokens, and what the template prints there."""
        return self._reader.ends

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens that can end an assistant's turn, by the model, the tokenizer or the template."""
        known = {token.content: end for end, token in self.tokenizer.added_tokens_decoder.items()}
        eos = self.tokenizer.eos_token_id
        return frozenset(
            [known[text] for text in self.end_texts if text in known] + ([] if eos is None else [int(eos)])
        )

    def needs_spelling(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> bool:
        """Whether there are tools or calls that the template does not know, so that we write them out."""
        calls = any(message.get("tool_calls") for message in messages)
        return bool(tools and self._habits.spells_tools) or bool(calls and self._habits.spells_calls)

    def _ready(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, met: Counter[tuple[int, str]] | None = None
    ) -> tuple[Messages, list[Any] | None]:
        """Messages and tools as the template can print them; `met` counts what was changed."""
        plain = self._habits.ready(messages, Counter() if met is None else met, self.keep_nulls)
        if self._habits.spells_calls and any("tool_calls" in message for message in plain):
            plain = spell_calls(plain)
        if tools and self._habits.spells_tools:
            return spell_tools(plain, tools, with_calls=self._habits.spells_calls), None
        return plain, list(tools) if tools else None

    def _ready_alone(self, messages: Messages) -> Messages:
        return self._ready(messages, None)[0]

    def _raw(
        self, messages: Messages, tools: Sequence[Any] | None = None, open_turn: bool = False, **kwargs: Any
    ) -> str:
        if any("content" in message and message["content"] is None for message in messages):
            render = self._with_nones  # `apply_chat_template` drops them
        else:
            render = self.tokenizer.apply_chat_template
        try:
            text = render(
                messages,
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=open_turn,
                **{**self.kwargs, **kwargs},
            )
        except _OF_TEMPLATES as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise ValueError(f"the chat template cannot render the roles {roles}: {error}") from error
        return str(text)

    def _with_nones(self, messages: Messages, tools: list[Any] | None, tokenize: bool, **kwargs: Any) -> str:
        template = self.tokenizer.get_chat_template(None, tools)
        options = {**self.tokenizer.special_tokens_map, **kwargs}
        texts: Any = render_jinja_template(conversations=[messages], tools=tools, chat_template=template, **options)[0]
        return str(texts[0])

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, open_turn: bool = False, **kwargs: Any
    ) -> str:
        """The template's text; `open_turn` adds the generation prompt."""
        plain, known = self._ready(messages, tools)
        return self._raw(plain, known, open_turn, **kwargs)

    def read(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, strict: bool = True) -> Reading:
        """The conversation's text and whose its characters are; unless `strict`, no turns where that cannot be told."""
        met: Counter[tuple[int, str]] = Counter()
        plain, known = self._ready(messages, tools, met)
        reading = self._reader.read(plain, known, self._raw(plain, known), strict)
        reading.changed, reading.spelled = met, self.needs_spelling(messages, tools)
        return reading.counted_from(len(plain) - len(messages))

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """The text that the model continues: a new assistant turn, or the last one when that is the assistant's."""
        if not messages or messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls"):
            return self.render(messages, tools, open_turn=True)
        reading = self.read(messages, tools)
        return reading.text[: reading.end_of_content(len(messages) - 1)]

    def split(
        self, prompt: Messages, answers: Sequence[Messages], tools: Sequence[Any] | None = None, trim: bool = True
    ) -> Rendered:
        """The prompt's text and each answer's: prompt + answer is the rendering of the whole conversation.

        Where the template renders the prompt in another way once it is answered, the prompt is the text that the model
        is prompted with. `trim`: an answer ends at its stop token, without the blanks that the template puts after it.
        """
        opened = self.prompt(prompt, tools)
        whole = [_joined(prompt, answer) for answer in answers]
        readings = [self.read(messages, tools) for messages in whole]
        firsts = [len(messages) - len(answer) for messages, answer in zip(whole, answers, strict=True)]
        begins = [self._begin(*one, prompt, tools) for one in zip(readings, whole, firsts, strict=True)]
        cuts = [cut for cut, _ in begins]
        begun, rewritten = opened, any(reading.rewritten for reading in readings)
        if any(reading.text[:cut] != opened for reading, cut in zip(readings, cuts, strict=True)):
            rewritten = True
            if not all(prompted for _, prompted in begins):
                cuts = [min(cuts)] * len(cuts)
                begun = readings[0].text[: cuts[0]]
                self._check_shared(begun, readings)
        texts, spans = [], []
        for reading, messages, first, cut in zip(readings, whole, firsts, cuts, strict=True):
            text = reading.text[cut:]
            texts.append(self._reader.without_tail(text) if trim else text)
            said = reading.spans(i for i in range(first, len(messages)) if is_learned(messages[i]))
            spans.append([(max(start - cut, 0), min(end - cut, len(texts[-1]))) for start, end in said])
        return Rendered(begun, texts, spans, readings, rewritten)

    def _begin(
        self, reading: Reading, messages: Messages, first: int, prompt: Messages, tools: Sequence[Any] | None
    ) -> tuple[int, bool]:
        """Where the answer begins whose first message is `first`, and whether the model was prompted for it so."""
        if first < len(prompt):  # it continues the prompt's last message
            return reading.end_of_content(first, len(prompt[-1]["content"])), True
        if first == len(messages):
            raise ValueError("the answer has no message")
        if messages[first]["role"] == "assistant":
            turn = reading.turn(first)
            return turn.start, turn.prompted
        return common_prefix(self.render(prompt, tools), reading.text), False

    @staticmethod
    def _check_shared(prompt: str, readings: Sequence[Reading]) -> None:
        for text in (reading.text for reading in readings):
            shared = common_prefix(prompt, text)
            if shared < len(prompt):
                raise ValueError(
                    "the chat template renders the prompt in another way under each answer (from character "
                    f"{shared}: {prompt[shared : shared + 30]!r} and {text[shared : shared + 30]!r})"
                )

    def conversation(self, messages: Messages, tools: Sequence[Any] | None = None, first: int = 0) -> Conversation:
        """The text, and the spans of the assistant's turns from message `first` on.

        By the template's own `{% generation %}` marks where it has them, otherwise as `read` finds them. Messages with
        `weight: 0` are not among them.
        """
        learned = [i for i, m in enumerate(messages) if is_learned(m) and i >= first and m.get("role") == "assistant"]
        if not re.search(r"\{%-?\s*generation\s*-?%\}", self._source):
            reading = self.read(messages, tools)
            return Conversation(reading.text, reading.spans(learned), reading)
        every = len(learned) == sum(m.get("role") == "assistant" for m in messages)
        reading = self.read(messages, tools, strict=not every)
        marked = self._generation_marks(messages, tools)
        wanted = reading.spans(learned)
        spans = marked if every else [(a, b) for a, b in marked if any(start <= a < end for start, end in wanted)]
        return Conversation(reading.text, spans, reading)

    def _generation_marks(self, messages: Messages, tools: Sequence[Any] | None) -> list[Span]:
        """The spans inside the template's `{% generation %}` marks."""
        plain, known = self._ready(messages, tools)
        rendered: Any = render_jinja_template(  # annotated as text, gives texts and spans
            conversations=[plain],
            tools=known,
            chat_template=self.tokenizer.get_chat_template(None, known),
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.kwargs},
        )
        return [(int(start), int(end)) for start, end in rendered[1][0]]


def _joined(prompt: Messages, answer: Messages) -> Messages:
    """Prompt and answer as one conversation; an answer that continues the assistant's last message is joined to it."""
    if not (prompt and answer and prompt[-1]["role"] == "assistant" == answer[0].get("role")):
        return [*prompt, *answer]
    begun, rest = prompt[-1].get("content"), answer[0].get("content")
    if not (isinstance(begun, str) and isinstance(rest, str)):
        return [*prompt, *answer]
    return [*prompt[:-1], {**answer[0], "content": begun + rest}, *answer[1:]]


__all__ = [
    "ChatTemplate",
    "Conversation",
    "Message",
    "Messages",
    "Rendered",
    "read_tools",
    "spell_tools",
    "without_nones",
]
