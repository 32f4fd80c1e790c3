"""How a chat template writes tool calls, learned from short conversations with calls that it renders."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from trl.data.chat import ChatTemplate
from trl.data.encode import common_prefix
from trl.data.messages import Messages
from trl.data.rendering import THOUGHT_FIELDS, shared_start
from trl.environment.call_formats import (
    THOUGHTS,
    CallReader,
    ChannelReader,
    FieldsForm,
    Frame,
    JsonForm,
    NamedForm,
    Schemas,
    SyntaxForm,
    ToolCall,
    call_id,
)

_NAME, _KEY, _VALUE = "zqname", "zqkey", "zqvalue"
_ONE = [ToolCall(_NAME, {_KEY: _VALUE})]
_TWO_ARGUMENTS = [ToolCall(_NAME, {_KEY: _VALUE, "zqother": "zqmore"})]
_TWO_CALLS = [*_ONE, ToolCall("zqnext", {"zqlast": "zqend"})]
_VALUES = [ToolCall(_NAME, {"zqcount": 7, "zqflag": True, "zqlist": [1, {"zqin": "zqtext"}]})]
_EMPTY = [ToolCall(_NAME)]
_STRINGS = {name: {"type": "string"} for name in (_KEY, "zqother", "zqlast")}
_PROBED: Schemas = {_NAME: {**_STRINGS, "zqcount": {}, "zqflag": {}, "zqlist": {}}, "zqnext": _STRINGS}
_ID = re.compile(r"call\d{5}")
_TOKEN = re.compile(r"<[^<>\n]*>|\[/?[A-Z_]+\]|```\w*|\s+|\w+|.")
_STRONG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]|```\w+|<[\w:]+[ =][^<>\s]*$|<[\w:]+ \w+=\"$")
"""what marks a call: it is not written by chance"""
_OF_TOKENS = (
    ("<|tool_call_start|>", SyntaxForm(Frame("<|tool_call_start|>", "[", "(", again=",", end="]<|tool_call_end|>"))),
    ("<|tool_call|>", JsonForm("<|tool_call|>", "<|/tool_call|>")),
)
"""LFM2, Phi-4 mini: their templates do not print calls, but they have tokens for them"""


def learned_reader(template: ChatTemplate, ends: Sequence[str], schemas: Sequence[Mapping[str, Any]]) -> CallReader:
    """What reads the calls of these tools as the template writes them; ValueError where they cannot be read back.

    ends: the texts of the tokens that end a turn.
    """
    probes = _Probes(template, tuple(ends), list(schemas))
    if template.needs_spelling(probes.conversation(_ONE), None):
        vocabulary = template.tokenizer.get_vocab()
        own: Any = next((form for token, form in _OF_TOKENS if token in vocabulary), None)
        if own is not None:
            return CallReader(_with_tools(own, _arguments_of(schemas)))
    text = probes.turn(_ONE)
    if text and "to=functions." + _NAME in text and "<|message|>" in text:
        return ChannelReader()
    for learn in (_json_form, _named_form, _fields_form, _syntax_form):
        form = learn(probes) if text else None
        if form is not None and probes.reads_back(form):
            return CallReader(_with_tools(form, _arguments_of(schemas)), probes.thoughts)
    shown = "does not print them in the assistant's turn" if not text else f"it prints {text[:80]!r}"
    raise ValueError(
        f"tools: the chat template writes calls in a way that cannot be read back ({shown}); give a "
        "`ChatEnvironment(tools, parser=...)` with a function that finds them in a turn"
    )


def _arguments_of(schemas: Sequence[Mapping[str, Any]]) -> Schemas:
    functions = [schema.get("function", schema) for schema in schemas]
    return {each["name"]: (each.get("parameters") or {}).get("properties") or {} for each in functions}


def _with_tools(form: Any, tools: Schemas) -> Any:
    return replace(form, tools=tools) if isinstance(form, NamedForm) else form


@dataclass
class _Probes:
    """Turns with calls, as the template renders them."""

    template: ChatTemplate
    ends: tuple[str, ...]
    schemas: list[Any]
    _turns: dict[str, str | None] = field(default_factory=dict)

    @staticmethod
    def conversation(calls: Sequence[ToolCall], **more: Any) -> Messages:
        said = {"tool_calls": [call.message(place) for place, call in enumerate(calls)]} if calls else {}
        return [{"role": "user", "content": "zqask"}, {"role": "assistant", "content": "", **said, **more}]

    def turn(self, calls: Sequence[ToolCall], **more: Any) -> str | None:
        """The turn of the assistant without its end and reasoning; None where the template does not print all of it."""
        key = repr((calls, more))
        if key not in self._turns:
            self._turns[key] = self._rendered(calls, more)
        return self._turns[key]

    def _rendered(self, calls: Sequence[ToolCall], more: Mapping[str, Any]) -> str | None:
        conversation = self.conversation(calls, **more)
        try:
            text = self.template.render(conversation, self.schemas)
            opened = self.template.render(conversation[:1], self.schemas, open_turn=True)
        except ValueError:
            return None
        text = _ID.sub(call_id(0), text[shared_start(opened, text) :])
        said = [call.name for call in calls] + [str(value) for value in more.values() if value]
        if not all(word in text for word in said):
            return None
        if any(end in text[: text.index(said[0])] for end in self.ends):
            return None  # sampling would stop before the call
        last = max(text.rfind(word) for word in [*said, *(key for call in calls for key in call.arguments)])
        cuts = [at for end in self.ends if (at := text.find(end, last)) >= 0]
        text = text[: min(cuts, default=len(text))]
        head = re.match("|".join(rf"\s*{re.escape(a)}\s*{re.escape(b)}" for a, b in THOUGHTS), text)
        return text[head.end() if head else 0 :].strip() if calls else text

    def reads_back(self, form: Any) -> bool:
        """Whether what the template prints of the probes is read as it was."""
        reader = CallReader(_with_tools(form, _PROBED))
        for calls in (_ONE, _TWO_ARGUMENTS, _VALUES, _EMPTY, _TWO_CALLS):
            text = self.turn(calls)
            if text is not None and reader(text).calls != calls:
                return False
        return True

    @cached_property
    def thoughts(self) -> tuple[tuple[str, str], ...]:
        """The tags around reasoning: those of known models, and those of the template."""
        found = []
        for name in THOUGHT_FIELDS:
            text = self.turn([], **{name: "zqthought", "content": "zqanswer"})
            if text is not None:
                before, _, after = text.partition("zqthought")
                opens, closes = before.strip(), _STRONG.search(after)
                if opens and closes:
                    found.append((opens, closes[0]))
        return tuple(dict([*THOUGHTS, *found]).items())


# --- JSON ------------------------------------------------------------------------------------------------------------


def _json_form(probes: _Probes) -> JsonForm | None:
    """The form where name and arguments stand in a JSON value."""
    text = probes.turn(_ONE) or ""
    for start in (at for at in range(text.index(_NAME)) if text[at] in "{["):
        try:
            value, end = json.JSONDecoder(strict=False).raw_decode(text, start)
        except ValueError:
            continue
        keys = _keys_of(value)
        if keys is not None:
            return JsonForm(text[:start], text[end:], *keys)
    return None


def _keys_of(value: Any) -> tuple[str, str] | None:
    """The keys under which the probe's name and arguments stand."""
    if isinstance(value, list):
        return _keys_of(value[0]) if len(value) == 1 else None
    if not isinstance(value, dict):
        return None
    name = next((key for key, held in value.items() if held == _NAME), None)
    arguments = next((key for key, held in value.items() if held == {_KEY: _VALUE} or _is_text_of(held)), None)
    return (name, arguments) if name and arguments else _keys_of(value.get("function"))


