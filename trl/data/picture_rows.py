"""Which pictures a row has, and where they stand: in parts of its messages, or in a column of their own.

A row that was read (`read_pictures`) holds the numbers under which the album keeps its pictures: those of its column
under `_pictures`, those of its parts as `{"type": "image", "image": number}`.
"""

from __future__ import annotations

import json
import os
import re
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, Features, Image, LargeList, List

from trl.data.columns import listed, shown
from trl.data.encode import Span
from trl.data.messages import SPEAKERS, Message, Messages, is_picture, messages_of
from trl.data.picture_files import is_animated, pictures_in, read_picture, source_of
from trl.data.pictures import Album, reader_of
from trl.data.report import NO_FLAGS, RowFlag

Row = dict[str, Any]
COLUMNS = ("images", "image")
"""columns with pictures"""
NUMBERS, FLAGS = "_pictures", "_picture_flags"
"""what a row has once it was read: the pictures of its column, and what was met"""
_NAMING = (*COLUMNS, "image_url", "url", "path")
"""columns and fields that may hold the path of a picture"""
_LONGEST_PATH = 4096
_MARK = "<image>"
"""what stands for a picture in the texts of many data sets, whatever the model's own placeholder is"""
_READ_FIELDS = ("type", "text", "index", "image", "image_url", "url", "path", "bytes", "base64", "data", "source")
_SILENT = ("media_type", "mime_type", "cache_control")
"""fields of a part that say nothing of how a picture is seen"""


class Shown(NamedTuple):
    """A text in which pictures stand as the processor writes them."""

    text: str
    spans: Sequence[Span] = ()
    """characters that the assistant says"""
    hidden: Sequence[Span] = ()
    """characters that stand for pictures"""
    numbers: Sequence[int] = ()
    """the pictures, in order"""


# --- reading ------------------------------------------------------------------------------------------------------


def read_pictures(row: Mapping[str, Any], columns: Iterable[str]) -> Row:
    """The row whose pictures are in the album; `columns`: those that may hold messages. A row is read once only.

    ValueError of one line for a picture that cannot be read.
    """
    if NUMBERS in row:
        return dict(row)
    made, flags = dict(row), NO_FLAGS
    for column in columns:
        if column in made:
            made[column], own = _read_messages(made[column], column)
            flags |= own
    made[NUMBERS], own = _read_column(row)
    made[FLAGS] = int(flags | own)
    return made


def _read_column(row: Mapping[str, Any]) -> tuple[list[int], RowFlag]:
    found = {column: pictures_in(row.get(column), column) for column in COLUMNS}
    given = [column for column in COLUMNS if found[column]]
    if len(given) > 1:
        raise ValueError("columns 'images' and 'image' both hold pictures: keep one of them")
    numbers, flags = [], NO_FLAGS
    for column in given:
        for place, value in enumerate(found[column]):
            alone = len(found[column]) == 1 and column == "image"
            number, own = _kept(value, f"column '{column}'" if alone else f"picture {place} of column '{column}'")
            numbers.append(number)
            flags |= own
    return numbers, flags


def _kept(value: Any, where: str) -> tuple[int, RowFlag]:
    content = read_picture(value, where)
    return Album.keep(content), RowFlag.ANIMATED if is_animated(content) else NO_FLAGS


def _read_messages(value: Any, column: str) -> tuple[Any, RowFlag]:
    """A column's messages whose pictures are numbers; what is no list of messages stays as it is."""
    messages, flags = listed(value) if isinstance(value, Mapping) else value, NO_FLAGS
    if not isinstance(messages, list | tuple):
        return value, flags
    made: list[Any] = []
    for place, message in enumerate(messages):
        if isinstance(message, Mapping) and isinstance(message.get("content"), Mapping | list | tuple):
            message, own = _read_message(message, f"message {place} of column '{column}'")
            flags |= own
        made.append(message)
    return made, flags


def _read_message(message: Mapping[str, Any], where: str) -> tuple[Message, RowFlag]:
    content, flags = message["content"], NO_FLAGS
    if isinstance(content, Mapping):
        if message.get("role") not in SPEAKERS or not is_picture(content, True):
            return dict(message), flags
        content = [content]
    parts: list[Any] = []
    for place, part in enumerate(content):
        if is_picture(part, message.get("role") in SPEAKERS):
            part, own = _read_part(part, f"part {place} of {where}")
            flags |= own
        parts.append(part)
    return {**message, "content": parts}, flags


