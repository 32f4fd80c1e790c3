"""Type hints of settings: values of YAML and words of a line are read by them, and they give the JSON schema."""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

NONE = type(None)
ORDER = (NONE, bool, int, float)
"""members of a union that are tried first, in this order; text is tried last, because it takes everything"""


def read_value(name: str, hint: Any, value: Any) -> Any:
    """The value as its hint has it; the ValueError names the setting and says what it takes."""
    try:
        return _read(hint, value)
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"{name}={value!r}: give {in_words(hint)}") from None


def members(hint: Any) -> list[Any]:
    """The members of a union, in the order in which they are tried; of another hint, itself."""
    if get_origin(hint) not in (Union, types.UnionType):
        return [hint]
    given = list(get_args(hint))
    if any(_is_enum(member) for member in given):  # its names are all the texts that it takes
        given = [member for member in given if member is not str]
    rank = {member: place for place, member in enumerate(ORDER)}
    return sorted(given, key=lambda member: rank.get(member, len(ORDER) + (member is str)))


def takes_several(hint: Any) -> bool:
    """Whether more than one word of a command line may follow the option."""
    return any(get_origin(member) in (list, tuple) for member in members(hint))


def takes_no_word(hint: Any) -> bool:
    """Whether the option alone means True."""
    return any(member is bool for member in members(hint))


def in_words(hint: Any) -> str:
    """What a setting takes, for an error or a help text."""
    return " or ".join(dict.fromkeys(_word(member) for member in members(hint) if member is not NONE))


def _word(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if _is_enum(hint):
        return "one of " + ", ".join(str(choice.value) for choice in hint)
    if origin is list:
        return "a list"
    if origin is tuple:
        return f"a list of {len(arguments)}"
    if origin is dict or hint is dict or is_dataclass(hint):
        return "an object (JSON)"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _is_enum(hint: Any) -> bool:
    return inspect.isclass(hint) and issubclass(hint, Enum)


def _read(hint: Any, value: Any) -> Any:
    candidates = members(hint)
    if len(candidates) == 1:
        return _read_one(candidates[0], value)
    if NONE in candidates and str not in candidates and str(value).lower() in ("none", "null"):
        return None
    if str in candidates and isinstance(value, str) and value.lower() not in ("true", "false"):
        candidates = [member for member in candidates if member is not bool]  # "no" is a word here
    for member in candidates:
        try:
            return _read_one(member, value, wrap=False)
        except (TypeError, ValueError, KeyError):
            continue
    several = [member for member in candidates if get_origin(member) is list]
    return _read_one(several[0], value) if several else _refuse(value)


def _refuse(value: Any) -> Any:
    raise TypeError(value)


def _read_one(hint: Any, value: Any, wrap: bool = True) -> Any:
    origin = get_origin(hint)
    if hint is NONE:
        return None if value is None else _refuse(value)
    if origin is Literal:
        choices = {str(choice).lower(): choice for choice in reversed(get_args(hint))}
        word = str(value).lower()
        return choices[word if word in choices else {"true": "yes", "false": "no"}[word]]  # YAML reads `no` as False
    if _is_enum(hint):
        word = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value  # YAML reads `no` as False
        return hint(word).value
    if origin is list:
        return _read_list(get_args(hint)[0], value, wrap)
    if origin is tuple:
        items, hints = list(_parsed(value)), get_args(hint)
        return tuple(_read(each, item) for each, item in zip(hints, items, strict=True))
    if hint is dict or origin is dict or is_dataclass(hint):
        return _read_mapping(hint, value)
    readers = {bool: _read_bool, int: _read_int, float: _read_float, str: _read_text}
    return readers[hint](value) if hint in readers else value


def _parsed(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _read_list(hint: Any, value: Any, wrap: bool) -> list[Any]:
    if isinstance(value, str) and value.startswith("["):
        value = json.loads(value)
    if isinstance(value, list | tuple):
        return [_read(hint, item) for item in value]
    return [_read(hint, value)] if wrap else _refuse(value)


def _read_mapping(hint: Any, value: Any) -> Any:
    if is_dataclass(hint):
        made: Any = hint
        if isinstance(value, made):
            return value
        value = json.loads(value) if isinstance(value, str) and value.startswith("{") else value
        if isinstance(value, str):
            return made(value)
        hints = settings_hints(made)
        return made(**{name: _read(hints[name], item) for name, item in value.items()})
    value = _parsed(value)
    return dict(value) if isinstance(value, Mapping) else _refuse(value)


def _read_bool(value: Any) -> bool:
    words = {"yes": True, "true": True, "t": True, "y": True, "1": True,
             "no": False, "false": False, "f": False, "n": False, "0": False}  # fmt: skip
    return words[str(value).lower()]


def _read_int(value: Any) -> int:
    number = _read_float(value)
    return int(number) if number == int(number) else _refuse(value)


def _read_float(value: Any) -> float:
    return _refuse(value) if isinstance(value, bool) or value is None else float(value)


def _read_text(value: Any) -> str:
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else _refuse(value)


def settings_hints(dataclass_type: Any) -> dict[str, Any]:
    """The resolved hints of the fields that a constructor takes; one whose option may stand alone takes True too."""
    hints = get_type_hints(dataclass_type)
    return {
        entry.name: bool | hints[entry.name] if entry.metadata.get("const") is True else hints[entry.name]
        for entry in fields(dataclass_type)
        if entry.init
    }


def default_of(entry: Any) -> Any:
    """The default of a dataclass field; None where there is none."""
    if entry.default_factory is not MISSING:
        return entry.default_factory()
    return None if entry.default is MISSING else entry.default


def schema_of(hint: Any) -> dict[str, Any]:
    """The JSON schema of a hint's values as YAML has them."""
    if len(members(hint)) > 1:
        return {"anyOf": [schema_of(member) for member in members(hint)]}
    hint = members(hint)[0]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {"enum": list(arguments)}
    if _is_enum(hint):
        return {"enum": [choice.value for choice in hint]}
    if origin is list:
        return {"type": "array", "items": schema_of(arguments[0])}
    if origin is tuple:
        return {"type": "array", "prefixItems": list(map(schema_of, arguments)), "minItems": len(arguments)}
    if is_dataclass(hint):
        required = [entry.name for entry in fields(hint) if entry.default is MISSING is entry.default_factory]
        properties = {name: schema_of(each) for name, each in settings_hints(hint).items()}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    names = {NONE: "null", bool: "boolean", int: "integer", float: "number", str: "string", dict: "object"}
    name = names.get(origin or hint)
    return {"type": name} if name else {}