def _is_text_of(held: Any) -> bool:
    try:
        return isinstance(held, str) and json.loads(held) == {_KEY: _VALUE}
    except ValueError:
        return False


# --- a name, then arguments ------------------------------------------------------------------------------------------


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text)


def _common_suffix(first: Sequence[str], second: Sequence[str]) -> int:
    return common_prefix(first[::-1], second[::-1])


def _cut(tokens: Sequence[str], word: str) -> tuple[list[str], list[str]]:
    """The tokens before and after the word, which may stand inside one of them."""
    at = next(i for i, token in enumerate(tokens) if word in token)
    before, _, after = tokens[at].partition(word)
    return [*tokens[:at], *filter(None, [before])], [*filter(None, [after]), *tokens[at + 1 :]]


def _frame(lead: Sequence[str], after_name: str, closing: Sequence[str], between: Sequence[str] | None) -> Frame:
    """lead: tokens before the name; closing: those after the arguments; between: those between two calls."""
    text = "".join(lead)
    strong = _STRONG.search(text)
    opening = text[: strong.end()] if strong else ""
    frame = Frame(opening, text[len(opening) :], after_name, "".join(closing))
    if between is None:
        return frame
    closes = common_prefix(closing, between)
    following = between[closes:]
    if _common_suffix(lead, following) == len(lead) and lead:
        return frame  # each call has its own opening
    return replace(frame, closing="".join(closing[:closes]), again="".join(following), end="".join(closing[closes:]))


