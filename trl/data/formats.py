"""Detects which of the known formats the rows of a data set have, and converts between formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from trl.data.chat import ChatTemplate, read_tools
from trl.data.columns import at_row, check_keys, from_json, listed, shown, text_of
from trl.data.encode import common_prefix
from trl.data.messages import Messages, messages_of, template_arguments, without_nones
from trl.data.version import code_version

Row = dict[str, Any]


class RowKind(StrEnum):
    """What a row is for."""

    TEXT = "language modelling"
    MESSAGES = "conversation"
    PROMPT = "prompt-only"
    PROMPT_COMPLETION = "prompt-completion"
    PREFERENCE = "preference"
    UNPAIRED = "unpaired preference"
    STEPWISE = "stepwise"
    TOKENIZED = "tokenised"


@dataclass(frozen=True)
class Format:
    """A data set's row format."""

    kind: RowKind
    conversational: bool
    implicit_prompt: bool
    """the prompt is a part of the answers and has no column"""
    columns: tuple[str, ...]
    """the columns that make up the format"""


_REQUIRED: dict[RowKind, tuple[tuple[str, ...], ...]] = {
    RowKind.STEPWISE: (("prompt", "completions", "labels"),),
    RowKind.MESSAGES: (("messages",), ("conversations",)),
    RowKind.PROMPT_COMPLETION: (("prompt", "completion"),),
    RowKind.PREFERENCE: (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    RowKind.UNPAIRED: (("prompt", "completion", "label"), ("completion", "label")),
    RowKind.PROMPT: (("prompt",),),
}

CONVERSATION_COLUMNS = ("prompt", "completion", "chosen", "rejected", "messages", "conversations")


def column_names(dataset: Any, name: str = "train") -> list[str]:
    """The columns of a data set: those it lists, or of all rows of a list, or of its first row; empty: ValueError."""
    names = getattr(dataset, "column_names", None)
    first = list(names) if names else list(first_row(dataset, name))
    if isinstance(dataset, list | tuple):  # rows have keys of their own
        return list(dict.fromkeys([*first, *(key for row in dataset for key in row)]))
    return first


def check_rows(dataset: Any, name: str = "train") -> None:
    """ValueError where a list of rows has one that is no dict of columns."""
    if not isinstance(dataset, list | tuple):
        return
    for index, row in enumerate(dataset):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"row {index} of the {name} data set: a row should be a dict of columns, got {type(row)}: {shown(row)}"
            )
        with at_row(index, name):
            check_keys(row, "the row's columns")


def refuse_splits(dataset: Any, name: str = "train") -> None:
    """ValueError for a dict of data sets, which `load_dataset` gives where no split is named."""
    if isinstance(dataset, Mapping):
        sizes = {key: len(one) if hasattr(one, "__len__") else None for key, one in dataset.items()}
        splits = ", ".join(f"'{key}'" + ("" if n is None else f" ({n:,} rows)") for key, n in sizes.items())
        wanted = name if name in dataset else next(iter(dataset), "train")
        raise ValueError(
            f"the {name} data set is a {type(dataset).__name__} with the splits {splits}: pass one of them, for "
            f"example dataset['{wanted}']"
        )


def first_row(dataset: Any, name: str = "train") -> Row:
    """The first row; ValueError when there is none."""
    refuse_splits(dataset, name)
    for row in dataset:
        if not isinstance(row, Mapping):
            raise ValueError(f"row 0 of the {name} data set: a row should be a dict of columns, got {type(row)}")
        return dict(row)
    raise ValueError(f"the {name} data set is empty")


def _is_messages(value: Any, keys: tuple[str, str] = ("role", "content")) -> bool:
    """Whether it is a list of messages, or one message."""
    value = listed(value)
    if not isinstance(value, list | tuple) or not value or not isinstance(value[0], Mapping):
        return False
    first = value[0]
    return keys[0] in first and (keys[1] in first or "tool_calls" in first)


def is_conversational(example: Mapping[str, Any]) -> bool:
    """Whether one of the known columns holds a list of messages with `role` and `content`."""
    return any(_is_messages(example.get(column)) for column in CONVERSATION_COLUMNS)


def is_conversational_from_value(example: Mapping[str, Any]) -> bool:
    """Whether `conversations` holds a list of messages with `from` and `value` (ShareGPT)."""
    return _is_messages(example.get("conversations"), ("from", "value"))


