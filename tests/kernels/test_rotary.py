"""Rotary embeddings in one step against the models' own, with gradients."""

import math
import sys

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, CohereConfig, LlamaConfig, PhiConfig, Qwen3Config

from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.kernels import layers
from trl.kernels.layers import fused_rotary, rotate
from trl.models.scoring import score


def test_by_hand():
    """A quarter turn takes (a, b) to (-b, a), half a turn to (-a, -b)."""
    x = torch.tensor([[3.0, 4.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    angles = torch.tensor([[math.pi / 2] * 2, [math.pi] * 2]).view(1, 2, 2)
    query, key = rotate(x, 2 * x, angles.cos(), angles.sin())
    torch.testing.assert_close(query[0, 0], torch.tensor([[-4.0, 3.0], [-3.0, -4.0]]))
    torch.testing.assert_close(key, 2 * query)


def test_lengths_stay_and_only_distances_count():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8)
    angle = torch.tensor([1.0, 0.3, 0.1, 0.02] * 2)
    products = []
    for first, second in ((3, 1), (12, 10)):
        at = [(position * angle).view(1, 1, 8) for position in (first, second)]
        turned, _ = rotate(query, query, at[0].cos(), at[0].sin())
        assert turned.norm().item() == pytest.approx(query.norm().item(), rel=1e-5)
        products.append((turned * rotate(key, key, at[1].cos(), at[1].sin())[1]).sum().item())
    assert products[0] == pytest.approx(products[1], rel=1e-4)


def test_gradients_are_those_of_differences():
    torch.manual_seed(0)
    query, key = (torch.randn(1, heads, 3, 4, dtype=torch.float64, requires_grad=True) for heads in (2, 1))
    cos, sin = torch.randn(2, 1, 3, 4, dtype=torch.float64)  # any numbers: the halves need not agree
    assert torch.autograd.gradcheck(lambda q, k: rotate(q, k, cos, sin), (query, key))


SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "more", "fused"),
    [
        (LlamaConfig, {}, True),
        (Qwen3Config, {"head_dim": 8}, True),
        (PhiConfig, {"num_key_value_heads": 2, "partial_rotary_factor": 0.5}, True),  # turns a part, cut out before
        (CohereConfig, {}, False),  # turns neighbours, not halves
    ],
)
def test_a_model_computes_what_it_did(config, more, fused, monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**{**SIZES, **more, "pad_token_id": 0})).eval()
    ids, calls = torch.tensor([[5, 6, 7, 8]]), []
    monkeypatch.setattr(layers, "rotate", lambda *args: (calls.append(1), rotate(*args))[1])
    results = []
    for inside in (True, False):
        model.zero_grad()
        if inside:
            with fused_rotary(model):
                logits = model(ids).logits
            assert len(calls) >= 2 if fused else len(calls) <= 1  # the probe may call it once
            calls.clear()
        else:
            logits = model(ids).logits
        logits.square().sum().backward()
        results.append([logits, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
    assert not calls
    for ours, own in zip(*results, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)


def test_half_precision_and_checkpointing_keep_the_models_own(monkeypatch):
    model, ids = tiny_model("llama"), torch.tensor([[5, 6, 7]])
    with fused_rotary(model):
        model(ids)
    calls = []
    monkeypatch.setattr(layers, "rotate", lambda *args: (calls.append(1), rotate(*args))[1])
    with fused_rotary(model), torch.autocast("cpu", torch.bfloat16):
        model(ids)
    model.train()
    model.model.gradient_checkpointing = True
    with fused_rotary(model):
        model(ids)
    assert not calls


def test_the_function_is_replaced_inside_only():
    file = sys.modules["transformers.models.llama.modeling_llama"]
    original = file.apply_rotary_pos_emb
    with fused_rotary(tiny_model("llama")):
        function = file.apply_rotary_pos_emb
        with fused_rotary(tiny_model("llama")):
            assert file.apply_rotary_pos_emb is function
        assert file.apply_rotary_pos_emb is function
        assert function.__name__ == "apply_rotary_pos_emb"
        assert function.__wrapped__ is original
        x, angles = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 8)
        turned, _ = function(x, x, angles.cos(), angles.sin(), unsqueeze_dim=2)
        expected, _ = rotate(x.transpose(1, 2), x.transpose(1, 2), angles.cos(), angles.sin())
        torch.testing.assert_close(turned.transpose(1, 2), expected)
    assert file.apply_rotary_pos_emb is original


def test_it_is_put_back_after_a_failure():
    file = sys.modules["transformers.models.llama.modeling_llama"]
    original = file.apply_rotary_pos_emb
    with pytest.raises(KeyError), fused_rotary(tiny_model("llama")):
        raise KeyError
    assert file.apply_rotary_pos_emb is original


def test_a_pass_leaves_transformers_as_it_was():
    file = sys.modules["transformers.models.llama.modeling_llama"]
    original = file.apply_rotary_pos_emb
    score(tiny_model("llama"), pack([TokenTree([5, 6], [Branch([7, 8])])])).logprobs_BT.sum().backward()
    assert file.apply_rotary_pos_emb is original