def _read_part(part: Any, where: str) -> tuple[Message, RowFlag]:
    """`{"type": "image"}` with the picture's number, or its place in the row's column, where it has one."""
    if not isinstance(part, Mapping):
        number, flags = _kept(part, where)
        return {"type": "image", "image": number}, flags
    fields = {name: value for name, value in part.items() if value is not None and not (name == "text" and not value)}
    inner = fields.get("image_url")
    fields |= {k: v for k, v in inner.items() if k != "url" and v is not None} if isinstance(inner, Mapping) else {}
    unread = [name for name in fields if name not in _READ_FIELDS + _SILENT and fields[name] != "auto"]
    flags = RowFlag.UNREAD_DETAILS if unread else NO_FLAGS
    if fields.get("text"):
        raise ValueError(f"{where} is a picture and has the text {shown(fields['text'])}: write two parts")
    made: Message = {"type": "image"}
    if any(name in fields for name in _READ_FIELDS[3:]):
        made["image"], own = _kept(source_of(part, where), where)
        return made, flags | own
    if isinstance(fields.get("index"), int):
        made["index"] = fields["index"]
    return made, flags


def marked_row(row: Mapping[str, Any], columns: Sequence[str], placeholder: str) -> Row:
    """The conversational row with parts where its pictures stand, to be rendered: no picture is read."""
    made = dict(row)
    for column in columns:
        messages = [row[column]] if isinstance(row.get(column), Mapping) else row.get(column)
        if isinstance(messages, list | tuple) and all(isinstance(message, Mapping) for message in messages):
            made[column] = [_marked(message) for message in messages]
    first = next((column for column in columns if column in ("prompt", "messages") and column in row), None)
    given = [0 for column in COLUMNS for _ in pictures_in(row.get(column), column)]
    if given and first and not any(True for message in made[first] for _ in _pictures_of(message)):
        made[first] = _in_texts(made[first], given, placeholder)[0]
    return made


def _marked(message: Mapping[str, Any]) -> Message:
    content, speaks = message.get("content"), message.get("role") in SPEAKERS
    content = [content] if isinstance(content, Mapping) and is_picture(content, speaks) else content
    if not isinstance(content, list | tuple):
        return dict(message)
    return {
        **message,
        "content": [{"type": "image", "image": 0} if is_picture(own, speaks) else own for own in content],
    }


# --- places -------------------------------------------------------------------------------------------------------


def placed(messages: Messages, given: Sequence[int], placeholder: str) -> tuple[Messages, list[int]]:
    """The messages with a number in each part that is a picture, and all pictures in their order.

    given: the pictures of the row's column. They are those of parts without a picture of their own, or stand where
    the texts have the processor's `placeholder` or `<image>`, or else before what the user says first.
    """
    parts = [part for message in messages for part in _pictures_of(message)]
    if not parts:
        return _in_texts(messages, given, placeholder) if given else (messages, [])
    own = [part["image"] for part in parts if "image" in part]
    if len(own) == len(parts):
        if given and sorted(own) != sorted(given):
            raise ValueError(
                f"the messages bring {len(own)} pictures of their own, and the row's column 'images' holds "
                f"{len(given)} others: keep one of the two"
            )
        return messages, own
    places, at = [], 0
    for part in parts:
        if "image" not in part:
            places.append(part.get("index", at))
            at = places[-1] + 1
    if set(places) != set(range(len(given))):
        raise ValueError(
            f"the messages have {len(places)} parts for pictures, and the row's column 'images' holds {len(given)}: "
            "give as many pictures as parts, or no parts, and the pictures stand before what the user says first"
        )
    wanted = iter(places)
    filled = [_filled(message, given, wanted) for message in messages]
    return filled, [part["image"] for message in filled for part in _pictures_of(message)]


def messages_with_pictures(row: Mapping[str, Any], column: str, tokenizer: Any) -> Messages:
    """The row's messages in that column, with its pictures where something reads them for this tokenizer."""
    reader = reader_of(tokenizer)
    if reader is None:
        return messages_of(row, column)
    read = read_pictures(row, (column,))
    return placed(messages_of(read, column), read[NUMBERS], reader.placeholder)[0]