def _format(row: Row, kind: RowKind, required: tuple[str, ...]) -> Format:
    """The format of rows like this one, which has the required columns."""
    chats = {c: _is_messages(row.get(c)) or _is_messages(row.get(c), ("from", "value")) for c in required}
    if kind is RowKind.TEXT and chats[required[0]]:
        kind = RowKind.MESSAGES
    pairs = kind in (RowKind.PREFERENCE, RowKind.UNPAIRED)
    answer = next((c for c in ("chosen", "completion") if c in chats), None)
    mixed = answer is not None and "prompt" in chats and "prompt" in row and chats["prompt"] != chats[answer]
    conversational = kind is RowKind.MESSAGES or any(chats.values())
    return Format(kind, conversational, pairs and ("prompt" not in chats or mixed), required)


def detect_format(
    dataset: Any,
    accepts: Sequence[RowKind],
    *,
    text_field: str = "text",
    tokenised: Sequence[tuple[str, ...]] = (("input_ids",),),
    name: str = "train",
) -> Format:
    """The first of the accepted kinds whose columns the data set has.

    `tokenised` lists the sets of columns that make a row tokenised, `name` says which data set it is. ValueError names
    the missing column and the columns found.
    """
    row = first_row(dataset, name)
    columns = set(row) | set(column_names(dataset, name))
    required_columns = _REQUIRED | {RowKind.TEXT: ((text_field,),), RowKind.TOKENIZED: tuple(tokenised)}
    kinds = {kind: required_columns[kind] for kind in accepts}
    for kind, alternatives in kinds.items():
        for required in alternatives:
            if not columns.issuperset(required):
                continue
            return _format(row, kind, required)
    raise ValueError(_missing(columns, kinds, name))


def _missing(columns: set[str], kinds: Mapping[RowKind, tuple[tuple[str, ...], ...]], name: str) -> str:
    alternatives = [(kind, required) for kind, many in kinds.items() for required in many]
    found = ", ".join(sorted(columns))
    kind, required = max(alternatives, key=lambda pair: len(columns.intersection(pair[1])) / len(pair[1]))
    if columns.intersection(required):
        lacking = ", ".join(f"'{c}'" for c in required if c not in columns)
        return f"the {name} data set lacks the column {lacking} of a {kind} row; columns found: {found}"
    known = " | ".join(" + ".join(many[0]) for kind, many in kinds.items())
    return f"the {name} data set has none of the columns that are needed ({known}); columns found: {found}"


_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_CALLS = ("function_call", "tool_call")


def _to_chatml(message: Any) -> Any:
    if not isinstance(message, Mapping) or "from" not in message:
        return message
    role, value = message["from"], message.get("value")
    known = role.lower() if isinstance(role, str) else ""
    if known not in _CALLS:
        kept = {key: own for key, own in message.items() if key not in ("from", "value")}  # `weight` is among them
        return {**kept, "role": _ROLES.get(known, known) or role, "content": value}
    try:
        calls = from_json(value, "a call") if isinstance(value, str) else value
    except ValueError:
        return {"role": "assistant", "content": value}
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": c} for c in calls]}


def maybe_convert_to_chatml(example: Mapping[str, Any]) -> Row:
    """ShareGPT messages (`from`, `value`) as `role` and `content`, `conversations` as `messages`; others unchanged.

    The roles human, gpt and observation become user, assistant and tool; a function_call becomes `tool_calls`.
    """
    converted = dict(example)
    for column in CONVERSATION_COLUMNS:
        if _is_messages(example.get(column), ("from", "value")):
            converted[column] = list(map(_to_chatml, listed(example[column])))
    if "conversations" in converted and "messages" not in converted:
        converted["messages"] = converted.pop("conversations")
    return converted


def apply_chat_template(
    example: Mapping[str, Any],
    tokenizer: Any = None,
    tools: Sequence[Any] | None = None,
    *,
    processing_class: Any = None,
    **template_kwargs: Any,
) -> Row:
    """The conversational columns of a row as text: `messages` becomes `text`, the other columns keep their names.

    Prompt + completion is the rendering of the whole conversation. A row's own `tools` and `chat_template_kwargs`
    come before the arguments. `processing_class` is another name of `tokenizer`; for a processor the texts have its
    placeholder where the pictures of the row stand.
    """
    tokenizer = _one_tokenizer(tokenizer, processing_class)
    if getattr(tokenizer, "image_processor", None) is not None:
        tokenizer, example = _with_marks(tokenizer, example)
    own = {**template_kwargs, **template_arguments(example)}
    template = ChatTemplate(tokenizer, own)
    tools = read_tools(example.get("tools")) or read_tools(tools)
    rendered: Row = {"label": example["label"]} if "label" in example else {}
    answers = [column for column in ("chosen", "rejected", "completion") if column in example]
    if "messages" in example:
        return {"text": template.render(messages_of(example, "messages"), tools), **rendered}
    if "prompt" in example and answers:
        said = [messages_of(example, column) for column in answers]
        split = template.split(messages_of(example, "prompt"), said, tools, trim=False)
        return {"prompt": split.prompt, **dict(zip(answers, split.answers, strict=True)), **rendered}
    if "prompt" in example:
        return {"prompt": template.prompt(messages_of(example, "prompt"), tools), **rendered}
    if answers:
        return {**{column: template.render(messages_of(example, column), tools) for column in answers}, **rendered}
    raise ValueError(
        "a conversational row needs 'messages', 'prompt', 'completion', or 'chosen' and 'rejected'; columns found: "
        + ", ".join(sorted(example))
    )


