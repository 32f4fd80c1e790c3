"""Tools as users give them: their names, and how they are described to a chat model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, get_type_hints

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
    """The JSON schema of a tool, by its type hints and docstring; ValueError where it lacks them."""
    given = getattr(tool, "__wrapped__", None)
    given = given if isinstance(given, partial) else tool
    error: Exception | None = None
    try:
        stubs = [tool] if getattr(given, "__name__", None) == name else _stubs(name, given)
        for stub in stubs:
            try:
                return dict(get_json_schema(stub))
            except Exception as raised:
                error = error or raised
    except Exception as raised:  # no signature, or hints that cannot be resolved
        error = raised
    raise ValueError(
        f"tools: {name} cannot be described to the model ({error}); give it type hints, and a docstring with an "
        "`Args:` section"
    ) from None


def _stubs(name: str, tool: Tool) -> list[Tool]:
    """Functions with the tool's name, signature and hints, one for each docstring that may describe it."""
    inner, fixed = (tool.func, tool.keywords) if isinstance(tool, partial) else (tool, {})
    is_object = not (inspect.isroutine(inner) or inspect.isclass(inner))
    code = type(inner).__call__ if is_object else inner
    hints = get_type_hints(code)
    signature = inspect.signature(tool)
    kept = [each for key, each in signature.parameters.items() if key not in fixed]

    def stub_with(doc: str | None) -> Tool:
        def stub() -> None: ...

        stub.__name__, stub.__doc__ = name, doc
        stub.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        names = [each.name for each in kept] + ["return"]
        stub.__annotations__ = {key: hints[key] for key in names if key in hints}
        return stub

    docs = [code.__doc__, type(inner).__doc__] if is_object else [inspect.getdoc(inner)]
    return [stub_with(doc) for doc in docs]