def refuse_pictures(messages: Messages, column: str) -> None:
    """ValueError where an answer of a pair, say, shows a picture."""
    if any(True for message in messages for _ in _pictures_of(message)):
        raise ValueError(f"column '{column}' has a picture: pictures belong to the prompt, not to an answer")


def _pictures_of(message: Message) -> Iterable[Message]:
    content = message.get("content")
    speaks = message.get("role") in SPEAKERS
    return (part for part in content if is_picture(part, speaks)) if isinstance(content, list) else ()


def _filled(message: Message, given: Sequence[int], wanted: Iterable[int]) -> Message:
    if not any(True for _ in _pictures_of(message)):
        return message
    places, speaks = iter(wanted), message.get("role") in SPEAKERS
    content = [
        {"type": "image", "image": given[next(places)]} if is_picture(part, speaks) and "image" not in part else part
        for part in message["content"]
    ]
    return {**message, "content": content}


def _in_texts(messages: Messages, given: Sequence[int], placeholder: str) -> tuple[Messages, list[int]]:
    """The pictures of the column where the texts have marks for them, or before what the user says first."""
    texts = [text for message in messages if message["role"] != "assistant" for text in _texts_of(message)]
    for mark in dict.fromkeys((placeholder, _MARK)):
        count = sum(text.count(mark) for text in texts)
        if not count:
            continue
        if count != len(given):
            raise ValueError(
                f"the messages have {mark!r} {count} times, which stands for a picture, and the row's column 'images' "
                f"holds {len(given)}: give as many of one as of the other"
            )
        if mark == placeholder:
            return messages, list(given)
        rest = iter(given)
        return [_split(message, mark, rest) for message in messages], list(given)
    first = next((at for at, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise ValueError(
            "no message is the user's, so it is not known where the pictures of the row's column stand: give parts of "
            "kind 'image' in the messages"
        )
    parts = [{"type": "image", "image": number} for number in given]
    asked = {**messages[first], "content": [*parts, *_parts_of(messages[first])]}
    return [*messages[:first], asked, *messages[first + 1 :]], list(given)


def _parts_of(message: Message) -> list[Any]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return list(content or [])


def _texts_of(message: Message) -> list[str]:
    parts = (part.get("text") if isinstance(part, Mapping) else part for part in _parts_of(message))
    return [text for text in parts if isinstance(text, str)]


def _split(message: Message, mark: str, rest: Iterable[int]) -> Message:
    """The message with the next pictures in place of the marks in its texts."""
    if message["role"] == "assistant" or not any(mark in text for text in _texts_of(message)):
        return message
    numbers, content = iter(rest), []
    for part in _parts_of(message):
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            content.append(part)
            continue
        for piece in re.split(f"({re.escape(mark)})", text):
            if piece == mark:
                content.append({"type": "image", "image": next(numbers)})
            elif piece:
                content.append({"type": "text", "text": piece})
    return {**message, "content": content}


def spoils(hidden: Sequence[int], kept: Sequence[int], pinned: int, at_start: bool) -> bool:
    """Whether a cut took something of a picture, or left one at the edge; both are 1 where pictures stand.

    at_start: what was cut stood at the start, behind the `pinned` first tokens.
    """
    if len(kept) == len(hidden) or not any(hidden):
        return False
    edge = kept[pinned : pinned + 1] if at_start else kept[-1:]
    return sum(kept) < sum(hidden) or 1 in edge


# --- data sets ----------------------------------------------------------------------------------------------------


def undecoded(dataset: Any) -> Any:
    """The data set whose pictures stay files: what is read are their bytes. A stream may have to fetch them itself."""
    if not isinstance(dataset, Dataset):
        return dataset
    features = Features({name: _undecoded(feature) for name, feature in dataset.features.items()})
    if features == dataset.features:
        return dataset
    how = {"indices_table": dataset._indices, "fingerprint": dataset._fingerprint}
    return Dataset(dataset.data, DatasetInfo(features=features), split=dataset.split, **how)


def files_of(dataset: Any, columns: Sequence[str]) -> list[tuple[str, int, int]]:
    """The files that the columns of a `Dataset` name, each with its size and the time of its last change."""
    known = [name for name in columns if isinstance(dataset, Dataset) and name in dataset.column_names]
    paths = {path for name in known for path in _paths(dataset.data.column(name), name)}
    found = []
    for path in sorted(paths):
        name = urllib.request.url2pathname(path.removeprefix("file://")) if path.startswith("file://") else path
        try:
            state = os.stat(os.path.expanduser(name)) if len(name) < _LONGEST_PATH else None
        except (OSError, ValueError):
            state = None
        if state is not None:
            found.append((path, state.st_size, state.st_mtime_ns))
    return found


def _paths(values: Any, name: str) -> Iterator[str]:
    """The texts among Arrow's values that may be paths of pictures; `name`: of their field."""
    kind = values.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        yield from _paths(pc.list_flatten(values), name)
    elif pa.types.is_struct(kind):
        for at in range(kind.num_fields):
            yield from _paths(pc.struct_field(values, at), kind.field(at).name)
    elif getattr(kind, "extension_name", "") == "arrow.json":  # what `datasets` makes of parts of several kinds
        chunks = values.chunks if isinstance(values, pa.ChunkedArray) else [values]
        texts = (text for chunk in chunks for text in pc.unique(chunk.storage).drop_null().to_pylist())
        for text in texts:
            if any(f'"{field}"' in text for field in _NAMING):
                yield from _paths_in(json.loads(text), name)
    elif name in _NAMING and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        yield from pc.unique(values).drop_null().to_pylist()


def _paths_in(value: Any, name: str) -> Iterator[str]:
    """The same of values that were read from JSON."""
    if isinstance(value, str):
        yield from [value] if name in _NAMING else []
    elif isinstance(value, Mapping | list):
        own = value.items() if isinstance(value, Mapping) else ((name, one) for one in value)
        for field, one in own:
            yield from _paths_in(one, field)


def found_beside(dataset: Any, folder: str) -> Any:
    """The rows of a file in this folder: a picture's path that leads nowhere from the working directory begins there.

    A data set with no such path stays as it is.
    """
    streamed = not isinstance(dataset, Dataset)
    if streamed:
        try:
            first: Row = next(iter(dataset.take(1)), {})
        except Exception:  # of any reader: what is wrong with the file is said where its rows are read
            return dataset
        if _beside(first, folder) == first:
            return dataset
        return dataset.map(_beside, fn_kwargs={"folder": folder}, features=dataset.features)
    paths = {path for name in dataset.column_names for path in _paths(dataset.data.column(name), name)}
    if all(_from(path, folder) == path for path in paths):
        return dataset
    return dataset.map(_beside, fn_kwargs={"folder": folder}, features=dataset.features, desc="Finding pictures")


def _beside(row: Mapping[str, Any], folder: str) -> Row:
    found = dict(row)
    for name, value in row.items():
        if name in COLUMNS:
            found[name] = _moved(value, folder)
        elif isinstance(value, list):
            found[name] = [_message_beside(message, folder) for message in value]
    return found


def _message_beside(message: Any, folder: str) -> Any:
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    return {**message, "content": [_moved(part, folder) if is_picture(part, True) else part for part in content]}


def _moved(value: Any, folder: str) -> Any:
    """The value of a picture with its paths from the folder, where they lead nowhere else."""
    if isinstance(value, str):
        return _from(value, folder)
    if isinstance(value, Mapping):
        return {name: _moved(own, folder) if name in _NAMING else own for name, own in value.items()}
    return [_moved(own, folder) for own in value] if isinstance(value, list) else value


def _from(path: str, folder: str) -> str:
    if not path or len(path) > _LONGEST_PATH or path.startswith(("data:", "~")) or os.path.isabs(path):
        return path
    try:
        beside = os.path.join(folder, path)
        return path if os.path.exists(path) or not os.path.isfile(beside) else beside
    except (OSError, ValueError):
        return path


def types_of(dataset: Dataset, given: Any, columns: Sequence[str]) -> dict[str, Any]:
    """The types of the columns: those of the data set `given` where `undecoded` changed them."""
    before = given.features if isinstance(given, Dataset) else {}
    own = {column: dataset.features[column] for column in columns}
    return {c: before[c] if c in before and _undecoded(before[c]) == kind else kind for c, kind in own.items()}


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, Image):
        return Image(mode=feature.mode, decode=feature.mode not in (None, "RGB") and feature.decode)
    if isinstance(feature, List):
        return List(_undecoded(feature.feature), length=feature.length)
    if isinstance(feature, LargeList):
        return LargeList(_undecoded(feature.feature))
    if isinstance(feature, Mapping):
        return {name: _undecoded(own) for name, own in feature.items()}
    return feature
