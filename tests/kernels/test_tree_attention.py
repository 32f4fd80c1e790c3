"""The CPU's one-step attention over a tree against the plain one, segment by segment."""

import pytest
import torch

from trl.data.packing import pack
from trl.data.records import Branch, Segment, TokenTree
from trl.kernels.tree_attention import TreeLayout, takes, tree_attention
from trl.models.attention import segment_attention

TREES = [
    TokenTree([1] * 5, [Branch([2] * 3), Branch([3] * 4)]),
    TokenTree([1] * 2, [Branch([2] * 6)]),
    TokenTree([], [Branch([2] * 3)]),
]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_segment_attention_with_gradients(kv_heads, window, scale):
    layout = TreeLayout(pack(TREES).segments)
    total = layout.segments[-1].end
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, total, 8, dtype=torch.float64) for heads in (4, kv_heads, kv_heads)]
    assert takes(*inputs)
    weight = torch.randn(1, total, 4, 8, dtype=torch.float64)
    results = []
    for one_step in (True, False):
        leaves = [x.clone().requires_grad_() for x in inputs]
        if one_step:
            out = tree_attention(layout, None, *leaves, window=window, scale=scale)
        else:
            out = segment_attention(layout, *leaves, window=window, scale=scale).transpose(1, 2)
        (out * weight).sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [None, 3])
def test_skipped_queries_answer_nothing_and_learn_nothing(window):
    layout, module = TreeLayout(pack(TREES).segments), object()  # 5, 3, 4, 8 and 3 tokens
    layout.read_only_at(module, [4, 6, 7, 15, 19])
    total = layout.segments[-1].end
    torch.manual_seed(0)
    weight = torch.randn(1, total, 4, 8, dtype=torch.float64)
    read = torch.tensor([4, 6, 7, *range(15, 20)])  # from the first that is read to its segment's end
    assert layout.skipped(module) == [4, 1, 4, 3, 3]
    inputs = [torch.randn(1, heads, total, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    results = []
    for name in (module, None):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = tree_attention(layout, name, *leaves, window=window, scale=None)
        (out * weight)[:, read].sum().backward()
        results.append([out[:, read], *(leaf.grad for leaf in leaves)])
        if name is module:
            assert not out[:, [0, 5, 8, 14, 20]].any()
    for few, all_of_them in zip(*results, strict=True):
        torch.testing.assert_close(few, all_of_them, rtol=1e-10, atol=1e-10)


def test_siblings_read_what_they_share_together():
    layout, module = TreeLayout(pack(TREES).segments), object()
    assert layout.parts(None, None) == [
        (0, 5, [0], False),
        (5, 8, [1], False),
        (8, 12, [2], False),
        (5, 12, [0], True),
        (12, 20, [3], False),
        (20, 23, [4], False),
    ]
    layout.read_only_at(module, [4, 6, 7, 8, 19])  # the first sibling is computed in part: nobody is left to share with
    assert layout.parts(module, None)[:3] == [(4, 5, [0], False), (6, 8, [0, 1], False), (8, 12, [0, 2], False)]
    assert not any(part.adds for part in layout.parts(None, 3))


def test_trees_of_trees():
    segments = [Segment(0, 2, -1), Segment(2, 5, 0), Segment(5, 6, 1), Segment(6, 9, 1), Segment(9, 11, 0)]
    layout = TreeLayout(segments)
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 11, 8, dtype=torch.float64) for _ in range(3)]
    plain = segment_attention(layout, *inputs, scale=None).transpose(1, 2)
    torch.testing.assert_close(tree_attention(layout, None, *inputs, window=None, scale=None), plain)
    assert [part for part in layout.parts(None, None) if part.adds] == [(5, 9, [0, 1], True)]


def test_other_kinds_are_left_to_the_plain_path():
    x = torch.zeros(1, 2, 3, 8)
    assert not takes(x, x, torch.zeros(1, 2, 3, 4))  # values of another width
    assert not takes(x.half(), x.half(), x.half())
