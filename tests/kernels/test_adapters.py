"""LoRA in one step of autograd against PEFT's own modules: outputs, gradients, dropout, and where PEFT's path stays."""

from contextlib import nullcontext

import peft
import pytest
import torch
import transformers as t
from torch import nn

from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.kernels import adapters
from trl.kernels.adapters import Layer, adapted, fused_adapters, gated
from trl.kernels.onednn import with_room, works
from trl.models.scoring import score

needs_onednn = pytest.mark.skipif(not works(), reason="this build of torch has no oneDNN")
ALL = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def network(width=16, kind=t.LlamaConfig, base=(), **lora):
    """Two layers; of a width of 256, all products but those with keys and values are large enough for oneDNN."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = kind(vocab_size=60, num_hidden_layers=2, head_dim=width // 2, pad_token_id=0, **sizes, **dict(base))
    return peft.get_peft_model(t.AutoModelForCausalLM.from_config(config), peft.LoraConfig(**{**ALL, **lora})).train()


def measure(model, fused=True, half=False, rows=1, **inputs):
    """How many modules have another forward inside; logits and the gradients of all weights that learn."""
    ids = torch.randint(3, 60, (rows, 71), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    torch.manual_seed(1)  # dropout
    with fused_adapters(model) if fused else nullcontext():
        swapped = sum("forward" in vars(module) for module in model.modules())
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = model(ids, **inputs).logits.float()
    if logits.requires_grad:
        logits.square().mean().backward()
    assert not any("forward" in vars(module) for module in model.modules())
    return swapped, [logits.detach(), *(w.grad.clone() for w in model.parameters() if w.grad is not None)]


def error(found, expected):
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def distance(found, exact):
    """Of all numbers together, relative."""
    apart = sum(float((a.float() - b).square().sum() / b.square().sum()) for a, b in zip(found, exact, strict=True))
    return (apart / len(exact)) ** 0.5


def test_by_hand():
    """W x = 1 * 3 + 2 * 4 = 11, A x = 7, so y = 11 + 0.5 * 3 * 7 = 21.5; dy/dx = W + 0.5 * 3 * (1, 1)."""
    x = torch.tensor([[3.0, 4.0]], requires_grad=True)
    a, b = torch.tensor([[1.0, 1.0]], requires_grad=True), torch.tensor([[3.0]], requires_grad=True)
    out = adapted(x, Layer(torch.tensor([[1.0, 2.0]]), None, a, b, 0.5))
    assert out.tolist() == [[21.5]]
    out.sum().backward()
    assert x.grad.tolist() == [[2.5, 3.5]]
    assert (a.grad.tolist(), b.grad.tolist()) == ([[4.5, 6.0]], [[3.5]])


def test_what_comes_out_may_be_written_to():
    x = torch.ones(1, 3, 2, requires_grad=True)
    layer = Layer(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    for out in (adapted(x, layer), gated(x, layer, layer, layer)):
        x.grad = None
        out.mul_(2)
        (expected,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        out.sum().backward()
        assert torch.equal(x.grad, expected)
    adapted(x, layer).mul_(2).sum().backward()
    assert (x.grad - expected).tolist() == [[[8.0, 12.0]] * 3]


def test_gradients_are_those_of_differences():
    torch.manual_seed(0)

    def layer(width, out, rank=2):
        a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((rank, width), (out, rank)))
        return Layer(torch.randn(out, width, dtype=torch.float64), None, a, b, 0.7)

    x, (one, gate, up, down) = (
        torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True),
        (layer(*sizes) for sizes in ((5, 4), (5, 6), (5, 6), (6, 5))),
    )
    assert torch.autograd.gradcheck(lambda *_: adapted(x, one), (x, one.a, one.b))
    weights = [weight for each in (gate, up, down) for weight in (each.a, each.b)]
    assert torch.autograd.gradcheck(lambda *_: gated(x, gate, up, down), (x, *weights))


@pytest.mark.parametrize("width", [16, pytest.param(256, marks=needs_onednn)])
@pytest.mark.parametrize(
    ("lora", "swapped"),
    [
        ({}, (16, 16)),  # seven layers and the block of each of two
        ({"lora_dropout": 0.3}, (16, 16)),
        ({"use_rslora": True, "lora_alpha": 3}, (16, 16)),
        ({"target_modules": ["q_proj", "v_proj"]}, (4, 14)),  # the frozen layers beside are oneDNN's, where large
        ({"target_modules": ["down_proj"], "rank_pattern": {"layers.1.mlp.down_proj": 2}}, (2, 12)),
        ({"target_modules": ["gate_proj", "up_proj"], "layers_to_transform": [1]}, (2, 12)),
    ],
)
def test_it_computes_what_peft_computes(width, lora, swapped):
    model = network(width, **lora)
    count, found = measure(model)
    _, expected = measure(model, fused=False)
    assert count == swapped[width > 16]
    assert len(found) > 1
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize(("kind", "base"), [(t.Qwen2Config, {}), (t.GemmaConfig, {})])
def test_other_models(kind, base):
    """Biases of frozen layers count; a block with another activation keeps its own forward, its layers do not."""
    model = network(kind=kind, base=base)
    for name, weight in model.named_parameters():
        if name.endswith("base_layer.bias"):
            nn.init.normal_(weight)
    count, found = measure(model)
    assert count == (14 if kind is t.GemmaConfig else 16)
    assert error(found, measure(model, fused=False)[1]) < 1e-5


@pytest.mark.parametrize("lora", [{}, {"lora_dropout": 0.3}, {"target_modules": ["q_proj", "down_proj"]}])
@pytest.mark.parametrize("width", [16, 256])
def test_under_autocast_it_is_as_near_to_float32(width, lora):
    model = network(width, **lora)
    _, exact = measure(model, fused=False)
    _, found = measure(model, half=True)
    _, peft_own = measure(model, fused=False, half=True)
    assert all(a.dtype == b.dtype for a, b in zip(found, peft_own, strict=True))
    assert distance(found, exact) < 1.2 * distance(peft_own, exact)


def test_half_precision_weights():
    model = network()
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    _, exact = measure(model, fused=False)
    model.to(torch.bfloat16)
    _, found = measure(model)
    assert distance(found, exact) < 1.2 * distance(measure(model, fused=False)[1], exact)
    assert all(weight.dtype == torch.bfloat16 for weight in found[1:])
    for name, weight in model.named_parameters():  # adapters in float32 on layers in bfloat16: PEFT's own path
        weight.data = weight.data.float() if ".lora_" in name else weight.data
    assert error(measure(model)[1], measure(model, fused=False)[1]) == 0


def two_adapters(model):
    model.add_adapter("other", peft.LoraConfig(**{**ALL, "target_modules": ["q_proj", "up_proj"]}))
    return model


def both_active(model):
    two_adapters(model).base_model.set_adapter(["default", "other"])
    return model


def other_active(model):
    two_adapters(model).set_adapter("other")
    return model


def merged(model):
    model.merge_adapter()
    return model


def learning_base(model):
    for name, weight in model.named_parameters():
        weight.requires_grad_("base_layer" in name or ".lora_" in name)
    return model


def watched(model):
    for module in model.modules():
        if type(module).__name__ == "Linear" and hasattr(module, "lora_A"):
            module.lora_A["default"].register_forward_hook(lambda *call: None)
    return model


def checkpointed(model):
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    return model


def flattened(model):
    """As an engine leaves weights that it views itself: no parameter of the layer."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            weight = module.base_layer._parameters.pop("weight")
            module.base_layer.weight = weight.detach()
    return model


