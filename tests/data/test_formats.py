"""Row formats are told apart, and converted into each other."""

from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from tokenizers_for_tests import CHATML, byte_tokenizer

from trl.data.formats import (
    RowKind,
    apply_chat_template,
    detect_format,
    extract_prompt,
    is_conversational,
    is_conversational_from_value,
    maybe_apply_chat_template,
    maybe_convert_to_chatml,
    maybe_extract_prompt,
    maybe_unpair_preference_dataset,
    unpair_preference_dataset,
)

ASK = {"role": "user", "content": "What color is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}
KINDS = tuple(RowKind)


@pytest.mark.parametrize(
    ("row", "kind", "conversational", "implicit"),
    [
        ({"text": "a"}, RowKind.TEXT, False, False),
        ({"text": [ASK, BLUE]}, RowKind.MESSAGES, True, False),
        ({"messages": [ASK, BLUE]}, RowKind.MESSAGES, True, False),
        ({"conversations": [{"from": "human", "value": "a"}]}, RowKind.MESSAGES, True, False),
        ({"prompt": "a"}, RowKind.PROMPT, False, False),
        ({"prompt": [ASK]}, RowKind.PROMPT, True, False),
        ({"prompt": "a", "completion": "b"}, RowKind.PROMPT_COMPLETION, False, False),
        ({"prompt": [ASK], "completion": [BLUE]}, RowKind.PROMPT_COMPLETION, True, False),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, RowKind.PREFERENCE, False, False),
        ({"chosen": "b", "rejected": "c"}, RowKind.PREFERENCE, False, True),
        ({"chosen": [ASK, BLUE], "rejected": [ASK, GREEN]}, RowKind.PREFERENCE, True, True),
        ({"prompt": "a", "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]}, RowKind.PREFERENCE, True, True),
        ({"prompt": [ASK], "chosen": [BLUE], "rejected": [GREEN]}, RowKind.PREFERENCE, True, False),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, RowKind.STEPWISE, False, False),
        ({"input_ids": [1]}, RowKind.TOKENIZED, False, False),
    ],
)
@pytest.mark.parametrize("as_dataset", [False, True])
def test_formats_are_told_apart(
    row: dict[str, Any], kind: RowKind, conversational: bool, implicit: bool, as_dataset: bool
) -> None:
    order = (
        RowKind.TOKENIZED,
        RowKind.STEPWISE,
        RowKind.MESSAGES,
        RowKind.PREFERENCE,
        RowKind.PROMPT_COMPLETION,
        RowKind.TEXT,
        RowKind.PROMPT,
    )
    found = detect_format(Dataset.from_list([row]) if as_dataset else [row], order)
    assert (found.kind, found.conversational, found.implicit_prompt) == (kind, conversational, implicit)


def test_unpaired_rows() -> None:
    accepts = (RowKind.UNPAIRED,)
    assert detect_format([{"prompt": "a", "completion": "b", "label": True}], accepts).kind is RowKind.UNPAIRED
    assert detect_format([{"completion": "b", "label": True}], accepts).implicit_prompt


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the eval data set is empty"),
        (Dataset.from_list([]), "the eval data set is empty"),
        (
            [{"prompt": "a", "chosen": "b"}],
            "lacks the column 'rejected' of a preference row; columns found: chosen, prompt",
        ),
        (
            [{"x": 1, "y": 2}],
            r"none of the columns that are needed \(prompt \+ chosen \+ rejected\); columns found: x, y",
        ),
        ([[1, 2]], "row 0 of the eval data set: a row should be a dict of columns"),
        ({"a": [], "b": []}, r"with the splits 'a' \(0 rows\), 'b' \(0 rows\): pass one of them"),
    ],
)
def test_missing_columns_are_named(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detect_format(rows, (RowKind.PREFERENCE,), name="eval")


def test_is_conversational() -> None:
    assert is_conversational({"prompt": [ASK]})
    assert is_conversational({"messages": [{"role": "assistant", "tool_calls": []}]})
    assert not is_conversational({"prompt": "The sky is"})
    assert not is_conversational({"prompt": []})
    assert not is_conversational({"other": [ASK]})
    assert is_conversational_from_value({"conversations": [{"from": "user", "value": "a"}]})
    assert not is_conversational_from_value({"conversations": [ASK]})
    assert not is_conversational_from_value({"conversations": "a"})


def test_share_gpt_becomes_chatml() -> None:
    rows = [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]
    assert maybe_convert_to_chatml({"conversations": rows, "id": 1}) == {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "id": 1,
    }
    rows = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
        {"from": "observation", "value": "r"},
        {"from": "function_call", "value": "no json"},
        {"from": "gpt", "value": "b"},
    ]
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert maybe_convert_to_chatml({"prompt": rows})["prompt"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "no json"},
        {"role": "assistant", "content": "b"},
    ]
    assert maybe_convert_to_chatml({"prompt": "a"}) == {"prompt": "a"}
    assert maybe_convert_to_chatml({"prompt": [ASK]}) == {"prompt": [ASK]}


