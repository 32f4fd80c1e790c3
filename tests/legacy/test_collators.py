"""The seed's collators and ConstantLengthDataset: golden values and messages of the specification."""

import warnings
from itertools import islice
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers_for_tests import byte_tokenizer, char_tokenizer, gpt2_words_tokenizer, word_tokenizer

from trl.legacy.collators import (
    DataCollatorForCompletionOnlyLM,
    DPODataCollatorWithPadding,
    RewardDataCollatorWithPadding,
    pad_to_length,
)
from trl.legacy.constant_length import ConstantLengthDataset

DIALOGUE = "### Human: Hi there.### Assistant: Hello!### Human: Bye.### Assistant: See you."


def gpt2() -> Any:
    tokenizer = gpt2_words_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def learned(batch: Any, row: int = 0) -> list[int]:
    return [label for label in batch["labels"][row].tolist() if label != -100]


def test_completion_only_keeps_the_last_response() -> None:
    tokenizer = gpt2()
    collator = DataCollatorForCompletionOnlyLM("### Assistant:", tokenizer=tokenizer)
    batch = collator([tokenizer(DIALOGUE)["input_ids"]])
    assert learned(batch) == [4091, 345, 13]
    assert batch["labels"].shape == batch["input_ids"].shape


def test_completion_only_with_instructions_keeps_every_response() -> None:
    tokenizer = gpt2()
    with pytest.warns(UserWarning, match="pad_token_id and eos_token_id values of this tokenizer are identical"):
        collator = DataCollatorForCompletionOnlyLM("### Assistant:", "### Human:", tokenizer=tokenizer)
    batch = collator([tokenizer(DIALOGUE), tokenizer("### Human: Hi there.### Assistant: Hello!")])
    assert learned(batch) == [18435, 0, 4091, 345, 13]
    assert learned(batch, 1) == [18435, 0]  # padding (pad = eos) is masked


def test_completion_only_takes_templates_as_ids() -> None:
    tokenizer = gpt2()
    collator = DataCollatorForCompletionOnlyLM([21017, 15286, 25], tokenizer=tokenizer)
    assert learned(collator([tokenizer(DIALOGUE)["input_ids"]])) == [4091, 345, 13]
    with pytest.raises(ValueError, match="response_template"):
        DataCollatorForCompletionOnlyLM([], tokenizer=tokenizer)


def test_completion_only_masks_from_an_unanswered_instruction_on() -> None:
    tokenizer = gpt2()
    with pytest.warns(UserWarning, match="identical"):
        collator = DataCollatorForCompletionOnlyLM("### Assistant:", "### Human:", tokenizer=tokenizer)
    assert learned(collator([tokenizer("### Human: Hi.### Assistant: Hello!### Human: Bye.")["input_ids"]])) == [
        18435,
        0,
    ]


def test_completion_only_ignores_rows_without_a_key() -> None:
    tokenizer = gpt2()
    collator = DataCollatorForCompletionOnlyLM("### Assistant:", tokenizer=tokenizer)
    message = r"Could not find response key `### Assistant:` in the following instance: ### Human: Hi\. This instance"
    with pytest.warns(UserWarning, match=message):
        batch = collator([tokenizer("### Human: Hi.")["input_ids"]])
    assert learned(batch) == []
    with pytest.warns(UserWarning, match="identical"):
        collator = DataCollatorForCompletionOnlyLM("### Assistant:", "### Human:", tokenizer=tokenizer)
    with pytest.warns(UserWarning, match="Could not find instruction key `### Human:`"):
        batch = collator([tokenizer("### Assistant: Hello!")["input_ids"]])
    assert learned(batch) == []


