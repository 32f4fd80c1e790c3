"""Reads pictures of any form as the bytes of a file, and opens such bytes. What cannot be read is one line."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trl.data.any_text import visible
from trl.data.columns import shown
from trl.import_utils import is_installed, pip_install

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 64_000_000
"""pixels of a picture; a larger one is refused by its header, before it is decoded. Set it to take larger ones"""
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "HEIF")
"""what is read; others of Pillow's formats start programs or are no pictures"""
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")
_CHANNELS = (1, 3, 4)
_TAKEN = "a PIL image, bytes, a path, a data URL, an array of pixels, or a dict with `bytes` or `path`"
_SOURCES = ("image", "image_url", "url", "path", "bytes", "base64", "data", "source")
"""fields of a dict that hold a picture"""
_BEFORE_BASE64 = re.compile(r"data:(?P<kind>[^,]*),(?P<data>.*)", re.DOTALL)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{64,}={0,2}\s*")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+)://")
_OTHERS = (
    (b"version https://git-lfs", "a pointer of Git LFS: run `git lfs pull` where it comes from"),
    (b"%PDF", "a PDF: save its pages as PNG"),
    (b"<svg", "an SVG drawing: save it as PNG"),
    (b"<?xml", "an XML text: save the drawing as PNG"),
    (b"<!doctype", "a web page: download the picture itself"),
    (b"<html", "a web page: download the picture itself"),
)
"""what files that are no pictures begin with, and what they are"""


def read_picture(value: Any, where: str) -> bytes:
    """The picture's file: its bytes as they are, or a PNG of pixels; ValueError where it does not decode whole.

    value: a PIL image, bytes, a path, a data URL or base64, an array, a tensor or nested list of pixels (values of
    0..255, or 0..1 with a point), or a dict with one of them, as `datasets` and chat messages have it.
    where: which picture it is, for the error.
    """
    _need_pillow()
    from PIL.Image import Image

    if isinstance(value, Image):
        return _written(value, where)
    if isinstance(value, Mapping):
        return read_picture(source_of(value, where), where)
    if isinstance(value, str):
        content = _of_text(value, where)
    elif isinstance(value, os.PathLike):
        content = _of_file(os.fspath(value), where)
    elif isinstance(value, bytes | bytearray | memoryview):
        content = bytes(value)
    elif isinstance(value, list | tuple) or hasattr(value, "tolist"):
        return _written(_of_pixels(value, where), where)
    else:
        raise ValueError(f"{where} is {shown(value)}: give {_TAKEN}, or take the entry out")
    _rgb(_header(content, where), where)
    return content


def open_picture(content: bytes, where: str = "the picture") -> Image:
    """The picture in RGB: upright by its EXIF, transparent parts on white, 16 bits scaled to 8."""
    return _rgb(_header(content, where), where)


def is_animated(content: bytes) -> bool:
    """Whether the file holds several pictures, of which the first is taken."""
    image = _header(content, "the picture")
    try:
        return image.format in _ANIMATED and bool(getattr(image, "is_animated", False))
    except Exception:  # a later picture of the file is broken
        return False


def source_of(value: Mapping[str, Any], where: str) -> Any:
    """What stands for the picture in a dict: of `datasets`, or a part of a message."""
    found = {name: value[name] for name in _SOURCES if value.get(name) is not None}
    if found.get("bytes") is not None and "path" in found:
        del found["path"]  # where the bytes come from
    if len(found) != 1:
        says = "two of " + ", ".join(map(repr, found)) if found else "none of " + ", ".join(map(repr, _SOURCES))
        raise ValueError(f"{where} is a dict with {says}, got {shown(value)}: give one of them")
    ((name, source),) = found.items()
    if name in ("base64", "data") and isinstance(source, str) and not source.startswith("data:"):
        return f"data:;base64,{source}"
    return source


def pictures_in(value: Any, column: str) -> list[Any]:
    """The pictures of a row's column, which holds one, a list of them, or None."""
    if value is None:
        return []
    if isinstance(value, list | tuple) or (hasattr(value, "tolist") and getattr(value, "ndim", 0) > 0):
        if _is_pixels(value):
            return [value]
        found: list[Any] = []
        for one in value:
            nested = isinstance(one, list | tuple) and not _is_pixels(one)
            found += pictures_in(one, column) if nested else [one]
        return found
    return [value]


def opened_pictures(value: Any, column: str) -> Any:
    """The value of a row's column with PIL pictures, which stay as they are; a list of them where it holds several."""
    if not isinstance(value, list | tuple) and not hasattr(value, "tolist"):
        return None if value is None else _opened_value(value, f"column '{column}'")
    found = pictures_in(value, column)
    opened = [_opened_value(one, f"picture {place} of column '{column}'") for place, one in enumerate(found)]
    return opened[0] if len(found) == 1 and found[0] is value else opened


