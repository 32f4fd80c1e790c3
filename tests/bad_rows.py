"""Rows of every format with something wrong in them, made by chance, and what becomes of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers_for_tests import CHATML, CHATML_GENERATION, TOOLS, byte_tokenizer

from trl.data.encode import Limits
from trl.data.prompt_rows import CompletionsJob, PairsJob, PromptsJob, StepwiseJob
from trl.data.row_job import RowJob
from trl.data.supervised_rows import SupervisedJob
from trl.data.tokenize import tokenize

Row = dict[Any, Any]


def nested(depth: int, leaf: Any = "x", inside: Callable[[Any], Any] = lambda value: [value]) -> Any:
    for _ in range(depth):
        leaf = inside(leaf)
    return leaf


VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "empty text": lambda: "",
    "blank": lambda: " \n\t",
    "text": lambda: "the sky",
    "NUL": lambda: "a\0b",
    "lone surrogate": lambda: "a\ud83d b",
    "half pairs": lambda: "\udc00\ud800",
    "right to left": lambda: "\u202eabc\x1b[31m",
    "1 MB": lambda: "ab " * 350_000,
    "special tokens": lambda: "<|im_start|><|im_end|><s>" * 2_000,
    "JSON text": lambda: '[{"role": "user", "content": "hi"}]',
    "torn JSON": lambda: '[{"role": "user", "con',
    "deep JSON": lambda: "[" * 100_000,
    "long digits in JSON": lambda: "[" + "9" * 5_000 + "]",
    "bytes": lambda: b"abc",
    "True": lambda: True,
    "0": lambda: 0,
    "-1": lambda: -1,
    "-100": lambda: -100,
    "7.0": lambda: 7.0,
    "nan": lambda: math.nan,
    "inf": lambda: -math.inf,
    "10**400": lambda: 10**400,
    "10**5000": lambda: 10**5_000,
    "2**40": lambda: 2**40,
    "complex": lambda: 1j,
    "[]": lambda: [],
    "{}": lambda: {},
    "()": lambda: (),
    "set": lambda: {1, 2},
    "object": object,
    "class": lambda: int,
    "dict for list": lambda: {"0": "a"},
    "[None]": lambda: [None],
    "[[]]": lambda: [[]],
    "texts": lambda: ["a", "b"],
    "ids": lambda: [5, 6, 7],
    "tuple of ids": lambda: (5, 6, 7),
    "nested ids": lambda: [[5, 6], [7]],
    "bool ids": lambda: [True, False, True],
    "negative id": lambda: [5, -3, 6],
    "ids of no vocabulary": lambda: [5, 100_000],
    "huge id": lambda: [5, 2**63],
    "ids with nan": lambda: [5, math.nan, 6],
    "float ids": lambda: [5.0, 6.5],
    "numpy ids": lambda: np.array([5, 6, 7]),
    "numpy matrix": lambda: np.ones((2, 2), dtype=np.int64),
    "numpy objects": lambda: np.array([5, None], dtype=object),
    "numpy 0-d": lambda: np.array(5),
    "numpy nan": lambda: np.float32("nan"),
    "tensor ids": lambda: torch.tensor([5, 6, 7]),
    "tensor 0-d": lambda: torch.tensor(5),
    "tensor 2-d": lambda: torch.ones(3, 3),
    "meta tensor": lambda: torch.ones(3, device="meta"),
    "messages": lambda: [{"role": "user", "content": "hi"}],
    "message": lambda: {"role": "assistant", "content": "hi"},
    "no role": lambda: [{"content": "hi"}],
    "odd role": lambda: [{"role": ["user"], "content": "hi"}],
    "no content": lambda: [{"role": "user"}],
    "keys of numbers": lambda: {1: 2, None: 3},
    "a message and a text": lambda: [{"role": "user", "content": "hi"}, "yes"],
    "ShareGPT": lambda: [{"from": "human", "value": "hi"}, 5],
    "image part": lambda: [{"type": "image", "url": "x"}],
    "calls as text": lambda: '[{"function": {"name": "f", "arguments": {}}}]',
    "call without name": lambda: [{"function": {}}],
    "call of text": lambda: [{"function": {"name": "f", "arguments": "{torn"}}],
    "nested 500": lambda: nested(500),
    "nested 5000": lambda: nested(5_000),
    "nested dicts": lambda: nested(3_000, inside=lambda value: {"a": value}),
    "iterator": lambda: iter([1, 2]),
}


class Form(NamedTuple):
    """A row format: a good row, the job that reads it."""

    row: Row
    job: Callable[[], RowJob]


def _job(kind: type[RowJob], template: str = CHATML, **options: Any) -> Callable[[], RowJob]:
    def make() -> RowJob:
        tokenizer = byte_tokenizer(template)
        limits = Limits(max_prompt_length=64 if kind is PromptsJob else None, max_length=None)
        return kind(tokenizer=tokenizer, limits=limits, embeddings=len(tokenizer), **options)

    return make


def _calls() -> Row:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
    }


def _chat() -> list[Row]:
    return [{"role": "user", "content": "hi"}, _calls(), {"role": "tool", "content": "3"}, _say("ok")]


def _older_chat() -> list[Row]:
    call = {"name": "f", "arguments": '{"x": 1}'}
    older = [{"role": "assistant", "content": "", "function_call": call}, {"role": "function", "content": "3"}]
    return [{"role": "user", "content": "hi"}, *older, _say("ok")]


def _say(text: str, role: str = "assistant") -> Row:
    return {"role": role, "content": text}


_TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
_ASKED = [_say("hi", "user")]
_IDS = {"prompt_ids": [20, 21], "chosen_ids": [22], "rejected_ids": [23]}
_KEPT = ("reference_logps",)

FORMS: dict[str, Form] = {
    "text": Form({"text": "the sky"}, _job(SupervisedJob)),
    "messages": Form({"messages": _chat()}, _job(SupervisedJob, assistant_only_loss=True)),
    "messages, marked": Form({"messages": _chat()}, _job(SupervisedJob, CHATML_GENERATION, assistant_only_loss=True)),
    "messages with tools": Form(
        {"messages": _chat(), "tools": _TOOLS, "chat_template_kwargs": {"a": 1}}, _job(SupervisedJob, TOOLS)
    ),
    "messages with an older call": Form({"messages": _older_chat()}, _job(SupervisedJob, TOOLS)),
    "prompt a text, completion messages": Form(
        {"prompt": "hi", "completion": [*_ASKED, _say("yo")]}, _job(SupervisedJob)
    ),
    "ShareGPT": Form(
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, _job(SupervisedJob)
    ),
    "prompt and completion": Form({"prompt": "the ", "completion": "sky"}, _job(SupervisedJob)),
    "prompt and completion, messages": Form({"prompt": _ASKED, "completion": [_say("yo")]}, _job(SupervisedJob)),
    "ids": Form({"input_ids": [20, 21], "labels": [-100, 21], "attention_mask": [1, 1]}, _job(SupervisedJob)),
    "ids with masks": Form({"input_ids": [20, 21], "completion_mask": [0, 1]}, _job(SupervisedJob)),
    "packed ids": Form({"input_ids": [20, 21, 22], "seq_lengths": [1, 2]}, _job(SupervisedJob)),
    "pair": Form({"prompt": "the ", "chosen": "sky", "rejected": "mat", "margin": 0.5}, _job(PairsJob)),
    "pair, prompt inside": Form({"chosen": "the sky", "rejected": "the mat"}, _job(PairsJob, needs_prompt=False)),
    "pair of messages": Form(
        {"prompt": _ASKED, "chosen": [_say("yo")], "rejected": [_say("no")], "tools": _TOOLS}, _job(PairsJob, TOOLS)
    ),
    "pair of messages, prompt inside": Form(
        {"chosen": [*_ASKED, _say("yo")], "rejected": [*_ASKED, _say("no")]}, _job(PairsJob)
    ),
    "pair of messages, prompt a text": Form(
        {"prompt": "hi", "chosen": [_say("yo")], "rejected": [_say("no")]}, _job(PairsJob)
    ),
    "pair of messages and texts": Form(
        {"prompt": _ASKED, "chosen": [*_ASKED, _say("yo")], "rejected": "no"}, _job(PairsJob)
    ),
    "pair of ids with masks": Form({**_IDS, "chosen_mask": [1], "rejected_mask": [1]}, _job(PairsJob)),
    "pair of ids": Form({**_IDS, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}, _job(PairsJob)),
    "pair of ids, Reward's": Form(
        {"input_ids_chosen": [20, 21], "attention_mask_chosen": [1, 1], "input_ids_rejected": [20, 22],
         "attention_mask_rejected": [1, 1]}, _job(PairsJob)
    ),
    "pair of ids, DPO's": Form(
        {"chosen_input_ids": [20, 21], "chosen_labels": [-100, 21], "rejected_input_ids": [20, 22],
         "rejected_labels": [-100, 22]}, _job(PairsJob)
    ),
    "pair of ids, encoder-decoder's": Form(
        {"prompt_input_ids": [20], "chosen_labels": [21, 2], "rejected_labels": [22, 2]}, _job(PairsJob)
    ),
    "KTO": Form({"prompt": "the ", "completion": "sky", "label": True}, _job(CompletionsJob, keep=_KEPT)),
    "KTO, messages": Form(
        {"prompt": _ASKED, "completion": [_say("yo")], "label": False, "reference_logps": -1.0},
        _job(CompletionsJob, keep=_KEPT),
    ),
    "KTO, prompt inside": Form({"completion": [*_ASKED, _say("yo")], "label": 1}, _job(CompletionsJob)),
    "KTO, ids": Form({"prompt_ids": [20], "completion_ids": [21], "label": True}, _job(CompletionsJob)),
    "KTO, pair": Form({"prompt": "the ", "chosen": "sky", "rejected": "mat"}, _job(CompletionsJob)),
    "KTO, pair of messages and texts": Form(
        {"prompt": "hi", "chosen": [_say("yo")], "rejected": "no"}, _job(CompletionsJob)
    ),
    "KTO, pair of messages": Form(
        {"chosen": [*_ASKED, _say("yo")], "rejected": [*_ASKED, _say("no")]}, _job(CompletionsJob)
    ),
    "PRM": Form({"prompt": "the ", "completions": ["sky", "is"], "labels": [True, False]}, _job(StepwiseJob)),
    "PRM, one not learned": Form(
        {"prompt": "the ", "completions": ["sky", "is"], "labels": [1, -100]}, _job(StepwiseJob)
    ),
    "PRM, ids": Form({"input_ids": [20, 21], "labels": [-100, 1]}, _job(StepwiseJob)),
    "prompt": Form({"prompt": "the ", "solution": "5"}, _job(PromptsJob)),
    "prompt, messages": Form({"prompt": [*_ASKED, _say("yo"), *_ASKED], "tools": _TOOLS}, _job(PromptsJob, TOOLS)),
    "prompt, ids": Form({"prompt_ids": [20, 21]}, _job(PromptsJob)),
}  # fmt: skip


def spoil(random: Random, row: Row, others: list[Row]) -> tuple[Row, str]:
    """A copy of the row with something wrong in it, and what that is."""
    row = copy.deepcopy(row)
    kind = random.choice(["value"] * 12 + ["missing", "extra", "mixed", "no row"])
    if kind == "mixed":
        return copy.deepcopy(random.choice(others)), "a row of another format"
    if kind == "no row":
        name = random.choice(sorted(VALUES))
        value: Any = VALUES[name]()
        return value, f"{name} for a row"
    holder: Any = row
    key: Any = random.choice(sorted(row))
    path = [key]
    while kind == "value" and isinstance(holder[key], dict | list) and holder[key] and random.random() < 0.7:
        holder = holder[key]
        key = random.choice(sorted(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
        path.append(key)
    if kind == "missing":
        return {name: value for name, value in row.items() if name != key}, f"{key} missing"
    name = random.choice(sorted(VALUES))
    if kind == "extra":
        key = random.choice(
            ["margin", "tools", "label", "messages", "weight", "note", "seq_lengths", 5, None, "\ud800"]
        )
        return {**row, key: VALUES[name]()}, f"{key!r} is {name}"
    holder[key] = VALUES[name]()
    return row, f"{path} is {name}"


def outcome(form: str, rows: list[Any], bad: int) -> str:
    """right; refused (a ValueError of one line that names the row and a column); or what is wrong with it."""
    job = FORMS[form].job()
    try:
        made, _ = tokenize(rows, job)
    except ValueError as error:
        return _judged(error, rows, bad)
    except Exception as error:
        return f"raw {type(error).__name__}"
    return _checked(made, job)


def _judged(error: ValueError, rows: list[Any], bad: int) -> str:
    text = str(error)
    if type(error) is not ValueError:  # those of Arrow and of Unicode are ValueErrors too
        return f"raw {type(error).__name__}"
    if "\n" in text or len(text) > 600:
        return "more than a line"
    if not text.isprintable():
        return "unprintable"
    if "could not be read" in text:
        return "in the net"
    if text.startswith(("all ", "the train data set ")):
        return "refused: the whole set"
    # the first row says what all should be, and a column of one row is missing in the others
    named = [
        f"row {row} of the train data set"
        for row in range(len(rows))
        if row == bad or "is missing, which other rows have" in text or "got None" in text or not bad
    ]
    if not text.startswith(tuple(named)):
        return f"another row: {text}"
    return "refused" if "column" in text else f"no column: {text}"


def _checked(made: Any, job: RowJob) -> str:
    for row in made:
        for name in job.features:
            values = row[name]
            if name == "label":
                if not isinstance(values, bool):
                    return "a label that is none"
            elif name.endswith("_ids") and not all(type(i) is int and 0 <= i < job.embeddings for i in values):
                return f"wrong ids in {name}"
        for name in job.keep or ():
            value = row.get(name)
            if name != "seq_lengths" and value is not None and not math.isfinite(value):
                return f"{name} is not finite"
        if "loss_mask" in row and len(row["loss_mask"]) != len(row["input_ids"]):
            return "a mask of another length"
        for name in job.features:
            if name.endswith("_ids") and len(row.get(name.replace("_ids", "_mask"), row[name])) != len(row[name]):
                return f"a mask of another length than {name}"
    return "right"


def sample(random: Random) -> tuple[str, str, str]:
    """A form, what was wrong in a row between good ones, and what became of it."""
    form = random.choice(sorted(FORMS))
    good = FORMS[form].row
    row, wrong = spoil(random, good, [one.row for one in FORMS.values()])
    before = random.randrange(3)
    rows = [*(copy.deepcopy(good) for _ in range(before)), row, copy.deepcopy(good)]
    return form, wrong, outcome(form, rows, before)
