"""Shapes of data: prompts that are missing, columns that no one reads, packing on Arrow's columns, cached rows, counts
by message."""

from __future__ import annotations

import logging
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenising import (
    tokenize_preference,
    tokenize_prompts,
    tokenize_stepwise,
    tokenize_supervised,
    tokenize_unpaired,
)
from tokenizers_for_tests import CHATML, TOOLS, byte_tokenizer, styled_tokenizer, word_tokenizer

import trl
from trl.data.packed_dataset import pack_dataset
from trl.data.prompt_rows import PairsJob, PromptsJob
from trl.data.report import RowFlag
from trl.data.supervised_rows import SupervisedJob
from trl.data.tokenize import notes
from trl.data.version import code_version

USER = {"role": "user", "content": "hi"}
YO = {"role": "assistant", "content": "yo"}
ORCA = {"system": "be good", "question": "the sky is", "chosen": "blue", "rejected": "green"}


def calling(arguments: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
    }


# Prompts and columns


@pytest.mark.parametrize("needs_prompt", [True, False], ids=["policy", "reward"])
@pytest.mark.parametrize("as_table", [True, False])
def test_a_question_that_no_one_reads_is_an_error(needs_prompt: bool, as_table: bool) -> None:
    rows = [ORCA, {**ORCA, "chosen": "sky one", "rejected": "sky two"}, ORCA]  # one pair begins alike by chance
    given: Any = Dataset.from_list(rows) if as_table else rows
    wanted = "2 of 3 rows of the train data set have an empty prompt, and no one reads the columns 'system', 'question'"
    with pytest.raises(ValueError, match=wanted):
        tokenize_preference(given, word_tokenizer(), needs_prompt=needs_prompt)
    with pytest.raises(ValueError, match="no one reads the columns 'query'"):
        tokenize_unpaired([{"query": "the sky", "completion": "is", "label": True}] * 2, word_tokenizer())


@pytest.mark.parametrize(
    ("tokenise", "row"),
    [
        (tokenize_preference, {"prompt": "", "chosen": "blue", "rejected": "green"}),
        (tokenize_preference, {"chosen": "blue", "rejected": "green"}),
        (tokenize_unpaired, {"completion": "blue", "label": True}),
        (tokenize_unpaired, {"chosen": "blue", "rejected": "green"}),
        (tokenize_supervised, {"prompt": " ", "completion": "blue"}),
        (tokenize_stepwise, {"prompt": "", "completions": ["blue"], "labels": [True]}),
        (tokenize_prompts, {"prompt": ""}),
        (tokenize_prompts, {"prompt": [{"role": "system", "content": "be good"}, {"role": "user", "content": " "}]}),
        (
            tokenize_preference,
            {"prompt": [{**USER, "content": ""}], "chosen": [YO], "rejected": [{**YO, "content": "no"}]},
        ),
    ],
)
def test_no_prompt_at_all_is_an_error(tokenise: Any, row: dict[str, Any]) -> None:
    tokenizer = byte_tokenizer(CHATML, bos="<s>", add_bos=True)
    with pytest.raises(ValueError, match=r"all \d rows of the train data set have an empty prompt: "):
        tokenise([row, row], tokenizer)
    if isinstance(row.get("prompt"), str):
        _, report = tokenise([row, {**row, "prompt": "a"}], tokenizer)
        assert report.empty_prompt == 1
        assert "1 rows have an empty prompt" in report.findings


def test_whole_texts_are_judged_without_a_prompt() -> None:
    rows, report = tokenize_preference([{"chosen": "blue", "rejected": "green"}], word_tokenizer(), needs_prompt=False)
    assert rows[0]["prompt_ids"] == []
    assert report.empty_prompt == 1


