"""What is kept for the backward pass, and where: layers that keep some results, activations in main memory."""

import pytest
import torch
from conformity import build, history
from transformers import AutoModelForCausalLM, LlamaConfig

from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.kernels import step_memory
from trl.kernels.step_memory import Offload
from trl.models.prepare import enable_gradient_checkpointing, keep_some
from trl.models.scoring import score

SIZES = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
SHARED = pack([TokenTree(list(range(4, 30)), [Branch(list(range(30, 50))), Branch(list(range(50, 75)))])])


def model_of():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).train()


def gradients(model):
    score(model, SHARED).logprobs_BT.sum().backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts calls of operations by a part of their names."""

    def __init__(self, *parts):
        super().__init__()
        self.counts = dict.fromkeys(parts, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for part in self.counts:
            self.counts[part] += part in str(function)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("keep", ["attention", "products"])
def test_layers_keep_what_was_asked(keep):
    model, again, some = model_of(), model_of(), model_of()
    expected = gradients(model)
    enable_gradient_checkpointing(again)
    enable_gradient_checkpointing(some)
    keep_some(some, {"keep": keep})
    counts = []
    for one in (again, some):
        score(one, SHARED)  # how the model is run is known then
        total = score(one, SHARED).logprobs_BT.sum()
        with Operations("trl.tree_attention.default", "flash_attention_for_cpu.", "aten.mm.") as seen:
            total.backward()
        counts.append(seen.counts)
        found = torch.cat([weight.grad.flatten() for weight in one.parameters()])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    plain, kept = counts
    assert plain["flash_attention_for_cpu."] > 0  # attention is computed again
    assert kept["flash_attention_for_cpu."] == kept["trl.tree_attention.default"] == 0  # it was kept
    products = 6 * SIZES["num_hidden_layers"]  # the result of the seventh nobody needs
    assert plain["aten.mm."] - kept["aten.mm."] == (products if keep == "products" else 0)


def test_keep_is_one_of_few():
    with pytest.raises(ValueError, match="`keep` is one of 'attention', 'products'"):
        keep_some(model_of(), {"keep": "norms"})
    with pytest.raises(ValueError, match="needs use_reentrant=False"):
        keep_some(model_of(), {"keep": "attention", "use_reentrant": True})


KINDS = {
    "layers again, attention kept": {"gradient_checkpointing_kwargs": {"keep": "attention"}},
    "layers again, products kept": {"gradient_checkpointing_kwargs": {"keep": "products"}},
    "every second layer again": {"gradient_checkpointing_kwargs": {"every_n_layers": 2}},
    "moved": {"activation_offloading": True, "gradient_checkpointing": False},
    "layers again, moved": {"activation_offloading": True},
}


@pytest.mark.parametrize("name", ["sft", "dpo-sigmoid", "grpo"])
def test_a_run_learns_the_same(name, tmp_path, monkeypatch):
    monkeypatch.setattr(step_memory, "APART", {"cpu"})
    monkeypatch.setattr(step_memory, "LEAST_MOVED", 64)
    moves, pack = [], Offload.pack

    def packed(self, tensor):
        found = pack(self, tensor)
        moves.append(found is not tensor)
        return found

    monkeypatch.setattr(Offload, "pack", packed)
    plain = build(name, tmp_path / "plain", max_steps=2)
    plain.train()
    for kind, settings in KINDS.items():
        moves.clear()
        trainer = build(name, tmp_path / kind, max_steps=2, **{"gradient_checkpointing": True, **settings})
        trainer.train()
        for metric in ("loss", "grad_norm"):
            expected = pytest.approx(history(plain, metric), rel=1e-4, abs=1e-7)
            assert history(trainer, metric) == expected, kind
        assert any(moves) == ("moved" in kind)


# -- in main memory ------------------------------------------------------------------------------


def saved_by_pass(model):
    """Bytes that autograd saves in a forward pass, weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    stores = {}

    def seen(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            stores[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        score(model, SHARED)
    return sum(stores.values())


def test_saved_tensors_move_and_gradients_are_the_same_bit_for_bit(monkeypatch):
    monkeypatch.setattr(step_memory, "APART", {"cpu"})
    model, other = model_of(), model_of()
    expected = gradients(model)
    offload = Offload(other.parameters(), least=1024)
    with offload.on():
        total = score(other, SHARED).logprobs_BT.sum()
    total.backward()
    found = torch.cat([weight.grad.flatten() for weight in other.parameters()])
    assert torch.equal(found, expected)
    kept = saved_by_pass(other)
    assert 0.8 * kept < offload.bytes < 1.1 * kept  # nearly all of it, the input of several products once


def test_weights_and_small_tensors_stay(monkeypatch):
    monkeypatch.setattr(step_memory, "APART", {"cpu"})
    weight = torch.nn.Parameter(torch.randn(64, 32))
    offload = Offload([weight], least=1024)
    hidden = torch.randn(16, 32)
    for stays in (weight, weight.t(), weight.to(torch.bfloat16), torch.randn(4, 4)):
        assert offload.pack(stays) is stays
    one, same = offload.pack(hidden), offload.pack(hidden[:])
    assert one is same
    assert torch.equal(offload.unpack(one), hidden)
    hidden.add_(1)  # another version is another tensor
    assert offload.pack(hidden) is not one
    assert offload.bytes == 2 * 16 * 32 * 4


def test_on_a_cpu_one_line_says_so(tmp_path, caplog):
    build("sft", tmp_path, max_steps=1, activation_offloading=True)
    assert "activation_offloading=True: has no effect on a CPU: activations are in main memory" in caplog.text
