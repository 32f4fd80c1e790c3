"""Pictures among the tokens of a row: each has a number, and its tokens are that number, below zero.

A row of token ids stays one list of numbers everywhere. Where a model wants the token of a picture, the row holds
`token_of(number)` instead, and the number leads to the picture (`Album`). So rows that differ in a picture differ, and
whoever carries ids carries pictures. What a processor makes of a picture, as text and as tensors, `PictureReader` says.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import ProcessorMixin

from trl.data.encode import Ids, Span
from trl.data.picture_files import open_picture

MOST_KEPT = 2**28
"""bytes of tensors of pictures that a reader keeps, so that a picture of several passes is read once"""
_TEXT = ("input_ids", "attention_mask", "text_replacement_offsets", "labels")
"""what a processor gives that is not of pictures"""


def token_of(number: int) -> int:
    """What stands in a row of ids for each token of this picture."""
    return -1 - number


def number_of(token: int) -> int:
    """The picture that a token below zero belongs to."""
    return -1 - token


def pictures_among(ids: Iterable[int]) -> list[int]:
    """The numbers of the pictures among the ids, each once, in the order in which they come."""
    return list(dict.fromkeys(number_of(token) for token in ids if token < 0))


# -- the album --------------------------------------------------------------------------------


def _folder() -> Path:
    """Beside the cached data sets, whose rows hold the numbers."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    datasets = os.environ.get("HF_DATASETS_CACHE") or os.path.join(home, "datasets")
    return Path(datasets).expanduser() / "trl_pictures"


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 2


def _write(path: Path, content: bytes) -> None:
    """The whole file at once, readable as the user's other files are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.urandom(8).hex()}")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class Album:
    """The files of pictures under their numbers, which are hashes of what the files hold.

    They lie in a folder beside the cached data sets, for all processes of this machine and for later runs.
    """

    @staticmethod
    def keep(content: bytes) -> int:
        """The number of a picture, given its file's content."""
        number = _hash(content)
        path = Album.path(number)
        try:
            before = path.read_bytes() if path.exists() else b""
            if before != content:  # the file may be broken
                if _hash(before) == number:
                    raise ValueError(f"two different pictures have the number {number}: remove {path}")
                _write(path, content)
        except OSError as error:
            raise ValueError(
                f"the folder of pictures, {path.parent.parent}, cannot be written ({error.strerror}): set "
                "HF_DATASETS_CACHE to a folder that can"
            ) from error
        return number

    @staticmethod
    def stamp() -> str:
        """What is another one once the folder was removed, so that cached rows are not of pictures that are gone."""
        path = _folder() / "stamp"
        if not path.exists():
            with contextlib.suppress(OSError):  # nobody can write there, or remove it
                _write(path, os.urandom(8).hex().encode())
        with contextlib.suppress(OSError):
            return path.read_text()
        return ""

    @staticmethod
    def path(number: int) -> Path:
        """Where the picture's file lies."""
        name = f"{number:016x}"
        return _folder() / name[-2:] / name

    @staticmethod
    def content(number: int) -> bytes:
        """The picture's file; ValueError where it is gone."""
        try:
            return Album.path(number).read_bytes()
        except OSError as error:
            raise ValueError(
                f"a picture of the data set is not at {Album.path(number)} any more ({error.strerror}): remove the "
                "cached data set, so that its rows are read again"
            ) from error

    @staticmethod
    def open(number: int) -> Any:
        """The picture, in RGB and upright."""
        return open_picture(Album.content(number), f"the picture at {Album.path(number)}")


# -- what a processor makes of pictures -------------------------------------------------------


class Expanded(NamedTuple):
    """A text in which pictures stand as the processor writes them."""

    text: str
    spans: list[Span]
    """those of the given text, where they are now"""
    hidden: list[Span]
    """what stands for pictures"""


class _Read(NamedTuple):
    """What the processor makes of one picture."""

    text: str
    values: dict[str, Tensor]
    size: int
    """bytes"""


