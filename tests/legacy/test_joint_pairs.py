"""Joint tokenisation of pairs, as in release 0.7.7; golden ids are GPT-2's."""

from typing import Any

import pytest
import torch
from tokenizers_for_tests import byte_tokenizer, gpt2_words_tokenizer, word_tokenizer

from trl.data.batches import pair_ids
from trl.legacy.dpo import build_tokenized_answer, tokenize_row

QUESTION = "Which is the best programming language?"
PROMPT_IDS = [13828, 318, 262, 1266, 8300, 3303, 30]
ROW = {"prompt": QUESTION, "chosen": " Python", "rejected": " C++"}


def row_of(tokenizer: Any = None, row: Any = ROW, **options: Any) -> dict[str, Any]:
    limits = {"max_length": 512, "max_prompt_length": 128, **options}
    return tokenize_row(row, tokenizer or gpt2_words_tokenizer(), **limits)


def test_golden_row() -> None:
    row = row_of()
    assert row["chosen_input_ids"] == [50256, *PROMPT_IDS, 11361, 50256]
    assert row["chosen_labels"] == [-100] * 8 + [11361, 50256]
    assert row["chosen_attention_mask"] == [1] * 10
    assert row["rejected_input_ids"] == [50256, *PROMPT_IDS, 327, 4880, 50256]
    assert row["rejected_labels"] == [-100] * 8 + [327, 4880, 50256]
    assert row["prompt_input_ids"] == [50256, *PROMPT_IDS]
    assert row["prompt_attention_mask"] == [1] * 8


def test_golden_truncation_keeps_the_end() -> None:
    row = row_of(max_length=10, max_prompt_length=4)  # 8 + 3 > 10
    assert row["chosen_input_ids"] == [1266, 8300, 3303, 30, 11361, 50256]
    assert row["chosen_labels"] == [-100] * 4 + [11361, 50256]
    assert row["prompt_input_ids"] == [1266, 8300, 3303, 30]


def test_truncation_keeps_the_start() -> None:
    row = row_of(max_length=10, max_prompt_length=4, truncation_mode="keep_start")
    assert row["chosen_input_ids"] == [50256, 13828, 318, 262, 11361, 50256]


def test_truncation_of_answers() -> None:
    row = row_of(max_length=6, max_prompt_length=4)  # 4 + 3 > 6 still: both answers to 2
    assert row["chosen_input_ids"] == [1266, 8300, 3303, 30, 11361, 50256]
    assert row["rejected_input_ids"] == [1266, 8300, 3303, 30, 327, 4880]
    assert row["rejected_labels"] == [-100] * 4 + [327, 4880]


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="Unknown truncation mode: middle"):
        row_of(max_length=4, max_prompt_length=2, truncation_mode="middle")
    for column in ROW:
        with pytest.raises(ValueError, match=f"{column} should be an str but got <class 'int'>"):
            row_of(row={**ROW, column: 1})


def test_no_bos_where_there_is_none_and_none_twice() -> None:
    without = word_tokenizer(bos=None)
    row = row_of(without, {"prompt": "the sky", "chosen": " is", "rejected": " blue"})
    assert row["chosen_input_ids"] == [30, 31, 32, 2]
    row = row_of(word_tokenizer(), {"prompt": "<bos> the sky", "chosen": " is <eos>", "rejected": " blue"})
    assert row["chosen_input_ids"] == [1, 30, 31, 32, 2]


def test_the_split_moves_left_where_tokens_merge() -> None:
    tokenizer = byte_tokenizer(merges=[("a", "b")])
    a, c, ab = tokenizer.convert_tokens_to_ids(["a", "c", "ab"])
    answer = build_tokenized_answer(tokenizer, "ca", "b")
    assert (answer["prompt_input_ids"], answer["input_ids"]) == ([c], [ab])
    assert (answer["prompt_attention_mask"], answer["attention_mask"]) == ([1], [1])
    answer = build_tokenized_answer(tokenizer, "ca", "c")
    assert (answer["prompt_input_ids"], answer["input_ids"]) == ([c, a], [c])


def test_encoder_decoder_row() -> None:
    class Model:
        def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
            return torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1]], dim=1)

    tokenizer = word_tokenizer()
    text = {"prompt": "the sky is", "chosen": "blue blue blue", "rejected": "green"}
    options = {"max_prompt_length": 2, "max_target_length": 2, "is_encoder_decoder": True}
    row = row_of(tokenizer, text, **options)
    assert row == {
        "chosen_labels": [33, 33],
        "rejected_labels": [34],
        "prompt_input_ids": [30, 31],
        "prompt_attention_mask": [1, 1],
    }
    row = row_of(tokenizer, text, **options, model=Model())
    assert row["chosen_decoder_input_ids"] == [0, 33]
    assert row["rejected_decoder_input_ids"] == [0]
    assert pair_ids(row) == {"prompt_ids": [30, 31], "chosen_ids": [33, 33], "rejected_ids": [34]}


def test_from_the_columns_of_release_0_7_7_to_ours() -> None:
    ids = {"prompt_ids": [50256, *PROMPT_IDS], "chosen_ids": [11361, 50256], "rejected_ids": [327, 4880, 50256]}
    assert pair_ids(row_of()) == ids
    # the answers begin with the same token: it is still theirs, not the prompt's
    same = {"prompt": "the", "chosen": " sky is", "rejected": " sky was"}
    assert pair_ids(row_of(word_tokenizer(), same)) == {
        "prompt_ids": [1, 30],
        "chosen_ids": [31, 32, 2],
        "rejected_ids": [31, word_tokenizer().convert_tokens_to_ids("was"), 2],
    }
    reward = {
        "input_ids_chosen": [5, 6, 7, 0],
        "attention_mask_chosen": [1, 1, 1, 0],
        "input_ids_rejected": [5, 6],
        "attention_mask_rejected": [1, 1],
    }
    assert pair_ids(reward) == {"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [6]}