@pytest.mark.parametrize(
    ("change", "lora", "swapped"),
    [
        (lambda model: model, {"use_dora": True}, 0),
        (lambda model: model, {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}, 0),
        (lambda model: model, {"lora_dropout": 0.3, "use_dora": True}, 0),
        (both_active, {}, 10),  # q and up have two
        (other_active, {}, 4),  # the others have none: PEFT's call of the base layer
        (merged, {}, 0),
        (learning_base, {}, 0),
        (watched, {}, 0),
        (flattened, {}, 0),
        (checkpointed, {}, 0),
        (checkpointed, {"lora_dropout": 0.3}, 0),
    ],
)
def test_peft_keeps_what_it_alone_computes(change, lora, swapped):
    model = change(network(kind=t.Qwen2Config if "lora_bias" in lora else t.LlamaConfig, **lora))
    count, found = measure(model)
    _, expected = measure(model, fused=False)
    assert count == swapped
    assert error(found, expected) < (1e-5 if swapped else 1e-30)


@pytest.mark.parametrize("width", [16, pytest.param(256, marks=needs_onednn)])
def test_an_adapter_switched_off(width):
    model = network(width)
    with model.disable_adapter(), torch.no_grad():
        _, found = measure(model)
        _, expected = measure(model, fused=False)
    assert error(found, expected) < 1e-5
    assert error(found, measure(model)[1][:1]) > 1e-3


