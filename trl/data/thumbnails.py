"""Pictures as people see them: a small copy for a page or a file, and a short mark where only text stands."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trl.data.pictures import Album

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST = 160
"""pixels of a thumbnail's longer side"""
LOSSLESS = 4096
"""bytes that a PNG may have: a larger one becomes a JPEG where that is smaller"""
SEEN = 64
"""pixels that the longer side of a picture has on a page at least; smaller ones are shown enlarged"""
FOLDER = "pictures"
"""folder of thumbnails, beside the files that name them"""
UNREAD = "[picture]"
"""mark of a picture that cannot be read"""
KINDS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}
"""how the files begin that a page embeds"""
PARTS = ("image", "image_url", "input_image")
"""types of content parts that are pictures"""

Seen = Any
"""a picture: its number in the album, or a PIL picture"""


class Thumbnail(NamedTuple):
    """A small copy of a picture, as the bytes of a file."""

    data: bytes
    kind: str
    """png or jpeg"""
    width: int
    height: int

    @property
    def url(self) -> str:
        """The copy as a data URL."""
        return f"data:image/{self.kind};base64,{base64.b64encode(self.data).decode()}"


def thumbnail(picture: Seen) -> str:
    """A small copy of a picture as a data URL; empty where the picture cannot be read."""
    small = small_copy(picture)
    return "" if small is None else small.url


def small_copy(picture: Seen) -> Thumbnail | None:
    """A copy of at most `LONGEST` pixels a side; None where the picture cannot be read."""
    whole: Any = opened(picture) if isinstance(picture, int) else picture
    if whole is None or not all(whole.size):
        return None
    try:
        small = _plain_mode(whole)
        small.thumbnail((LONGEST, LONGEST))
        exact = _encoded(small, "PNG", optimize=True)
        if len(exact) <= LOSSLESS or "A" in small.getbands():
            return Thumbnail(exact, "png", *small.size)
        loose = _encoded(small, "JPEG", quality=80)
    except Exception:  # as many kinds as there are broken files
        return None
    return Thumbnail(loose, "jpeg", *small.size) if len(loose) < len(exact) else Thumbnail(exact, "png", *small.size)


def _plain_mode(picture: Image) -> Image:
    """A copy in the colours of a screen: grey, RGB or RGBA."""
    if picture.mode[:1] in ("I", "F"):  # 16 bits, 32 bits: the darkest becomes black, the lightest white
        found: Any = picture.getextrema()
        low, high = found
        scale = 255 / ((high - low) or 1)
        return picture.convert("F").point(lambda value: value * scale - low * scale).convert("L")
    clear = "A" in picture.getbands() or "transparency" in picture.info
    return picture.convert("RGBA" if clear else "L" if picture.mode in ("1", "L") else "RGB")


def _encoded(picture: Image, kind: str, **how: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **how)
    return file.getvalue()


# -- marks ---------------------------------------------------------------------------------------


def mark(picture: Seen, tokens: int | None = None, parts: int = 1) -> str:
    """What stands for a picture in a text: [picture 320x240, 64 tokens]."""
    size = _size_of(picture) if isinstance(picture, int) else getattr(picture, "size", None)
    words = "picture" if size is None else f"picture {size[0]}x{size[1]}"
    if tokens is not None:
        words += f", {tokens:,} token{'s' if tokens != 1 else ''}{f' in {parts} parts' if parts > 1 else ''}"
    return f"[{words}]"


@lru_cache(maxsize=4096)
def _size_of(number: int) -> tuple[int, int] | None:
    picture = opened(number)
    return None if picture is None else picture.size


def opened(number: int) -> Image | None:
    """The picture of a number; None where the album has it no more."""
    try:
        found: Image = Album.open(number)
        return found
    except (OSError, LookupError, ValueError):
        return None


def is_picture(value: Any) -> bool:
    """Whether a value is a picture of PIL."""
    return hasattr(value, "getbands") and hasattr(value, "tobytes")


def is_part(part: Any) -> bool:
    """Whether a content part of a message is a picture."""
    return isinstance(part, Mapping) and (part.get("type") in PARTS or part.get("image") is not None)


def has_pictures(messages: Any) -> bool:
    """Whether a conversation has parts that are pictures."""
    if not isinstance(messages, list | tuple):
        return False
    contents = [turn.get("content") for turn in messages if isinstance(turn, Mapping)]
    return any(is_part(part) or is_picture(part) for each in contents if isinstance(each, list) for part in each)


def said_in(content: Sequence[Any], marks: Iterator[str]) -> str:
    """The texts of a message in parts, and marks for its pictures: the next of these, or what the part itself tells."""
    said = []
    for part in content:
        if is_part(part) or is_picture(part):
            said.append(next(marks, None) or mark_of_part(part))
            continue
        text = part.get("text") if isinstance(part, Mapping) else part
        said.append(text if isinstance(text, str) else json.dumps(plain(part), default=str, ensure_ascii=False))
    return " ".join(said)


