"""Rows with prompts become ids: pairs, single judged answers, bare prompts and judged steps."""

from typing import Any

import pytest
from datasets import Dataset
from tokenising import tokenize_preference, tokenize_prompts, tokenize_stepwise, tokenize_unpaired
from tokenizers import processors
from tokenizers_for_tests import CHATML, byte_tokenizer, word_tokenizer

THE, SKY, IS, BLUE, GREEN = 30, 31, 32, 33, 34
BOS, EOS = 1, 2
PAIR = {"prompt": "the sky is", "chosen": " blue", "rejected": " green"}
USER = {"role": "user", "content": "hi"}
YO = {"role": "assistant", "content": "yo"}


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
    row = {"chosen": "blue", "rejected": "green"}
    assert pairs(row, add_bos=True, needs_prompt=False) == [[BOS], [BLUE, EOS], [GREEN, EOS]]


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
    assert list(rows) == [{"prompt_ids": [THE, SKY, IS], "completion_ids": [BLUE, EOS], "label": True}]
    with pytest.raises(ValueError, match=r"row 0 .* column 'label' should be true \(a good answer\) or false, got 2"):
        tokenize_unpaired([{"prompt": "the", "completion": " sky", "label": 2}], word_tokenizer())


def test_pairs_are_taken_apart() -> None:
    for dataset in ([PAIR], Dataset.from_list([PAIR])):
        rows, _ = tokenize_unpaired(dataset, word_tokenizer())
        assert [(row["completion_ids"], row["label"]) for row in rows] == [([BLUE, EOS], True), ([GREEN, EOS], False)]


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
    assert list(rows) == [
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
        ({"labels": [1, 2]}, "should hold true or false for each step, or -100 for one that is not learned, got 2"),
    ],
)
def test_wrong_steps(row: dict[str, Any], message: str) -> None:
    good = {"prompt": "the", "completions": ["sky", "is"], "labels": [True, False]}
    with pytest.raises(ValueError, match=message):
        tokenize_stepwise([{**good, **row}], word_tokenizer())