def test_columns_that_no_one_reads_are_named() -> None:
    pair = {"prompt": "the", "chosen": " sky", "rejected": " is", "margin": 1.0, "source": "x", "id": 3}
    assert tokenize_preference([pair], word_tokenizer())[1].findings == ["no one reads the columns 'source', 'id'"]
    row = {"messages": [USER, YO], "tools": None, "chat_template_kwargs": None, "system": "be good"}
    found = tokenize_supervised(Dataset.from_list([row]), byte_tokenizer())[1].findings
    assert found == ["no one reads the column 'system'"]
    assert tokenize_prompts([{"prompt": "the", "gold": "x"}], word_tokenizer())[1].unread == []  # rewards read them
    assert tokenize_supervised([{"input_ids": [5, 6], "x": 1}], word_tokenizer())[1].unread == []


# The report


def test_messages_are_counted_one_by_one() -> None:
    tokenizer, ends = styled_tokenizer("handwritten_phi3")
    told = {"role": "tool", "name": "f", "content": "2"}
    thought = {**YO, "reasoning_content": "Hm."}
    rows = [{"messages": [USER, thought, USER, calling('{"a": 1}'), told, thought]}, {"messages": [USER, YO]}]
    _, report = tokenize_supervised(rows, tokenizer, ends=ends, assistant_only_loss=True)
    assert report.met._asdict() == {
        "messages": 8,
        "thoughts": 2,
        "results": 1,
        "texts": 0,
        "decoded": 1,
        "joined": 0,
        "pictures": 0,
    }
    assert (report.unprinted_thoughts, report.unprinted_results) == (1, 1)  # in rows
    assert "the chat template does not print the reasoning of 2 of 8 messages" in report.findings


def test_a_prompt_is_counted_once_for_both_answers() -> None:
    told = {"role": "tool", "name": "f", "content": "2"}
    prompt = [USER, calling('{"a": 1}'), told]
    parts = {"role": "assistant", "content": [{"type": "text", "text": "yo"}]}
    pair = {"prompt": prompt, "chosen": [parts], "rejected": [{**YO, "reasoning_content": "Hm."}, USER]}
    _, report = tokenize_preference([pair, pair], byte_tokenizer(TOOLS))
    assert report.met._asdict() == {
        "messages": 12,
        "thoughts": 2,
        "results": 0,
        "texts": 0,
        "decoded": 2,
        "joined": 2,
        "pictures": 0,
    }


@pytest.mark.parametrize("tokenise", [tokenize_prompts, tokenize_stepwise])
def test_prompts_report_too(tokenise: Any) -> None:
    row = {"prompt": [{**USER, "content": [{"type": "text", "text": "hi"}]}, calling('{"a": 1}')]}
    row |= {"completions": ["a"], "labels": [True]} if tokenise is tokenize_stepwise else {}
    for rows in ([row], Dataset.from_list([row])):
        _, report = tokenise(rows, byte_tokenizer(TOOLS))
        assert (report.met.messages, report.met.decoded, report.met.joined) == (2, 1, 1)
        assert (report.decoded_arguments, report.joined_parts) == (1, 1)


def test_each_row_can_be_looked_at() -> None:
    rows = [{"messages": [USER, {**YO, "reasoning_content": "Hm."}]}, {"messages": [USER, YO]}, {"messages": [USER]}]
    job = SupervisedJob(tokenizer=byte_tokenizer(), assistant_only_loss=True)
    seen = list(notes(Dataset.from_list(rows), job))
    assert [(note.index, note.tokens > 0, note.left_out) for note in seen] == [
        (0, True, False), (1, True, False), (2, True, True),
    ]  # fmt: skip
    assert seen[0].findings == ["the chat template does not print the reasoning of 1 of 2 messages"]
    assert seen[1].findings == []
    assert seen[2].flags == RowFlag.UNLEARNED
    assert byte_tokenizer().decode([i for i, m in zip(*seen[1].columns.values(), strict=True) if m]) == "yo<|im_end|>"
    pair = {"prompt": "the sky", "chosen": " is", "rejected": " blue"}
    (note,) = notes([pair, pair], PairsJob(tokenizer=word_tokenizer()), most=1)
    assert (note.tokens, note.learned, sorted(note.columns)) == (6, 4, ["chosen_ids", "prompt_ids", "rejected_ids"])
    assert [
        n.met.decoded
        for n in notes([{"prompt": [USER, calling('{"a": 1}')]}], PromptsJob(tokenizer=byte_tokenizer(TOOLS)))
    ] == [1]