def test_extract_prompt_from_texts() -> None:
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    assert extract_prompt(row) == {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    # both words begin with "b": the prompt ends before the word, not inside it
    row = {"chosen": "The sky is blue", "rejected": "The sky is brown"}
    assert extract_prompt(row) == {"prompt": "The sky is", "chosen": " blue", "rejected": " brown"}
    row = {"chosen": "Q: 1+1=2", "rejected": "Q: 1+1=3"}
    assert extract_prompt(row) == {"prompt": "Q: 1+1=", "chosen": "2", "rejected": "3"}
    row = {"chosen": "blue", "rejected": "brown"}
    assert extract_prompt(row)["prompt"] == ""
    with pytest.raises(ValueError, match="is text and the other is a conversation"):
        extract_prompt({"chosen": "a", "rejected": [BLUE]})


def test_extract_prompt_from_conversations() -> None:
    row = {"chosen": [ASK, BLUE], "rejected": [ASK, GREEN], "id": 1}
    assert extract_prompt(row) == {"prompt": [ASK], "chosen": [BLUE], "rejected": [GREEN], "id": 1}
    same = extract_prompt({"chosen": [ASK, BLUE], "rejected": [ASK, BLUE]})
    assert same["prompt"] == [ASK]  # each answer keeps a message


def test_maybe_extract_prompt() -> None:
    explicit = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert maybe_extract_prompt(explicit) == explicit
    assert maybe_extract_prompt({"prompt": "a"}) == {"prompt": "a"}
    mixed = {"prompt": "What color is the sky?", "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]}
    assert maybe_extract_prompt(mixed)["prompt"] == [ASK]


def test_unpair_preferences() -> None:
    rows = [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green.", "id": 1},
        {"prompt": "The sun is", "chosen": " hot.", "rejected": " cold.", "id": 2},
    ]
    expected = [
        {"prompt": "The sky is", "id": 1, "completion": " blue.", "label": True},
        {"prompt": "The sun is", "id": 2, "completion": " hot.", "label": True},
        {"prompt": "The sky is", "id": 1, "completion": " green.", "label": False},
        {"prompt": "The sun is", "id": 2, "completion": " cold.", "label": False},
    ]
    dataset = Dataset.from_list(rows)
    assert list(unpair_preference_dataset(dataset)) == expected
    assert unpair_preference_dataset(rows) == expected
    assert list(unpair_preference_dataset(dataset.to_iterable_dataset())) == expected
    assert list(maybe_unpair_preference_dataset(DatasetDict(a=dataset))["a"]) == expected
    single = Dataset.from_list(expected)
    assert maybe_unpair_preference_dataset(single) is single


USER_TEXT = "<|im_start|>user\nWhat color is the sky?<|im_end|>\n"


def test_apply_chat_template() -> None:
    tokenizer = byte_tokenizer(CHATML)
    opened = USER_TEXT + "<|im_start|>assistant\n"
    blue, green = "It is blue.<|im_end|>\n", "It is green.<|im_end|>\n"
    assert apply_chat_template({"messages": [ASK, BLUE]}, tokenizer) == {"text": opened + blue}
    assert apply_chat_template({"prompt": [ASK]}, tokenizer) == {"prompt": opened}
    assert apply_chat_template({"prompt": [ASK], "completion": [BLUE], "label": True}, tokenizer) == {
        "prompt": opened,
        "completion": blue,
        "label": True,
    }
    assert apply_chat_template({"prompt": [ASK], "chosen": [BLUE], "rejected": [GREEN]}, tokenizer) == {
        "prompt": opened,
        "chosen": blue,
        "rejected": green,
    }
    assert apply_chat_template({"chosen": [ASK, BLUE], "rejected": [ASK, GREEN]}, tokenizer) == {
        "chosen": opened + blue,
        "rejected": opened + green,
    }
    with pytest.raises(ValueError, match="columns found: other"):
        apply_chat_template({"other": 1}, tokenizer)


def test_a_prompt_that_ends_with_the_assistant_is_continued() -> None:
    begun = {"role": "assistant", "content": "It is"}
    assert apply_chat_template({"prompt": [ASK, begun]}, byte_tokenizer(CHATML)) == {
        "prompt": USER_TEXT + "<|im_start|>assistant\nIt is"
    }


def test_template_arguments() -> None:
    tokenizer = byte_tokenizer("{{ mood }}" + CHATML)
    assert apply_chat_template({"messages": [ASK]}, tokenizer, mood="glad")["text"] == "glad" + USER_TEXT
    row = {"messages": [ASK], "chat_template_kwargs": {"mood": "sad"}}
    assert apply_chat_template(row, tokenizer, mood="glad")["text"] == "sad" + USER_TEXT


def test_maybe_apply_chat_template_leaves_text_alone() -> None:
    assert maybe_apply_chat_template({"prompt": "a"}, byte_tokenizer()) == {"prompt": "a"}
    assert maybe_apply_chat_template({"messages": [ASK]}, byte_tokenizer()) == {"text": USER_TEXT}