class PictureReader:
    """What a processor makes of pictures: the text that stands for one, its tokens, and the tensors of a model's call.

    Found out by calling the processor. ValueError for one that does not say which token stands for a picture.
    """

    def __init__(self, processor: Any) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        placeholder = getattr(processor, "image_token", None)
        if not isinstance(placeholder, str) or getattr(processor, "image_processor", None) is None:
            raise ValueError(
                f"{type(processor).__name__} does not say which token stands for a picture (`image_token`)"
            )
        self.placeholder: str = placeholder
        """what stands for a picture in a text"""
        ids = [own for own in getattr(processor, "image_token_ids", None) or () if own is not None]
        known = ids or [self.tokenizer.convert_tokens_to_ids(placeholder)]
        self.image_token_id = int(known[0])
        """what stands for each part of a picture among ids"""
        self._settings = self.fingerprint()
        self._forget()

    def _forget(self) -> None:
        self._lock = RLock()  # rollouts that are drawn ahead are read in a thread of their own
        self._read: OrderedDict[int, _Read] = OrderedDict()
        self._counts: dict[int, int] = {}
        self._joins: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        kept = ("processor", "tokenizer", "placeholder", "image_token_id", "_settings")
        return {name: vars(self)[name] for name in kept}  # what was read is read again

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)  # the tokenizer, which holds this reader, may not be whole yet: it is not asked
        self._forget()

    def fingerprint(self) -> str:
        """What rows depend on, as text."""
        parts = [type(self.processor).__name__, self.processor.to_dict(), self.processor.image_processor.to_dict()]
        return json.dumps(parts, sort_keys=True, default=str)

    def is_of(self, processor: Any) -> bool:
        """Whether it reads by this processor as its settings are now."""
        return self.processor is processor and self.fingerprint() == self._settings

    # -- text and ids --

    def expand(self, text: str, spans: Sequence[Span], numbers: Sequence[int]) -> Expanded:
        """The text with these pictures where its placeholders are, in order; ValueError where it has more or fewer."""
        pieces = text.split(self.placeholder)
        if len(pieces) - 1 != len(numbers):
            raise ValueError(
                f"the text has {len(pieces) - 1} times {self.placeholder!r}, which stands for a picture, and "
                f"{len(numbers)} pictures: give as many of one as of the other"
            )
        if not numbers:
            return Expanded(text, list(spans), [])
        made = [self.text_of(number) for number in numbers]
        width = len(self.placeholder)
        befores = list(accumulate(len(piece) + width for piece in pieces[:-1]))  # where each placeholder ends
        grown = [0, *accumulate(len(one) - width for one in made)]

        def moved(edge: int) -> int:
            count = sum(end <= edge for end in befores)
            inside = count < len(befores) and befores[count] - width < edge
            return (befores[count] - width if inside else edge) + grown[count]

        whole = [pieces[0]]
        for one, piece in zip(made, pieces[1:], strict=True):
            whole += [one, piece]
        hidden = [(end - width + grown[i], end + grown[i + 1]) for i, end in enumerate(befores)]
        return Expanded("".join(whole), [(moved(start), moved(end)) for start, end in spans], hidden)

    def tokens(self, ids: Sequence[int], numbers: Sequence[int]) -> Ids:
        """The ids of an expanded text with the tokens of its pictures; ValueError where a picture was cut."""
        filled = [token_of(number) for number in numbers for _ in range(self.count(number))]
        if sum(own == self.image_token_id for own in ids) != len(filled):
            found = sum(own == self.image_token_id for own in ids)
            raise ValueError(f"the pictures of a row have {len(filled)} tokens, and {found} stand in its ids")
        rest = iter(filled)
        return [next(rest) if own == self.image_token_id else own for own in ids]

    def text_of(self, number: int) -> str:
        """What the processor writes for a picture in place of the placeholder."""
        return self._of(number).text

    def count(self, number: int) -> int:
        """How many tokens of a picture's text stand for parts of it."""
        if number not in self._counts:
            found = sum(own == self.image_token_id for own in self._ids_in(self.text_of(number)))
            if not found:
                raise ValueError(
                    f"{type(self.processor).__name__} writes {self.text_of(number)[:50]!r} for a picture, in which the "
                    f"token {self.image_token_id} does not stand: the model would not see it"
                )
            self._counts[number] = found
        return self._counts[number]

    def occurrences(self, ids: Iterable[int]) -> list[int]:
        """The pictures among the ids as they come, as often as they come; ValueError where one is not whole."""
        found: list[int] = []
        left = 0
        for token in ids:
            if token >= 0:
                continue
            number = number_of(token)
            if not left:
                found.append(number)
                left = self.count(number)
            elif number != found[-1]:
                raise ValueError(f"a picture of {self.count(found[-1])} tokens ends {left} tokens early in a row")
            left -= 1
        if left:
            raise ValueError(f"a picture of {self.count(found[-1])} tokens ends {left} tokens early in a row")
        return found

    def plain(self, ids: Ids) -> Ids:
        """The ids as the tokenizer knows them."""
        return [self.image_token_id if own < 0 else own for own in ids]

    # -- tensors --

    def values(self, numbers: Sequence[int], names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The tensors of these pictures in this order, as the processor gives them for one row. names: only these."""
        parts = [self._of(number).values for number in numbers]
        wanted = parts[0].keys() if names is None and parts else set(names or ()) & set(parts[0] if parts else ())
        if len(parts) == 1:
            return {name: parts[0][name] for name in wanted}
        return {name: _joined([part[name] for part in parts], self._join(name)) for name in wanted}

    def aligned(self, ids_BL: Tensor) -> dict[str, Tensor]:
        """What the processor says of each token beside its id (token types), for ids as the model sees them."""
        found = {}
        for name, table in self._tables.items():
            column_BL = torch.zeros_like(ids_BL)
            for own, value in table.items():
                column_BL = column_BL.masked_fill(ids_BL == own, value)
            found[name] = column_BL
        return found

    @property
    def samples(self) -> tuple[int, int]:
        """Two pictures of different sizes, for probes."""
        return Album.keep(_sample(64, 48)), Album.keep(_sample(40, 56))

    def ids_of(self, number: int) -> Ids:
        """The tokens of a picture alone, as they stand in a row."""
        return self.tokens(self._ids_in(self.text_of(number)), [number])

    def _of(self, number: int) -> _Read:
        with self._lock:
            read = self._read.get(number)
            if read is None:
                read = self._read[number] = self._read_now(number)
                while len(self._read) > 1 and sum(one.size for one in self._read.values()) > MOST_KEPT:
                    self._read.popitem(last=False)
            self._read.move_to_end(number)
            return read

    def _read_now(self, number: int) -> _Read:
        output = self._call([number])
        offsets = output.get("text_replacement_offsets")
        text = offsets[0][0]["replacement"] if offsets else self._written(output["input_ids"][0].tolist())
        values = {name: own for name, own in output.items() if name not in _TEXT and not self._is_aligned(name)}
        return _Read(text, values, sum(own.nbytes for own in values.values()))

    def _written(self, ids: Ids) -> str:
        """The text of the ids that an older processor gives for a picture, without BOS and EOS around it."""
        around = set(self.tokenizer("", verbose=False)["input_ids"])
        inner = [place for place, own in enumerate(ids) if own not in around]
        kept = ids[inner[0] : inner[-1] + 1] if inner else []
        text = str(self.tokenizer.decode(kept, skip_special_tokens=False))
        if self._ids_in(text) != kept:
            raise ValueError(
                f"{type(self.processor).__name__}: what it writes for a picture, {text!r}, is not read back"
            )
        return text

    def _ids_in(self, text: str) -> Ids:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _call(self, numbers: Sequence[int], around: str = "") -> Mapping[str, Any]:
        """What the processor gives for a text of these pictures, with `around` on both sides."""
        text = around + self.placeholder * len(numbers) + around
        images = [[Album.open(number) for number in numbers]]
        options: dict[str, Any] = {"return_tensors": "pt"}
        try:
            return self.processor(text=[text], images=images, return_text_replacement_offsets=True, **options)  # type: ignore[no-any-return]
        except TypeError:  # an older processor's, which does not know the option
            return self.processor(text=[text], images=images, **options)  # type: ignore[no-any-return]

    def _is_aligned(self, name: str) -> bool:
        return name in self._tables

    @cached_property
    def _tables(self) -> dict[str, dict[int, int]]:
        """For each column of numbers beside the ids what it holds for an id, 0 where it is not named."""
        output = self._call(self.samples, around="x")
        ids_L = output["input_ids"][0]
        tables: dict[str, dict[int, int]] = {}
        for name, column in output.items():
            if name in _TEXT or not isinstance(column, Tensor) or column.shape != output["input_ids"].shape:
                continue
            pairs = set(zip(ids_L.tolist(), column[0].tolist(), strict=True))
            if len(pairs) > len({own for own, _ in pairs}):
                raise ValueError(
                    f"{type(self.processor).__name__}: {name} does not follow the ids, which is not known here"
                )
            tables[name] = {own: int(value) for own, value in pairs if value}
        return tables

    def _join(self, name: str) -> int:
        """Along which axis the tensors of several pictures are joined."""
        if name not in self._joins:
            both = self._call(self.samples)[name]
            alone = [self._of(number).values[name] for number in self.samples]
            for axis in range(min(2, both.ndim)):
                joined = _joined(alone, axis)
                if joined.shape == both.shape and torch.equal(joined, both):
                    self._joins[name] = axis
                    break
            else:
                raise ValueError(
                    f"{type(self.processor).__name__}: {name} of two pictures is not made of those of each "
                    f"({[list(one.shape) for one in alone]}, {list(both.shape)}), which is not known here"
                )
        return self._joins[name]


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    """The parts one after the other, filled up with zeros where they are smaller along other axes."""
    sizes = [max(part.shape[i] for part in parts) for i in range(parts[0].ndim)]
    padded = []
    for part in parts:
        room = [size - own if i != axis else 0 for i, (size, own) in enumerate(zip(sizes, part.shape, strict=True))]
        pads = [edge for own in reversed(room) for edge in (0, own)]
        padded.append(torch.nn.functional.pad(part, pads) if any(room) else part)
    return torch.cat(padded, axis)


@lru_cache(maxsize=8)
def _sample(width: int, height: int) -> bytes:
    """A picture of colours that change from pixel to pixel."""
    from PIL import Image

    image = Image.new("RGB", (width, height))
    image.putdata([((3 * i) % 251, (i * i // 7) % 241, (11 * i) % 239) for i in range(width * height)])
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


# -- which reader goes with a tokenizer -------------------------------------------------------

_READER = "_reads_pictures"
"""the attribute of a tokenizer that holds what reads pictures for its rows"""


def read_by(processor: Any) -> Any:
    """The tokenizer of a processor, with its chat template, which from now on knows what reads pictures for it.

    A tokenizer stays as it is.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or not isinstance(processor, ProcessorMixin):
        return processor
    if getattr(processor, "chat_template", None) is not None:
        tokenizer.chat_template = processor.chat_template
    known = reader_of(tokenizer)
    if known is None or not known.is_of(processor):
        with contextlib.suppress(ValueError):  # it reads sounds, say
            vars(tokenizer)[_READER] = PictureReader(processor)
    return tokenizer


def processor_of(tokenizer: Any) -> Any:
    """The processor that the tokenizer belongs to, which is saved in its place; without one the tokenizer."""
    reader = reader_of(tokenizer)
    return tokenizer if reader is None else reader.processor


def reader_of(tokenizer: Any) -> PictureReader | None:
    """What reads pictures for the rows of this tokenizer; None: nothing does."""
    return getattr(tokenizer, "__dict__", {}).get(_READER)


def plain_ids(tokenizer: Any, ids: Iterable[int]) -> Ids:
    """A row's ids to be read as text: a picture, or a tile of it, is one token; none where nothing reads pictures."""
    row = list(map(int, ids))
    if min(row, default=0) >= 0:
        return row
    reader = reader_of(tokenizer)
    starts = (token for token, before in zip(row, [0, *row], strict=False) if token >= 0 or token != before)
    known = [token for token in starts if token >= 0 or reader is not None]
    return known if reader is None else reader.plain(known)
