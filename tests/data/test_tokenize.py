"""Rows become ids: boundaries, BOS and EOS, masks, limits, kinds of data sets; and the report says what was met."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk
from tokenising import (
    tokenize_preference,
    tokenize_prompts,
    tokenize_stepwise,
    tokenize_supervised,
    tokenize_unpaired,
)
from tokenizers import processors
from tokenizers_for_tests import CHATML, NO_GENERATION_PROMPT, byte_tokenizer, metaspace_tokenizer, word_tokenizer

from trl.data.report import TokenizationReport
from trl.data.supervised_rows import format_rows, supervised_row

THE, SKY, IS, BLUE, GREEN = 30, 31, 32, 33, 34
BOS, EOS = 1, 2
PAIR = {"prompt": "the sky is", "chosen": " blue", "rejected": " green"}
USER = {"role": "user", "content": "hi"}
YO = {"role": "assistant", "content": "yo"}


def supervised(row: dict[str, Any], tokenizer: Any = None, **options: Any) -> tuple[list[int], list[int]]:
    rows, _ = tokenize_supervised([row], tokenizer or word_tokenizer(), **options)
    return rows[0]["input_ids"], rows[0]["loss_mask"]


def report_of(rows: Any, tokenizer: Any = None, **options: Any) -> TokenizationReport:
    return tokenize_supervised(rows, tokenizer or word_tokenizer(), **options)[1]


# Supervised rows


def test_texts_get_their_end_token() -> None:
    assert supervised({"text": "the sky"}) == ([THE, SKY, EOS], [0, 1, 1])
    assert supervised({"text": "the sky <eos>"}) == ([THE, SKY, EOS], [0, 1, 1])
    assert supervised({"other": "the sky"}, text_field="other") == ([THE, SKY, EOS], [0, 1, 1])
    assert supervised({"text": "the sky"}, add_eos=False) == ([THE, SKY], [0, 1])


def test_bos_is_the_tokenizers_own_and_never_double() -> None:
    tokenizer = word_tokenizer(add_bos=True)
    assert supervised({"text": "the sky"}, tokenizer) == ([BOS, THE, SKY, EOS], [0, 1, 1, 1])
    assert supervised({"text": "<bos> the sky"}, tokenizer) == ([BOS, THE, SKY, EOS], [0, 1, 1, 1])
    assert supervised({"text": "<bos> <bos> the"}, tokenizer) == ([BOS, THE, EOS], [0, 1, 1])
    assert supervised({"text": "the sky"}, tokenizer, add_special_tokens=False)[0] == [THE, SKY, EOS]
    assert report_of([{"text": "<bos> the"}, {"text": "the"}], tokenizer).double_bos == 1


def test_a_tokenizer_that_ends_rows_by_itself() -> None:
    tokenizer = word_tokenizer(eos=None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <extra0>", special_tokens=[("<bos>", 1), ("<extra0>", 80)]
    )
    assert supervised({"text": "the sky"}, tokenizer)[0] == [BOS, THE, SKY, 80]


def test_no_end_token_at_all() -> None:
    with pytest.raises(
        ValueError, match=r"no EOS token, so the model could not learn to stop: set `tokenizer.eos_token`"
    ):
        supervised({"text": "the"}, word_tokenizer(eos=None))
    assert supervised({"text": "the sky"}, word_tokenizer(eos=None), add_eos=False)[0] == [THE, SKY]


def test_prompt_and_completion() -> None:
    row = {"prompt": "the sky is", "completion": " blue"}
    assert supervised(row) == ([THE, SKY, IS, BLUE, EOS], [0, 0, 0, 1, 1])
    assert supervised(row, completion_only_loss=False) == ([THE, SKY, IS, BLUE, EOS], [0, 1, 1, 1, 1])


def test_completions_continue_the_prompts_words() -> None:
    tokenizer = metaspace_tokenizer()  # puts a blank before every text that it sees by itself
    ids, mask = supervised({"prompt": "The sky", "completion": " is"}, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁The", "▁sky", "▁is", "</s>"]
    assert mask == [0, 0, 0, 1, 1]
    ids, _ = supervised({"prompt": "The sky is (", "completion": "hi"}, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids)[-3:] == ["h", "i", "</s>"]


def test_conversational_completion() -> None:
    tokenizer = byte_tokenizer(CHATML)
    ids, mask = supervised({"prompt": [USER], "completion": [YO]}, tokenizer)
    assert tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>"
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "yo<|im_end|>"
    answer = [YO, USER, YO]
    ids, mask = supervised({"prompt": [USER, YO, USER], "completion": answer}, tokenizer, assistant_only_loss=True)
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "yo<|im_end|>yo<|im_end|>"


def test_conversation_is_learned_whole_unless_told_otherwise() -> None:
    tokenizer = byte_tokenizer(CHATML)
    ids, mask = supervised({"messages": [USER, YO]}, tokenizer)
    assert tokenizer.decode(ids).endswith("assistant\nyo<|im_end|>\n")
    assert mask == [0] + [1] * (len(ids) - 1)
    share = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    assert supervised({"conversations": share}, tokenizer) == (ids, mask)


def test_tokenised_rows() -> None:
    ids = [5, 6, 7, EOS]
    assert supervised({"input_ids": ids}) == (ids, [0, 1, 1, 1])
    assert supervised({"input_ids": ids, "labels": [-100, -100, 7, EOS]}) == (ids, [0, 0, 1, 1])
    assert supervised({"input_ids": ids, "completion_mask": [0, 0, 1, 1]}) == (ids, [0, 0, 1, 1])
    assert supervised({"input_ids": ids, "completion_mask": [0, 0, 1, 1]}, completion_only_loss=False)[1] == [
        0,
        1,
        1,
        1,
    ]
    masks = {"input_ids": ids, "assistant_masks": [0, 1, 0, 1]}
    assert supervised(masks, assistant_only_loss=True) == (ids, [0, 1, 0, 1])
    assert supervised(masks) == (ids, [0, 1, 1, 1])
    padded = {"input_ids": [0, *ids], "attention_mask": [0, 1, 1, 1, 1], "labels": [-100, 5, 6, 7, EOS]}
    assert supervised(padded) == (ids, [0, 1, 1, 1])
    assert supervised_row({"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)})["input_ids"] == ids


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"input_ids": [5, 6], "labels": [6, 7]},
            {},
            "row 0 of the train data set: column 'labels' should hold -100 or the same",
        ),
        ({"input_ids": [5, 6], "labels": [5]}, {}, "column 'labels' has 1 entries for 2 `input_ids`"),
        (
            {"input_ids": [5]},
            {"assistant_only_loss": True},
            "assistant_only_loss=True needs a column 'assistant_masks'",
        ),
        (
            {"input_ids": [5]},
            {"completion_only_loss": True},
            "completion_only_loss=True needs a column 'completion_mask'",
        ),
        ({"text": "a"}, {"completion_only_loss": True}, "completion_only_loss=True needs the columns 'prompt' and"),
        ({"text": "a"}, {"assistant_only_loss": True}, "assistant_only_loss=True needs conversations"),
        ({"text": None}, {}, "column 'text' should be a text, got None"),
        ({"messages": ["a"]}, {}, "column 'messages' should be a list of messages"),
        ({"input_ids": "ab"}, {}, "column 'input_ids' should be a list of token ids, got 'ab'"),
        ({"prompt": "a", "completion": 3}, {}, "column 'completion' should be a text, got 3"),
        ({"other": "a"}, {}, "none of the columns that are needed"),
        ({"text": "a"}, {"truncation_mode": "middle"}, "truncation_mode='middle': choose 'keep_start' or 'keep_end'"),
        ({"text": "a"}, {"max_length": 0}, "max_length=0: should be at least 1"),
    ],
)
def test_wrong_supervised_rows(row: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        supervised(row, **options)


@pytest.mark.parametrize(
    ("tokenise", "row"),
    [
        (tokenize_supervised, {"text": "the"}),
        (tokenize_supervised, {"input_ids": [5, 6]}),
        (tokenize_preference, PAIR),
        (tokenize_preference, {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}),
        (tokenize_unpaired, {"prompt": "the", "completion": " sky", "label": True}),
        (tokenize_prompts, {"prompt": "the"}),
        (tokenize_prompts, {"prompt_ids": [5]}),
        (tokenize_stepwise, {"prompt": "the", "completions": ["sky"], "labels": [True]}),
    ],
)
def test_a_later_row_without_its_column_is_named(tokenise: Any, row: dict[str, Any]) -> None:
    for column in row:
        lacking = {name: value for name, value in row.items() if name != column}
        with pytest.raises(ValueError, match=f"row 1 of the train data set: column '{column}'"):
            tokenise([row, lacking], word_tokenizer())


def test_limits_of_supervised_rows() -> None:
    row = {"prompt": "the sky is", "completion": " blue green"}
    assert supervised(row, max_length=4) == ([THE, SKY, IS, BLUE], [0, 0, 0, 1])
    assert supervised(row, max_length=4, truncation_mode="keep_end") == ([IS, BLUE, GREEN, EOS], [0, 1, 1, 1])
    tokenizer = word_tokenizer(add_bos=True)  # BOS stays at the front
    assert supervised(row, tokenizer, max_length=4, truncation_mode="keep_end") == (
        [BOS, BLUE, GREEN, EOS],
        [0, 1, 1, 1],
    )
    report = report_of([row, {"prompt": "the", "completion": " sky"}], max_length=4)
    assert (report.truncated, report.tokens_cut, report.rows, report.tokens, report.learned) == (1, 2, 2, 7, 3)


# The report


def test_rows_that_lost_their_answer_are_left_out() -> None:
    rows = [{"prompt": "the sky is", "completion": " blue"}, {"prompt": "the", "completion": " sky"}]
    for dataset in (rows, Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        mapped, report = tokenize_supervised(dataset, word_tokenizer(), max_length=3)
        assert [row["input_ids"] for row in mapped] == [[THE, SKY, EOS]]
        assert (report.answer_cut, report.left_out) == (1, 1)


def test_meaningless_training_is_an_error() -> None:
    rows = [{"prompt": "the sky is", "completion": " blue"}]
    with pytest.raises(
        ValueError, match="all 1 rows of the train data set are without a learned token: 1 lost their whole"
    ):
        report_of(rows, max_length=3)
    with pytest.raises(ValueError, match="1 have nothing that the loss mask lets through"):
        report_of([{"input_ids": [5, 6], "labels": [-100, -100]}])
    with pytest.raises(ValueError, match="all 1 pairs of the train data set have the same chosen and rejected tokens"):
        tokenize_preference([{**PAIR, "rejected": " blue"}], word_tokenizer())
    with pytest.raises(ValueError, match="the eval data set is empty"):
        tokenize_supervised([], word_tokenizer(), name="eval")


def test_stop_tokens_that_are_never_learned_are_counted() -> None:
    rows = [{"input_ids": [5, 6, EOS], "labels": [5, 6, -100]}, {"input_ids": [5, 6]}, {"input_ids": [5, 6, EOS]}]
    report = report_of(rows)
    assert (report.stop_masked, report.missing_eos) == (1, 1)
    # this tokenizer's EOS is another, but the template ends turns with <|im_end|>, and that is learned
    tokenizer = byte_tokenizer(CHATML, eos="<|endoftext|>")
    assert report_of([{"messages": [USER, YO]}], tokenizer, assistant_only_loss=True).missing_eos == 0
    tokenizer = byte_tokenizer(NO_GENERATION_PROMPT)
    assert report_of([{"messages": [USER, YO]}], tokenizer, assistant_only_loss=True).missing_eos == 1


def test_empty_completions_are_counted() -> None:
    assert (
        report_of([{"prompt": "the", "completion": ""}, {"prompt": "the", "completion": " sky"}]).empty_completion == 1
    )
    silent = {"role": "assistant", "content": ""}
    assert report_of([{"messages": [USER, silent]}], byte_tokenizer()).empty_completion == 1


def test_the_report_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "the sky is"}, {"text": "the"}]
    with caplog.at_level(logging.INFO, logger="trl.data.report"):
        report_of(rows)
        report_of(rows, max_length=3, name="eval")
        monkeypatch.setenv("RANK", "1")
        report_of(rows)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "train data: 2 rows, 6 tokens, 4 learned"),
        ("WARNING", "eval data: 2 rows, 5 tokens, 3 learned; 1 rows were truncated (1 tokens cut)"),
    ]


# Kinds of data sets


def test_every_kind_of_data_set_gives_the_same_rows() -> None:
    rows = [{"text": "the sky", "id": 7}, {"text": "blue"}, {"text": "green is"}]
    rows = [{"id": 0, **row} for row in rows]
    listed, report = tokenize_supervised(rows, word_tokenizer(), keep=("id", "absent"), batch_size=2)
    expected = list(listed)
    assert expected[0] == {"input_ids": [THE, SKY, EOS], "loss_mask": [0, 1, 1], "id": 7}
    dataset = Dataset.from_list(rows)
    mapped, mapped_report = tokenize_supervised(dataset, word_tokenizer(), keep=("id",), batch_size=2)
    assert mapped.to_list() == expected
    assert mapped_report == report
    stream, stream_report = tokenize_supervised(
        dataset.to_iterable_dataset(), word_tokenizer(), keep=("id",), batch_size=2
    )
    assert list(stream) == expected
    assert stream_report.partial
    assert stream_report.rows == 2


def test_other_data_sets_pass_through() -> None:
    class Rows(torch.utils.data.Dataset[dict[str, list[int]]]):
        def __getitem__(self, index: int) -> dict[str, list[int]]:
            return {"input_ids": [5, 6]}

    rows = Rows()
    for tokenise in (tokenize_supervised, tokenize_preference, tokenize_unpaired, tokenize_prompts, tokenize_stepwise):
        assert tokenise(rows, word_tokenizer())[0] is rows
        with pytest.raises(ValueError, match="The dataset should not be None"):
            tokenise(None, word_tokenizer())


def test_the_fingerprint_depends_on_what_the_rows_depend_on() -> None:
    dataset = Dataset.from_list([{"text": "the sky"}])

    def fingerprint(tokenizer: Any = None, **options: Any) -> str:
        return str(tokenize_supervised(dataset, tokenizer or word_tokenizer(), **options)[0]._fingerprint)

    used = word_tokenizer()
    used(["the", "sky is"], padding=True, truncation=True, max_length=4)  # leaves traces in the tokenizer
    assert fingerprint() == fingerprint(used)
    assert fingerprint() != fingerprint(max_length=4)
    assert fingerprint() != fingerprint(word_tokenizer(add_bos=True))


def test_a_cached_pass_reports_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Dataset.from_list([{"text": "the sky"}, {"text": "the sky is"}]).save_to_disk(str(tmp_path / "rows"))
    first = tokenize_supervised(load_from_disk(str(tmp_path / "rows")), word_tokenizer(), max_length=3)
    monkeypatch.setattr(Dataset, "_map_single", None)  # the second pass must not need it
    again = tokenize_supervised(load_from_disk(str(tmp_path / "rows")), word_tokenizer(), max_length=3)
    assert again[0].to_list() == first[0].to_list()
    assert again[1] == first[1]
    assert again[1].truncated == 1


@pytest.mark.slow
def test_several_processes() -> None:
    rows = [{"text": "the sky"}] * 4
    mapped, report = tokenize_supervised(Dataset.from_list(rows), word_tokenizer(), num_proc=2)
    assert mapped[3]["input_ids"] == [THE, SKY, EOS]
    assert report.rows == 4


# Formatting functions


def test_formatting_functions_of_rows_and_of_batches() -> None:
    rows = [{"a": "the", "b": "sky"}, {"a": "is", "b": "blue"}]

    def of_row(row: dict[str, str]) -> str:
        return row["a"].strip() + " " + row["b"]

    def of_batch(batch: dict[str, list[str]]) -> list[str]:
        return [f"{a} {b}" for a, b in zip(batch["a"], batch["b"], strict=True)]

    for function in (of_row, of_batch):
        assert list(format_rows(Dataset.from_list(rows), function)) == [{"text": "the sky"}, {"text": "is blue"}]
        assert format_rows(rows, function) == [{"text": "the sky"}, {"text": "is blue"}]
    assert supervised(rows[0], formatting_func=of_row)[0] == [THE, SKY, EOS]
    with pytest.raises(ValueError, match="The `formatting_func` should return a list of processed strings"):
        format_rows(rows, lambda row: 3)


def test_a_processor_gives_its_tokenizer() -> None:
    class Processor:
        tokenizer = word_tokenizer()

    assert supervised({"text": "the sky"}, Processor())[0] == [THE, SKY, EOS]
    with pytest.raises(ValueError, match=r"a tokenizer .* is needed, got <class 'int'>"):
        supervised({"text": "the sky"}, 3)
