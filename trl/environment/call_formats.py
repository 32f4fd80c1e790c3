"""How chat models write tool calls, and how those of a turn are found.

The way of a chat template is learned once, from short conversations that it renders (`learned_reader`): JSON with or
without tags around it, a name followed by JSON, a tag for each argument, the syntax of Python, or the channels of
gpt-oss. What a model writes is then read so. What stands in its reasoning is no call. Reading takes linear time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

from trl.data.any_text import encodable, encodable_values

LONGEST_CALL = 65_536
"""characters; a longer call is answered with an error"""
_TOO_LONG = f"the call is longer than {LONGEST_CALL} characters"
Schemas = Mapping[str, Mapping[str, Any]]
"""the JSON schema of each argument of each tool"""
THOUGHTS = (
    *((f"<{tag}>", f"</{tag}>") for tag in ("think", "thinking", "thought", "reasoning", "seed:think")),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel>thought", "<channel|>"),
    ("◁think▷", "◁/think▷"),
)
"""tags around the reasoning of known models"""


@dataclass(frozen=True)
class ToolCall:
    """A call as the model wrote it, or the `error` that made it unreadable."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", encodable(self.name))
        object.__setattr__(self, "error", encodable(self.error))
        try:
            object.__setattr__(self, "arguments", encodable_values(self.arguments))
        except ValueError as error:
            object.__setattr__(self, "arguments", {})
            object.__setattr__(self, "error", f"the arguments cannot be read: {error}")

    def message(self, number: int) -> dict[str, Any]:
        """The entry of a chat message's `tool_calls`."""
        return {"type": "function", "id": call_id(number), "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class Spoken:
    """A turn of the model: its text without the calls, and the calls."""

    content: str
    calls: list[ToolCall] = field(default_factory=list)


ToolParser = Callable[[str], Spoken]
"""reads the text of a turn without its end token"""


def call_id(number: int) -> str:
    """The id of a turn's n-th call: nine letters and digits, because some chat templates accept nothing else."""
    return f"call{number:05d}"


class Found(NamedTuple):
    """Calls, and where what was read ends. No calls: there are none here after all."""

    calls: list[ToolCall]
    end: int


class Form(Protocol):
    """A way to write calls."""

    @property
    def opener(self) -> str:
        """A pattern without groups for what stands before a call."""
        ...

    @property
    def bare(self) -> bool:
        """Whether nothing marks a call, so that it must begin a line."""
        ...

    def read(self, text: str, at: int, first: bool) -> Found:
        """The calls whose opener ends at `at`. `first`: nothing was said before."""
        ...


class CallReader:
    """Finds the calls of a turn that stand outside of the model's reasoning."""

    def __init__(self, form: Form, thoughts: Sequence[tuple[str, str]] = THOUGHTS) -> None:
        self.form, self.thoughts = form, dict(thoughts)
        closings = sorted(set(self.thoughts.values()), key=len, reverse=True)
        opener = form.opener
        if form.bare:
            ends = "|".join(f"(?<={re.escape(closing)})" for closing in closings)
            opener = rf"(?:^|{ends})[ \t]*(?:<\|python_tag\|>\s*)?{opener}"
        openings = sorted(self.thoughts, key=len, reverse=True)
        tags = [f"(?P<{kind}>{'|'.join(map(re.escape, of))})" for kind, of in (("open", openings), ("close", closings))]
        self._next = re.compile("|".join([*tags, f"(?P<call>{opener})"]), re.MULTILINE)

    def __call__(self, text: str) -> Spoken:
        """The turn without its end token, read."""
        return self.read(text)

    def read(self, text: str, before: str = "") -> Spoken:
        """As a call of this object. before: what the turn follows, of which the end may open the reasoning."""
        reads: list[tuple[int, Found]] = []
        sure = 0  # so many of them no closing tag can turn into reasoning any more
        at = self._opened(text, before)
        blank = _blanks_end(text, at or 0)
        while at is not None and (found := self._next.search(text, at)) is not None:
            if found.lastgroup == "call":
                read = self.form.read(text, found.end(), found.start() <= blank)
                at = max(read.end, found.end(), found.start() + 1)
                if read.calls:
                    reads.append((found.start(), read))
                    blank = _blanks_end(text, at)
                continue
            if found.lastgroup == "close":  # all that stands before was reasoning
                del reads[sure:]
                at = found.end()
            else:
                at = _after(text, self.thoughts[found[0]], found.end())
            sure, blank = len(reads), _blanks_end(text, at or 0)
        return _spoken(text, reads)

    def _opened(self, text: str, before: str) -> int | None:
        """Where the turn's first word outside of the reasoning stands, by what was opened before; None: nowhere."""
        said = before[-200:].rstrip()
        closing = next((closing for opening, closing in self.thoughts.items() if said.endswith(opening)), None)
        return 0 if closing is None else _after(text, closing, 0)


def _after(text: str, piece: str, at: int) -> int | None:
    found = text.find(piece, at)
    return None if found < 0 else found + len(piece)


_BLANKS = re.compile(r"[\s;,]*")


def _blanks_end(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    return at if found is None else found.end()


def _spoken(text: str, reads: Sequence[tuple[int, Found]]) -> Spoken:
    """The turn without what was read from each of these places on."""
    if not reads:
        return Spoken(text)
    kept, at = [], 0
    for start, read in reads:
        kept.append(text[at:start])
        at = max(at, read.end)
    return Spoken("".join([*kept, text[at:]]).strip(), [call for _, read in reads for call in read.calls])


# --- what forms share ------------------------------------------------------------------------------------------------

_JSON = json.JSONDecoder(strict=False)  # lines may break inside a text
_NAME = r"""[^\s<>{}\[\]()"'=,:`]{1,256}"""
_TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
_ID = re.compile(r"call\d{5}")


def loose(literal: str) -> str:
    """A pattern for a piece of a template: any blanks stand for its blanks, any id for the id of a call."""
    pattern = r"\s*".join(re.escape(piece) for piece in literal.split())
    return _ID.sub(r"[^\\s\"<>\\[\\]]{0,64}", pattern)


def unreadable(text: str, at: int, closing: str, why: str | Callable[[str], str], name: str = "unknown") -> Found:
    """The call from `at` to its closing, which cannot be read. why: may be made of the call's text."""
    closed = re.compile(loose(closing)).search(text, at) if closing.strip() else None
    call = text[at : closed.start() if closed else len(text)]
    if closing.strip() and closed is None:
        error = f"the call is not closed by {closing.strip()}"
    else:
        error = why if isinstance(why, str) else why(call)
    if len(call) > LONGEST_CALL:
        error = _TOO_LONG
    return Found([ToolCall(name, error=error)], closed.end() if closed else len(text))


def _no_json(text: str) -> str:
    try:
        json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        return f"the call is no JSON: {error}"
    return "the call cannot be read"


def arguments_call(name: str, arguments: Any) -> ToolCall:
    """A call with what the model gave as arguments: an object, its JSON text, or nothing."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, strict=False) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            return ToolCall(name, error=f"the arguments are no JSON: {error}")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return ToolCall(name, error='"arguments" is a JSON object of the arguments by name')
    return ToolCall(name, arguments)


# --- JSON that holds name and arguments ------------------------------------------------------------------------------


@dataclass(frozen=True)
class JsonForm:
    """An object with name and arguments, or a list of such, between tags or alone."""

    opening: str = ""
    closing: str = ""
    name: str = "name"
    arguments: str = "arguments"

    @property
    def bare(self) -> bool:
        return not self.opening.strip()

    @property
    def opener(self) -> str:
        if not self.bare:
            return loose(self.opening)
        keys = "|".join(map(re.escape, {self.name, self.arguments, "name", "type", "id", "function", "parameters"}))
        return rf"""(?=(?:\[\s*)?\{{\s*"(?:{keys})"\s*:)"""

    def read(self, text: str, at: int, first: bool) -> Found:
        begin, start = at, _blanks_end(text, at)
        calls: list[ToolCall] = []
        while text[start : start + 1] in ("{", "[") or not calls:
            try:
                value, end = _JSON.raw_decode(text, start)
            except (ValueError, RecursionError) as error:
                if self.bare and (calls or not first):
                    return Found(calls, begin if calls else max(getattr(error, "pos", len(text)), start + 1))
                return self._broken(text, begin)
            if self.bare and not self._is_call(value):
                return Found(calls, begin if calls else end)
            if end - start > LONGEST_CALL:
                return self._broken(text, begin)
            calls += [self._call(each) for each in (value if isinstance(value, list) and value else [value])]
            begin, start = (end if self.bare else begin), _blanks_end(text, end)
        closed = self._closed.match(text, end)
        return self._broken(text, begin) if closed is None else Found(calls, closed.end())

    @cached_property
    def _closed(self) -> re.Pattern[str]:
        return re.compile(r"\s*" + loose(self.closing) if self.closing.strip() else "")

    def _broken(self, text: str, at: int) -> Found:
        return unreadable(text, at, self.closing, _no_json)

    def _is_call(self, value: Any) -> bool:
        each = value if isinstance(value, list) else [value]
        return bool(each) and all(
            isinstance(call, dict)
            and isinstance(self._inner(call).get(self.name, self._inner(call).get("name")), str)
            and not {self.arguments, "arguments", "parameters"}.isdisjoint(self._inner(call))
            for call in each
        )

    @staticmethod
    def _inner(call: dict[str, Any]) -> dict[str, Any]:
        inner = call.get("function")
        return inner if isinstance(inner, dict) else call

    def _call(self, value: Any) -> ToolCall:
        call = self._inner(value) if isinstance(value, dict) else {}
        name = call.get(self.name, call.get("name"))
        if not isinstance(name, str):
            return ToolCall("unknown", error=f'a call is a JSON object with "{self.name}" and "{self.arguments}"')
        keys = (self.arguments, "arguments", "parameters")
        return arguments_call(name, next((call[key] for key in keys if key in call), None))


class JsonCalls(CallReader):
    """Reads calls such as `<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>`, or between other tags."""

    def __init__(self, opening: str = "<tool_call>", closing: str = "</tool_call>") -> None:
        if not opening.strip() or not closing.strip():
            raise ValueError("opening, closing: give the tags that stand around a call")
        self.opening, self.closing = opening, closing
        super().__init__(JsonForm(opening, closing))


# --- a name, then its arguments --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """The pieces of a template around a call that begins with its name."""

    opening: str
    """what marks a call, or a group of them"""
    rest: str = ""
    """what stands between that and the name"""
    after_name: str = ""
    closing: str = ""
    again: str = ""
    """what stands between a call of a group and the name of the next; "": each call has its opening"""
    end: str = ""
    """what closes a group"""


@dataclass(frozen=True)
class NamedForm:
    """`f`, then what `arguments` reads: with pieces around that say where a call begins and ends."""

    frame: Frame
    tools: Schemas = field(default_factory=dict)
    begins: ClassVar[str] = r"\s*\{"
    """how arguments begin"""

    @property
    def bare(self) -> bool:
        return not self.frame.opening.strip()

    @property
    def opener(self) -> str:
        if not self.bare:
            return loose(self.frame.opening)
        rest = rf"{loose(self.frame.rest)}\s*" if self.frame.rest.strip() else ""
        return rf"(?={rest}{_NAME}\s*{loose(self.frame.after_name)}{self.begins})"

    def read(self, text: str, at: int, first: bool) -> Found:
        calls: list[ToolCall] = []
        head = self._heads[0].match(text, at)
        while True:
            if head is None:
                read = self._bad(text, at, "the call does not begin with the name of a tool")
            else:
                read = self._checked(text, head)
            if self.bare and not calls and (head is None or not self._is_meant(head[1], read, first)):
                return Found([], at if head is None else head.end())
            calls += read.calls
            at = read.end
            if not self.frame.again.strip() or (head := self._heads[1].match(text, at)) is None:
                break
        closed = self._end.match(text, at)
        return Found(calls, at if closed is None else closed.end())

    def _is_meant(self, name: str, read: Found, first: bool) -> bool:
        """Whether what looks like a call is one, though nothing marks it."""
        known = name in self.tools or bool(self.frame.rest.strip())
        return known and (first or not read.calls[0].error)

    @cached_property
    def _heads(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """What begins the first call of a group, and the next ones."""
        name = rf"\s*({_NAME})" + (rf"\s*{loose(self.frame.after_name)}" if self.frame.after_name.strip() else "")
        first, again = (rf"\s*{loose(piece)}" if piece.strip() else "" for piece in (self.frame.rest, self.frame.again))
        return re.compile(first + name), re.compile(again + name)

    @cached_property
    def _end(self) -> re.Pattern[str]:
        return re.compile(rf"\s*{loose(self.frame.end)}" if self.frame.end.strip() else "")

    @cached_property
    def _closed(self) -> re.Pattern[str]:
        return re.compile(rf"\s*{loose(self.frame.closing)}" if self.frame.closing.strip() else "")

    def _bad(self, text: str, at: int, why: str | Callable[[str], str], name: str = "unknown") -> Found:
        if self.frame.closing.strip() or self.bare:
            tags = _TAG.findall(self.frame.closing)
            return unreadable(text, at, tags[-1] if tags else self.frame.closing, why, name)
        following = re.compile(self.opener).search(text, at)  # nothing closes a call: up to the next
        end = len(text) if following is None else following.start()
        return Found(unreadable(text[at:end], 0, "", why, name).calls, end)

    def _checked(self, text: str, head: re.Match[str]) -> Found:
        """The call that begins so, if its arguments and its closing follow."""
        try:
            arguments, end = self.arguments(text, head.end(), head[1])
        except (ValueError, RecursionError) as error:
            return self._bad(text, head.end(), f"the arguments cannot be read: {error}", head[1])
        closed = self._closed.match(text, end)
        if closed is None or end - head.start() > LONGEST_CALL:
            return self._bad(text, head.end(), "the call goes on behind its arguments", head[1])
        return Found([arguments_call(head[1], arguments)], closed.end())

    def arguments(self, text: str, at: int, name: str) -> tuple[Any, int]:
        """The arguments of a call of that tool, and where they end; ValueError."""
        start = _blanks_end(text, at)
        if text[start : start + 1] not in ("{", '"'):
            if text[start : start + 1] and not self._closed.match(text, at):
                raise ValueError("they are no JSON object")
            return {}, at
        return _JSON.raw_decode(text, start)


@dataclass(frozen=True)
class FieldsForm(NamedForm):
    """A tag for each argument: `<parameter=a>1</parameter>`. A text stands as it is, other values as JSON."""

    before_key: str = ""
    after_key: str = ""
    after_value: str = ""
    json_texts: bool = False
    """texts are written as JSON too"""

    @cached_property
    def _field(self) -> re.Pattern[str]:
        blank = r"\n?" if self.after_key.endswith("\n") else ""
        return re.compile(rf"\s*{loose(self.before_key)}\s*({_NAME})\s*{loose(self.after_key)}{blank}")

    @cached_property
    def _value_end(self) -> re.Pattern[str]:
        """What closes a value, or begins another call: values are not searched beyond that."""
        blank = r"\n?" if self.after_value.startswith("\n") else ""
        goes_on = rf"(?=\s*(?:{loose(self.before_key)}|{loose(self.frame.closing)}))"
        return re.compile(rf"(?P<closed>{blank}{loose(self.after_value)}{goes_on})|{self.opener}")

    def arguments(self, text: str, at: int, name: str) -> tuple[Any, int]:
        arguments: dict[str, Any] = {}
        while (key := self._field.match(text, at)) is not None:
            end = self._value_end.search(text, key.end())
            if end is None or end["closed"] is None:
                raise ValueError(f"{key[1]} is not closed by {self.after_value.strip()}")
            schema = {} if self.json_texts else self.tools.get(name, {}).get(key[1], {})
            arguments[key[1]] = typed(text[key.end() : end.start()], schema)
            at = end.end()
        return arguments, at


@dataclass(frozen=True)
class SyntaxForm(NamedForm):
    """The syntax of Python, `f(a=1, b="two")`, or one like it."""

    equals: str = "="
    closes: str = ")"
    quote: str = ""
    """a mark of the template around texts; "": they have quotes"""
    begins: ClassVar[str] = ""

    def arguments(self, text: str, at: int, name: str) -> tuple[Any, int]:
        arguments: dict[str, Any] = {}
        values, order = Values(self.quote), list(self.tools.get(name, {}))
        at = _spaces_end(text, at)
        while not text.startswith(self.closes, at):
            key = self._key.match(text, at)
            if key is None and len(arguments) >= len(order):
                raise ValueError(f"an argument has no name: {text[at : at + 20]!r}")
            if key is None:
                arguments[order[len(arguments)]], at = values.read(text, at)
            else:
                arguments[key[1]], at = values.read(text, key.end())
            at = _comma_end(text, at, self.closes)
        return arguments, at + len(self.closes)

    @cached_property
    def _key(self) -> re.Pattern[str]:
        return re.compile(rf"""["']?({_NAME})["']?\s*{loose(self.equals)}\s*""")


def _spaces_end(text: str, at: int) -> int:
    found = _SPACES.match(text, at)
    return at if found is None else found.end()


def _comma_end(text: str, at: int, closes: str) -> int:
    """Where the next entry of a list begins, or the bracket that closes it stands; ValueError where neither follows."""
    at = _spaces_end(text, at)
    if text.startswith(",", at):
        return _spaces_end(text, at + 1)
    if not text.startswith(closes, at):
        raise ValueError(f"{closes} is missing before {text[at : at + 20]!r}")
    return at


_SPACES = re.compile(r"\s*")
_QUOTED = {
    mark: re.compile(rf"{mark}([^{mark[0]}\\]*(?:(?:\\.|{more})[^{mark[0]}\\]*)*){mark}", re.DOTALL)
    for mark, more in (('"""', '"(?!"")'), ("'''", "'(?!'')"), ('"', r"(?!)"), ("'", r"(?!)"))
}
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": "", **{mark: mark for mark in "\\\"'/"}}
_WORD = re.compile(r"""[^\s,()\[\]{}"'=:][^,()\[\]{}"'=\n]*""")
_WORDS = {"true": True, "false": False, "null": None, "none": None}
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


@dataclass(frozen=True)
class Values:
    """Reads values of JSON, of Python, and of syntaxes with another `quote`; a word without quotes is a text."""

    quote: str = ""

    def read(self, text: str, at: int, depth: int = 100) -> tuple[Any, int]:
        """The value at that place, and where it ends; ValueError."""
        if depth == 0:
            raise ValueError("it is nested too deeply")
        if self.quote and text.startswith(self.quote, at):
            start = at + len(self.quote)
            end = _after(text, self.quote, start)
            if end is None:
                raise ValueError(f"a text is not closed by {self.quote}")
            return text[start : end - len(self.quote)], end
        mark = next((mark for mark in _QUOTED if text.startswith(mark, at)), None)
        if mark is not None:
            return self._quoted(text, at, mark)
        if text[at : at + 1] in ("[", "("):
            return self._list(text, at, depth)
        if text.startswith("{", at):
            return self._dict(text, at, depth)
        return self._word(text, at)

    @staticmethod
    def _quoted(text: str, at: int, mark: str) -> tuple[str, int]:
        found = _QUOTED[mark].match(text, at)
        if found is None:
            raise ValueError(f"a text is not closed by {mark}")

        def plain(escape: re.Match[str]) -> str:
            number = escape[1] or escape[2]
            return chr(int(number, 16)) if number else _ESCAPED.get(escape[3], escape[0])

        said = _ESCAPE.sub(plain, found[1])
        return said.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass"), found.end()

    def _list(self, text: str, at: int, depth: int) -> tuple[list[Any], int]:
        closes, values = {"[": "]", "(": ")"}[text[at]], []
        at = _spaces_end(text, at + 1)
        while not text.startswith(closes, at):
            value, at = self.read(text, at, depth - 1)
            values.append(value)
            at = _comma_end(text, at, closes)
        return values, at + 1

    def _dict(self, text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
        values: dict[str, Any] = {}
        at = _spaces_end(text, at + 1)
        while not text.startswith("}", at):
            bare = re.compile(_NAME).match(text, at)
            key, at = (bare[0], bare.end()) if bare else self.read(text, at, depth - 1)
            at = _spaces_end(text, at)
            if not text.startswith(":", at):
                raise ValueError(f": is missing before {text[at : at + 20]!r}")
            values[str(key)], at = self.read(text, _spaces_end(text, at + 1), depth - 1)
            at = _comma_end(text, at, "}")
        return values, at + 1

    @staticmethod
    def _word(text: str, at: int) -> tuple[Any, int]:
        found = _WORD.match(text, at)
        if found is None:
            raise ValueError(f"no value begins with {text[at : at + 20]!r}")
        word = found[0].rstrip()
        if word.lower() in _WORDS:
            return _WORDS[word.lower()], found.end()
        if _NUMBER.fullmatch(word) is None:
            return word, found.end()
        return (float(word) if set(word) & set(".eE") else int(word)), found.end()


def typed(text: str, schema: Any) -> Any:
    """The value that stands there as text, by the schema of its argument."""
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    kinds = {kinds} if isinstance(kinds, str) else set(kinds or ())
    if kinds == {"string"} and not (schema.get("nullable") and text.strip() in ("null", "None")):
        return text
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        pass
    try:
        value, end = Values().read(text, _blanks_end(text, 0))
    except (ValueError, RecursionError):
        return text
    return value if not text[end:].strip() and not isinstance(value, str) else text


# --- the channels of gpt-oss -----------------------------------------------------------------------------------------


class ChannelReader(CallReader):
    """Messages to `functions.NAME` on any channel but that of the reasoning, `analysis`."""

    def __init__(self) -> None:
        super().__init__(JsonForm("<|message|>", "<|call|>"))

    def read(self, text: str, before: str = "") -> Spoken:
        opened = before.rfind("<|start|>", max(0, len(before) - 200))
        lead = before[opened:] if opened >= 0 else ""
        whole, reads, at = lead + text, [], 0
        while at < len(whole):
            ends = _ENDS.search(whole, at)
            end, goes_on = (ends.start(), ends.end()) if ends else (len(whole), len(whole))
            header, opens, body = whole[at:end].partition("<|message|>")
            to, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
            if opens and to and not (channel and channel[1] == "analysis"):
                reads.append((max(at - len(lead), 0), Found([self._call(to[1], body)], goes_on - len(lead))))
            at = goes_on
        return _spoken(text, reads)

    @staticmethod
    def _call(name: str, body: str) -> ToolCall:
        return ToolCall(name, error=_TOO_LONG) if len(body) > LONGEST_CALL else arguments_call(name, body)


_ENDS = re.compile(r"<\|(?:start|end|call|return)\|>")
_RECIPIENT = re.compile(r"\bto=functions\.([^\s<>]{1,256})")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
