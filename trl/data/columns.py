"""Reads the columns of a row. What cannot be meant is a ValueError of one line that names the column."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import numpy as np

from trl.data.any_text import visible
from trl.data.encode import Ids

DEPTH = 100
"""how deep lists and dicts may be nested"""
_LARGEST_ID = 2**31 - 1
_LEAST_PICTURE = -(2**62)
"""the number of a picture has 62 bits, and its token is -1 - number"""
_LARGEST = float(np.finfo(np.float32).max)
_LONGEST_BITS = 10_000
"""of a whole number that can be printed; Python writes 4,300 digits at most"""
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 20
UNREADABLE = (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, NotImplementedError)
"""what the code that reads a row raises for values that nobody thought of"""


def shown(value: Any) -> str:
    """Any value on one line, shortened."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # it nests too deeply, is a number too long to print, or cannot say what it is
        text = f"a {type(value).__name__}"
    return visible(" ".join(text.split()))[:80]


@contextmanager
def at_row(index: int, name: str, columns: Sequence[str] = ()) -> Iterator[None]:
    """Say in an error which row it is about, and which columns it is made of where it names none."""
    try:
        yield
    except (ValueError, *UNREADABLE) as error:
        text = visible(" ".join(str(error).split()))
        if not isinstance(error, ValueError):
            text = f"it could not be read ({type(error).__name__}: {text[:200]})"
        if columns and "column" not in text:
            text += f" (column{'s' if len(columns) > 1 else ''} {', '.join(map(repr, columns))})"
        raise ValueError(f"row {index} of the {name} data set: {text}") from error


def check_text(text: str, where: str) -> None:
    """ValueError for a lone surrogate, of which no tokenizer can make tokens."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = ascii(text[error.start])[1:-1]
        raise ValueError(
            f"{where} has half a character ({broken}, a lone surrogate) at character {error.start}: repair the text, "
            "for example by text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        ) from None


def from_json(text: str, where: str) -> Any:
    """What JSON text says."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        cause = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{where} is text but not JSON: {cause}") from None


def plain(value: Any, where: str, strict: bool = True, depth: int = DEPTH) -> Any:
    """A value of texts, finite numbers, lists and dicts, arrays and tuples as lists; ValueError for another.

    strict: False leaves other objects as they are, where nothing may ever read them.
    """
    if isinstance(value, str):
        check_text(value, where)
    elif isinstance(value, Mapping | list | tuple):
        if depth == 0:
            raise ValueError(f"{where} is nested more than {DEPTH} deep")
        if not isinstance(value, Mapping):
            return [plain(own, where, strict, depth - 1) for own in value]
        check_keys(value, where)
        return {key: plain(own, where, strict, depth - 1) for key, own in value.items()}
    elif unwrapped(value) is not value:
        return plain(unwrapped(value), where, strict, depth)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} has the number {value}: numbers of data are finite")
    elif isinstance(value, int) and value.bit_length() > _LONGEST_BITS:
        raise ValueError(f"{where} has a number of {value.bit_length():,} bits")
    elif isinstance(value, bytes) or (
        strict and not (value is None or callable(value) or isinstance(value, int | float))
    ):
        raise ValueError(f"{where} has {shown(value)}: only texts, numbers, lists and dicts can be printed")
    return value


def check_keys(value: Mapping[Any, Any], where: str) -> None:
    """ValueError where a key is no text."""
    for key in value:
        if not isinstance(key, str):
            raise ValueError(f"a key in {where} is {shown(key)}: keys are texts")
        check_text(key, f"a key in {where}")


def unwrapped(value: Any) -> Any:
    """Arrays and tensors as lists, or as the number that they are; other values as they are."""
    if not hasattr(value, "tolist"):
        return value
    try:
        return value.tolist()
    except (TypeError, RuntimeError, AttributeError):  # a tensor without data, a class
        return value


def listed(value: Any) -> Any:
    """One dict alone as a list of one, arrays and tensors as lists; other values as they are."""
    value = unwrapped(value)
    return [value] if isinstance(value, Mapping) else value


