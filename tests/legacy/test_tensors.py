"""Tensor helpers of third-party trainers, by hand."""

import pytest
import torch

from trl.trainer.utils import flush_left, nanmax, nanmin, nanstd, pad, selective_log_softmax, split_tensor_dict


def test_pad():
    rows = [torch.tensor([1, 2]), torch.tensor([3])]
    assert pad(rows).tolist() == [[1, 2], [3, 0]]
    assert pad(rows, padding_value=9, padding_side="left", pad_to_multiple_of=3).tolist() == [[9, 1, 2], [9, 9, 3]]
    wide = [torch.ones(1, 2), torch.ones(2, 1)]
    assert pad(wide).tolist() == [[[1, 1], [0, 0]], [[1, 0], [1, 0]]]
    with pytest.raises(ValueError, match="padding_side='top'"):
        pad(rows, padding_side="top")


def test_selective_log_softmax():
    """Logits 0, 0 and 0, ln 3: probabilities 1/2 and 1/4, 3/4."""
    logits = torch.tensor([[0.0, 0.0], [0.0, 3.0]]).log_softmax(-1)
    logits[1] = torch.tensor([0.25, 0.75]).log()
    index = torch.tensor([1, 0])
    assert selective_log_softmax(logits, index).exp().tolist() == pytest.approx([0.5, 0.25])
    both = selective_log_softmax(logits, torch.tensor([[0, 1], [1, 0]])).exp()
    assert both.flatten().tolist() == pytest.approx([0.5, 0.5, 0.75, 0.25])


def test_flush_left():
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
    ids = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
    moved, tokens = flush_left(mask, ids)
    assert moved.tolist() == [[1, 1, 0], [1, 0, 1]]
    assert tokens.tolist() == [[7, 8, 0], [2, 3, 4]]


def test_numbers_without_nan():
    values = torch.tensor([1.0, torch.nan, 3.0])
    assert [float(f(values)) for f in (nanmin, nanmax)] == [1, 3]
    assert float(nanstd(values)) == pytest.approx(2**0.5)
    assert torch.isnan(nanmin(torch.tensor([torch.nan])))


def test_split_tensor_dict():
    parts = split_tensor_dict({"x": torch.arange(4), "y": None}, 2)
    assert [part["x"].tolist() for part in parts] == [[0, 1], [2, 3]]
    assert all(part["y"] is None for part in parts)
    with pytest.raises(ValueError, match="num_chunks=3: 'x' has 4 rows"):
        split_tensor_dict({"x": torch.arange(4)}, 3)