def _named_form(probes: _Probes) -> NamedForm | None:
    """The form where a name is followed by a JSON object of its arguments."""
    lead, rest = _cut(_tokens(probes.turn(_ONE) or ""), _NAME)
    after = "".join(rest)
    start = after.find("{")
    end = _object_end(after, start)
    if end is None:
        return None
    two, between = probes.turn(_TWO_CALLS), None
    if two is not None:
        _, rest = _cut(_tokens(two), _NAME)
        second = "".join(rest)
        stop = _object_end(second, second.find("{"))
        between = None if stop is None else _cut(_tokens(second[stop:]), "zqnext")[0]
    frame = _frame(lead, after[:start], _tokens(after[end:]), between)
    return NamedForm(frame)


def _object_end(text: str, start: int) -> int | None:
    """Where the JSON object with the probe's argument ends that starts there."""
    try:
        value, end = json.JSONDecoder(strict=False).raw_decode(text, max(start, 0))
    except ValueError:
        return None
    return int(end) if value == {_KEY: _VALUE} else None


@dataclass(frozen=True)
class _Pieces:
    """What stands around the name, the key and the value of a call, in tokens."""

    lead: list[str]
    after_name: list[str]
    before_key: list[str]
    after_key: list[str]
    after_value: list[str]
    """whether or not another argument follows"""
    closing: list[str]
    between: list[str] | None
    """from the end of the last value to the name of the next call"""

    @property
    def quoted(self) -> list[str]:
        """The mark that stands on both sides of the value, if any."""
        both = self.after_key[-1:] == self.after_value[:1] and "".join(self.after_value[:1]).strip()
        return self.after_value[:1] if both else []


def _pieces(probes: _Probes) -> _Pieces | None:
    one, two, calls = probes.turn(_ONE), probes.turn(_TWO_ARGUMENTS), probes.turn(_TWO_CALLS)
    if one is None or two is None or not all(word in one for word in (_KEY, _VALUE)):
        return None
    lead, rest = _cut(_tokens(one), _NAME)
    to_key, rest = _cut(rest, _KEY)
    after_key, closing = _cut(rest, _VALUE)
    goes_on = _cut(_cut(_tokens(two), _VALUE)[1], "zqother")[0]
    closes = common_prefix(goes_on, closing)
    opens = _common_suffix(to_key, goes_on[closes:])
    cut = len(to_key) - opens
    between = None if calls is None else _cut(_cut(_tokens(calls), _VALUE)[1], "zqnext")[0][closes:]
    return _Pieces(lead, to_key[:cut], to_key[cut:], after_key, closing[:closes], closing[closes:], between)


def _fields_form(probes: _Probes) -> FieldsForm | None:
    """The form where each argument stands between pieces of its own."""
    pieces = _pieces(probes)
    if pieces is None:
        return None
    quotes = len(pieces.quoted)  # texts are JSON too, and a piece follows their quotes
    after_key, after_value = pieces.after_key[: len(pieces.after_key) - quotes], pieces.after_value[quotes:]
    if not "".join(after_value).strip() or pieces.quoted[:1] not in ([], ['"']):
        return None
    frame = _frame(pieces.lead, "".join(pieces.after_name), pieces.closing, pieces.between)
    if not frame.opening or not frame.closing.strip():
        return None
    before, after, closes = ("".join(of) for of in (pieces.before_key, after_key, after_value))
    return FieldsForm(frame, {}, before, after, closes, json_texts=bool(quotes))


def _syntax_form(probes: _Probes) -> SyntaxForm | None:
    """The form of a call in a programming language."""
    pieces = _pieces(probes)
    if pieces is None or not pieces.after_name:
        return None
    equals = pieces.after_key[: len(pieces.after_key) - len(pieces.quoted)]
    closes = {"(": ")", "{": "}", "[": "]"}.get("".join(pieces.after_name).strip()[-1:], "")
    if not closes or pieces.closing[:1] != [closes] or not equals:
        return None
    between = None
    if pieces.between is not None and pieces.between[:1] == [closes]:
        between = pieces.between[1:]
    frame = _frame(pieces.lead, "".join(pieces.after_name), pieces.closing[1:], between)
    if between is None and frame.closing.startswith("]"):  # the template writes one call, in a list
        frame = replace(frame, closing="", again=",", end=frame.closing)
    quote = "" if pieces.quoted[:1] in ([], ['"'], ["'"]) else pieces.quoted[0]
    return SyntaxForm(frame, {}, "".join(equals), closes, quote)
