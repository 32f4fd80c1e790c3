"""C18, C19, R12: what is wrong in a row is told with its row and its column, on one line."""

import copy
import json
import logging
from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from bad_rows import FORMS, VALUES, outcome, sample
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenising import tokenize_preference, tokenize_prompts, tokenize_stepwise, tokenize_supervised, tokenize_unpaired
from tokenizers_for_tests import TOOLS, byte_tokenizer, word_tokenizer

from trl import apply_chat_template, extract_prompt, unpair_preference_dataset
from trl.data.columns import shown

FINE = ("right", "refused", "refused: the whole set")


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def count(rows, seed):
    outcomes = Counter()
    for _ in range(rows):
        form, wrong, what = sample(random := Random(seed))
        seed = random.randrange(2**32)
        outcomes[what if what in FINE else f"{what} ({form}: {wrong})"] += 1
    return outcomes


def test_generated_rows():
    outcomes = count(300, seed=1)
    assert not outcomes.keys() - set(FINE)
    assert outcomes["right"] > 30
    assert outcomes["refused"] > 150


@pytest.mark.long
def test_many_generated_rows(request):
    if not request.config.getoption("--long", default=False):
        pytest.skip("the long form")
    outcomes = count(5_000, seed=2)
    print(dict(outcomes))
    assert not outcomes.keys() - set(FINE)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(random=st.randoms(use_true_random=False))
def test_rows_that_hypothesis_makes(random):
    form, wrong, what = sample(random)
    assert what in FINE, (form, wrong)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=4) | st.binary(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
    form=st.sampled_from(sorted(FORMS)),
    data=st.data(),
)
def test_values_that_hypothesis_makes(value, form, data):
    row = copy.deepcopy(FORMS[form].row)
    row[data.draw(st.sampled_from(sorted(row)))] = value
    assert outcome(form, [FORMS[form].row, row], 1) in FINE


@pytest.mark.parametrize("form", sorted(FORMS))
def test_good_rows_are_right(form):
    assert outcome(form, [copy.deepcopy(FORMS[form].row)] * 2, 0) == "right"


@pytest.mark.parametrize("name", sorted(VALUES))
def test_any_value_is_shown_on_one_line(name):
    text = shown(VALUES[name]())
    assert text.isprintable()
    assert 0 < len(text) <= 80


CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"x": None}}}]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": CALLS}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}, {"text": "b\ud83d"}], r"row 1 .*: column 'text' has half a character \(\\ud83d, .* 1"),
        ([{"text": "a"}, {"text": b"b"}], "row 1 of the train data set: column 'text' should be a text, got b'b'"),
        ([{"text": "a"}, 5], "row 1 of the train data set: a row should be a dict of columns, got <class 'int'>: 5"),
        ([{"text": "a"}, {"text": "b", 5: 1}], "row 1 of the train data set: a key in the row's columns is 5"),
        ([{"text": "a"}, {"messages": CHAT}], "row 0 .*: column 'messages' is missing, which other rows have"),
        ([{"input_ids": [5]}, {"input_ids": [5, -3]}], "row 1 .*: column 'input_ids' .*, got -3 at entry 1"),
        ([{"input_ids": [5]}, {"input_ids": [True, False]}], r"row 1 .*'input_ids' .* \(entry 0: True\)"),
        ([{"input_ids": [5]}, {"input_ids": 5}], "row 1 .*: column 'input_ids' should be a list of token ids, got 5"),
        ([{"input_ids": [5]}, {"input_ids": b"ab"}], "column 'input_ids' should be a list of token ids, got b'ab'"),
        ([{"input_ids": [5]}, {"input_ids": {5: 6}}], "column 'input_ids' should be a list of token ids, got {5: 6}"),
        ([{"input_ids": [5]}, {"input_ids": [2**63]}], "row 1 .*: column 'input_ids' .*, got 9223372036854775808 at"),
        ([{"input_ids": [5], "loss_mask": [[1]]}], r"row 0 .*: column 'loss_mask' .* 0 or 1 .*, got \[1\] at entry 0"),
        ([{"input_ids": [5], "loss_mask": [0.5]}], "row 0 .*: column 'loss_mask' should hold 0 or 1 .*, got 0.5"),
        ([{"input_ids": [5, 6], "seq_lengths": [2, 0]}], "column 'seq_lengths' should hold numbers of tokens of 1 or"),
        ([{"messages": [{"role": "user", "content": 5}]}], "message 0 of column 'messages': its content .*, got 5"),
        ([{"messages": [{"role": "user", "content": "\udc00"}]}], "message 0 of column 'messages' has half a char"),
        ([{"messages": [{**CHAT[1], "tool_calls": "call f"}]}], "its `tool_calls` is text but not JSON"),
        ([{"messages": [{**CHAT[1], "tool_calls": 5}]}], "message 0 .*: its `tool_calls` should be a list .*, got 5"),
        ([{"messages": [{**CHAT[1], "tool_calls": [{}]}]}], "should be calls with a function's `name`"),
        ([{"messages": CHAT, "tools": [5]}], "column 'tools', tool 0, should be a JSON schema or a function, got 5"),
        ([{"messages": CHAT, "chat_template_kwargs": "x"}], "column 'chat_template_kwargs' is text but not JSON"),
    ],
)  # fmt: skip
def test_wrong_rows(rows, message):
    with pytest.raises(ValueError, match=message) as caught:
        tokenize_supervised(rows, byte_tokenizer(TOOLS), embeddings=300)
    assert "\n" not in str(caught.value)


def test_ids_without_an_embedding():
    with pytest.raises(ValueError, match=r"row 1 .* has the id 100000, and the model's embedding has 300 rows"):
        tokenize_supervised([{"input_ids": [5]}, {"input_ids": [100_000]}], byte_tokenizer(), embeddings=300)


def learned(rows, **options):
    tokenizer = byte_tokenizer(TOOLS)
    made, _ = tokenize_supervised(rows, tokenizer, **options)
    return tokenizer.decode(made[0]["input_ids"])


@pytest.mark.parametrize("as_table", [False, True])
def test_calls_as_json_text_are_read(as_table):
    """What Arrow cannot hold is often kept as text, and a None in it was said."""
    spelled = [CHAT[0], {**CHAT[1], "tool_calls": json.dumps(CALLS)}]
    rows = [{"messages": spelled}]
    expected = learned([{"messages": CHAT}])
    assert '"x": null' in expected
    assert learned(Dataset.from_list(rows) if as_table else rows) == expected
    one = [CHAT[0], {**CHAT[1], "tool_calls": [json.dumps(CALLS[0])]}]
    assert (
        learned([{"messages": one}])
        == learned([{"messages": [CHAT[0], {**CHAT[1], "tool_calls": CALLS[0]}]}])
        == expected
    )


@pytest.mark.parametrize(
    "ids",
    [
        (5, 6),
        np.array([5, 6]),
        [np.int64(5), np.int32(6)],
        torch.tensor([5, 6]),
        [torch.tensor(5), 6],
        range(5, 7),
    ],
)
def test_ids_of_any_kind_pass(ids):
    assert tokenize_supervised([{"input_ids": ids}], word_tokenizer())[0][0]["input_ids"] == [5, 6]


def test_clear_meanings_pass():
    part = {"type": "text", "text": "hi"}
    said = [{"role": "user", "content": part}, {"role": "assistant", "content": "yo"}]
    whole = [{"role": "user", "content": [part]}, said[1]]
    assert learned([{"messages": said}]) == learned([{"messages": whole}])
    assert learned([{"messages": np.array(whole, dtype=object)}]) == learned([{"messages": tuple(whole)}])
    assert learned([{"text": "a\0b"}]).startswith("a\0b")
    step = {"prompt": "the", "completions": np.array([" sky"], dtype=object), "labels": np.array([True])}
    assert tokenize_stepwise([step], word_tokenizer())[0][0]["input_ids"]


