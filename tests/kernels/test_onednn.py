"""Products by oneDNN are those of `F.linear`."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.kernels import head_tiles, layers, onednn
from trl.kernels.onednn import laid_out, rows_times, suits, works
from trl.models.scoring import score

needs_onednn = pytest.mark.skipif(not works(), reason="this build of torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("rows", [(1,), (8,), (13,), (2, 5)])
@pytest.mark.parametrize("biased", [True, False])
def test_rows_of_any_number(rows, biased):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(*rows, 24), torch.randn(40, 24), torch.randn(40) if biased else None
    expected = F.linear(hidden, weight, bias)
    for form in (weight, laid_out(weight)):
        torch.testing.assert_close(rows_times(hidden, form, bias), expected, rtol=1e-5, atol=1e-5)


def test_what_it_takes():
    weight = torch.zeros(8, 8)
    assert suits(weight, 64) == works()
    assert not suits(weight, 65)
    assert not suits(weight.double(), 1)
    assert not suits(torch.zeros(8, 16)[:, ::2], 1)


@pytest.mark.parametrize("rows", [3, 40, 64, 100, 128, 1500])
def test_products_of_any_number_of_rows(rows):
    """Forward, backward and for the weight's gradient, with and without room behind the rows."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(rows + 200, 128), torch.randn(160, 128), torch.randn(160)
    for given in (hidden[:rows], hidden[:rows].clone()):
        out = onednn.times(given, weight, bias)
        torch.testing.assert_close(out, given @ weight.T + bias, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(onednn.times(out, weight.T), out @ weight, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(onednn.between(out, given), out.T @ given, rtol=1e-4, atol=5e-3)


def test_few_programs_for_all_lengths(monkeypatch):
    """Of 1,000 numbers of rows: 16 programs up to 1,024."""
    seen, own = set(), onednn.rows_times
    monkeypatch.setattr(onednn, "rows_times", lambda rows, *more: (seen.add(len(rows)), own(rows, *more))[1])
    weight = torch.ones(128, 64)
    for rows in range(128, 1025):
        onednn.times(torch.ones(rows, 64), weight)
    assert len(seen) == (15 if works() else 0)


def test_small_products_are_as_they_were():
    hidden, weight = torch.randn(20, 32), torch.randn(16, 32)
    assert torch.equal(onednn.times(hidden, weight), hidden @ weight.T)
    assert torch.equal(onednn.between(hidden, hidden), hidden.T @ hidden)


def gradients(model, packed):
    model.zero_grad()
    logprobs_BT = score(model, packed).logprobs_BT
    logprobs_BT.sum().backward()
    return [logprobs_BT.detach(), *(weight.grad.clone() for weight in model.parameters() if weight.grad is not None)]


@pytest.mark.parametrize("frozen", ["", "lm_head", "self_attn"])
def test_a_model_learns_the_same_by_either_library(monkeypatch, frozen):
    """Linear layers and the tiles of a head, of several numbers of rows, some of them frozen."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "vocab_size": 900}
    model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=2, num_key_value_heads=2, **sizes))
    for name, weight in model.named_parameters():
        weight.requires_grad_(not frozen or frozen not in name)
    draw = random.Random(0)
    ids = [[draw.randrange(900) for _ in range(length)] for length in (30, 60, 45)]
    packed = pack([TokenTree(ids[0], [Branch(ids[1]), Branch(ids[2])])])
    found, calls = [], []
    times = onednn.times
    for leads in (True, False):
        for file in (layers, head_tiles):
            monkeypatch.setattr(file, "leads", lambda leads=leads: leads and onednn.works())
            monkeypatch.setattr(file, "times", lambda *args: (calls.append(len(args[0])), times(*args))[1])
        score(model, packed)  # probes
        calls.clear()
        found.append(gradients(model, packed))
        assert bool(calls) == (leads and onednn.works())
        assert not any("forward" in vars(module) for module in model.modules())
    for ours, own in zip(*found, strict=True):
        assert float((ours - own).abs().max()) <= 2e-5 * float(own.abs().max())


def in_parts(linear):
    """As FSDP leaves a weight between passes: a piece of it, in one row."""
    linear.weight = nn.Parameter(linear.weight.detach().flatten()[: 2**16])


def test_an_engine_of_others_and_checkpoints_keep_their_own(monkeypatch):
    monkeypatch.setattr(layers, "leads", lambda: True)
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(8, 8))
    with layers.faster_products(model):
        assert ["forward" in vars(module) for module in model] == [True, False]
        assert model[0](torch.ones(256)).shape == (256,)
        assert model[0](torch.ones(2, 0, 256)).shape == (2, 0, 256)
        half = model[0].bfloat16()(torch.ones(2, 256, dtype=torch.bfloat16))
        assert half.dtype == torch.bfloat16
    for change in (
        lambda model: model[0].register_forward_hook(lambda *call: None),
        lambda model: model.bfloat16(),
        lambda model: setattr(model, "gradient_checkpointing", True),
        lambda model: in_parts(model[0]),
    ):
        model = nn.Sequential(nn.Linear(256, 256))
        change(model)
        with layers.faster_products(model):
            assert "forward" not in vars(model[0])
