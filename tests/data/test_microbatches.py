"""Rows in pieces of bounded length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl.data.microbatches import BudgetCollator, balanced_pieces, row_tokens


def test_tokens_of_a_row_count_a_shared_prompt_once():
    assert row_tokens({"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5], "margin": 1.0}) == 5
    assert row_tokens({"input_ids": [1, 2], "loss_mask": [0, 1], "attention_mask": [1, 1]}) == 2
    assert row_tokens({"input_ids_chosen": [1], "input_ids_rejected": [1, 2], "attention_mask_chosen": [1]}) == 3
    with pytest.raises(ValueError, match="no column of token ids"):
        row_tokens({"text": "a"})


def test_pieces_by_hand():
    assert balanced_pieces([4, 3, 3, 2], 6) == [[0, 3], [1, 2]]
    assert balanced_pieces([9, 1], 6) == [[0], [1]]  # a longer row stands alone
    assert balanced_pieces([1, 1, 1, 1], 2) == [[0, 2], [1, 3]]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(5, 60))
def test_every_row_once_and_within_the_budget(lengths, budget):
    pieces = balanced_pieces(lengths, budget)
    assert sorted(i for piece in pieces for i in piece) == list(range(len(lengths)))
    for piece in pieces:
        assert piece == sorted(piece)
        assert len(piece) == 1 or sum(lengths[i] for i in piece) <= budget


def test_the_inner_collator_sees_each_piece():
    collate = BudgetCollator(lambda rows: {"lengths": [len(row["input_ids"]) for row in rows]}, 5)
    rows = [{"input_ids": [0] * length} for length in (3, 5, 2)]
    assert sorted(piece["lengths"] for piece in collate(rows)["pieces"]) == [[3, 2], [5]]
