"""Which characters of a rendered conversation are whose, and which the assistant says: found in one rendering.

The text is what the template makes of the messages as they are. Where each content stands in it is known from a second
rendering with private-use marks around the contents. What the template prints between the contents is kept for every
shape of conversation, so that later rows of that shape need no marks: their contents and the kept pieces must make up
the text to the letter. What surrounds an assistant's turn (the generation prompt, the stop token, the next role) is
learned once per template from short conversations. No row is rendered in part.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from trl.data.encode import Span, common_prefix
from trl.data.messages import PROBE_ID, PROBE_TOOL, PROBE_TOOLS, Message, Messages, Render, is_picture

KEYS = "keys of tool_calls"
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking", "thoughts")
TEXT_FIELDS = (*THOUGHT_FIELDS, "refusal", "content")
"""fields of a message that hold what is said"""
_THOUGHTS = re.compile(r"(</?think(?:ing)?>|</?thought>|</?reasoning>|\[/?THINK\]|</?seed:think>)")
"""tags at which templates cut a content"""
_FIRST_MARK = 0x100000
_MARKS = re.compile("[\U00100000-\U0010fffd]")
_MOST_PARTS = (0x10FFFD - _FIRST_MARK) // 2
_OPENING_TAG = re.compile(r"<[^<>\s]+>\s*")
_CLOSING_TAG = re.compile(r"</[^<>\s]+>")
_TOKENISH = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
"""what looks like a special token: a boundary does not fall inside it"""
_SHAPES = 256
"""shapes of conversations whose pieces are kept"""


class Part(NamedTuple):
    """A text of a message: a whole field, or what stands between the thinking tags of a content."""

    message: int
    field: str
    text: str
    offset: int = 0
    """where it begins in its field"""


class Place(NamedTuple):
    """Where a part stands in the rendering."""

    start: int
    end: int
    part: int
    lead: int = 0
    """characters at the part's start that the template does not print"""


class Turn(NamedTuple):
    """What the assistant says in one message, its stop token included."""

    message: int
    start: int
    end: int
    prompted: bool
    """what stands before it is what the template prints to prompt for a turn"""


@dataclass
class Reading:
    """A rendered conversation and whose its characters are; messages are counted as the caller gave them."""

    text: str
    turns: list[Turn]
    places: list[Place] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    missing: set[tuple[int, str, str]] = field(default_factory=set)
    """message, role and field of what the template does not print; `thoughts`: those inside a content"""
    changed: Counter[tuple[int, str]] = field(default_factory=Counter)
    """what was decoded and joined before rendering, by message"""
    rewritten: bool = False
    """when the model answers, it sees earlier messages, or the opening of its turn, in another way than here"""
    spelled: bool = False
    """tools or calls were written out because the template does not know them"""

    @property
    def unprinted(self) -> Counter[tuple[str, str]]:
        """Messages with a field that the template does not print, by role and field."""
        return Counter((role, name) for _, role, name in self.missing)

    @property
    def met(self) -> Counter[str]:
        """What was decoded and joined before rendering."""
        met: Counter[str] = Counter()
        for (_, kind), count in self.changed.items():
            met[kind] += count
        return met

    def spans(self, messages: Iterable[int] | None = None) -> list[Span]:
        """The characters of the assistant's turns, or of those among the given messages."""
        wanted = None if messages is None else set(messages)
        return [(t.start, t.end) for t in self.turns if t.end > t.start and (wanted is None or t.message in wanted)]

    def counted_from(self, shift: int) -> Reading:
        """The reading, with messages counted from `shift` on: what was put before them is not the caller's."""
        if shift:
            self.turns = [turn._replace(message=turn.message - shift) for turn in self.turns]
            self.parts = [part._replace(message=part.message - shift) for part in self.parts]
            self.missing = {(at - shift, role, name) for at, role, name in self.missing if at >= shift}
        return self

    def turn(self, message: int) -> Turn:
        """The assistant's turn in that message."""
        for turn in self.turns:
            if turn.message == message:
                return turn
        raise ValueError(f"the chat template prints nothing of message {message}, so it is not known where it begins")

    def end_of_content(self, message: int, length: int | None = None) -> int:
        """Where the content of that message ends, or its first `length` characters."""
        mine = [
            p for p in self.places if self.parts[p.part].message == message and self.parts[p.part].field == "content"
        ]
        if not mine:
            return self.turn(message).start
        if length is None:
            return max(place.end for place in mine)
        for place in mine:
            part = self.parts[place.part]
            if length <= part.offset + len(part.text):
                return min(max(place.start + length - part.offset - place.lead, place.start), place.end)
        return mine[-1].end


