"""The last layer is computed where its result is read, and nowhere else."""

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.kernels.layers import computed_at, final_norm, last_layer
from trl.kernels.tree_attention import TreeLayout
from trl.models.forward import in_module, plan_of, rows_padded
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
    with computed_at((block,), torch.tensor([2, 7]), 10):
        out = block(x)
    assert out.flatten().tolist() == [0, 0, 4, 0, 0, 0, 0, 14, 0, 0]
    assert block.seen == [2]
    assert torch.equal(block(x), 2 * x)


def rows_of(*modules):
    """Rows that each module answers with from now on."""
    sizes = {module: [] for module in modules}
    for module in modules:
        module.register_forward_hook(lambda m, args, out: sizes[m].append(out.shape[1]))
    return sizes


def test_scoring_skips_what_nobody_reads():
    model = tiny_model("llama")
    score(model, PACKED)  # the probe
    mlp, attention = model.model.layers[-1].mlp, model.model.layers[-1].self_attn
    inner = [getattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")]
    sizes = rows_of(*inner, attention.k_proj, attention.v_proj)
    score(model, PACKED)
    read, total = len(PACKED.scored_S.unique()), len(PACKED.ids_N)
    assert list(sizes.values()) == [[read]] * 3 + [[total]] * 2


def test_where_nearly_all_are_read_all_are_computed():
    model, packed = tiny_model("llama"), pack([TokenTree([5], [Branch(list(range(6, 26)))])])
    score(model, packed)
    sizes = rows_of(model.model.layers[-1].mlp.gate_proj)
    score(model, packed)
    assert list(sizes.values()) == [[21]]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_gradients_are_those_of_the_padded_rows(name):
    gradients = []
    for padded in (False, True):
        model = tiny_model(name)
        with rows_padded(padded):
            score(model, PACKED).logprobs_BT.square().sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    for key, expected in gradients[1].items():
        size = float(expected.abs().max())
        torch.testing.assert_close(gradients[0][key], expected, rtol=0, atol=2e-5 * size + 1e-7, msg=key)


def test_attention_skips_the_queries_that_nobody_reads():
    layout = TreeLayout(PACKED.segments)  # 4 tokens, then 2 and 3 below them; then 7 alone
    attention, other = nn.Identity(), nn.Identity()
    layout.read_only_at(attention, [3, 7, 14, 15])
    assert layout.skipped(attention) == [3, 2, 1, 5]
    assert layout.skipped(other) == [0, 0, 0, 0]


def test_layers_whose_activations_are_computed_again_are_left_alone():
    model = tiny_model("llama")
    enable_gradient_checkpointing(model)
    assert last_layer(model) is None


# -- the final norm ------------------------------------------------------------------------------


def final_states(model):
    """What the final norm returns and what the head reads of it, in a pass with gradient."""
    normed, read = [], []
    hook = final_norm(model).register_forward_hook(lambda module, inputs, output: normed.append(output))
    head = model.get_output_embeddings()
    in_module(model, head, PACKED, lambda states_SD: read.append(states_SD) or states_SD.sum(-1))
    hook.remove()
    return normed[-1], read[-1]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_final_norm_computes_what_is_read_and_the_head_takes_it_without_a_copy(name, checkpointing):
    """6 tokens are scored; two completions share the state of their prompt's last token."""
    model = tiny_model(name)
    if checkpointing:
        enable_gradient_checkpointing(model.train())
    score(model, PACKED)
    normed, read = final_states(model)
    assert len(PACKED.scored_S) == 6
    assert normed.shape[:2] == (1, 6)
    assert read.data_ptr() == normed.data_ptr()
    assert read.untyped_storage().nbytes() == 6 * read.shape[-1] * 4


def test_a_network_that_views_the_norms_output_as_a_whole_row_gets_it():
    model = tiny_model("gpt2")
    score(model, PACKED)
    assert (plan_of(model).packed, plan_of(model).narrow, plan_of(model).early) == (True, True, False)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_head_that_needs_the_whole_row_gets_it(name):
    """A network that adds something as long as the row to the norm's output: its last layer is still narrowed."""
    model = tiny_model(name)
    whole = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: whole.append(output))
    model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.0 * whole[-1],))
    found = score(model, PACKED).logprobs_BT
    assert (plan_of(model).packed, plan_of(model).narrow, plan_of(model).early) == (True, True, False)
    assert final_states(model)[0].shape[1] == len(PACKED.ids_N)
    torch.testing.assert_close(found, score(tiny_model(name), PACKED).logprobs_BT)


def test_a_norm_that_is_not_beside_the_layers_is_left_alone():
    model = tiny_model("llama")
    model.model.norm = nn.Sequential(model.model.norm)
    assert final_norm(model) is None
    expected = score(tiny_model("llama"), PACKED).logprobs_BT
    torch.testing.assert_close(score(model, PACKED).logprobs_BT, expected)