def mark_of_part(part: Any) -> str:
    """The mark of a content part that is a picture, as far as the part tells its size."""
    if not isinstance(part, Mapping):
        return mark(part)
    for value in (part.get("image"), part.get("image_url"), part.get("url")):
        inner = value.get("url") if isinstance(value, Mapping) and "url" in value else value
        found = plain(inner)
        if isinstance(found, str) and found.startswith("[picture"):
            return found
    return UNREAD


def plain(value: Any, depth: int = 100) -> Any:
    """A value as JSON can hold it: pictures are marks in it, whatever form they have, and other bytes are counted."""
    if isinstance(value, str):
        return _mark_of_url(value) if value.startswith("data:image/") else value
    if is_picture(value):
        return mark(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return _mark_of_bytes(bytes(value))
    if depth == 0:
        return "..."
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), bytes) and set(value) <= {"bytes", "path"}:
            return _mark_of_bytes(value["bytes"])
        return {str(name): plain(each, depth - 1) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each, depth - 1) for each in value]
    if getattr(value, "dtype", None) == "uint8" and len(value.shape) == 3:
        return f"[picture {value.shape[1]}x{value.shape[0]}]"
    return value


def _mark_of_bytes(data: bytes) -> str:
    try:
        from PIL import Image

        with Image.open(io.BytesIO(data)) as picture:
            return mark(picture)
    except Exception:  # Pillow is not installed, or one of the many kinds that it has for broken files
        return f"[{len(data):,} bytes]"


def _mark_of_url(text: str) -> str:
    _, _, data = text.partition(";base64,")
    try:
        found = _mark_of_bytes(base64.b64decode(data))
    except ValueError:
        return UNREAD
    return found if found.startswith("[picture") else UNREAD


# -- files and pages -----------------------------------------------------------------------------


def stored(pictures: Sequence[Seen], folder: Path) -> list[str | None]:
    """Thumbnails in the folder `pictures` of this one, each written once; their paths from this folder.

    None for a picture that cannot be read.
    """
    return [_stored(picture, folder) for picture in pictures]


def _stored(picture: Seen, folder: Path) -> str | None:
    if isinstance(picture, int):
        for kind in KINDS.values():
            if (folder / FOLDER / f"{picture}.{kind}").is_file():
                return f"{FOLDER}/{picture}.{kind}"
    small = small_copy(picture)
    if small is None:
        return None
    name = str(picture) if isinstance(picture, int) else hashlib.sha256(small.data).hexdigest()[:16]
    path = folder / FOLDER / f"{name}.{small.kind}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_bytes(small.data)
        beside.replace(path)
    return f"{FOLDER}/{path.name}"


def read_back(folder: Path, path: Any) -> Thumbnail | None:
    """A thumbnail that `stored` wrote; None where there is none."""
    if not isinstance(path, str) or not path:
        return None
    file = folder / path
    try:
        from PIL import Image

        if not file.resolve().is_relative_to((folder / FOLDER).resolve()):
            return None
        data = file.read_bytes()
        kind = next(kind for start, kind in KINDS.items() if data.startswith(start))
        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
    except Exception:  # see `_mark_of_bytes`
        return None
    return Thumbnail(data, kind, width, height) if max(width, height) <= LONGEST else None


class Gallery:
    """The pictures of a page: each is embedded once, in the page's style, however often it is shown."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._known: dict[int, Thumbnail | None] = {}

    def tag(self, picture: Seen | Thumbnail, caption: str, learned: bool = False) -> str:
        """HTML that shows a picture with a caption below it; the caption alone where the picture cannot be read."""
        small = picture if isinstance(picture, Thumbnail) else self._small(picture)
        name = f"picture{' learned' if learned else ''}"
        if small is None:
            return f'<span class="{name}"><small>{escape(caption)}</small></span>'
        place = self._places.setdefault(self._rule(small), len(self._places))
        shown = f'<span class="shot shot{place}" role="img" aria-label="{escape(caption)}"></span>'
        return f'<span class="{name}">{shown}<small>{escape(caption)}</small></span>'

    def _small(self, picture: Seen) -> Thumbnail | None:
        if not isinstance(picture, int):
            return small_copy(picture)
        if picture not in self._known:
            self._known[picture] = small_copy(picture)
        return self._known[picture]

    @staticmethod
    def _rule(small: Thumbnail) -> str:
        times = max(1, SEEN // max(small.width, small.height))
        sharp = " image-rendering: pixelated;" if times > 1 else ""
        size = f"width: {times * small.width}px; height: {times * small.height}px;"
        return f"{{ {size}{sharp} background-image: url({small.url}); }}"

    @property
    def style(self) -> str:
        """The rules of the page's style; empty without pictures."""
        if not self._places:
            return ""
        return "\n".join([_STYLE, *(f".shot{place} {rule}" for rule, place in self._places.items())])


_STYLE = """
.picture { display: inline-block; vertical-align: bottom; margin: 2px 4px 2px 0; padding: 3px; border-radius: 6px;
  border: 1px solid #cbd5e1; background: #fff; line-height: 1.3; white-space: normal; overflow-wrap: normal;
  width: min-content; min-width: 72px; }
.picture small { display: block; font-size: 11px; color: #64748b; }
.shot { display: block; background: center / 100% 100% no-repeat; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
"""