PAIR = {"prompt": "the", "chosen": " sky", "rejected": " is"}


@pytest.mark.parametrize("value", [10**400, 1e300, True, 1j])
def test_numbers_that_no_loss_can_read(value):
    """C18: in single precision too, in which the loss reads it."""
    with pytest.raises(ValueError, match="row 1 of the train data set: column 'margin' should be a finite number"):
        tokenize_preference([{**PAIR, "margin": 1}, {**PAIR, "margin": value}], word_tokenizer())


def test_an_optional_number_that_some_rows_lack():
    """R12: whichever row comes first."""
    for rows, row in (([{**PAIR, "margin": 1.0}, PAIR], 1), ([PAIR, {**PAIR, "margin": 1.0}], 0)):
        with pytest.raises(ValueError, match=f"row {row} .*: column 'margin' should be a finite number, got None"):
            tokenize_preference(rows, word_tokenizer())
    mixed = [{**PAIR, "margin": own} for own in (1, 0.5, np.float32(2), torch.tensor([3.0]))]
    assert tokenize_preference(mixed, word_tokenizer())[0]["margin"][:] == [1.0, 0.5, 2.0, 3.0]


def test_a_prompt_that_some_rows_lack():
    """R12: the prompt of a later row is not dropped in silence because the first row has none."""
    with pytest.raises(ValueError, match=r"row 0 .*: column 'prompt' is missing, which other rows have"):
        tokenize_preference([{"chosen": "the sky", "rejected": "the is"}, PAIR], word_tokenizer())
    unpaired = unpair_preference_dataset([PAIR, {**PAIR, "note": "x"}])
    assert [row["note"] for row in unpaired] == [None, "x", None, "x"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PAIR, "rejected": 5}, "row 1 of the train data set: column 'rejected' should be a text, got 5"),
        (
            {**PAIR, "chosen": 76.0},
            r"'chosen' should be a text, got 76.0 \(of a CSV file\? converters=\{'chosen': str\}",
        ),
        ({"prompt": "the", "chosen": "a"}, "row 1 of the train data set: .*'rejected'"),
        ({**PAIR, "chosen": "\ud800"}, "row 1 of the train data set: column 'chosen' has half a character"),
    ],
)
def test_pairs_taken_apart_keep_their_row(row, message):
    with pytest.raises(ValueError, match=message):
        tokenize_unpaired([PAIR, row, PAIR], word_tokenizer())


@pytest.mark.parametrize("as_table", [False, True])
def test_a_conversation_that_no_template_renders_keeps_its_row(as_table):
    def pair(role):
        return {
            "prompt": [{"role": role, "content": "a"}],
            **{side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")},
        }

    refuses = "{% if m.role == 'odd' %}{{ raise_exception('no') }}{% endif %}"
    template = "{% for m in messages %}" + refuses + "{{ m.content }}.{% endfor %}"
    rows = [pair("user"), pair("user"), pair("odd")]
    with pytest.raises(ValueError, match=r"row 2 of the train data set: the chat template cannot render .* \(columns"):
        tokenize_unpaired(Dataset.from_list(rows) if as_table else rows, byte_tokenizer(template))


def test_functions_of_single_rows():
    with pytest.raises(ValueError, match=r"'chosen' and 'rejected' is text .*: chosen is 'a', rejected is None"):
        extract_prompt({"chosen": "a", "rejected": None})
    with pytest.raises(ValueError, match="column 'prompt' should be a list of messages"):
        apply_chat_template({"prompt": "a", "completion": CHAT}, byte_tokenizer())
    with pytest.raises(ValueError, match=r"row 1 .*: column 'prompt' should be a text, got \['a'\]"):
        tokenize_prompts([{"prompt": "the"}, {"prompt": ["a"]}], word_tokenizer())
