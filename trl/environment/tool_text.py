"""Tool calls in what a chat model says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ToolCall:
    """A call as the model wrote it; with an `error` where it could not be read."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    def message(self, number: int) -> dict[str, Any]:
        """As an entry of a message's `tool_calls`."""
        return {"type": "function", "id": call_id(number), "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class Spoken:
    """A turn of the model: what it says, and the tools that it calls."""

    content: str
    calls: list[ToolCall] = field(default_factory=list)


ToolParser = Callable[[str], Spoken]
"""from the text of a turn, without its end token"""


def call_id(number: int) -> str:
    """Nine letters and digits, as the strictest of the chat templates wants."""
    return f"call{number:05d}"


@dataclass(frozen=True)
class JsonCalls:
    """Calls such as `<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>`, between other tags if need be."""

    opening: str = "<tool_call>"
    closing: str = "</tool_call>"

    def __post_init__(self) -> None:
        if not self.opening or not self.closing:
            raise ValueError("opening, closing: give the tags that stand around a call")

    def __call__(self, text: str) -> Spoken:
        call = re.compile(f"{re.escape(self.opening)}(.*?)({re.escape(self.closing)}|$)", re.DOTALL)
        calls = [
            _read(found[1]) if found[2] else ToolCall("unknown", error=f"the call is not closed by {self.closing}")
            for found in call.finditer(text)
        ]
        return Spoken(call.sub("", text).strip() if calls else text, calls)


def _read(text: str) -> ToolCall:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError) as error:
        return ToolCall("unknown", error=f"the call is no JSON: {error}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return ToolCall("unknown", error='a call is a JSON object with "name" and "arguments"')
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            return ToolCall(call["name"], error=f"the arguments are no JSON: {error}")
    if not isinstance(arguments, dict):
        return ToolCall(call["name"], error='"arguments" is a JSON object of the arguments by name')
    return ToolCall(call["name"], arguments)