def _with_marks(processor: Any, example: Mapping[str, Any]) -> tuple[Any, Row]:
    """The processor's tokenizer, and the row with parts where its pictures stand, which are not read."""
    from trl.data.picture_rows import marked_row  # who only formats conversations has no need of them
    from trl.data.pictures import read_by, reader_of

    tokenizer = read_by(processor)
    reader = reader_of(tokenizer)
    return tokenizer, dict(example) if reader is None else marked_row(example, CONVERSATION_COLUMNS, reader.placeholder)


def _one_tokenizer(tokenizer: Any, processing_class: Any) -> Any:
    if (tokenizer is None) == (processing_class is None):
        raise ValueError("apply_chat_template: give the tokenizer, as `tokenizer` or as `processing_class`")
    return processing_class if tokenizer is None else tokenizer


def maybe_apply_chat_template(
    example: Mapping[str, Any],
    tokenizer: Any = None,
    tools: Sequence[Any] | None = None,
    *,
    processing_class: Any = None,
    **template_kwargs: Any,
) -> Row:
    """`apply_chat_template` for a conversational row; another row comes back as it is."""
    tokenizer = _one_tokenizer(tokenizer, processing_class)
    if is_conversational(example):
        return apply_chat_template(example, tokenizer, tools, **template_kwargs)
    return dict(example)


def _text_split(chosen: str, rejected: str) -> int:
    """Where two texts begin to differ, moved back to the blank before that word."""

    def in_word(text: str, at: int) -> bool:
        return 0 < at < len(text) and all(c.isascii() and c.isalnum() for c in text[at - 1 : at + 1])

    cut = common_prefix(chosen, rejected)
    while in_word(chosen, cut) or in_word(rejected, cut):
        cut -= 1
    return cut - 1 if cut and chosen[cut - 1] == " " else cut