def _opened_value(value: Any, where: str) -> Any:
    from PIL.Image import Image

    return value if isinstance(value, Image) else open_picture(read_picture(value, where), where)


def _is_pixels(value: Any) -> bool:
    """Whether lists or an array are the pixels of one picture, not several pictures."""
    shape = _shape(value)
    return len(shape) == 2 or (len(shape) == 3 and (shape[-1] in _CHANNELS or shape[0] in _CHANNELS))


def _shape(value: Any) -> tuple[int, ...]:
    """The shape of an array, or of nested lists of numbers by their first entries; () for another list."""
    if hasattr(value, "tolist"):
        return tuple(getattr(value, "shape", ()))
    shape = []
    while isinstance(value, list | tuple) and value:
        shape.append(len(value))
        value = value[0]
    if isinstance(value, bool | int | float):
        return tuple(shape)
    return (*shape, *inner) if hasattr(value, "tolist") and (inner := _shape(value)) and len(shape) > 1 else ()


def _need_pillow() -> None:
    if not is_installed("PIL"):
        raise ImportError(f"rows with pictures need Pillow: {pip_install('pillow')}")


# --- texts and files ----------------------------------------------------------------------------------------------


def _of_text(text: str, where: str) -> bytes:
    """The bytes that a path, a `file://` URL, a data URL or base64 stands for."""
    if text.startswith("data:"):
        return _of_data_url(text, where)
    scheme = _SCHEME.match(text)
    if scheme and scheme[1].lower() == "file":
        return _of_file(urllib.request.url2pathname(urllib.parse.urlsplit(text).path), where)
    if scheme:
        raise ValueError(
            f"{where} is the address {shown(text)}: nothing is fetched while training; download it first and give its "
            "path, its bytes or a data URL"
        )
    if not text.strip():
        raise ValueError(f"{where} is an empty text: give {_TAKEN}, or take the entry out")
    if _BASE64.fullmatch(text) and not _exists(text):
        return _decoded(text, where)
    return _of_file(text, where)


def _exists(path: str) -> bool:
    try:
        return os.path.exists(os.path.expanduser(path))
    except (OSError, ValueError):
        return False


def _of_data_url(text: str, where: str) -> bytes:
    match = _BEFORE_BASE64.fullmatch(text)
    if match is None:
        raise ValueError(f"{where} is the data URL {shown(text)} without a comma: write data:image/png;base64,...")
    if match["kind"].lower().endswith("base64"):
        return _decoded(match["data"], where)
    return urllib.parse.unquote_to_bytes(match["data"])


def _decoded(text: str, where: str) -> bytes:
    text = "".join(urllib.parse.unquote(text).split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where} is not base64 ({error}): encode the file's bytes by base64.b64encode") from None


def _of_file(path: str | bytes, where: str) -> bytes:
    name = shown(os.fsdecode(path))
    try:
        file = Path(os.fsdecode(path)).expanduser()
        if not file.exists():
            hint = "" if file.is_absolute() else f" (paths begin at the working directory, {Path.cwd()})"
            raise ValueError(f"{where} is the file {name}, which does not exist{hint}: correct the path")
        if not file.is_file():
            raise ValueError(f"{where} is {name}, which is no file: give the path of a picture")
        return file.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{where} is the file {name}, which cannot be read ({error.strerror or type(error).__name__}): correct the "
            "path or its permissions"
        ) from None
    except RuntimeError as error:  # a home folder of no one
        raise ValueError(f"{where} is the file {name}: {error}") from None


# --- pixels -------------------------------------------------------------------------------------------------------


def _of_pixels(value: Any, where: str) -> Image:
    """The picture of an array, a tensor or nested lists: [H, W], [H, W, C] or [C, H, W], C = 1, 3 or 4."""
    from PIL.Image import fromarray

    pixels = _array(value, where)
    if pixels.ndim == 3 and pixels.shape[-1] not in _CHANNELS and pixels.shape[0] in _CHANNELS:
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] not in _CHANNELS):
        raise ValueError(
            f"{where} has the shape {list(pixels.shape)}: pixels are [height, width] or [height, width, 3]"
        )
    if 0 in pixels.shape:
        raise ValueError(f"{where} has the shape {list(pixels.shape)}, so no pixel: take it out")
    _check_size(pixels.shape[1], pixels.shape[0], where)
    return fromarray(np.ascontiguousarray(_in_bytes(pixels, where)))


def _array(value: Any, where: str) -> np.ndarray:
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            value = value.float().numpy() if value.is_floating_point() else value.numpy()
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{where} is {shown(value)}, which is no array of pixels ({str(error)[:100]})") from None
    if array.dtype.kind not in "buif" or not array.ndim:
        raise ValueError(f"{where} is {shown(value)}: give {_TAKEN}, or take the entry out")
    return array


