"""Rows in pieces of bounded length."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl.data.microbatches import BudgetCollator, balanced_pieces, row_tokens, runs_of_groups, unasked_budget


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


def test_runs_by_hand():
    # groups of 2 + 3 + 3, 2 + 1 and 2 + 6 tokens: 19 in all, in two runs of about 9.5
    assert runs_of_groups("aabc", [3, 3, 1, 6], [2, 2, 2, 2], 10) == [range(3), range(3, 4)]
    assert runs_of_groups("aabc", [3, 3, 1, 6], [2, 2, 2, 2], 19) == [range(4)]
    assert runs_of_groups("aaaa", [9, 9, 9, 9], [1, 1, 1, 1], 5) == [range(4)]  # a group stays together


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20)), min_size=1, max_size=40), st.integers(5, 60))
def test_every_row_is_in_one_run_and_groups_stay_whole(rows, budget):
    groups, lengths = zip(*rows, strict=True)
    runs = runs_of_groups(groups, lengths, [2] * len(rows), budget)
    assert [i for run in runs for i in run] == list(range(len(rows)))
    assert all(groups[run.start] != groups[run.start - 1] for run in runs[1:])


def test_unasked_only_what_can_be_cut_is_cut():
    collate = BudgetCollator(lambda rows: {"rows": len(rows)}, 5, asked=False)
    assert collate([{"input_ids": [0] * 2}] * 2) == {"rows": 2}
    assert collate([{"input_ids": [0] * 3}] * 2) == {"pieces": [{"rows": 1}, {"rows": 1}], "places": [[0], [1]]}
    assert collate([{"text": "a"}] * 9) == {"rows": 9}


def test_only_a_single_process_on_the_cpu_cuts_unasked():
    assert unasked_budget(torch.device("cpu"), 1) == 1536
    assert unasked_budget(torch.device("cpu"), 1, mostly_scored=True) == 768
    assert unasked_budget(torch.device("cpu"), 2) is None
    assert unasked_budget(torch.device("cuda"), 1) is None
