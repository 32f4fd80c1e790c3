"""The CPU's one-step attention over a tree against the plain one, segment by segment."""

import pytest
import torch

from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.models.attention import segment_attention
from trl.models.layout import TreeLayout
from trl.models.tree_attention import takes, tree_attention

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
            out = tree_attention(layout, *leaves, window=window, scale=scale)
        else:
            out = segment_attention(layout, *leaves, window=window, scale=scale).transpose(1, 2)
        (out * weight).sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)


def test_other_kinds_are_left_to_the_plain_path():
    x = torch.zeros(1, 2, 3, 8)
    assert not takes(x, x, torch.zeros(1, 2, 3, 4))  # values of another width
    assert not takes(x.half(), x.half(), x.half())
