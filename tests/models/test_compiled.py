"""Layers that torch compiles: one graph each for packed rows of every length."""

import random
import sys

import pytest
import torch
import transformers as t
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import masking_utils

from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.kernels.layers import is_compiled
from trl.kernels.tree_attention import TreeLayout
from trl.models import attention
from trl.models.attention import enable_tree_attention, inside_tree
from trl.models.forward import plan_of
from trl.models.scoring import score

# torch's compiler looks at the inputs of a layer
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LAYERS = ["sliding_attention", "full_attention"]
CONFIGS = {
    "llama": t.LlamaConfig(**SIZES),
    "qwen3": t.Qwen3Config(**SIZES, head_dim=8),
    "gemma3": t.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=6, layer_types=LAYERS),
}


def model_of(name):
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(CONFIGS[name])


def batch(seed):
    draw = random.Random(seed)

    def ids(most):
        return [draw.randrange(3, 60) for _ in range(draw.randint(1, most))]

    return pack(TokenTree(ids(9), [Branch(ids(8)) for _ in range(draw.randint(1, 3))]) for _ in range(2 + seed % 4))


def gradients(model, packed):
    model.zero_grad()
    logprobs_BT = score(model, packed).logprobs_BT
    logprobs_BT.sum().backward()
    return [logprobs_BT.detach(), *(weight.grad.clone() for weight in model.parameters())]


@pytest.mark.parametrize("name", CONFIGS)
def test_one_graph_for_every_length(name):
    """The layers of a model, without a break (`fullgraph`) and nothing compiled again over 20 lengths."""
    model = model_of(name)
    batches = [batch(seed) for seed in range(20)]
    assert len({len(packed.ids_N) for packed in batches}) > 15
    expected = [gradients(model, packed) for packed in batches[:3]]
    torch._dynamo.reset()
    counters.clear()
    counter, compiled = CompileCounterWithBackend("aot_eager"), []
    for layer in model.model.layers:
        layer.compile(fullgraph=True, dynamic=True, backend=counter)
    assert is_compiled(model)
    for index, packed in enumerate(batches):
        found = gradients(model, packed)
        compiled.append(counter.frame_count)
        for ours, plain in zip(found, expected[index] if index < 3 else found, strict=True):
            torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    assert plan_of(model).packed
    assert compiled[0] > 0
    assert set(compiled) == {compiled[0]}
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_a_layer_alone():
    """A decoder layer's forward, called with a layout."""
    model = model_of("llama")
    enable_tree_attention(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer, counts = model.model.layers[0], []
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for seed in range(5):
        packed = batch(seed)
        hidden = torch.randn(1, len(packed.ids_N), 32)
        angles = model.model.rotary_emb(hidden, packed.position_N[None])
        layout = TreeLayout(packed.segments).tabulated()
        with inside_tree():
            expected = layer(hidden, position_embeddings=angles, tree=layout)
            torch.testing.assert_close(compiled(hidden, position_embeddings=angles, tree=layout), expected)
        counts.append(counter.frame_count)
    assert set(counts) == {counts[0]}
    torch._dynamo.reset()


def test_flex_attention_is_part_of_a_graph_on_an_accelerator(monkeypatch):
    """The forward pass, which torch has on the CPU too: a layer with a window and one without, of several lengths."""
    model = model_of("gemma3")
    enable_tree_attention(model)
    monkeypatch.setattr(attention, "takes", lambda *qkv: False)
    torch._dynamo.reset()
    counter, counts = CompileCounterWithBackend("aot_eager"), []
    compiled = [torch.compile(layer, fullgraph=True, dynamic=True, backend=counter) for layer in model.model.layers]
    for seed in range(6):
        packed = batch(seed)
        hidden, layout = torch.randn(1, len(packed.ids_N), 32), TreeLayout(packed.segments).tabulated()
        attention.lay_out_for_graphs(layout, model)
        assert set(layout.blocks) == {None, 6}
        for kind, layer, graph in zip(LAYERS, model.model.layers, compiled, strict=True):
            angles = model.model.rotary_emb(hidden, packed.position_N[None], kind)
            with inside_tree(), torch.no_grad():
                expected = layer(hidden, position_embeddings=angles, tree=layout)  # by segments
                found = graph(hidden, position_embeddings=angles, tree=layout)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        counts.append(counter.frame_count)
    assert set(counts) == {counts[0]}
    torch._dynamo.reset()


def test_transformers_has_its_own_functions_back():
    model = model_of("llama")
    file = sys.modules[type(model).__module__]
    before = file.apply_rotary_pos_emb, masking_utils.find_packed_sequence_indices
    gradients(model, batch(0))
    assert (file.apply_rotary_pos_emb, masking_utils.find_packed_sequence_indices) == before
    assert not any(hasattr(function, "of_trl") for function in before)
    with inside_tree():
        with inside_tree():  # as a reference's pass within a policy's
            assert masking_utils.find_packed_sequence_indices(torch.tensor([[0, 1, 0]])) is None
        assert masking_utils.find_packed_sequence_indices(torch.tensor([[0, 1, 0]])) is None
    assert masking_utils.find_packed_sequence_indices(torch.tensor([[0, 1, 0]])).tolist() == [[0, 0, 1]]
