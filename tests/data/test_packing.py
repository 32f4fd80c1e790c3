"""Token trees worked out by hand, and bins."""

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from trl.data.packed_dataset import pack_dataset
from trl.data.packing import best_fit_decreasing, pack
from trl.data.records import Branch, Segment, TokenTree


def test_a_shared_prompt_stands_once():
    packed = pack(
        [TokenTree([10, 11], [Branch([12, 13]), Branch([14], scored=[1])]), TokenTree([], [Branch([20, 21])])]
    )
    assert packed.ids_N.tolist() == [10, 11, 12, 13, 14, 20, 21]
    assert packed.position_N.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert packed.segments == (Segment(0, 2, -1), Segment(2, 4, 0), Segment(4, 5, 0), Segment(5, 7, -1))
    assert packed.scored_S.tolist() == [1, 2, 1, 5]
    assert packed.target_S.tolist() == [12, 13, 14, 21]
    assert packed.last_B.tolist() == [3, 4, 6]
    assert packed.mask_BT.tolist() == [[1, 1], [1, 0], [0, 1]]
    assert [packed.row_indices(row) for row in range(3)] == [[0, 1, 2, 3], [0, 1, 4], [5, 6]]


def test_one_branch_joins_its_prompt():
    packed = pack([TokenTree([1, 2], [Branch([3])])])
    assert packed.segments == (Segment(0, 3, -1),)
    assert packed.prompt_tokens == (2,)
    assert packed.scored_S.tolist() == [1]


def test_an_empty_completion_ends_at_its_prompt():
    packed = pack([TokenTree([1, 2], [Branch([]), Branch([3])])])
    assert packed.last_B.tolist() == [1, 2]
    assert packed.row_indices(0) == [0, 1]


@pytest.mark.parametrize(
    ("tree", "message"),
    [(TokenTree([], [Branch([])]), "row of the batch is empty"), (TokenTree([1], [Branch([2], [1, 1])]), "entries")],
)
def test_impossible_trees_are_refused(tree, message):
    with pytest.raises(ValueError, match=message):
        pack([tree])


@given(st.lists(st.integers(1, 20), max_size=60))
def test_bins_hold_everything_once(lengths):
    bins = best_fit_decreasing(lengths, 20)
    assert sorted(i for bin_ in bins for i in bin_) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in bin_) <= 20 for bin_ in bins)
    if lengths:  # first-fit-decreasing's guarantee, which best-fit shares: at most 11/9 of the optimum, plus one
        assert len(bins) <= 11 / 9 * -(-sum(lengths) // 20) * 2 + 1


def test_best_fit_fills_the_fullest_bin():
    assert best_fit_decreasing([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]
    with pytest.raises(ValueError, match="sequence 0 has 11 tokens"):
        best_fit_decreasing([11], 10)


def test_pack_dataset_keeps_or_cuts_sequences():
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5], [6]], "loss_mask": [[1, 1, 1], [0, 1], [1]]})
    bfd = pack_dataset(rows, 4)
    assert bfd["input_ids"][:] == [[1, 2, 3, 6], [4, 5]]
    assert bfd["seq_lengths"][:] == [[3, 1], [2]]
    wrapped = pack_dataset(rows, 4, "wrapped")
    assert wrapped["input_ids"][:] == [[1, 2, 3, 4], [5, 6]]
    assert wrapped["loss_mask"][:] == [[1, 1, 1, 0], [1, 1]]
    with pytest.raises(ValueError, match="packing_strategy='x'"):
        pack_dataset(rows, 4, "x")
