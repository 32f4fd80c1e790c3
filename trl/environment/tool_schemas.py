"""Tools as users give them: their names, and how they are described to a chat model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import partial
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers.utils.chat_template_utils import get_json_schema

Tool = Callable[..., Any]


def named_tools(tools: Sequence[Tool] | Mapping[str, Tool]) -> dict[str, Tool]:
    """The tools by name: functions, methods, `functools.partial` of them, and objects with `__call__`.

    What a partial has fixed cannot be given again. ValueError for what cannot be called, and for a name twice.
    """
    pairs = tools.items() if isinstance(tools, Mapping) and "function" not in tools else enumerate(_listed(tools))
    named: dict[str, Tool] = {}
    for place, tool in pairs:
        if not callable(tool):
            said = f" of {_schema_name(tool)!r}" if isinstance(tool, Mapping) else ""
            kind = "JSON schema" if isinstance(tool, Mapping) else type(tool).__name__
            raise ValueError(
                f"tools[{place!r}]: a {kind}{said} holds no code that could run; give the function itself, its schema "
                "is made from its type hints and docstring"
            )
        name = place if isinstance(place, str) else _name_of(tool)
        if name in named:
            raise ValueError(f"tools: several have the same name ({name}); give a dict of tools by name")
        named[name] = _with_fixed(tool) if isinstance(tool, partial) else tool
    return named


def _listed(tools: Any) -> Sequence[Any]:
    return [tools] if isinstance(tools, Mapping) or callable(tools) else tools


def _schema_name(schema: Mapping[str, Any]) -> Any:
    function = schema.get("function")
    return (function if isinstance(function, Mapping) else schema).get("name")


def _name_of(tool: Tool) -> str:
    name = getattr(tool, "__name__", None)
    if name is None and isinstance(tool, partial):
        return _name_of(tool.func)
    return name if isinstance(name, str) else type(tool).__name__


def _with_fixed(tool: partial[Any]) -> Tool:
    """The partial as a function that refuses what has been fixed."""

    def call(**arguments: Any) -> Any:
        again = sorted(tool.keywords.keys() & arguments.keys())
        if again:
            raise TypeError(f"{_name_of(tool)}() got an unexpected argument {again[0]!r}")
        return tool(**arguments)

    call.__wrapped__ = tool  # type: ignore[attr-defined]
    return call


def schema_of(name: str, tool: Tool) -> dict[str, Any]:
    """The JSON schema of a tool, by its hints and docstring, without `**kwargs`; ValueError where it lacks them."""
    given = getattr(tool, "__wrapped__", None)
    given = given if isinstance(given, partial) else tool
    _refuse_uncallable(name, tool)
    error: Exception | None = None
    try:
        stubs = [tool] if _describes_itself(name, given) else _stubs(name, given)
        for stub in stubs:
            try:
                return dict(get_json_schema(stub))
            except Exception as raised:
                error = error or raised
    except Exception as raised:  # no signature, or hints that cannot be resolved
        error = raised
    raise ValueError(
        f"tools: {name} cannot be described to the model ({error}); give it type hints, and a docstring with an "
        f"`Args:` section{_OR_HIDE if inspect.ismethod(inspect.unwrap(tool)) else ''}"
    ) from None


_OR_HIDE = "; a method that is no tool begins with an underscore"


def _describes_itself(name: str, tool: Tool) -> bool:
    """Whether it has the name and a docstring of its own, and no `**kwargs`, of which a schema says nothing true."""
    parameters = inspect.signature(tool).parameters.values()
    is_open = any(each.kind is each.VAR_KEYWORD for each in parameters)
    return getattr(tool, "__name__", None) == name and bool(tool.__doc__) and not is_open


def with_members(tool: Tool, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with the members of an `Enum` for their values, which a schema tells the model.

    ValueError for a value that no member has.
    """
    try:
        hints = get_type_hints(_code_of(inspect.unwrap(tool)))
    except Exception:  # nothing is known of them
        return dict(arguments)
    return {name: _member(hints.get(name), value) for name, value in arguments.items()}


def _member(hint: Any, value: Any) -> Any:
    if get_origin(hint) is list and isinstance(value, list):
        return [_member(get_args(hint)[0], each) for each in value]
    kinds = [each for each in (hint, *get_args(hint)) if inspect.isclass(each) and issubclass(each, Enum)]
    plain = value is None or len(kinds) != 1 or get_origin(hint) not in (None, Union, UnionType)
    return value if plain else kinds[0](value)


def _refuse_uncallable(name: str, tool: Tool) -> None:
    """ValueError for a tool that a call by name cannot fill, or of which a call gives no result."""
    code = inspect.unwrap(tool)
    codes = (code, getattr(code, "__call__", None))  # noqa: B004
    if any(inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each) for each in codes):
        raise ValueError(f"tools: {name} yields, and a call has one answer; let it return a text or a list")
    try:
        parameters = inspect.signature(tool).parameters.values()
    except (TypeError, ValueError):
        return
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.POSITIONAL_ONLY: ""}
    unnamed = [f"{stars[each.kind]}{each.name}" for each in parameters if each.kind in stars]
    if unnamed:
        raise ValueError(
            f"tools: {name} takes {', '.join(unnamed)} by position, and models give arguments by name; give it "
            "parameters with names, a list for several values"
        )


def _stubs(name: str, tool: Tool) -> list[Tool]:
    """Functions with the tool's name, signature and hints, one for each docstring that may describe it."""
    inner, fixed = (tool.func, tool.keywords) if isinstance(tool, partial) else (tool, {})
    inner = getattr(inner, "__wrapped__", inner)  # the method of an environment, which inherits its docstring
    code = _code_of(inner)
    hints = get_type_hints(code)
    signature = inspect.signature(tool)
    named = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    kept = [each for each in named if each.name not in fixed]

    def stub_with(doc: str | None) -> Tool:
        def stub() -> None: ...

        stub.__name__, stub.__doc__ = name, doc
        stub.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        names = [each.name for each in kept] + ["return"]
        stub.__annotations__ = {key: hints[key] for key in names if key in hints}
        return stub

    docs = [inspect.getdoc(inner)] if code is inner else [code.__doc__, type(inner).__doc__]
    return [stub_with(doc) for doc in docs]


def _code_of(tool: Tool) -> Callable[..., Any]:
    """The function that has a tool's hints: itself, that of a partial, or the `__call__` of an object's class."""
    inner = tool.func if isinstance(tool, partial) else tool
    is_object = not (inspect.isroutine(inner) or inspect.isclass(inner))
    return type(inner).__call__ if is_object else inner  # type: ignore[no-any-return]
