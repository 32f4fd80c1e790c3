"""Messages as rows hold them, made ready for a chat template: arguments, text parts, nulls, weights, tools."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from trl.data.columns import check_text, from_json, listed, plain, shown, unwrapped

Message = dict[str, Any]
Messages = list[Message]
Render = Callable[..., str]
"""`render(messages, tools=None, open_turn=False)`: the template's text; ValueError where the template refuses"""

PROBE_ID = "zqcall000"
PROBE_TOOL = "zqtool"
PROBE_TOOLS = [{"type": "function", "function": {"name": PROBE_TOOL, "description": "Look.", "parameters": {}}}]
"""the tool that probes offer; Mistral's templates want call ids of nine letters"""

SPEAKERS = ("system", "developer", "user", "assistant")
"""roles; any other tells what a tool has answered"""
PICTURES = ("image", "image_url", "input_image")
"""kinds of parts of a content that are pictures"""
DECODED = "arguments as JSON text"
JOINED = "lists of text parts"
_UNREAD_PICTURE = (
    "has a part of kind {!r} in its content: only parts of kind 'text' can be trained without the model's processor: "
    "pass it, not its tokenizer, as `processing_class`"
)
_WEIGHTS = ("weight", "train", "trainable", "training", "learn", "loss")
"""fields of a message that say whether it is learned (OpenAI, Mistral: weight; axolotl: train; ms-swift: loss)"""
_LIKE_A_WEIGHT = re.compile(r"(^|_)(weight|train|training|trainable|learn|loss|mask|masked)($|_)", re.IGNORECASE)