def extract_prompt(example: Mapping[str, Any]) -> Row:
    """`prompt`, `chosen` and `rejected` of a preference row whose prompt stands inside the answers.

    Conversations are split after the messages they share, texts at the blank before the first word that differs. A
    prompt that is a text becomes the user's message where the answers of a conversation share none.
    """
    for column in ("chosen", "rejected"):
        if isinstance(example.get(column), int | float):
            text_of(example, column)  # which says what it is
    if isinstance(example.get("chosen"), str) != isinstance(example.get("rejected"), str):
        raise ValueError(
            "one of the columns 'chosen' and 'rejected' is text and the other is a conversation: chosen is "
            f"{shown(example.get('chosen'))}, rejected is {shown(example.get('rejected'))}"
        )
    if isinstance(example.get("chosen"), str):
        first, second = text_of(example, "chosen"), text_of(example, "rejected")
        cut = _text_split(first, second)
        return {**example, "prompt": first[:cut], "chosen": first[cut:], "rejected": second[cut:]}
    chosen, rejected = messages_of(example, "chosen"), messages_of(example, "rejected")
    shared = common_prefix(without_nones(chosen), without_nones(rejected))  # Arrow may have filled in some
    cut = max(0, min(shared, len(chosen) - 1, len(rejected) - 1))
    asked = example.get("prompt")
    if not cut and isinstance(asked, str) and asked.strip():
        return {**example, "prompt": _said(example, "prompt", "user"), "chosen": chosen, "rejected": rejected}
    return {**example, "prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


def maybe_extract_prompt(example: Mapping[str, Any]) -> Row:
    """`extract_prompt` where a preference row has no prompt of the same kind as its answers; else the row as it is."""
    if "chosen" not in example or "rejected" not in example:
        return dict(example)
    if "prompt" in example and isinstance(example["prompt"], str) == isinstance(example["chosen"], str):
        return dict(example)
    return extract_prompt(example)


def as_messages(example: Mapping[str, Any], answers: Sequence[str]) -> Row:
    """A conversational row whose prompt and answers are lists of messages; answers that repeat the prompt lose it.

    A text is what the user asks, or what the assistant answers. A prompt that is a text stays one where all answers
    begin with other messages than the assistant's: they hold the question themselves. ValueError for what is neither.
    """
    row = maybe_convert_to_chatml(example)
    said = {name: _said(row, name, "assistant") for name in answers if name in row}
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        answered = any(not own or own[0]["role"] == "assistant" for own in said.values())
        prompt = _said(row, "prompt", "user") if answered and prompt.strip() else prompt
    elif prompt is not None:
        prompt = messages_of(row, "prompt")
    if isinstance(prompt, list):
        said = {name: own[_repeated(prompt, own) :] for name, own in said.items()}
    return {**row, **said, **({"prompt": prompt} if "prompt" in row else {})}


def _said(row: Mapping[str, Any], column: str, role: str) -> Messages:
    """The row's messages in that column; a text is one of that role."""
    if isinstance(row[column], str):
        return [{"role": role, "content": text_of(row, column)}]
    return messages_of(row, column)


def _repeated(prompt: Messages, answer: Messages) -> int:
    """How many of the prompt's last messages the answer begins with."""
    asked, said = without_nones(prompt), without_nones(answer)
    most = range(min(len(asked), len(said) - 1), 0, -1)
    return next((n for n in most if said[:n] == asked[-n:] and said[0]["role"] != "assistant"), 0)


def with_prompt(example: Mapping[str, Any], answers: Sequence[str], split: Callable[[Row], Row]) -> Row:
    """`as_messages`; a row that has no messages in its prompt then is taken apart by `split`."""
    row = as_messages(example, answers)
    return row if row.get("prompt") and not isinstance(row["prompt"], str) else split(row)


def split_completion(row: Row) -> Row:
    """The row whose completion is a whole conversation: its last message is the answer, the others are the prompt."""
    whole = messages_of(row, "completion")
    return {**row, "prompt": whole[:-1], "completion": whole[-1:]}


def _unpair(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    chosen, rejected = batch["chosen"], batch["rejected"]
    others = {name: [*values, *values] for name, values in batch.items() if name not in ("chosen", "rejected")}
    labels = [True] * len(chosen) + [False] * len(rejected)
    return {**others, "completion": [*chosen, *rejected], "label": labels}


def mapped_rows(
    dataset: Any, function: Callable[..., Any], desc: str | None = None, state: Any = None, **options: Any
) -> Any:
    """The data set with `function` of each row; what is cached depends on the code of this room, and on `state`."""
    from datasets import Dataset  # who only formats conversations has no need of it
    from datasets.fingerprint import Hasher

    if isinstance(dataset, list):
        more = options.get("fn_kwargs", {})
        return [function(row, *([i] if options.get("with_indices") else []), **more) for i, row in enumerate(dataset)]
    if isinstance(dataset, Dataset):
        how = sorted((name, repr(value)) for name, value in options.get("fn_kwargs", {}).items())
        key = [dataset._fingerprint, code_version(), function.__name__, sorted(options), how, state]
        options |= {"desc": desc, "new_fingerprint": Hasher.hash(key)}
    return dataset.map(function, **options)


def unpair_preference_dataset(dataset: Any, num_proc: int | None = None, desc: str | None = None) -> Any:
    """Pairs as single rows with `completion` and `label`: the chosen ones of a batch of 1,000, then its rejected ones.

    Takes a Dataset, DatasetDict, IterableDataset or a list of rows; other columns are repeated.
    """
    if isinstance(dataset, list):
        columns = {name: [row.get(name) for row in dataset] for name in column_names(dataset)} if dataset else {}
        unpaired = _unpair(columns) if columns else {}
        return [dict(zip(unpaired, values, strict=True)) for values in zip(*unpaired.values(), strict=True)]
    if isinstance(dataset, dict):
        unpaired = {name: unpair_preference_dataset(one, num_proc, desc) for name, one in dataset.items()}
        return type(dataset)(unpaired)
    processes = {"num_proc": num_proc} if hasattr(dataset, "__len__") else {}  # a stream has no processes of its own
    return mapped_rows(dataset, _unpair, desc, batched=True, remove_columns=["chosen", "rejected"], **processes)


def maybe_unpair_preference_dataset(dataset: Any, num_proc: int | None = None, desc: str | None = None) -> Any:
    """`unpair_preference_dataset` for pairs; another data set comes back as it is."""
    one = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
    columns = column_names(one)
    if "chosen" in columns and "rejected" in columns:
        return unpair_preference_dataset(dataset, num_proc, desc)
    return dataset


__all__ = [
    "Format",
    "RowKind",
    "apply_chat_template",
    "as_messages",
    "column_names",
    "detect_format",
    "extract_prompt",
    "first_row",
    "is_conversational",
    "is_conversational_from_value",
    "maybe_apply_chat_template",
    "maybe_convert_to_chatml",
    "maybe_extract_prompt",
    "maybe_unpair_preference_dataset",
    "unpair_preference_dataset",
]
