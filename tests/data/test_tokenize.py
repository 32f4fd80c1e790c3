"""Rows become ids: boundaries, BOS and EOS, masks, limits, kinds of data sets; and the report says what was met."""

import logging
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import processors
from tokenizers_for_tests import CHATML, byte_tokenizer, metaspace_tokenizer, word_tokenizer

from trl.data.report import TokenizationReport
from trl.data.tokenize import (
    format_rows,
    supervised_row,
    tokenize_preference,
    tokenize_prompts,
    tokenize_stepwise,
    tokenize_supervised,
    tokenize_unpaired,
)

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
            "row 0 of the train data set: `labels` should be -100 or the same",
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
    # turns end with <|im_end|>, but this tokenizer's EOS is another
    tokenizer = byte_tokenizer(CHATML, eos="<|endoftext|>")
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


# Preferences


def pairs(row: dict[str, Any], tokenizer: Any = None, **options: Any) -> list[list[int]]:
    rows, _ = tokenize_preference([row], tokenizer or word_tokenizer(), **options)
    return [rows[0][column] for column in ("prompt_ids", "chosen_ids", "rejected_ids")]


def test_pairs_share_their_prompt() -> None:
    assert pairs(PAIR) == [[THE, SKY, IS], [BLUE, EOS], [GREEN, EOS]]
    assert pairs(PAIR, add_bos=True) == [[BOS, THE, SKY, IS], [BLUE, EOS], [GREEN, EOS]]
    assert pairs(PAIR, word_tokenizer(add_bos=True)) == pairs(PAIR, add_bos=True)
    assert pairs(PAIR, word_tokenizer(add_bos=True), add_bos=False) == pairs(PAIR)
    assert pairs(PAIR, word_tokenizer(bos=None), add_bos=True) == pairs(PAIR)
    assert pairs({**PAIR, "prompt": "<bos> the"}, add_bos=True)[0] == [BOS, THE]
    assert pairs(PAIR, add_eos=False) == [[THE, SKY, IS], [BLUE], [GREEN]]


def test_pairs_with_the_prompt_inside() -> None:
    row = {"chosen": "the sky is blue", "rejected": "the sky is green"}
    assert pairs(row) == [[THE, SKY, IS], [BLUE, EOS], [GREEN, EOS]]
    assert pairs({"chosen": "the sky", "rejected": "the sky is"}) == [[THE, SKY], [EOS], [IS, EOS]]
    assert pairs({"chosen": "blue", "rejected": "green"}, add_bos=True) == [[BOS], [BLUE, EOS], [GREEN, EOS]]


def test_conversational_pairs() -> None:
    tokenizer = byte_tokenizer(CHATML)
    no = {"role": "assistant", "content": "no"}
    explicit = pairs({"prompt": [USER], "chosen": [YO], "rejected": [no]}, tokenizer)
    assert [tokenizer.decode(ids) for ids in explicit] == [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "yo<|im_end|>",
        "no<|im_end|>",
    ]
    whole = {"chosen": [USER, YO], "rejected": [USER, no]}
    assert pairs(whole, tokenizer) == explicit
    assert pairs({**whole, "prompt": "hi"}, tokenizer) == explicit
    with pytest.raises(
        ValueError, match="row 0 of the train data set: the conversation has no message before its answer"
    ):
        pairs({"chosen": [YO], "rejected": [no]}, tokenizer)


def test_tokenised_pairs() -> None:
    ids = [[5, 6], [7, EOS], [8, EOS]]
    assert pairs({"prompt_ids": ids[0], "chosen_ids": ids[1], "rejected_ids": ids[2]}) == ids
    reward = {"input_ids_chosen": [5, 6, 7, EOS], "input_ids_rejected": [5, 6, 8, EOS]}
    assert pairs(reward) == ids
    dpo = {"chosen_input_ids": [5, 6, 7, EOS], "chosen_labels": [-100, -100, 7, EOS]}
    dpo |= {"rejected_input_ids": [5, 6, 8, EOS], "rejected_labels": [-100, -100, 8, EOS]}
    assert pairs(dpo) == ids


def test_limits_of_pairs() -> None:
    row = {"prompt": "the sky is", "chosen": " blue blue blue", "rejected": " green"}
    assert pairs(row, max_prompt_length=2) == [[THE, SKY], [BLUE, BLUE, BLUE, EOS], [GREEN, EOS]]
    assert pairs(row, max_prompt_length=2, truncation_mode="keep_end")[0] == [SKY, IS]
    assert pairs(row, max_completion_length=2)[1:] == [[BLUE, BLUE], [GREEN, EOS]]
    assert pairs(row, max_length=5) == [[THE, SKY, IS], [BLUE, BLUE], [GREEN, EOS]]
    assert pairs(row, max_length=5, truncation_mode="keep_end") == [[IS], [BLUE, BLUE, BLUE, EOS], [GREEN, EOS]]
    with_bos = pairs(row, max_length=6, truncation_mode="keep_end", add_bos=True)
    assert with_bos == [[BOS, IS], [BLUE, BLUE, BLUE, EOS], [GREEN, EOS]]