def without_nones(value: Any) -> Any:
    """The value without dict entries that are None, at any depth: Arrow adds them where rows have different keys."""
    if isinstance(value, Mapping):
        return {k: without_nones(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [without_nones(v) for v in value]
    return value


def read_tools(tools: Any, keep_nulls: bool = False) -> list[Any] | None:
    """A row's tools; None when there are none.

    They are a list of JSON schemas or functions, or one of them; the list or its entries can be JSON text.
    """
    where = "column 'tools'"
    if isinstance(tools, str):
        tools = from_json(tools, where) if tools.strip() else None
        keep_nulls = True  # Arrow fills nothing into a text
    tools = listed(tools)
    if tools is not None and not isinstance(tools, list | tuple):
        raise ValueError(f"{where} should be a list of tools, got {type(tools)}: {shown(tools)}")
    return [_tool(tool, f"{where}, tool {i},", keep_nulls) for i, tool in enumerate(tools)] if tools else None


def _tool(tool: Any, where: str, keep_nulls: bool) -> Any:
    """A tool's schema, which may be JSON text, or its function."""
    if isinstance(tool, str):
        tool, keep_nulls = from_json(tool, where), True
    if callable(tool):
        return tool
    if not isinstance(tool, Mapping) or not tool:
        raise ValueError(f"{where} should be a JSON schema or a function, got {shown(tool)}")
    schema = plain(tool, where)
    return schema if keep_nulls else without_nones(schema)


def template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row's own `chat_template_kwargs`: a dict, or its JSON text."""
    own, where = row.get("chat_template_kwargs"), "column 'chat_template_kwargs'"
    if isinstance(own, str):
        own = from_json(own, where) if own.strip() else None
    if own is not None and not isinstance(own, Mapping):
        raise ValueError(f"{where} should be a dict of the template's arguments, got {shown(own)}")
    return without_nones(plain(own, where, strict=False)) if own else {}


def messages_of(row: Mapping[str, Any], column: str) -> Messages:
    """The row's conversation in that column, each message checked; one message alone is a list of one.

    Calls are a list under `tool_calls`, each with its `function`.
    """
    value = listed(row.get(column))
    if not isinstance(value, list | tuple) or not all(isinstance(m, Mapping) and _has_role(m) for m in value):
        raise ValueError(
            f"column '{column}' should be a list of messages with `role` and `content`, got {shown(row.get(column))}"
        )
    places = [f"message {place} of column '{column}'" for place in range(len(value))]
    if any(message.get("function_call") is not None for message in value):
        value = [_with_tool_calls(message, where) for message, where in zip(value, places, strict=True)]
    return [_message(message, where) for message, where in zip(value, places, strict=True)]


def _with_tool_calls(message: Mapping[str, Any], where: str) -> Message:
    """A message with OpenAI's older `function_call`, or its result, which has the role `function`, in today's form."""
    made = {key: value for key, value in message.items() if key != "function_call"}
    made["role"] = "tool" if made["role"] == "function" else made["role"]
    if message.get("function_call") is not None and not unwrapped(made.get("tool_calls")):
        made["tool_calls"] = _calls(message["function_call"], f"{where}: its `function_call`")
    return made


def _has_role(message: Mapping[str, Any]) -> bool:
    return isinstance(message.get("role"), str) and bool(message["role"])


def _message(message: Mapping[str, Any], where: str) -> Message:
    content = message.get("content")
    if "tool_calls" not in message and {str} == set(map(type, message)) | set(map(type, message.values())):
        for text in (*message, *message.values()):
            check_text(text, where)
        return dict(message)
    made: Message = plain({k: v for k, v in message.items() if k not in ("content", "tool_calls")}, where, strict=False)
    made = {key: made.get(key) for key in message}  # in the same order
    if "content" in message:
        content = [content] if isinstance(content, Mapping) and made["role"] in SPEAKERS else content
        if isinstance(content, list | tuple):
            _check_pictures(content, made["role"] in SPEAKERS, where)
        content = plain(content, where)
        if made["role"] in SPEAKERS and not (content is None or isinstance(content, str | list)):
            raise ValueError(f"{where}: its content should be a text or a list of text parts, got {shown(content)}")
        made["content"] = content
    if message.get("tool_calls") is not None:
        made["tool_calls"] = _calls(message["tool_calls"], f"{where}: its `tool_calls`")
    return made


def is_picture(part: Any, speaks: bool) -> bool:
    """Whether a part of a content is a picture; `speaks`: of a message that is no tool's result, which is any JSON."""
    if not isinstance(part, Mapping):
        return speaks and any(kind.__module__.startswith("PIL.") for kind in type(part).__mro__)
    if part.get("type") is not None:
        return part["type"] in PICTURES
    return speaks and part.get("text") is None and any(part.get(name) is not None for name in PICTURES)


def _check_pictures(content: Sequence[Any], speaks: bool, where: str) -> None:
    """ValueError for a picture that was not read: see `trl.data.picture_rows`."""
    for part in content:
        if is_picture(part, speaks):
            known = isinstance(part, Mapping) and part.get("type") == "image"
            said = {name for name, value in part.items() if value is not None} if known else {"picture"}
            if said - {"type", "index", "text"} and not (said == {"type", "image"} and type(part["image"]) is int):
                kind = part.get("type") if isinstance(part, Mapping) else None
                raise ValueError(f"{where} {_UNREAD_PICTURE.format(kind or 'image')}")


def _calls(calls: Any, where: str) -> list[Message]:
    """An assistant's tool calls: a list of them, which may be JSON text, or one alone."""
    spelled = isinstance(calls, str)
    if spelled:
        calls = from_json(calls, where) if calls.strip() else []
    calls = listed(calls)
    if not isinstance(calls, list | tuple):
        raise ValueError(f"{where} should be a list of calls, got {shown(calls)}")
    made = []
    for call in calls:
        told = isinstance(call, str)
        call = _with_function(plain(from_json(call, where) if told else call, where))
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where} should be calls with a function's `name` and `arguments`, got {shown(call)}")
        if (spelled or told) and isinstance(function.get("arguments"), Mapping):  # Arrow fills nothing into a text
            arguments = json.dumps(function["arguments"], ensure_ascii=False)
            call = {**call, "function": {**function, "arguments": arguments}}
        made.append(call)
    return made


def _with_function(call: Any) -> Any:
    """The call with `function` around its name and arguments, where it has none."""
    if not isinstance(call, Mapping) or call.get("function") or "name" not in call:
        return call
    outer = {key: call[key] for key in ("id", "type") if call.get(key) is not None}
    function = {key: value for key, value in call.items() if key not in ("id", "type", "function")}
    return {"type": "function", **outer, "function": function}


def is_learned(message: Mapping[str, Any]) -> bool:
    """Whether the row wants this message to be learned: `weight: 0` and `train: false` say no.

    ValueError: a weight between 0 and 1, or a field that seems to mean the same and is not known.
    """
    for field, value in message.items():
        if field in _WEIGHTS and value is not None:
            if value not in (0, 1):
                raise ValueError(f"a message has {field}={shown(value)}: 1 (learn it) and 0 (do not) are known")
            if not value:
                return False
        elif isinstance(value, bool | int | float) and 0 <= value <= 1 and _LIKE_A_WEIGHT.search(field):
            raise ValueError(
                f"a message has the field {field}={value!r}, which seems to say whether it is learned; write "
                "`weight: 0` for a message that is not, or remove the field"
            )
    return True


class TemplateHabits:
    """How a chat template wants its messages: found out once by rendering short conversations."""

    def __init__(self, render: Render, source: str) -> None:
        self._render = render
        source = re.sub(r"\{#.*?#\}", "", source, flags=re.DOTALL)
        self.spells_tools = not re.search(r"\btools\b", source)
        """the template does not know `tools`, so we list them in the system message"""
        self.spells_calls = "tool_calls" not in source
        """the template does not know `tool_calls`, so we write them into the content"""
        self._forms: dict[tuple[str, bool], bool] = {}

    def _try(self, messages: Messages) -> str:
        try:
            return self._render(messages)
        except ValueError:
            return ""

    def _prints(self, role: str, parts: bool) -> bool:
        """Whether the template prints the content of that role when it is a text, or a list of text parts."""
        if (role, parts) not in self._forms:
            texts = ("zqone", "zqtwo")
            content: Any = [{"type": "text", "text": text} for text in texts] if parts else " ".join(texts)
            before = [] if role in ("system", "developer", "user") else [{"role": "user", "content": "x"}]
            after = [{"role": "user", "content": "x"}] if role in ("system", "developer") else []
            if parts:  # a template that reads parts may read nothing else
                before, after = _wrapped(before), _wrapped(after)
            text = self._try([*before, {"role": role, "content": content}, *after])
            self._forms[role, parts] = all(t in text for t in texts) and "'text':" not in text
        return self._forms[role, parts]

    def reads_parts(self, role: str) -> bool:
        """Whether lists of text parts of that role can be handed on as they are."""
        return self._prints(role, parts=True)

    @cached_property
    def wants_parts(self) -> bool:
        """Whether the template prints text parts only, no plain text."""
        return not self._prints("user", parts=False) and self._prints("user", parts=True)

    @cached_property
    def _call_form(self) -> tuple[bool, Message]:
        """Whether arguments are handed on as JSON text, and what stands for the content of a turn of calls alone."""
        contents: list[Message] = [{}, {"content": ""}, {"content": None}]
        for as_text in (False, True):
            for content in contents:
                text = self._try(self._probe(as_text, content))
                printed = "zqkey" in text and "zqvalue" in text
                if printed and "{'" not in text and "None" not in text:
                    return as_text, content
        return False, {}

    @staticmethod
    def _probe(as_text: bool, content: Message) -> Messages:
        arguments: Any = {"zqkey": "zqvalue"}
        function = {"name": PROBE_TOOL, "arguments": json.dumps(arguments) if as_text else arguments}
        calls = [{"type": "function", "id": PROBE_ID, "function": function}]
        return [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": calls, **content}]

    def ready(self, messages: Sequence[Message], met: Counter[tuple[int, str]], keep_nulls: bool = False) -> Messages:
        """The messages as the template can print them; `met` counts by message what was decoded and joined.

        keep_nulls: a None inside tool calls was said by the row, not filled in by Arrow.
        """
        made = []
        for index, message in enumerate(messages):
            new = {k: v for k, v in message.items() if v is not None and k not in _WEIGHTS}
            calls = new.pop("tool_calls", None)
            if not keep_nulls and not all(type(v) is str for v in new.values()):
                new = without_nones(new)
            if isinstance(new.get("content"), list | tuple):
                new["content"] = self._content(new, index, met)
            elif isinstance(new.get("content"), str) and self.wants_parts:
                new["content"] = [{"type": "text", "text": new["content"]}]
            if calls:
                as_text, content = (False, {}) if self.spells_calls else self._call_form
                new["tool_calls"] = [_decoded(c, as_text, keep_nulls, index, met) for c in calls]
                if not new.get("content"):
                    new = {**{k: v for k, v in new.items() if k != "content"}, **content}
            made.append(new)
        return made

    def _content(self, message: Message, index: int, met: Counter[tuple[int, str]]) -> Any:
        """A list of text parts and pictures as the template reads it; ValueError for other parts."""
        role, parts, pictured = str(message["role"]), [], False
        for part in message["content"]:
            own = {"text": part} if isinstance(part, str) else part if isinstance(part, Mapping) else {}
            kind = own.get("type") or ("text" if "text" in own else type(part).__name__)
            if kind in ("text", "input_text", "output_text") and isinstance(own.get("text"), str):
                parts.append({"type": "text", "text": own["text"]})
            elif kind == "image" and type(own.get("image")) is int:
                parts.append({"type": "image"})
                pictured = True
            elif kind in PICTURES:
                raise ValueError(f"message {index} {_UNREAD_PICTURE.format(kind)}")
            elif role in SPEAKERS or own.get("type"):
                raise ValueError(
                    f"message {index} has a part of kind {kind!r} in its content: only parts of kind 'text' can be "
                    "trained here, and pictures"
                )
            else:
                return message["content"]  # a tool's result that is a list
        if self.reads_parts(role):
            return parts
        if pictured:
            raise ValueError(
                f"message {index} has a picture, and the chat template prints no parts of messages of the role {role}: "
                "set the template of the model's processor"
            )
        met[index, JOINED] += 1
        return "\n".join(part["text"] for part in parts)


def _wrapped(messages: Messages) -> Messages:
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def _decoded(call: Any, as_text: bool, keep_nulls: bool, index: int, met: Counter[tuple[int, str]]) -> Any:
    """A tool call whose arguments are a dict (`as_text`: JSON text), whatever the row gave."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {
            **without_nones({k: v for k, v in call.items() if k != "function"}),
            "function": _decoded(call["function"], as_text, keep_nulls, index, met),
        }
    call = {k: v if k == "arguments" and keep_nulls else without_nones(v) for k, v in call.items() if v is not None}
    arguments = call.get("arguments")
    if isinstance(arguments, str) and not as_text:
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
        if isinstance(parsed, dict):
            met[index, DECODED] += 1
            return {**call, "arguments": parsed}
    elif as_text and arguments is not None and not isinstance(arguments, str):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return call


def spell_calls(messages: Sequence[Message]) -> Messages:
    """The conversation with calls written into the content as `<tool_call>` text, in Hermes' manner."""
    spelled: Messages = []
    for message in messages:
        plain = {key: value for key, value in message.items() if key != "tool_calls"}
        calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or []]
        if calls:
            texts = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
            said = plain.get("content") or ""
            if isinstance(said, list):
                plain["content"] = [*said, *({"type": "text", "text": text} for text in texts)]
            else:
                plain["content"] = "\n".join(filter(None, [said, *texts]))
        spelled.append(plain)
    return spelled


def spell_tools(messages: Sequence[Message], tools: Sequence[Any], with_calls: bool = True) -> Messages:
    """The conversation with tools listed in its system message; `with_calls`: and how they are called."""
    from transformers.utils.chat_template_utils import get_json_schema

    schemas = [get_json_schema(tool) if callable(tool) else tool for tool in tools]
    listed = "\n".join(json.dumps(schema, ensure_ascii=False) for schema in schemas)
    notice = f"You may call these functions:\n<tools>\n{listed}\n</tools>"
    if with_calls:
        notice += '\nCall one with a JSON object in <tool_call></tool_call>: {"name": ..., "arguments": ...}.'
    spelled = list(messages)
    if spelled and spelled[0].get("role") == "system":
        own = spelled[0].get("content") or ""
        if isinstance(own, list):
            own = [*own, {"type": "text", "text": f"\n\n{notice}"}]
            return [{**spelled[0], "content": own}, *spelled[1:]]
        return [{**spelled[0], "content": f"{own}\n\n{notice}"}, *spelled[1:]]
    return [{"role": "system", "content": notice}, *spelled]
