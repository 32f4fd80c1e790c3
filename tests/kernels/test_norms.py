"""The norm in one step against the models' own, with gradients."""

import math

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.kernels import layers
from trl.kernels.layers import fused_norms, rms_norm
from trl.models.scoring import score


def test_by_hand():
    x = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, 2.0], dtype=torch.float64)
    out = rms_norm(x, weight, 0.0)
    rms = math.sqrt(12.5)
    assert out.tolist() == pytest.approx([3 / rms, 8 / rms])
    out[0].backward()
    # d (x0 / rms) / dx = (1, 0) / rms - x0 x / (2 rms^3)
    assert x.grad.tolist() == pytest.approx([1 / rms - 9 / (2 * rms**3), -12 / (2 * rms**3)])


def test_gradients_are_those_of_differences():
    torch.manual_seed(0)
    x, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-3), (x, weight))


SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, Qwen3Config, Gemma2Config])
def test_a_model_computes_what_it_did(config):
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(config(**SIZES)), torch.tensor([[5, 6, 7, 8]])
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    results = []
    for fused in (True, False):
        model.zero_grad()
        if fused:
            with fused_norms(model):
                replaced = [norm for norm in norms if "forward" in vars(norm)]
                logits = model(ids).logits
        else:
            logits = model(ids).logits
        logits.square().sum().backward()
        results.append([logits, *(parameter.grad for parameter in model.parameters())])
    assert len(replaced) == (0 if config is Gemma2Config else len(norms))  # gemma's weight is a distance from 1
    assert not any("forward" in vars(norm) for norm in norms)
    for ours, own in zip(*results, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)


def test_checkpointed_models_and_other_precisions_keep_their_own():
    model = tiny_model("llama")
    model.model.layers[0].gradient_checkpointing = True
    with fused_norms(model):
        assert not any("forward" in vars(module) for module in model.modules())
    half = tiny_model("llama").to(torch.bfloat16)
    with fused_norms(half):
        assert not any("forward" in vars(module) for module in half.modules())


def test_the_final_norm_that_selects_what_is_read_is_one_too(monkeypatch):
    """Two layers have two norms each; the final one computes the three positions that predict a scored token."""
    model, packed = tiny_model("llama"), pack([TokenTree([5, 6, 7], [Branch([8, 9]), Branch([4])])])
    score(model, packed)  # probes
    seen, own = [], layers.rms_norm
    monkeypatch.setattr(layers, "rms_norm", lambda x, *args: (seen.append(x.shape[1]), own(x, *args))[1])
    score(model, packed)
    assert seen == [6] * (len(seen) - 1) + [3]
    assert len(seen) == 2 * model.config.num_hidden_layers + 1
