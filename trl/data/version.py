"""The version of the code that makes rows, for the keys of cached data sets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib import import_module
from types import CodeType, FunctionType, ModuleType
from typing import Any

_ROW_CODE = (
    "batches", "chat", "columns", "encode", "formats", "messages", "packed_dataset", "packing", "prompt_rows",
    "rendering", "report", "row_job", "supervised_rows", "tokenize",
)  # fmt: skip
"""modules of this room that rows, their masks or the counts of the report depend on"""


def code_version() -> str:
    """A hash of what the functions of this room do, as they are now: not of comments and the places of lines."""
    digest = hashlib.sha256()
    for name in _ROW_CODE:
        for text in _texts_of(import_module(f"{__package__}.{name}")):
            digest.update(text.encode())
    return digest.hexdigest()


def _texts_of(module: ModuleType) -> Iterator[str]:
    """What the module's functions, methods and plain values are, as texts."""
    for name, value in sorted(vars(module).items()):
        if isinstance(value, FunctionType):
            yield from (name, *_of_function(value))
        elif isinstance(value, type) and value.__module__ == module.__name__:
            for attribute, member in sorted(vars(value).items()):
                yield from (name, attribute, *_of_member(member))
        elif name.isupper() or (name.startswith("_") and not name.startswith("__")):
            yield from (name, repr(value) if isinstance(value, str | int | tuple | dict) else "")


def _of_member(member: Any) -> Iterator[str]:
    for inner in (getattr(member, "__func__", None), getattr(member, "func", None), getattr(member, "fget", None)):
        if isinstance(inner, FunctionType):
            yield from _of_function(inner)
    if isinstance(member, FunctionType):
        yield from _of_function(member)
    elif isinstance(member, str | int | tuple):
        yield repr(member)


def _of_function(function: FunctionType) -> Iterator[str]:
    yield repr(function.__defaults__)
    yield from _of_code(function.__code__)


def _of_code(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield repr(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _of_code(constant)
        else:  # the order of a set of texts is another one in each process
            yield repr(sorted(constant, key=repr) if isinstance(constant, frozenset) else constant)
