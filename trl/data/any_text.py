"""Text of any kind, as models write it: made fit for tokenizers, files and terminals."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""lone surrogates, and what moves a terminal's cursor, changes its colours or turns the direction of writing"""


def encodable(text: str) -> str:
    r"""The text with lone surrogates spelled out (`\ud800`): neither UTF-8 nor a tokenizer takes them."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def visible(text: str) -> str:
    r"""The text as a terminal can show it literally: control characters and lone surrogates are spelled out."""
    return _HIDDEN.sub(lambda found: ascii(found[0])[1:-1], text)


def many(count: int, one: str, several: str | None = None) -> str:
    """A count with its noun: 1 row, 2,000 rows."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def encodable_values(value: Any, depth: int = 100) -> Any:
    """A JSON value whose texts and names are `encodable`; ValueError where it is nested deeper than `depth`."""
    if isinstance(value, str):
        return encodable(value)
    if not isinstance(value, dict | list):
        return value
    if depth == 0:
        raise ValueError("it is nested too deeply")
    if isinstance(value, list):
        return [encodable_values(each, depth - 1) for each in value]
    return {encodable_values(name, depth - 1): encodable_values(each, depth - 1) for name, each in value.items()}


def json_text(value: Any) -> str:
    """The value as JSON, in which pictures are marks, and what JSON has no form for is a text."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        if "data:image/" not in text:
            return text
    except (TypeError, ValueError):
        pass
    from trl.data.thumbnails import plain

    return json.dumps(plain(value), default=str, ensure_ascii=False)


class _Lenient:
    """A stream that spells out what its encoding has no bytes for, where the stream below would raise."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text) or 0)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return int(self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding)) or 0)

    def __getattr__(self, name: str) -> Any:
        if name == "rich_proxied_file":  # by it rich would write past its own bars, into the middle of them
            raise AttributeError(name)
        return getattr(self._stream, name)


def fitting(line: str, stream: Any) -> str:
    """The line as it is; on a terminal that is narrower, in several, broken between words and indented."""
    try:
        terminal = bool(stream.isatty())
    except (AttributeError, ValueError):  # a stand-in for a stream, or one that is closed
        terminal = False
    width = shutil.get_terminal_size().columns
    if not terminal or len(line) <= width:
        return line
    how: Any = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(line, max(width, 20), **how)


def console() -> Console:
    """rich's console on the standard output; any text can be printed to it, whatever encoding that has."""
    from rich.console import Console

    return Console(file=_Lenient(sys.stdout))  # type: ignore[arg-type]  # it has all that a stream has