def test_pairs_keep_the_trainers_own_columns() -> None:
    row = {**PAIR, "margin": 0.5, "reference_chosen_logps": -1.0, "source": "a"}
    rows, _ = tokenize_preference(Dataset.from_list([row]), word_tokenizer())
    assert set(rows.column_names) == {"prompt_ids", "chosen_ids", "rejected_ids", "margin", "reference_chosen_logps"}
    assert rows[0]["margin"] == 0.5


def test_encoder_decoder_pairs() -> None:
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", EOS)]
    )
    assert pairs(PAIR, tokenizer, is_encoder_decoder=True) == [[THE, SKY, IS, EOS], [BLUE, EOS], [GREEN, EOS]]
    assert pairs(PAIR, tokenizer, is_encoder_decoder=True, max_prompt_length=3)[0] == [THE, SKY, EOS]
    with pytest.raises(ValueError, match="max_length=9 bounds prompt"):
        pairs(PAIR, tokenizer, is_encoder_decoder=True, max_length=9)


# Single judged answers


def test_unpaired_rows() -> None:
    rows, _ = tokenize_unpaired([{"prompt": "the sky is", "completion": " blue", "label": 1}], word_tokenizer())
    assert rows == [{"prompt_ids": [THE, SKY, IS], "completion_ids": [BLUE, EOS], "label": True}]
    with pytest.raises(ValueError, match=r"row 0 .* column 'label' should be true \(a good answer\) or false, got 2"):
        tokenize_unpaired([{"prompt": "the", "completion": " sky", "label": 2}], word_tokenizer())


def test_pairs_are_taken_apart() -> None:
    for dataset in ([PAIR], Dataset.from_list([PAIR])):
        rows, _ = tokenize_unpaired(dataset, word_tokenizer())
        assert [(row["completion_ids"], row["label"]) for row in rows] == [([BLUE, EOS], True), ([GREEN, EOS], False)]
    with pytest.raises(ValueError, match="split them first with `extract_prompt`"):
        tokenize_unpaired([{"chosen": "a", "rejected": "b"}], word_tokenizer())


def test_unpaired_conversation_with_the_prompt_inside() -> None:
    tokenizer = byte_tokenizer(CHATML)
    rows, _ = tokenize_unpaired([{"completion": [USER, YO], "label": True}], tokenizer)
    assert tokenizer.decode(rows[0]["completion_ids"]) == "yo<|im_end|>"


# Prompts


def test_prompts_keep_every_column() -> None:
    rows = [{"prompt": "the sky", "gold": "blue"}]
    for dataset in (rows, Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        mapped, _ = tokenize_prompts(dataset, word_tokenizer())
        assert list(mapped) == [{"prompt": "the sky", "gold": "blue", "prompt_ids": [THE, SKY]}]


def test_conversational_prompts_open_a_turn() -> None:
    tokenizer = byte_tokenizer(CHATML)
    rows, _ = tokenize_prompts([{"prompt": [USER]}], tokenizer)
    assert tokenizer.decode(rows[0]["prompt_ids"]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_long_prompts() -> None:
    row = {"prompt": "the sky is"}
    with pytest.raises(
        ValueError, match=r"row 0 .* 3 tokens but the model's context holds 3, .* set `max_prompt_length`"
    ):
        tokenize_prompts([row], word_tokenizer(), context_length=3)
    rows, report = tokenize_prompts([row], word_tokenizer(), context_length=3, max_prompt_length=2)
    assert rows[0]["prompt_ids"] == [SKY, IS]
    assert (report.truncated, report.tokens_cut) == (1, 1)
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        tokenize_prompts([{"prompt": ""}], word_tokenizer())


# Steps


def test_steps_carry_their_label_at_their_last_token() -> None:
    row = {"prompt": "the", "completions": ["sky is", "blue"], "labels": [True, False]}
    rows, _ = tokenize_stepwise([row], word_tokenizer(), step_separator=" .")
    dot = word_tokenizer().convert_tokens_to_ids(".")
    assert rows == [
        {"input_ids": [THE, SKY, IS, dot, BLUE, dot], "step_labels": [-100, -100, -100, 1, -100, 0]},
    ]
    rows, _ = tokenize_stepwise([row], word_tokenizer(), step_separator=" .", train_on_last_step_only=True)
    assert rows[0]["step_labels"] == [-100] * 5 + [0]
    rows, report = tokenize_stepwise([row], word_tokenizer(), step_separator=" .", max_length=4)
    assert rows[0]["step_labels"] == [-100, -100, -100, 1]
    assert report.truncated == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completions": "sky"}, "column 'completions' should be a list of texts"),
        ({"labels": [True]}, "column 'labels' has 1 entries for 2 steps"),
        ({"labels": [1, 2]}, "should hold true or false for each step, got 2"),
    ],
)
def test_wrong_steps(row: dict[str, Any], message: str) -> None:
    good = {"prompt": "the", "completions": ["sky", "is"], "labels": [True, False]}
    with pytest.raises(ValueError, match=message):
        tokenize_stepwise([{**good, **row}], word_tokenizer())


# Kinds of data sets


def test_every_kind_of_data_set_gives_the_same_rows() -> None:
    rows = [{"text": "the sky", "id": 7}, {"text": "blue"}, {"text": "green is"}]
    rows = [{"id": 0, **row} for row in rows]
    expected, report = tokenize_supervised(rows, word_tokenizer(), keep=("id", "absent"), batch_size=2)
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
