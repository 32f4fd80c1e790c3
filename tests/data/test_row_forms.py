"""Other forms of the same rows: who says what in prompts and answers, how calls and tools are written, and which tokens
of an answer are scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from tokenising import (
    tokenize_preference,
    tokenize_prompts,
    tokenize_stepwise,
    tokenize_supervised,
    tokenize_unpaired,
)
from tokenizers_for_tests import CHATML, TOOLS, byte_tokenizer

from trl.data.batches import pair_columns, pair_ids, pair_tree

ASK = {"role": "user", "content": "q"}
BE = {"role": "system", "content": "be"}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
RESULT = {"role": "tool", "content": "seen"}
PROMPT = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


def say(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def calling(arguments: Any = '{"x": 1}') -> dict[str, Any]:
    return say("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": arguments}}])


def decoded(tokenise: Callable[..., Any], row: dict[str, Any], template: str = CHATML, **options: Any) -> Any:
    tokenizer = byte_tokenizer(template)
    rows, _ = tokenise([row], tokenizer, **options)
    return {name: tokenizer.decode(ids) for name, ids in rows[0].items() if name.endswith("_ids")}


def learned(row: dict[str, Any], template: str = TOOLS, name: str = "input_ids", mask: str = "loss_mask") -> str:
    ids, marks = row[name], row[mask]
    return str(byte_tokenizer(template).decode([i for i, m in zip(ids, marks, strict=True) if m]))


# -- prompts and answers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "yes", "no", "wanted"),
    [
        ([ASK], [ASK, say("y")], [ASK, say("n")], PROMPT),
        ([ASK], [ASK, say("y")], [say("n")], PROMPT),
        ([BE, ASK], [ASK, say("y")], [ASK, say("n")], "<|im_start|>system\nbe<|im_end|>\n" + PROMPT),
        ([ASK], "y", "n", PROMPT),
        ([ASK], say("y"), say("n"), PROMPT),
        ("q", [say("y")], [say("n")], PROMPT),
        ("q", [say("y")], [ASK, say("n")], PROMPT),
        ("q", [BE, ASK, say("y")], [BE, ASK, say("n")], "<|im_start|>system\nbe<|im_end|>\n" + PROMPT),
        ([{"from": "human", "value": "q"}], [{"from": "gpt", "value": "y"}], [{"from": "gpt", "value": "n"}], PROMPT),
    ],
)
def test_an_answer_is_what_follows_the_prompt(prompt: Any, yes: Any, no: Any, wanted: str) -> None:
    """Answers that repeat the prompt were trained with it, and texts beside conversations were refused."""
    pair = {"prompt": prompt, "chosen": yes, "rejected": no}
    parts = {"prompt_ids": wanted, "chosen_ids": "y<|im_end|>", "rejected_ids": "n<|im_end|>"}
    assert decoded(tokenize_preference, pair) == parts
    assert decoded(tokenize_preference, pair, needs_prompt=False) == parts
    single = {"prompt_ids": wanted, "completion_ids": "y<|im_end|>"}
    assert decoded(tokenize_unpaired, pair) == single
    assert decoded(tokenize_unpaired, {"prompt": prompt, "completion": yes, "label": True}) == single
    row = {"prompt": prompt, "completion": yes}
    for options in ({}, {"assistant_only_loss": True}):
        rows, _ = tokenize_supervised([row], byte_tokenizer(CHATML), **options)
        assert learned(rows[0], CHATML) == "y<|im_end|>"
        assert byte_tokenizer().decode(rows[0]["input_ids"]).startswith(wanted + "y")


def test_messages_of_two_columns_are_the_same_without_what_arrow_filled_in() -> None:
    """A table whose chosen answers call tools was refused: 'no message before its answer'."""
    row = {"chosen": [ASK, calling(), RESULT, say("y")], "rejected": [ASK, say("n")]}
    rows, _ = tokenize_preference(Dataset.from_list([row]), byte_tokenizer(TOOLS))
    assert byte_tokenizer().decode(rows[0]["prompt_ids"]) == PROMPT
    assert byte_tokenizer().decode(rows[0]["rejected_ids"]) == "n<|im_end|>"


@pytest.mark.parametrize("names", [("Human", "GPT"), ("USER", "bard"), ("user", "Assistant")])
def test_roles_in_other_spellings(names: tuple[str, str]) -> None:
    row = {"conversations": [{"from": names[0], "value": "q"}, {"from": names[1], "value": "y"}]}
    rows, _ = tokenize_supervised([row], byte_tokenizer(), assistant_only_loss=True)
    assert learned(rows[0], CHATML) == "y<|im_end|>"


def test_arrays_of_messages() -> None:
    """Rows of pandas hold arrays."""
    yes, no, ask = (np.array(messages, dtype=object) for messages in ([ASK, say("y")], [ASK, say("n")], [ASK]))
    rows, _ = tokenize_supervised([{"messages": yes}], byte_tokenizer(), assistant_only_loss=True)
    assert learned(rows[0], CHATML) == "y<|im_end|>"
    assert decoded(tokenize_preference, {"chosen": yes, "rejected": no})["chosen_ids"] == "y<|im_end|>"
    assert decoded(tokenize_prompts, {"prompt": ask}) == {"prompt_ids": PROMPT}


def test_a_step_without_a_verdict_is_not_learned() -> None:
    row = {"prompt": "q", "completions": ["a", "b", "c"], "labels": [1, -100, 0]}
    rows, report = tokenize_stepwise([row], byte_tokenizer())
    assert (rows[0]["step_labels"], report.learned) == ([-100, -100, 1, -100, -100, -100, 0], 2)


# -- calls and tools --------------------------------------------------------------------------

CALL = {"name": "f", "arguments": {"x": 1}}
FUNCTION = {"type": "function", "function": CALL}


@pytest.mark.parametrize(
    "messages",
    [
        [say("", tool_calls=[FUNCTION]), RESULT],
        [say("", tool_calls=json.dumps([FUNCTION])), RESULT],
        [say("", tool_calls=FUNCTION), RESULT],
        [say("", tool_calls=[CALL]), RESULT],
        [say("", tool_calls=json.dumps([{**CALL, "id": "c1"}])), RESULT],
        [say("", function_call={**CALL, "arguments": '{"x": 1}'}), {"role": "function", "content": "seen"}],
    ],
)
def test_one_call_in_many_forms(messages: list[dict[str, Any]]) -> None:
    """Flat calls and JSON text ended in errors of the template; `function_call` disappeared."""
    row = {"messages": [ASK, *messages, say("y")]}
    rows, report = tokenize_supervised([row], byte_tokenizer(TOOLS), assistant_only_loss=True)
    call = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|im_end|>'
    assert learned(rows[0]) == f"{call}y<|im_end|>"
    assert "<|im_start|>tool\nseen<|im_end|>" in byte_tokenizer().decode(rows[0]["input_ids"])
    assert report.empty_completion == 0


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], TOOL, json.dumps(TOOL)])
def test_one_tool_in_many_forms(tools: Any) -> None:
    text = decoded(tokenize_prompts, {"prompt": [ASK], "tools": tools}, TOOLS)["prompt_ids"]
    assert text == f"<|im_start|>system\n{json.dumps(TOOL)}\n<|im_end|>\n" + PROMPT


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": ["search"]}, "row 0 of the train data set: column 'tools', tool 0, is text but not JSON"),
        ({"tools": [3]}, "row 0 .*: column 'tools', tool 0, should be a JSON schema or a function, got 3"),
        (
            {"prompt": [ASK, say("", tool_calls="f(1)")]},
            "row 0 .*: message 1 of column 'prompt': its `tool_calls` is text but not JSON",
        ),
    ],
)
def test_what_is_neither_call_nor_tool(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize_prompts([{"prompt": [ASK], **row}], byte_tokenizer(TOOLS))


@pytest.mark.parametrize("field", ["weight", "train"])
def test_weights_that_no_one_reads_are_reported(field: str) -> None:
    """Without `assistant_only_loss` a message with `weight: 0` was learned without a word."""
    row = {"messages": [{**ASK, field: 0}, say("a", **{field: 0}), ASK, say("y", **{field: 1})]}
    said = {True: 0, False: 1}
    for only, count in said.items():
        _, report = tokenize_supervised(
            [row, {"messages": [ASK, say("y")]}], byte_tokenizer(), assistant_only_loss=only
        )
        assert report.unread_weights == count
        assert any("`assistant_only_loss=True` leaves those messages out" in line for line in report.findings) != only


# -- what is scored (T13 of preference rows) --------------------------------------------------

AGENTIC = {"prompt": [ASK], "chosen": [calling(), RESULT, say("y")], "rejected": [say("n")]}
SAID = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|im_end|>y<|im_end|>'


@pytest.mark.parametrize("as_table", [True, False])
def test_results_of_tools_are_not_scored_in_answers(as_table: bool) -> None:
    tokenizer = byte_tokenizer(TOOLS)
    rows, report = tokenize_preference(Dataset.from_list([AGENTIC]) if as_table else [AGENTIC], tokenizer)
    assert learned(rows[0], name="chosen_ids", mask="chosen_mask") == SAID
    assert rows[0]["rejected_mask"] == [1, 1]
    assert report.learned == sum(rows[0]["chosen_mask"]) + 2
    tree = pair_tree(rows[0])
    assert [list(branch.scored or []) for branch in tree.branches] == [rows[0]["chosen_mask"], [1, 1]]
    again, _ = tokenize_preference(rows, tokenizer)  # as another trainer reads them
    assert again[0] == rows[0]
    single, _ = tokenize_unpaired([AGENTIC], tokenizer)
    assert learned(single[0], name="completion_ids", mask="completion_mask") == SAID


def test_weights_of_messages_count_in_pairs() -> None:
    row = {"prompt": [ASK], "chosen": [say("a", weight=0), ASK, say("y")], "rejected": [say("n", weight=1)]}
    rows, _ = tokenize_preference([row], byte_tokenizer(TOOLS))
    assert learned(rows[0], name="chosen_ids", mask="chosen_mask") == "y<|im_end|>"


def test_all_of_an_answer_is_scored_where_it_is_asked_for() -> None:
    rows, report = tokenize_preference([AGENTIC], byte_tokenizer(TOOLS), learn_tool_results=True)
    assert sorted(rows[0]) == ["chosen_ids", "prompt_ids", "rejected_ids"]
    assert report.learned == len(rows[0]["chosen_ids"]) + len(rows[0]["rejected_ids"])


def test_a_cut_answer_keeps_its_mask_or_is_left_out() -> None:
    row = {"prompt": [ASK], "chosen": [say("a", weight=0), ASK, say("y")], "rejected": [say("n")]}
    whole, _ = tokenize_preference([row], byte_tokenizer(TOOLS))
    size = len(whole[0]["chosen_ids"])
    cut, _ = tokenize_preference([row], byte_tokenizer(TOOLS), max_completion_length=size - 1)
    assert cut[0]["chosen_mask"] == whole[0]["chosen_mask"][:-1]
    _, report = tokenize_preference([row, AGENTIC], byte_tokenizer(TOOLS), max_completion_length=3)
    assert report.answer_cut == 1


def test_labels_of_tokenised_pairs_say_what_is_scored() -> None:
    """Of labels that are -100 inside an answer only the first ones counted."""
    rows, _ = tokenize_preference([AGENTIC], byte_tokenizer(TOOLS))
    own = pair_columns(rows[0])
    assert pair_ids(own)["chosen_mask"] == rows[0]["chosen_mask"]
    row = {
        "chosen_input_ids": [5, 6, 7, 8], "chosen_labels": [-100, 6, -100, 8],
        "rejected_input_ids": [5, 9], "rejected_labels": [-100, 9],
    }  # fmt: skip
    made, _ = tokenize_preference([row], byte_tokenizer())
    assert (made[0]["chosen_ids"], made[0]["chosen_mask"]) == ([6, 7, 8], [1, 0, 1])
    wrong = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7], "chosen_mask": [1, 1], "rejected_mask": [1]}
    with pytest.raises(ValueError, match=r"row 0 .*: column 'chosen_mask' has 2 entries for 1 `chosen_ids`"):
        tokenize_preference([wrong], byte_tokenizer())


# -- forms that meet what is checked ----------------------------------------------------------


def test_masks_of_padded_pairs_go_with_the_ids_that_are_left() -> None:
    """Labels lose their padding with their ids, and -100 inside an answer still says what is not scored."""
    row = {
        "chosen_input_ids": [0, 5, 6, 7, 8], "chosen_labels": [-100, -100, 6, -100, 8],
        "chosen_attention_mask": [0, 1, 1, 1, 1],
        "rejected_input_ids": [5, 9], "rejected_labels": [-100, 9],
    }  # fmt: skip
    made, _ = tokenize_preference([row], byte_tokenizer())
    assert (made[0]["prompt_ids"], made[0]["chosen_ids"], made[0]["chosen_mask"]) == ([5], [6, 7, 8], [1, 0, 1])


def test_a_prompt_of_arrays_of_parts_is_found_in_the_answers() -> None:
    """Arrays have no single truth: messages are read before they are compared."""
    parts = [{"type": "text", "text": "q"}]
    asked = {"role": "user", "content": np.array(parts * 2, dtype=object)}
    plain = {"role": "user", "content": parts * 2}
    made, wanted = (
        decoded(tokenize_preference, {"prompt": [ask], "chosen": [ask, say("y")], "rejected": "n"})
        for ask in (asked, plain)
    )
    assert made == wanted
    assert made["chosen_ids"] == "y<|im_end|>"


@pytest.mark.parametrize("prompt", [None, []])
@pytest.mark.parametrize("tokenise", [tokenize_preference, tokenize_unpaired])
def test_a_row_without_its_own_prompt_has_it_in_its_answers(tokenise: Callable[..., Any], prompt: Any) -> None:
    rows = [
        {"prompt": [ASK], "chosen": [say("y")], "rejected": [say("n")]},
        {"prompt": prompt, "chosen": [ASK, say("y")], "rejected": [ASK, say("n")]},
    ]
    made, _ = tokenise(rows, byte_tokenizer())
    assert [byte_tokenizer().decode(row["prompt_ids"]) for row in made] == [PROMPT] * len(made)
    with pytest.raises(ValueError, match=r"row 1 .*prompt.*'prompt' is (None|\[\])"):
        tokenise([rows[0], {**rows[0], "prompt": prompt}], byte_tokenizer())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (5, "its `function_call` should be a list of calls, got 5"),
        ({"arguments": "{}"}, "its `function_call` should be calls with a function's `name`"),
        ("f(1)", "its `function_call` is text but not JSON"),
    ],
)
def test_an_older_call_is_checked_like_a_newer_one(call: Any, message: str) -> None:
    row = {"messages": [ASK, say("", function_call=call)]}
    with pytest.raises(ValueError, match=f"row 0 .*: message 1 of column 'messages': {message}"):
        tokenize_supervised([row], byte_tokenizer(TOOLS))
    spelled, whole = (
        tokenize_supervised([{"messages": [ASK, say("", function_call=one)]}], byte_tokenizer(TOOLS))[0][0]
        for one in (json.dumps(CALL), CALL)
    )
    assert spelled == whole


def test_steps_have_verdicts_of_three_kinds() -> None:
    for labels in (np.array([1, -100]), [True, -100], (1.0, np.int64(-100))):
        rows, _ = tokenize_stepwise([{"prompt": "q", "completions": ["a", "b"], "labels": labels}], byte_tokenizer())
        assert rows[0]["step_labels"] == [-100, -100, 1, -100, -100]
    with pytest.raises(ValueError, match=r"'labels' should hold true or false .*, or -100 .*, got 2 at entry 1"):
        tokenize_stepwise([{"prompt": "q", "completions": ["a", "b"], "labels": [1, 2]}], byte_tokenizer())