def test_the_report_is_always_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing found and logging as Python has it, the line still appears; who asks for silence gets it."""
    logger = logging.getLogger("trl.data.report")
    tokenize_supervised([{"text": "the sky"}], word_tokenizer())
    assert "train data: 1 rows, 3 tokens, 2 learned" in capsys.readouterr().err
    monkeypatch.setattr(logger, "level", logging.ERROR)
    logger.manager._clear_cache()  # type: ignore[attr-defined]
    tokenize_supervised([{"text": "the sky"}], word_tokenizer())
    assert "train data" not in capsys.readouterr().err


# Packing


def by_hand(rows: list[list[int]], capacity: int, strategy: str) -> list[list[list[int]]]:
    """The sequences of each bin, one row after the other."""
    if strategy == "bfd_split":
        rows = [row[at : at + capacity] for row in rows for at in range(0, max(len(row), 1), capacity)]
    bins: list[list[list[int]]] = []
    for row in sorted((row[:capacity] for row in rows), key=len, reverse=True):
        fitting = [b for b in bins if capacity - sum(map(len, b)) > 0 and sum(map(len, b)) + len(row) <= capacity]
        least = max((sum(map(len, b)) for b in fitting), default=None)
        if least is None:
            bins.append([row])
        else:
            [b for b in fitting if sum(map(len, b)) == least][-1].append(row)
    return bins


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 25), min_size=1, max_size=40), st.integers(2, 12), st.sampled_from(["bfd", "bfd_split"]))
def test_bins_are_full_and_nothing_is_lost(lengths: list[int], capacity: int, strategy: str) -> None:
    values = iter(range(10_000))
    rows = [[next(values) for _ in range(length)] for length in lengths]
    marks = [[v % 3 for v in row] for row in rows]
    dataset = Dataset.from_dict({"input_ids": rows, "completion_mask": marks})
    packed = pack_dataset(dataset, capacity, strategy)
    sizes = [[len(row) for row in b] for b in by_hand(rows, capacity, strategy)]
    assert sorted(map(sum, packed["seq_lengths"])) == sorted(map(sum, sizes))
    for ids, mask, own in zip(packed["input_ids"], packed["completion_mask"], packed["seq_lengths"], strict=True):
        assert mask == [v % 3 for v in ids]
        assert sum(own) == len(ids) <= capacity
    kept = {v for ids in packed["input_ids"] for v in ids}
    whole = {v for row in rows for v in (row if strategy == "bfd_split" else row[:capacity])}
    assert kept == whole
    assert sum(map(len, packed["input_ids"])) == len(whole)


def test_todays_example() -> None:
    columns = {"input_ids": [[1, 2, 3], [4, 5, 6, 7], [8]], "attention_mask": [[1, 1, 0], [1, 0, 0, 1], [1]]}
    packed = pack_dataset(Dataset.from_dict(columns), seq_length=4, strategy="bfd")
    assert packed[:] == {
        "input_ids": [[4, 5, 6, 7], [1, 2, 3, 8]],
        "attention_mask": [[1, 0, 0, 1], [1, 1, 0, 1]],
        "seq_lengths": [[4], [3, 1]],
    }


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_every_column_of_numbers_is_packed(strategy: str, caplog: pytest.LogCaptureFixture) -> None:
    columns = {
        "ids": [[1, 2], [3, 4, 5]], "assistant_masks": [[0, 1], [1, 1, 0]], "weights": [[0.5, 1.0], [0.25, 0.0, 2.0]],
        "seen": [[True, False], [False, True, True]], "text": ["a", "b"],
    }  # fmt: skip
    packed = pack_dataset(Dataset.from_dict(columns), 8, strategy)
    order = [0, 1, 2, 3, 4] if strategy == "wrapped" else [2, 3, 4, 0, 1]
    for name in ("ids", "assistant_masks", "weights", "seen"):
        flat = [v for row in columns[name] for v in row]
        assert packed[name][:] == [[flat[i] for i in order]]
    assert "packed rows leave out the columns text" in caplog.text
    assert packed.features["weights"].feature.dtype == "float64"


def test_chosen_shuffled_and_transformed_rows_are_packed_as_they_are_shown() -> None:
    rows = Dataset.from_dict({"input_ids": [[i] * (1 + i % 3) for i in range(9)]})
    for shown in (
        rows.shuffle(seed=1),
        rows.select([8, 8, 0, 3]),
        rows.select(range(2, 6)),
        rows.filter(lambda r: len(r["input_ids"]) > 1),
    ):
        flat = [i for row in shown["input_ids"] for i in row]
        wrapped = pack_dataset(shown, 4, "wrapped")
        assert [i for row in wrapped["input_ids"] for i in row] == flat
        assert sorted(i for row in pack_dataset(shown, 4)["input_ids"] for i in row) == sorted(flat)
    double = rows.with_transform(lambda batch: {"input_ids": [[2 * i for i in row] for row in batch["input_ids"]]})
    assert sum(sum(row) for row in pack_dataset(double, 4)["input_ids"]) == 2 * sum(map(sum, rows["input_ids"]))


def test_streams_and_splits_are_packed(caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_dict(
        {"input_ids": [[i] * (1 + i % 3) for i in range(10)], "loss_mask": [[1] * (1 + i % 3) for i in range(10)]}
    )
    whole = list(pack_dataset(rows.to_iterable_dataset(), 4))
    assert whole == list(pack_dataset(rows, 4))
    taken: list[int] = []

    def counted(row: dict[str, Any]) -> dict[str, Any]:
        taken.append(row["input_ids"][0])
        return row

    stream = pack_dataset(rows.to_iterable_dataset().map(counted), 4, map_kwargs={"batch_size": 5})
    taken.clear()  # the first row was looked at for its columns
    next(iter(stream))
    assert taken == [0, 1, 2, 3, 4]  # no more than a buffer is read
    assert list(stream) == list(pack_dataset(rows, 4, map_kwargs={"batch_size": 5}))
    splits = pack_dataset(DatasetDict({"a": rows, "b": rows}), 4)
    assert list(splits["b"]) == whole
    over = pack_dataset(rows, 2)
    assert max(map(len, over["input_ids"])) == 2
    assert "3 rows are longer than seq_length=2 and are cut to it (3 tokens cut)" in caplog.text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"input_ids": [[1, 2]], "m": [[1]]}, "row 0: column 'm' has 1 entries for 2 in 'input_ids'"),
        ({"input_ids": [[1], None]}, "column 'input_ids' has no list in 1 rows"),
        ({"input_ids": [[1, None]]}, "has an empty entry"),
        ({"text": ["a"]}, "packing needs a column with a list of numbers; columns found: text"),
    ],
)
def test_what_cannot_be_packed_is_said(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_dataset(Dataset.from_dict(columns), 4)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packing_makes_no_lists_of_numbers(strategy: str) -> None:
    """Of 300,000 tokens, 5 bytes each: at most three times the data, where lists of numbers were 20 times."""
    lengths = np.random.default_rng(0).integers(1, 200, 3000)
    rows = [np.full(n, n, np.int32) for n in lengths]
    dataset = Dataset.from_dict({"input_ids": rows, "loss_mask": [r.astype(np.int8) for r in rows]})
    tracemalloc.start()
    pack_dataset(dataset, 512, strategy)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15 * lengths.sum() + 24 * (1 << 20)  # and the places of a block of a million numbers


def test_packed_rows_stay_packed() -> None:
    """Rows that somebody has packed keep their sequences: their first tokens are not learned."""
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]], "completion_mask": [[0, 1, 1], [1, 1]]})
    packed = pack_dataset(rows, 8)
    made, _ = tokenize_supervised(packed, word_tokenizer(), max_length=8)
    assert made[0] == {"input_ids": [5, 6, 7, 8, 9], "loss_mask": [0, 1, 1, 0, 1], "seq_lengths": [3, 2]}
    with pytest.raises(ValueError, match="row 0 of the train data set: a packed row has 5 tokens: set max_length"):
        tokenize_supervised(packed, word_tokenizer(), max_length=4)
    wrong = [{"input_ids": [5, 6], "seq_lengths": [3]}]
    with pytest.raises(ValueError, match="column 'seq_lengths' says 3 tokens and the packed row has 2"):
        tokenize_supervised(wrong, word_tokenizer())


def test_the_template_by_todays_name() -> None:
    tokenizer = byte_tokenizer(CHATML)
    row = {"prompt": [USER], "completion": [YO]}
    by_name = trl.apply_chat_template(row, processing_class=tokenizer)
    assert (
        by_name
        == trl.apply_chat_template(row, tokenizer)
        == trl.maybe_apply_chat_template(row, processing_class=tokenizer)
    )
    assert trl.apply_chat_template({"prompt": USER, "completion": YO}, processing_class=tokenizer) == by_name
    for wrong in ({}, {"tokenizer": tokenizer, "processing_class": tokenizer}):
        with pytest.raises(ValueError, match="give the tokenizer, as `tokenizer` or as `processing_class`"):
            trl.apply_chat_template(row, **wrong)


# What is cached


def test_rows_of_older_code_are_not_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def learned() -> str:
        rows, _ = tokenize_supervised(load_from_disk(str(tmp_path / "rows")), byte_tokenizer())
        return str(byte_tokenizer().decode(rows[0]["input_ids"]))

    Dataset.from_list([{"prompt": "a", "completion": " b"}] * 4).save_to_disk(str(tmp_path / "rows"))
    assert learned() == "a b<|im_end|>"
    monkeypatch.setattr("trl.data.supervised_rows.needs_closing", lambda *_: False)
    assert learned() == "a b"


@pytest.mark.parametrize(
    "place", ["encode.TextEncoder.open_row", "rendering.Reader._end", "encode.common_prefix", "packing.best_fit_bins"]
)
def test_the_version_is_that_of_the_code(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_version()
    assert code_version() == before
    monkeypatch.setattr(f"trl.data.{place}", lambda *_: None)
    assert code_version() != before


def test_taken_apart_pairs_are_not_taken_from_an_older_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Dataset.from_list([{"chosen": "the sky is", "rejected": "the sky sat"}] * 2).save_to_disk(str(tmp_path / "rows"))

    def completions() -> list[list[int]]:
        return list(tokenize_unpaired(load_from_disk(str(tmp_path / "rows")), word_tokenizer())[0]["completion_ids"])

    before = completions()
    monkeypatch.setattr("trl.data.formats._text_split", lambda chosen, rejected: 3)
    assert [len(ids) for ids in completions()] == [len(ids) + 1 for ids in before]


def test_keys_of_some_rows_only_are_none_in_the_others() -> None:
    rows, _ = tokenize_prompts([{"prompt": "the"}, {"prompt": "sky", "gold": "x"}], word_tokenizer())
    assert [row["gold"] for row in rows] == [None, "x"]
    pair = {"prompt": "the", "chosen": " sky", "rejected": " is"}
    assert tokenize_preference([pair, {**pair, "note": "x"}], word_tokenizer())[1].unread == ["note"]