def list_in(row: Mapping[str, Any], column: str, what: str) -> list[Any]:
    """The row's list in that column, from a tuple, an array or a tensor too; `what` it should be, for the error."""
    value = unwrapped(row.get(column))
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray | memoryview):
        raise ValueError(f"column '{column}' should be {what}, got {shown(row.get(column))}")
    return list(value)


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The row's text in that column."""
    value = row.get(column)
    if not isinstance(value, str):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        hint = f" (of a CSV file? converters={{'{column}': str}} of load_dataset keeps its texts)" if number else ""
        raise ValueError(f"column '{column}' should be a text, got {shown(value)}{hint}")
    check_text(value, f"column '{column}'")
    return value


def whole_numbers(row: Mapping[str, Any], column: str, what: str = "a list of whole numbers") -> list[int]:
    """The row's whole numbers in that column."""
    values = list_in(row, column, what)
    if set(map(type, values)) <= {int}:
        return values
    numbers = [unwrapped(value) for value in values]
    for place, number in enumerate(numbers):
        if not isinstance(number, Integral) or isinstance(number, bool):
            raise ValueError(
                f"column '{column}' should be {what}, got {shown(values)} (entry {place}: {shown(number)})"
            )
    return list(map(int, numbers))


def ids_of(row: Mapping[str, Any], column: str, pictured: bool = False) -> Ids:
    """The row's token ids in that column; `pictured`: those of pictures, below zero, may be among them."""
    ids = whole_numbers(row, column, "a list of token ids")
    check_ids(ids, f"column '{column}'", pictured)
    return ids


def check_ids(ids: Ids, where: str, pictured: bool = False) -> None:
    """ValueError where one of them is the id of no token in any vocabulary, nor of a picture where rows have them."""
    least = _LEAST_PICTURE if pictured else 0
    if ids and not (min(ids) >= least and max(ids) <= _LARGEST_ID):
        place = next(i for i, own in enumerate(ids) if not least <= own <= _LARGEST_ID)
        raise ValueError(
            f"{where} should be a list of token ids, got {shown(ids[place])} at entry {place}: ids are 0 or more"
        )


def check_embedded(ids: Ids, where: str, embeddings: int | None, pictured: bool = False) -> None:
    """ValueError where an id is beyond the rows of the model's embedding; `pictured`: as in `check_ids`."""
    check_ids(ids, where, pictured)
    if embeddings is not None and ids and max(ids) >= embeddings:
        raise ValueError(
            f"{where} has the id {max(ids)} at entry {ids.index(max(ids))}, and the model's embedding has {embeddings} "
            "rows: give ids of its own tokenizer, or call `model.resize_token_embeddings(len(tokenizer))`"
        )


def flag_in(value: Any, known: tuple[int, ...] = (0, 1)) -> int | None:
    """0 or 1 for what says so, else None; `known`: the numbers that are flags."""
    value = unwrapped(value)
    return int(value) if isinstance(value, int | float) and value in known else None


def flags_in(
    row: Mapping[str, Any], column: str, what: str = "0 or 1 for each token", known: tuple[int, ...] = (0, 1)
) -> list[int]:
    """The row's list of true and false in that column, as ones and zeros."""
    values = list_in(row, column, f"a list of {what}")
    flags = [flag_in(value, known) for value in values]
    for place, flag in enumerate(flags):
        if flag is None:
            raise ValueError(f"column '{column}' should hold {what}, got {shown(values[place])} at entry {place}")
    return [flag for flag in flags if flag is not None]


def mask_for(row: Mapping[str, Any], column: str, ids: Sequence[int], of_ids: str = "input_ids") -> list[int]:
    """The row's mask in that column, with an entry for each id."""
    return same_length(flags_in(row, column), column, ids, of_ids)


def same_length(values: list[int], column: str, ids: Sequence[int], of_ids: str = "input_ids") -> list[int]:
    """The values; ValueError where there is not one for each id."""
    if len(values) != len(ids):
        raise ValueError(f"column '{column}' has {len(values)} entries for {len(ids)} `{of_ids}`")
    return values


def number_of(row: Mapping[str, Any], column: str) -> float:
    """The row's number in that column, which is finite, in single precision too."""
    value = row.get(column)
    single = unwrapped(value)
    single = single[0] if isinstance(single, list) and len(single) == 1 and single is not value else single
    if not isinstance(single, Real) or isinstance(single, bool) or not -_LARGEST <= float_of(single) <= _LARGEST:
        raise ValueError(f"column '{column}' should be a finite number, got {shown(value)}")
    return float(single)


def float_of(number: Real) -> float:
    """The number; infinite where it is too large."""
    try:
        return float(number)
    except OverflowError:
        return math.inf