def _in_bytes(pixels: np.ndarray, where: str) -> np.ndarray:
    """The pixels as numbers of 0..255: floats up to 1 are parts of 255, whole numbers above 255 have 16 bits."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * 255
    low, high = pixels.min(), pixels.max()
    fraction = pixels.dtype.kind == "f"
    if not (low >= 0 and high <= (255 if fraction else 65535)):  # nan too
        raise ValueError(
            f"{where} has pixels from {low:g} to {high:g}: scale them to whole numbers of 0..255, or numbers of 0..1"
        )
    factor = 255.0 if fraction and high <= 1 else 1 / 257 if high > 255 else 1.0
    return np.rint(pixels.astype(np.float64) * factor).astype(np.uint8)


# --- files of pictures --------------------------------------------------------------------------------------------


def _header(content: bytes, where: str) -> Image:
    """The picture, opened but not decoded yet."""
    import PIL.Image as pillow

    pillow.init()
    try:
        image = pillow.open(io.BytesIO(content), formats=[name for name in _FORMATS if name in pillow.OPEN])
    except pillow.UnidentifiedImageError:
        raise ValueError(f"{where} {_what_it_is(content)}") from None
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise ValueError(
            f"{where} is too large ({error}): make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS and "
            "trl.data.picture_files.MOST_PIXELS"
        ) from None
    except Exception as error:  # Pillow raises anything for broken files
        raise _broken(where, error) from None
    _check_size(*image.size, where)
    return image


def _check_size(width: int, height: int, where: str) -> None:
    if not width or not height:
        raise ValueError(f"{where} has {width} x {height} pixels: take it out")
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"{where} has {width:,} x {height:,} pixels, more than {MOST_PIXELS:,}: make it smaller, or raise "
            "trl.data.picture_files.MOST_PIXELS"
        )


def _what_it_is(content: bytes) -> str:
    """Why bytes are no picture, and what to do."""
    if not content:
        return "is empty: it has 0 bytes; take the entry out"
    if content[:8] == b"\x89PNG\r\n\x1a\n" and b"\0\0\0\0" in (content[16:20], content[20:24]):
        width, height = (int.from_bytes(content[at : at + 4]) for at in (16, 20))
        return f"has {width} x {height} pixels: take it out"
    if content[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1"):
        way = f"{pip_install('pillow-heif')}` and `pillow_heif.register_heif_opener()"
        return f"is a HEIF file: save it as PNG, or call `{way}`"
    begins = content[:64].lstrip().lower()
    found = next((what for start, what in _OTHERS if begins.startswith(start.lower())), None)
    if found:
        return f"is {found}"
    known = ", ".join(_FORMATS[:-1])
    return f"is no picture that can be read: its {len(content):,} bytes begin with {content[:12]!r}; known are {known}"


def _broken(where: str, error: Exception) -> ValueError:
    why = visible(" ".join(str(error).split()))[:200] or type(error).__name__
    return ValueError(f"{where} cannot be decoded ({why}): copy the file again, or take the row out")


def _rgb(image: Image, where: str) -> Image:
    """The picture as it is seen: decoded whole, upright, in RGB, on white where it is transparent."""
    import PIL.Image as pillow
    from PIL.ImageOps import exif_transpose

    _check_size(*image.size, where)
    try:
        image.load()
        upright = exif_transpose(image)
        if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
            return _scaled(upright, where)
        if upright.has_transparency_data or upright.mode in ("La", "RGBa"):
            if upright.mode == "La":
                upright = upright.convert("LA")
            clear = upright.convert("RGBA")
            return pillow.alpha_composite(pillow.new("RGBA", clear.size, "white"), clear).convert("RGB")
        return upright if upright.mode == "RGB" else upright.convert("RGB")
    except ValueError as error:
        raise (error if str(error).startswith(where) else _broken(where, error)) from None
    except Exception as error:  # Pillow raises anything for broken files
        raise _broken(where, error) from None


def _scaled(image: Image, where: str) -> Image:
    """A picture of numbers that are wider than bytes; Pillow's own conversion would clip them at 255."""
    from PIL.Image import fromarray

    pixels = np.asarray(image)
    if image.mode.startswith("I;16"):
        return fromarray(np.rint(pixels / 257).astype(np.uint8)).convert("RGB")
    return fromarray(_in_bytes(pixels, where)).convert("RGB")


def _written(image: Image, where: str) -> bytes:
    """The picture as the bytes of a PNG."""
    file = io.BytesIO()
    _rgb(image, where).save(file, "PNG", compress_level=1)
    return file.getvalue()
