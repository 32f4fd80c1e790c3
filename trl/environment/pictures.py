"""Pictures in conversations with tools: those of a prompt, and those that a tool answers with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from trl.data.chat import Messages
from trl.data.messages import PICTURES
from trl.data.picture_files import read_picture, source_of
from trl.data.pictures import Album, PictureReader
from trl.environment.tool_calls import FailedCall

Part = dict[str, Any]
_FILES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF")
"""what files of pictures begin with: a tool's bytes that begin so are no text"""


def with_numbers(
    row: Mapping[str, Any], messages: Messages, reader: PictureReader | None
) -> tuple[Messages, list[int]]:
    """The messages of a prompt with numbers for their pictures and those of the row's column, and the numbers in order.

    Where nothing reads pictures, the messages are as they were.
    """
    if reader is None:
        return messages, []
    from trl.data.picture_rows import COLUMNS, NUMBERS, placed, read_pictures  # and `datasets`, which text needs not

    columns = {name: row[name] for name in COLUMNS if name in row}
    read = read_pictures({**columns, "prompt": messages}, ["prompt"])
    return placed(read["prompt"], read[NUMBERS], reader.placeholder)


# --- answers of tools ---------------------------------------------------------------------------------------------


class PicturedAnswer(str):
    """A tool's answer with pictures; as a text it has `[picture]` in their places."""

    parts: tuple[Part, ...]
    """texts, and pictures under their numbers in the album, as they follow each other"""

    @classmethod
    def of(cls, parts: Sequence[Part]) -> PicturedAnswer:
        made = cls("\n".join(part.get("text", "[picture]") for part in parts))
        made.parts = tuple(parts)
        return made

    @property
    def numbers(self) -> list[int]:
        return [part["image"] for part in self.parts if part["type"] == "image"]


def answer_with_pictures(result: Any, reads: bool, as_text: Callable[[Any], str]) -> str | None:
    """What a tool that gave pictures says to the model; None: it gave none.

    reads: whether the model reads pictures. as_text: makes the text of all else that the tool gave.
    """
    listed = list(result) if isinstance(result, list | tuple) else [result]
    if not any(map(_holds_picture, listed)):
        return None
    if not reads:
        return FailedCall("Tool error: the tool gave a picture, and only text can be read here")
    return PicturedAnswer.of([part for each in listed for part in _parts_of(each, as_text)])


def _parts_of(value: Any, as_text: Callable[[Any], str]) -> Iterator[Part]:
    """A value that a tool gave as parts: pictures inside a dict follow its JSON, which has marks in their places."""
    if _is_picture(value):
        yield _picture(value)
    elif not _holds_picture(value):
        known = isinstance(value, Mapping) and value.get("type") == "text" and isinstance(value.get("text"), str)
        yield {"type": "text", "text": value["text"] if known else as_text(value)}
    else:
        found: list[Any] = []
        marked = {name: _marked(each, found) for name, each in value.items()}
        yield {"type": "text", "text": json.dumps(marked, ensure_ascii=False, default=str)}
        yield from map(_picture, found)


def _marked(value: Any, found: list[Any]) -> Any:
    """The value of a dict with marks for its pictures, which are added to `found`."""
    if _is_picture(value):
        found.append(value)
        return f"[picture {len(found)}]"
    if isinstance(value, list | tuple):
        return [_marked(each, found) for each in value]
    return value


def _picture(value: Any) -> Part:
    source = source_of(value, "the tool's picture") if isinstance(value, Mapping) else value
    return {"type": "image", "image": Album.keep(read_picture(source, "the tool's picture"))}


def _holds_picture(value: Any) -> bool:
    """Whether it is a picture, or a dict with some in it."""
    if _is_picture(value):
        return True
    inner = value.values() if isinstance(value, Mapping) else ()
    return any(_is_picture(own) for each in inner for own in (each if isinstance(each, list | tuple) else [each]))


def _is_picture(value: Any) -> bool:
    if isinstance(value, Mapping):
        return value.get("type") in PICTURES
    if isinstance(value, str):
        return value.startswith("data:image/")
    if isinstance(value, bytes | bytearray):
        return bytes(value).startswith(_FILES)
    return any(kind.__module__.startswith("PIL.") for kind in type(value).__mro__)


def cut_parts(answer: PicturedAnswer, cut: Callable[[str, int | None], str], most: int | None) -> PicturedAnswer:
    """The answer with at most so many characters of text; its pictures stay whole."""
    left, kept = most, []
    for part in answer.parts:
        if part["type"] == "text":
            text = cut(part["text"], left)
            left = None if left is None else max(0, left - len(text))
            part = {"type": "text", "text": text}
        if part["type"] != "text" or part["text"]:
            kept.append(part)
    return PicturedAnswer.of(kept)


def without_marks(text: str, reader: PictureReader | None) -> str:
    """A tool's text in which nothing stands for a picture: a blank parts the words that would."""
    if reader is None:
        return text
    token = reader.tokenizer.convert_ids_to_tokens(reader.image_token_id)
    for mark in {reader.placeholder, str(token)}:
        text = text.replace(mark, f"{mark[:1]} {mark[1:]}")
    return text


def shown_pictures(messages: Messages) -> Messages:
    """The messages as reward functions read them: their pictures are PIL pictures."""
    return [{**message, "content": _shown(message.get("content"))} for message in messages]


def _shown(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [
        {**part, "image": Album.open(part["image"])} if isinstance(part.get("image"), int) else part for part in content
    ]