# --- the texts of messages, with and without marks -------------------------------------------------------------------


def _visit(messages: Sequence[Message], visit: Callable[[int, str, str], str]) -> Messages:
    """The messages with every text that is said replaced by `visit(message index, field, text)`."""

    def of_value(index: int, value: Any) -> Any:
        if isinstance(value, str):
            return visit(index, "tool_calls", value)
        if isinstance(value, Mapping):
            keys = [visit(index, KEYS, key) if isinstance(key, str) else key for key in value]
            return {key: of_value(index, v) for key, v in zip(keys, value.values(), strict=True)}
        return [of_value(index, v) for v in value] if isinstance(value, list | tuple) else value

    def of_call(index: int, call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": of_call(index, call["function"])}
        said = {k: of_value(index, call[k]) for k in ("name", "arguments") if k in call}
        return {**call, **said}

    visited = []
    for index, message in enumerate(messages):
        new = dict(message)
        for name in TEXT_FIELDS:
            value = new.get(name)
            if isinstance(value, str):
                new[name] = visit(index, name, value)
            elif name == "content" and isinstance(value, list):
                new[name] = [
                    {**part, "text": visit(index, name, part["text"])}
                    if isinstance(part, Mapping) and isinstance(part.get("text"), str)
                    else part
                    for part in value
                ]
        if new.get("tool_calls"):
            new["tool_calls"] = [of_call(index, call) for call in new["tool_calls"]]
        visited.append(new)
    return visited


def _segments(name: str, text: str) -> list[tuple[bool, str]]:
    """The text cut at thinking tags; True for what is not a tag."""
    if name != "content" or ("<" not in text and "[" not in text):
        return [(True, text)]
    return [(not _THOUGHTS.fullmatch(piece), piece) for piece in _THOUGHTS.split(text)]


def parts_of(messages: Sequence[Message]) -> list[Part]:
    """The texts of the messages that can be looked for; of a message that says nothing, its empty content."""
    parts: list[Part] = []
    blank: dict[int, Part] = {}

    def visit(index: int, name: str, text: str) -> str:
        offset = 0
        for said, piece in _segments(name, text):
            if said and piece and not piece.isspace():
                parts.append(Part(index, name, piece, offset))
            elif said and name == "content":
                blank[index] = Part(index, name, piece, offset)  # the last one: templates drop thoughts
            offset += len(piece)
        return text

    _visit(messages, visit)
    heard = {part.message for part in parts}
    if blank.keys() - heard:
        parts += [part for index, part in blank.items() if index not in heard]
        parts.sort(key=lambda part: part.message)
    return parts


def _marked(messages: Sequence[Message], blanks: bool = True, keys: bool = True) -> Messages:
    """The messages with marks at the edges of each part, inside the blanks and tags that templates trim or look for.

    `blanks`: empty contents are marked too; `keys`: the keys of arguments are, by which a template may sort.
    """
    blank_at = {part.message: part.offset for part in parts_of(messages) if _is_blank(part.text)}
    count = 0

    def visit(index: int, name: str, text: str) -> str:
        nonlocal count
        if _MARKS.search(text):
            raise _Unmarkable
        out, offset = [], 0
        for said, piece in _segments(name, text):
            blank = _is_blank(piece)
            marked = said and (not blank or (name == "content" and blank_at.get(index) == offset))
            offset += len(piece)
            if not marked:
                out.append(piece)
                continue
            if count == _MOST_PARTS:
                raise _Unmarkable
            first, last = chr(_FIRST_MARK + 2 * count), chr(_FIRST_MARK + 2 * count + 1)
            count += 1
            if blank:
                del blank_at[index]  # one mark will do
                out.append(f"{piece}{first}{last}" if blanks else piece)
            elif name == KEYS and not keys:
                out.append(piece)
            else:
                start, end = _core(piece)
                out.append(f"{piece[:start]}{first}{piece[start:end]}{last}{piece[end:]}")
        return "".join(out)

    return _visit(messages, visit)


def _core(text: str) -> Span:
    """The text without blanks, opening tags and closing tags at its edges; never empty."""
    start, end = first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    while tag := _OPENING_TAG.match(text, start, end):
        start = tag.end()
    while text.endswith(">", start, end):
        at = text.rfind("</", start, end)
        if at < 0 or not _CLOSING_TAG.fullmatch(text, at, end):
            break
        end = start + len(text[start:at].rstrip())
    return (start, end) if start < end else (first, last)


class _Unmarkable(Exception):
    """The messages hold private-use characters of their own, or too many texts."""


def _unmarked(rendering: str, parts: Sequence[Part]) -> tuple[str, list[tuple[int | None, int | None, int]]]:
    """The rendering without marks, and (start, end, part) between its marks; None where one of the two was cut away."""
    plain: list[str] = []
    found: list[tuple[int | None, int | None, int]] = []
    opened: dict[int, int] = {}
    size = last = 0
    for mark in _MARKS.finditer(rendering):
        piece = rendering[last : mark.start()]
        plain.append(piece)
        size += len(piece)
        last = mark.end()
        part, closing = divmod(ord(mark.group()) - _FIRST_MARK, 2)
        if part >= len(parts):
            continue
        if not closing:
            opened[part] = size
        else:
            found.append((opened.pop(part, None), size, part))
    found += [(start, None, part) for part, start in opened.items()]
    plain.append(rendering[last:])
    return "".join(plain), found


def _widened(text: str, found: tuple[int | None, int | None, int], parts: Sequence[Part]) -> Place | None:
    """The place of a part whose core stands between two marks: with its blanks and tags where they are printed too."""
    start, end, index = found
    said = parts[index].text
    if not said or said.isspace():
        at = start if start is not None else end
        return None if at is None else Place(at, at, index)
    first, last = _core(said)
    if start is None:
        assert end is not None
        size = common_prefix(said[:last][::-1], text[:end][::-1])
        size -= len(said[last - size : last]) - len(said[last - size : last].lstrip())
        start, first = end - size, last - size
    if end is None:
        end = start + common_prefix(said[first:last], text[start:])
        last = first + end - start
    if start >= end:
        return None
    return _grown(text, start, end, said, (first, last), index)


def _grown(text: str, start: int, end: int, said: str, core: Span, index: int) -> Place:
    """The place with what the part has around its core, as far as the text has it too."""
    before = common_prefix(said[: core[0]][::-1], text[max(0, start - core[0]) : start][::-1])
    rest = said[core[1] :]
    in_json = json.dumps(rest, ensure_ascii=False)[1:-1]
    after = max(common_prefix(form, text[end : end + len(form)]) for form in (rest, in_json))
    return Place(start - before, end + after, index, core[0] - before)


# --- the pieces that a template prints between the contents ----------------------------------------------------------


def _forms(text: str) -> Iterator[tuple[str, int]]:
    """How a template may print a text, and how many characters at its start are missing then."""
    yield text, 0
    stripped = text.strip()
    if len(stripped) < len(text):
        lead = len(text) - len(text.lstrip())
        yield from ((stripped, lead), (text.lstrip(), lead), (text.rstrip(), 0))
    yield json.dumps(text, ensure_ascii=False)[1:-1], 0


class _Skeleton(NamedTuple):
    pieces: list[str]
    order: list[int]
    """the part after each piece but the last"""

    def fit(self, parts: Sequence[Part], text: str) -> list[Place] | None:
        """The places of the parts, when the pieces and they make up the text."""
        at = len(self.pieces[0])
        if not text.startswith(self.pieces[0]):
            return None
        places = []
        for index, piece in zip(self.order, self.pieces[1:], strict=True):
            for form, lead in _forms(parts[index].text):
                if text.startswith(form, at) and text.startswith(piece, at + len(form)):
                    places.append(Place(at, at + len(form), index, lead))
                    at += len(form) + len(piece)
                    break
            else:
                return None
        return places if at == len(text) else None


def _skeleton(text: str, places: Sequence[Place]) -> _Skeleton | None:
    edges = [0, *(edge for place in places for edge in (place.start, place.end)), len(text)]
    if any(a > b for a, b in pairwise(edges)):
        return None
    pieces = [text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return _Skeleton(pieces, [place.part for place in places])


def locate_in_order(text: str, parts: Sequence[Part]) -> list[Place]:
    """The places of the contents in the text, which prints them in order; ValueError where they could be others.

    Calls are looked for only in messages without content, and thoughts in fields of their own are not: the template
    may drop them.
    """
    spoken = {part.message for part in parts if part.field == "content" and not _is_blank(part.text)}
    fields = [("content",) if part.message in spoken else ("content", "tool_calls") for part in parts]
    kept = [i for i, p in enumerate(parts) if p.field in fields[i] and not _is_blank(p.text) and p.text.strip() in text]
    first, at = [], 0
    for index in kept:
        said = parts[index].text.strip()
        first.append(text.find(said, at))
        at = first[-1] + len(said)
        if first[-1] < 0:
            raise _not_found(parts[index])
    at, places = len(text), []
    for index, early in zip(reversed(kept), reversed(first), strict=True):
        whole = parts[index].text
        core = len(whole) - len(whole.lstrip()), len(whole.rstrip())
        size = core[1] - core[0]
        if text.rfind(whole[slice(*core)], 0, at) != early:
            raise _not_found(parts[index])
        places.append(_grown(text, early, early + size, whole, core, index))
        at = early
    return places[::-1]


def _not_found(part: Part) -> ValueError:
    said = part.text.strip()
    return ValueError(
        f"the chat template changes what is said, and {part.field} of message {part.message} ({said[:30]!r}) cannot be "
        "found in its text once and in order, so the assistant's words cannot be told apart: mark them with "
        "{% generation %} in the template, or train on the whole text"
    )


# --- what surrounds the turns ----------------------------------------------------------------------------------------


def _snapped(text: str, at: int, forward: bool = False) -> int:
    """The place, moved out of a special token that it falls into."""
    for token in _TOKENISH.finditer(text):
        if token.start() < at < token.end():
            return token.end() if forward else token.start()
    return at


def shared_start(first: str, second: str) -> int:
    """How much both begin with, up to a special token's edge."""
    return _snapped(first, _snapped(second, common_prefix(first, second)))


def _shared_end(first: str, second: str) -> str:
    """What both end with, from a special token's edge on."""
    size = common_prefix(first[::-1], second[::-1])
    start = _snapped(first, len(first) - size, forward=True)
    return first[max(start, len(first) - len(second) + _snapped(second, len(second) - size, forward=True)) :]


def _pattern(text: str) -> re.Pattern[str]:
    """The text, with any name and call id for those of the probes."""
    pattern = re.escape(text)
    for probe in (PROBE_ID, PROBE_TOOL):
        pattern = pattern.replace(probe, r"[^\s\"<>\[\]]*")
    return re.compile(pattern)


def _say(*roles: str, thought: str | None = None) -> Messages:
    """A short conversation; `call` is an assistant's turn that calls a tool; `thought`: the field with thoughts."""
    said: Messages = []
    for number, role in enumerate(roles):
        if role == "call":
            function = {"name": PROBE_TOOL, "arguments": {"zqkey": f"zqvalue{number}"}}
            call = {"type": "function", "id": PROBE_ID, "function": function}
            said.append({"role": "assistant", "tool_calls": [call]})
        elif role == "tool":
            said.append({"role": "tool", "name": PROBE_TOOL, "tool_call_id": PROBE_ID, "content": f"zqtold{number}"})
        else:
            message = {"role": role, "content": f"zqsaid{number}"}
            if role == "assistant" and thought == "content":
                message["content"] = f"<think>\nzqthought\n</think>\n\n{message['content']}"
            elif role == "assistant" and thought is not None:
                message[thought] = "zqthought"
            said.append(message)
    return said


class _Probe(NamedTuple):
    """A rendered short conversation: its text, and each message's first and last character."""

    text: str
    spans: list[Span]

    def before(self, message: int) -> str:
        """What stands between the message before and this one."""
        return self.text[self.spans[message - 1][1] if message else 0 : self.spans[message][0]]

    @property
    def tail(self) -> str:
        return self.text[self.spans[-1][1] :]


class Reader:
    """Reads conversations that one chat template renders.

    `ready` makes messages and tools what the template can print, `specials` are the tokenizer's special tokens, and
    `ends` are the texts of the model's end tokens.
    """

    def __init__(
        self,
        render: Render,
        ready: Callable[[Messages], Messages],
        specials: Sequence[str] = (),
        ends: Sequence[str] = (),
    ) -> None:
        self._render = render
        self._ready = ready
        self._specials = tuple(specials)
        self._given_ends = tuple(filter(None, ends))
        self._shapes: dict[Any, _Skeleton] = {}
        self._rewritten: dict[str, bool] = {}

    # --- one conversation ---------------------------------------------------------------------------------------------

    def read(self, messages: Messages, tools: Sequence[Any] | None, text: str, strict: bool = True) -> Reading:
        """Whose the characters of the text are, which is the rendering of the messages.

        Where that cannot be told: ValueError, or a reading without turns unless it is `strict`.
        """
        parts = parts_of(messages)
        try:
            places = self.places(messages, tools, text, parts)
            turns = self._turns(messages, parts, places, text)
        except ValueError:
            if strict:
                raise
            return Reading(text, [], rewritten=self._rewrites(messages, tools))
        rewritten = not all(turn.prompted for turn in turns) or self._rewrites(messages, tools)
        return Reading(text, turns, places, parts, _unprinted(messages, parts, places), rewritten=rewritten)

    def places(self, messages: Messages, tools: Sequence[Any] | None, text: str, parts: Sequence[Part]) -> list[Place]:
        """Where the parts stand, in the order of the text; a part that is printed twice has two places."""
        shape = (
            tuple(m["role"] for m in messages),
            tuple((p.message, p.field) for p in parts),
            tuple(_pictures_in(messages)),
            bool(tools),
        )
        kept = self._shapes.get(shape)
        fitting = kept.fit(parts, text) if kept else None
        if fitting is not None:
            return fitting
        places = self._by_marks(messages, tools, text, parts)
        if places is None:
            for part in parts:
                if _is_blank(part.text) and messages[part.message]["role"] == "assistant":
                    raise _not_found(part)
            return locate_in_order(text, parts)
        skeleton = _skeleton(text, places)
        if skeleton is not None and skeleton.fit(parts, text) == places:
            if len(self._shapes) >= _SHAPES:
                self._shapes.clear()
            self._shapes[shape] = skeleton
        return places

    def _by_marks(
        self, messages: Messages, tools: Sequence[Any] | None, text: str, parts: Sequence[Part]
    ) -> list[Place] | None:
        """The places by a rendering with marks; None when the marks change what the template prints."""
        for blanks, keys in ((True, True), (False, True), (True, False), (False, False)):
            try:
                rendering = self._render(_marked(messages, blanks, keys), tools=tools)
            except (_Unmarkable, ValueError):
                continue
            plain, found = _unmarked(rendering, parts)
            if plain == text:
                places = [place for place in (_widened(text, one, parts) for one in found) if place is not None]
                return sorted(places, key=lambda place: (place.start, place.end))
        return None

    def _turns(self, messages: Messages, parts: Sequence[Part], places: Sequence[Place], text: str) -> list[Turn]:
        turns: dict[int, Turn] = {}
        runs = _runs(parts, places)
        for number, (message, run) in enumerate(runs):
            if message is None or messages[message]["role"] != "assistant":
                continue
            if message in turns:
                raise ValueError(
                    f"the chat template prints other messages inside message {message}, so the assistant's words "
                    "cannot be told apart: mark them with {% generation %} in the template, or train on the whole text"
                )
            before = runs[number - 1][1][-1] if number else None
            after = runs[number + 1][1][0] if number + 1 < len(runs) else None
            start, prompted = self._start(messages, parts, before, message, run[0].start, text)
            end = self._end(messages, parts, max(place.end for place in run), after, message, text)
            turns[message] = Turn(message, start, max(start, end), prompted)
        return sorted(turns.values())

    def _start(
        self, messages: Messages, parts: Sequence[Part], before: Place | None, message: int, content: int, text: str
    ) -> tuple[int, bool]:
        """Where the turn of a message begins whose content does at `content`, and whether it was prompted for so."""
        at = before.end if before else 0
        opening = self._opening(str(messages[parts[before.part].message]["role"])) if before else None
        opened = self._opened(opening, before, text) if before and opening else None
        skips = before is not None and not 0 <= message - parts[before.part].message <= 1  # of others no word is found
        if opened is not None and (not skips or opened >= content):
            return opened, True
        said = text[content:]
        blanks = len(said) - len(said.lstrip())
        for header in filter(None, (self._prompt, self._header)):
            found = text.rfind(header, at, content + blanks)
            if found >= 0:
                return found + len(header), header == self._prompt
        return content, opening is None

    def _opening(self, role: str) -> re.Pattern[str] | None:
        role = "system" if role == "developer" else role
        return self._openings.get(role if role in ("system", "user", "assistant") else "tool")

    @staticmethod
    def _opened(opening: re.Pattern[str], before: Place, text: str) -> int | None:
        """Where the opening ends that follows what was said before; blanks can be the content's or the template's."""
        said = text[before.start : before.end].rstrip()
        for edge in range(before.end, before.start + len(said) - 1, -1):
            match = opening.match(text, edge)
            if match:
                return match.end()
        return None

    def _end(
        self, messages: Messages, parts: Sequence[Part], said: int, after: Place | None, message: int, text: str
    ) -> int:
        """Where the turn of a message ends whose last word does at `said`; `after`: what is said next."""
        gap = text[said:] if after is None else text[said : max(after.start, said)]
        stops = [end for end in self.ends if end in gap]
        if after is None and message == len(messages) - 1:
            return said + (max(gap.rfind(s) + len(s) for s in stops) if stops else len(self.without_tail(gap)))
        if stops:
            return said + min(gap.find(stop) + len(stop) for stop in stops)
        role = str(messages[parts[after.part].message]["role"]) if after else ""
        for header in self._role_headers.get(role, ()):
            match = next((m for m in header.finditer(gap) if m.end() == len(gap)), None)
            if match:
                return said + len(self.without_tail(gap[: match.start()]))
        return said

    def without_tail(self, text: str) -> str:
        """The text without the blanks that follow its stop token: nothing is sampled after that."""
        stripped = text.rstrip()
        return stripped if stripped.endswith(self._specials or ("\0",)) else text

    # --- what the template prints around turns, from short conversations ----------------------------------------------

    def _probe(self, messages: Messages, tools: Sequence[Any] | None = None, open_turn: bool = False) -> _Probe | None:
        """The conversation as the template renders it; None where it refuses or does not print every message."""
        try:
            ready = self._ready(messages)
            parts = parts_of(ready)
            plain, found = _unmarked(self._render(_marked(ready), tools=tools, open_turn=open_turn), parts)
            if plain != self._render(ready, tools=tools, open_turn=open_turn):
                return None
        except (ValueError, _Unmarkable):
            return None
        places = [place for place in (_widened(plain, one, parts) for one in found) if place is not None]
        spans = []
        for index in range(len(messages)):
            mine: dict[int, Place] = {}
            for place in sorted(places):
                if parts[place.part].message == index:
                    mine.setdefault(place.part, place)
            if not mine:
                return None
            spans.append((min(p.start for p in mine.values()), max(p.end for p in mine.values())))
        return _Probe(plain, spans)

    @cached_property
    def _history(self) -> _Probe | None:
        return self._probe(_say("user", "assistant", "user", "assistant", "user"))

    @cached_property
    def _openings(self) -> dict[str, re.Pattern[str]]:
        """What the template prints after a message of a role to prompt for the assistant's turn."""
        before = {"user": ("user",), "system": ("system",), "assistant": ("user", "assistant")}
        openings = {}
        for role, roles in (before | {"tool": ("user", "call", "tool")}).items():
            probe = self._probe(_say(*roles), open_turn=True)
            if probe is not None:
                openings[role] = _pattern(probe.tail)
        return openings

    @cached_property
    def _user_tails(self) -> tuple[str, str]:
        """What follows a user's message at the end, and what does when an answer is prompted for."""
        closed, opened = self._probe(_say("user")), self._probe(_say("user"), open_turn=True)
        return (closed.tail, opened.tail) if closed and opened else ("", "")

    @cached_property
    def _user_end(self) -> str:
        """What closes a user's message, whatever follows."""
        closed, opened = self._user_tails
        return opened[: shared_start(opened, closed)]

    @cached_property
    def _prompt(self) -> str:
        """The generation prompt."""
        return self._user_tails[1][len(self._user_end) :]

    @cached_property
    def _header(self) -> str:
        """What opens every assistant's turn: the generation prompt, or the start of it that history has too."""
        opened = self._user_tails[1]
        if self._history is None or not opened:
            return ""
        size = min(shared_start(opened, self._history.before(1)), shared_start(opened, self._history.before(3)))
        return opened[len(self._user_end) : size]

    @cached_property
    def _user_header(self) -> str:
        """What stands before a user's message in the midst of a conversation, after what closes the turn before."""
        if self._history is None:
            return ""
        gap, end = self._history.before(2), self._user_end
        if end.strip() and gap.startswith(end):  # one closing for all roles
            return gap[len(end) :]
        return _shared_end(gap, self._history.before(0))

    @cached_property
    def _role_headers(self) -> dict[str, list[re.Pattern[str]]]:
        """What stands before a message of a role that follows the assistant's turn."""
        headers = {"user": [self._user_header], "assistant": [self._prompt, self._header]}
        call = self._call
        if call is not None:
            headers["tool"] = [call[0].before(2)[len(call[1]) :]]
        return {role: [_pattern(text) for text in texts if text] for role, texts in headers.items()}

    @cached_property
    def _call(self) -> tuple[_Probe, str] | None:
        """A turn that calls a tool, and what follows the call's last word before the next message."""
        whole, alone = self._probe(_say("user", "call", "tool", "assistant")), self._probe(_say("user", "call"))
        if whole is None or alone is None:
            return None
        gap = whole.before(2)
        return whole, gap[: shared_start(gap, alone.tail)]

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The texts that end an assistant's turn: the model's end tokens, and what this template prints there."""
        ends = dict.fromkeys(self._given_ends)
        last = self._probe(_say("user", "assistant"))
        closings = [last.tail] if last else []
        if self._history is not None:
            gap = self._history.before(2)
            closings.append(gap[: len(gap) - len(self._user_header)])
        for closing in closings:
            closing = closing.strip()
            if _TOKENISH.search(closing) or self._last_special(closing):
                ends[closing] = None
            ends[self._last_special(closing)] = None
        if self._call is not None:
            whole, closing = self._call
            goes_on = whole.before(2)[len(closing) :]
            if not goes_on.startswith(self._given_ends or ("\0",)):
                ends[self._last_special(closing.strip())] = None
        return tuple(filter(None, ends))

    def _last_special(self, closing: str) -> str:
        return max((s for s in self._specials if closing.endswith(s)), key=len, default="")

    # --- what the template renders in another way later on ------------------------------------------------------------

    def _rewrites(self, messages: Messages, tools: Sequence[Any] | None) -> bool:
        """Whether earlier messages stand here in another way than when the model answered."""
        if self.rewrites("plain"):
            return True
        roles = [m["role"] for m in messages]
        said = [i for i, role in enumerate(roles) if role == "assistant"]
        asked = [i for i, role in enumerate(roles) if role == "user"]
        if not said or not asked or said[0] > asked[-1]:
            return False  # one question
        found = ["turns"]
        found += ["system"] if roles[0] in ("system", "developer") else []
        found += ["tools"] if tools else []
        before = [m for m in messages[: asked[-1]] if m["role"] == "assistant"]
        found += ["calls"] if any(m.get("tool_calls") for m in before) else []
        found += [name for name in THOUGHT_FIELDS if any(m.get(name) for m in before)]
        tagged = any(isinstance(m.get("content"), str) and _THOUGHTS.search(m["content"]) for m in before)
        found += ["content"] if tagged else []
        return any(self.rewrites(feature) for feature in found)

    def rewrites(self, feature: str) -> bool:
        """Whether the template renders conversations with the feature in another way once more messages follow.

        plain | turns | system | tools | calls, or the field that holds thoughts.
        """
        if feature not in self._rewritten:
            cases: dict[str, tuple[Messages, int]] = {
                "plain": (_say("user", "assistant"), 1),
                "turns": (_say("user", "assistant", "user", "assistant"), 2),
                "system": (_say("system", "user", "assistant", "user", "assistant"), 3),
                "tools": (_say("user", "assistant", "user", "assistant"), 2),
                "calls": (_say("user", "call", "tool", "assistant", "user", "assistant"), 4),
            }
            thinking = _say("user", "assistant", "user", "assistant", thought=feature), 2
            messages, cut = cases.get(feature, thinking)
            tools = PROBE_TOOLS if feature == "tools" else None
            whole, part = self._probe(messages, tools), self._probe(messages[:cut], tools)
            changed = bool(whole and part and not whole.text.startswith(part.text[: part.spans[-1][1]]))
            self._rewritten[feature] = changed
        return self._rewritten[feature]


def _runs(parts: Sequence[Part], places: Sequence[Place]) -> list[tuple[int | None, list[Place]]]:
    """The places in runs of one message each; None for the message of a part that is printed once more."""
    runs: list[tuple[int | None, list[Place]]] = []
    seen: set[int] = set()
    for place in places:
        message = None if place.part in seen else parts[place.part].message
        seen.add(place.part)
        if runs and runs[-1][0] == message:
            runs[-1][1].append(place)
        else:
            runs.append((message, [place]))
    return runs


def _unprinted(messages: Messages, parts: Sequence[Part], places: Sequence[Place]) -> set[tuple[int, str, str]]:
    """Messages, with their roles, and the fields of which something is not printed."""
    printed = {place.part for place in places}
    heard = {(parts[i].message, parts[i].field) for i in printed}
    silent = [p for i, p in enumerate(parts) if i not in printed and p.field != KEYS and not _is_blank(p.text)]
    missing = {(part.message, part.field) for part in silent}
    cut = {key for key in missing & heard if key[1] == "content"}  # one of several parts: what stands between tags
    return {(at, str(messages[at]["role"]), "thoughts" if (at, name) in cut else name) for at, name in missing}


def _pictures_in(messages: Messages) -> Iterator[Span]:
    """The message and the place in its content of each picture."""
    for at, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list):
            yield from ((at, i) for i, part in enumerate(content) if is_picture(part, False))


def _is_blank(text: str) -> bool:
    return not text or text.isspace()