def test_reward_collator_pads_the_sides_apart() -> None:
    collator = RewardDataCollatorWithPadding(word_tokenizer())
    row = {
        "input_ids_chosen": [5, 6, 7],
        "attention_mask_chosen": [1, 1, 1],
        "input_ids_rejected": [5],
        "attention_mask_rejected": [1],
    }
    short = {**row, "input_ids_chosen": [5], "attention_mask_chosen": [1]}
    batch = collator([{**row, "margin": 1}, {**short, "margin": 0.5}])
    assert batch["input_ids_chosen"].tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch["attention_mask_chosen"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["input_ids_rejected"].tolist() == [[5], [5]]
    assert batch["return_loss"] is True
    assert batch["margin"].dtype == torch.float32
    assert "margin" not in collator([row])
    del short["input_ids_rejected"]
    with pytest.raises(ValueError, match="The features should include `input_ids_chosen`, `attention_mask_chosen`"):
        collator([row, short])


def test_reward_collator_pads_to_a_multiple() -> None:
    collator = RewardDataCollatorWithPadding(word_tokenizer(), pad_to_multiple_of=4)
    keys = ("input_ids_chosen", "attention_mask_chosen", "input_ids_rejected", "attention_mask_rejected")
    assert collator([{key: [1] for key in keys}])["input_ids_rejected"].shape == (1, 4)


def test_dpo_collator_pads_by_name() -> None:
    rows = [
        {"prompt_input_ids": [1], "chosen_labels": [-100, 3], "chosen_attention_mask": [1, 1], "chosen_logps": 0.5},
        {"prompt_input_ids": [1, 2], "chosen_labels": [3], "chosen_attention_mask": [1], "chosen_logps": -1.0},
    ]
    rows = [{**row, "prompt": "hi", "chosen_input_ids": row["chosen_labels"]} for row in rows]
    batch = DPODataCollatorWithPadding(pad_token_id=9)(rows)
    assert batch["prompt_input_ids"].tolist() == [[9, 1], [1, 2]]
    assert batch["chosen_labels"].tolist() == [[-100, 3], [3, -100]]
    assert batch["chosen_input_ids"].tolist() == [[-100, 3], [3, 9]]
    assert batch["chosen_attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["chosen_logps"].tolist() == [0.5, -1.0]
    assert batch["prompt"] == ["hi", "hi"]


def test_dpo_collator_for_encoder_decoders() -> None:
    rows = [
        {"prompt_input_ids": [1], "chosen_labels": [3, 4], "rejected_decoder_input_ids": [3]},
        {"prompt_input_ids": [1, 2], "chosen_labels": [3], "rejected_decoder_input_ids": [3, 4]},
    ]
    collator = DPODataCollatorWithPadding(pad_token_id=9, is_encoder_decoder=True)
    batch = collator(rows)
    assert batch["prompt_input_ids"].tolist() == [[1, 9], [1, 2]]
    assert batch["chosen_labels"].tolist() == [[3, 4], [3, -100]]
    assert batch["rejected_decoder_input_ids"].tolist() == [[3, -100], [3, 4]]
    with pytest.raises(ValueError, match="Unexpected key in batch 'other_input_ids'"):
        collator([{"other_input_ids": [1]}])


def test_pad_to_length() -> None:
    assert pad_to_length(torch.tensor([[1, 2]]), 4, 9).tolist() == [[1, 2, 9, 9]]
    assert pad_to_length(torch.tensor([[1, 2]]), 2, 9, dim=0).tolist() == [[1, 2], [9, 9]]
    longer = torch.tensor([1, 2, 3])
    assert pad_to_length(longer, 2, 9) is longer


TEXTS = [{"text": "abc"}, {"text": "defgh"}, {"text": "ij"}]


def sequences(**options: Any) -> list[list[int]]:
    dataset = ConstantLengthDataset(char_tokenizer(), Dataset.from_list(TEXTS), "text", shuffle=False, **options)
    rows = list(dataset)
    assert all(row["labels"].tolist() == row["input_ids"].tolist() for row in rows)
    assert dataset.current_size == len(rows)
    assert len(dataset) == 3
    return [row["input_ids"].tolist() for row in rows]


def test_constant_length_joins_with_the_end_token() -> None:
    assert sequences(seq_length=4) == [[1, 2, 3, 99], [4, 5, 6, 7], [8, 99, 9, 10]]


def test_constant_length_without_the_end_token() -> None:
    assert sequences(seq_length=5, append_concat_token=False) == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]


def test_constant_length_drops_what_is_left_of_each_buffer() -> None:
    # buffers of at least 3 characters: "abc" | "defgh" | "ij"; each with the end token, cut by 3
    options = {"seq_length": 3, "chars_per_token": 1, "num_of_sequences": 1}
    assert sequences(**options) == [[1, 2, 3], [4, 5, 6], [7, 8, 99], [9, 10, 99]]


def test_constant_length_infinite_starts_again() -> None:
    dataset = ConstantLengthDataset(
        char_tokenizer(),
        TEXTS,
        "text",
        shuffle=False,
        infinite=True,
        seq_length=4,
        num_of_sequences=1,
        chars_per_token=1,
    )
    with pytest.warns(UserWarning, match=r"The dataset reached end and the iterator is reset to the start\."):
        rows = [row["input_ids"].tolist() for row in islice(dataset, 5)]
    # buffers "abc"+"defgh" and "ij"+"abc": the second one begins anew
    assert rows == [[1, 2, 3, 99], [4, 5, 6, 7], [9, 10, 99, 1], [4, 5, 6, 7], [9, 10, 99, 1]]


def test_constant_length_shuffles_within_a_buffer() -> None:
    import random

    random.seed(1)
    rows = [row["input_ids"].tolist() for row in ConstantLengthDataset(char_tokenizer(), TEXTS, "text", seq_length=2)]
    assert sorted(rows) == [[1, 2], [3, 99], [4, 5], [6, 7], [8, 99], [9, 10]]


def test_constant_length_arguments() -> None:
    tokenizer = byte_tokenizer(eos=None)
    with pytest.warns(UserWarning, match="does not have an EOS token"):
        dataset = ConstantLengthDataset(tokenizer, TEXTS, "text", eos_token_id=7, seq_length=4)
    assert dataset.concat_token_id == 7
    assert dataset.max_buffer_size == 4 * 3.6 * 1024
    with pytest.warns(UserWarning, match="more than one argument"):
        ConstantLengthDataset(char_tokenizer(), TEXTS, formatting_func=lambda row, other: "a")
    with pytest.raises(ValueError, match="dataset_text_field"):
        ConstantLengthDataset(char_tokenizer(), TEXTS)
    with warnings.catch_warnings():
        formatted = ConstantLengthDataset(
            char_tokenizer(), TEXTS, formatting_func=lambda row: row["text"], seq_length=11
        )
    assert len(list(formatted)) == 1
