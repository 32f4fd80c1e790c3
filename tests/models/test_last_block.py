"""The last feed-forward block is computed where its result is read, and nowhere else."""

import torch
from tiny_models import tiny_model
from torch import nn

from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.models.last_block import last_block, only_at
from trl.models.prepare import enable_gradient_checkpointing
from trl.models.scoring import score

PACKED = pack([TokenTree([5, 6, 7, 8], [Branch([9, 10]), Branch([11, 12, 13])]), TokenTree([5] * 6, [Branch([7])])])


class Doubling(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.shape[1])
        return 2 * x


def test_only_the_positions_that_are_read():
    block, x = Doubling(), torch.arange(10.0).view(1, 10, 1)
    with only_at(block, torch.tensor([7, 2, 2]), 10):
        out = block(x)
    assert out.flatten().tolist() == [0, 0, 4, 0, 0, 0, 0, 14, 0, 0]
    assert block.seen == [2]
    assert torch.equal(block(x), 2 * x)


def test_all_positions_where_nearly_all_are_read():
    block, x = Doubling(), torch.ones(1, 10, 1)
    with only_at(block, torch.arange(10), 10):
        assert torch.equal(block(x), 2 * x)


def test_scoring_skips_what_nobody_reads():
    model = tiny_model("llama")
    score(model, PACKED)  # the probe
    sizes = []
    handle = last_block(model).gate_proj.register_forward_hook(lambda m, args, out: sizes.append(out.shape[1]))
    score(model, PACKED)
    handle.remove()
    assert sizes == [len(PACKED.scored_S.unique())]


def test_layers_whose_activations_are_computed_again_are_left_alone():
    model = tiny_model("llama")
    enable_gradient_checkpointing(model)
    assert last_block(model) is None