def test_an_adapter_for_each_row():
    model = two_adapters(network()).eval()
    names = {"adapter_names": ["default", "other", "__base__"], "rows": 3}
    with torch.no_grad():
        assert error(measure(model, **names)[1], measure(model, fused=False, **names)[1]) == 0


def test_a_block_that_does_more_keeps_its_own():
    """A subclass whose forward adds something is asked, and answers otherwise."""
    model = network()

    class Shifted(type(model.base_model.model.model.layers[0].mlp)):
        def forward(self, x):
            return super().forward(x) + 1.0

    model.base_model.model.model.layers[0].mlp.__class__ = Shifted
    count, found = measure(model)
    assert count == 15
    assert error(found, measure(model, fused=False)[1]) < 1e-5


def kept_numbers(model, fused):
    """How many numbers a pass keeps for its backward pass, weights apart."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    seen = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = (storage.nbytes() // 4, tensor)
        return tensor

    inside = fused_adapters(model) if fused else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), inside:
        model(torch.full((1, 64), 7))
    return sum(size for size, _ in seen.values())


def test_a_block_keeps_half_of_its_wide_numbers():
    """Of gates, their silu, values and their product it keeps two: 64 tokens, 512 wide, in each of two layers."""
    model = network(256)
    saved = kept_numbers(model, fused=False) - kept_numbers(model, fused=True)
    assert 0 <= saved - 2 * (2 * 64 * 512) < 2 * 64 * 256


def test_a_pass_over_packed_rows_takes_it(monkeypatch):
    """With the last layer narrowed, gradients and log-probabilities are those of PEFT's modules."""
    packed = pack([TokenTree([5, 6, 7, 9], [Branch([8, 9]), Branch([4, 3, 2])]), TokenTree([11], [Branch([12])])])
    model, calls = network(), []
    score(model, packed)  # probes
    own = adapters.adapted
    monkeypatch.setattr(adapters, "adapted", lambda x, layer: (calls.append(x.shape[1]), own(x, layer))[1])

    def gradients():
        model.zero_grad()
        logprobs_BT = score(model, packed).logprobs_BT
        logprobs_BT.sum().backward()
        return [logprobs_BT.detach(), *(w.grad.clone() for w in model.parameters() if w.grad is not None)]

    found = gradients()
    total = len(packed.ids_N)
    assert len(calls) == 8  # queries, keys, values and outputs of two layers; the blocks are one step each
    assert sum(count < total for count in calls) == 2  # queries and outputs of the last
    calls.clear()
    monkeypatch.setattr(adapters, "fused_adapters", lambda network: nullcontext())
    expected = gradients()
    assert not calls
    assert error(found, expected) < 1e-4


def test_room_behind_rows():
    rows = torch.arange(300.0).view(100, 3)
    assert with_room(rows[:64]).shape == (64, 3)  # a count that a program is made for
    view = with_room(rows[:36])
    assert view.shape == (64, 3)
    assert view.data_ptr() == rows.data_ptr()
    copy = with_room(rows[60:])
    assert copy.shape == (64, 3)
    assert torch.equal(copy[:40], rows[60:])
    assert with_room(rows.half()[:36]).shape == (36, 3)
    counts = {len(with_room(torch.empty(count, 1))) for count in range(1, 4097)}
    assert len(counts) == 48  # 16 up to 1,024, 16 to 2,048, 16 to 4,096


@needs_onednn
def test_what_lies_behind_the_rows_does_not_count():
    torch.manual_seed(0)
    weight, a, b = torch.randn(256, 256), torch.randn(4, 256, requires_grad=True), torch.randn(256, 4)
    found = []
    for behind in (0.0, float("nan")):
        storage = torch.full((128, 256), behind)
        storage[:100] = torch.linspace(-1, 1, 25600).view(100, 256)
        a.grad = None
        out = adapted(storage[:100], Layer(weight, None, a, b))
        out.square().sum().backward()
        found.append((out.detach(), a.grad))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert found[0][0].isfinite().all()
