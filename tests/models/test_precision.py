"""Precision has one owner: what is stored, what is computed, what is tolerated, and what memory that takes."""

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as t
from tiny_models import lora, tiny_model

from trl import AutoModelForCausalLMWithValueHead
from trl.models.precision import (
    TOLERANCES,
    check_trainable,
    coarsest,
    dtype_of,
    frozen_dtype,
    heads_of,
    memory_line,
    precision_of,
    products,
    switched_products,
    warn_of_half,
)
from trl.models.prepare import load_model, wrap_peft

IDS = torch.tensor([[5, 6, 7, 8]])
CPU = torch.device("cpu")
CausalLM = t.AutoModelForCausalLM


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A checkpoint in bfloat16, as most of the Hub."""
    folder = tmp_path_factory.mktemp("half")
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def dtypes(model):
    """The dtypes of trained and of frozen weights."""
    found = {True: set(), False: set()}
    for weight in model.parameters():
        found[weight.requires_grad].add(str(weight.dtype).removeprefix("torch."))
    return found[True], found[False]


# -- stored -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        ({}, "float32"),
        ({"init_kwargs": {"dtype": "auto"}}, "bfloat16"),
        ({"init_kwargs": {"torch_dtype": "float16"}}, "float16"),
        ({"init_kwargs": {"dtype": None, "torch_dtype": torch.bfloat16}}, "bfloat16"),
        ({"init_kwargs": {"dtype": None}}, "float32"),
        ({"whole": False}, "bfloat16"),
        ({"frozen": True}, "bfloat16"),
        ({"frozen": True, "like": torch.float32}, "float32"),
        ({"frozen": True, "like": torch.float32, "init_kwargs": {"dtype": "float16"}}, "float16"),
    ],
)
def test_what_is_trained_is_float32_and_what_is_frozen_follows(how, dtype, half):
    model = load_model(half, CausalLM, **how)
    assert {str(weight.dtype) for weight in model.parameters()} == {f"torch.{dtype}"}


def test_wide_and_quantised_weights_stay(half, tmp_path):
    tiny_model("llama").double().save_pretrained(tmp_path)
    assert load_model(tmp_path, CausalLM).dtype == torch.float64
    from trl.models.precision import dtype_keywords

    for kwargs in ({"quantization_config": {"load_in_4bit": True}}, {"dtype": "auto"}):
        asked = {name: value for name, value in kwargs.items() if name == "dtype"}
        assert dtype_keywords(half, kwargs, {}, trained=True, like=None) == asked
    config = t.LlamaConfig(quantization_config={"quant_method": "fp8"})
    config.save_pretrained(tmp_path / "fp8")
    assert dtype_keywords(str(tmp_path / "fp8"), {}, {}, trained=True, like=None) == {}


def test_a_folder_with_an_adapter_keeps_its_base_as_it_was_saved(half, tmp_path):
    wrap_peft(load_model(half, CausalLM, whole=False), lora()).save_pretrained(tmp_path)
    assert dtypes(load_model(tmp_path, CausalLM)) == ({"float32"}, {"bfloat16"})
    frozen = load_model(tmp_path, CausalLM, frozen=True, like=torch.float32)
    assert dtypes(frozen) == (set(), {"float32"})


def test_value_heads_by_name(half):
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    assert dtypes(load(half)) == ({"float32"}, set())
    assert dtypes(load(half, dtype="bfloat16"))[0] == {"bfloat16", "float32"}  # the head of its own
    assert dtypes(load(half, peft_config=lora())) == ({"float32"}, {"bfloat16"})


@pytest.mark.parametrize(
    ("changes", "raised"),
    [
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, 2),
        ({"modules_to_save": ["input_layernorm", "down_proj"]}, 4),
        ({"bias": "all"}, 14),
    ],
)
def test_what_an_adapter_trains_besides_is_float32_too(changes, raised):
    """Heads, embeddings, norms and biases: the modules around them compute as before."""
    fields = {"attention_bias": True, "mlp_bias": True} if "bias" in changes else {}
    plain = tiny_model("llama", **fields).to(torch.bfloat16)
    own = plain(IDS).logits.detach()
    model = wrap_peft(plain, lora(init_lora_weights=True, **changes)).train()
    trained, _ = dtypes(model)
    assert trained == {"float32"}
    others = [name for name, weight in model.named_parameters() if weight.requires_grad and "lora" not in name]
    assert len(others) == raised
    logits = model(IDS).logits
    assert (logits - own).abs().max() < 0.02 * own.abs().max()
    logits.float().square().sum().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(IDS).logits - own).abs().max() < 0.02 * own.abs().max()


def test_what_frozen_models_follow(half):
    assert dtype_of(tiny_model("llama")) == torch.float32
    policy = wrap_peft(load_model(half, CausalLM, whole=False), lora(r=64))
    assert dtype_of(policy) == torch.bfloat16  # most numbers are the adapter's
    assert frozen_dtype(policy) is None
    assert frozen_dtype(tiny_model("llama"), "bf16") is None
    assert frozen_dtype(tiny_model("llama"), "no") == torch.float32


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        (t.LlamaForSequenceClassification, ["score"]),
        (t.DistilBertForSequenceClassification, ["pre_classifier", "classifier"]),
        (t.BertForTokenClassification, ["classifier"]),
        (t.LlamaForCausalLM, ["lm_head"]),
    ],
)
def test_heads_stand_beside_the_body(kind, heads):
    small = {
        "vocab_size": 9,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
    }
    if "Distil" in kind.__name__:
        small = {"vocab_size": 9, "dim": 8, "n_layers": 1, "n_heads": 1, "hidden_dim": 8}
    assert list(heads_of(kind(kind.config_class(**small)))) == heads


# -- what cannot learn ------------------------------------------------------------------------


def test_nothing_to_train():
    adapted = peft.get_peft_model(tiny_model("llama"), lora())
    check_trainable(adapted)
    with pytest.raises(ValueError, match=r"PeftModelForCausalLM has no trainable weight: .*is_trainable=True"):
        check_trainable(adapted.requires_grad_(False))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no trainable weight: call `requires_grad_\(True\)`"):
        check_trainable(tiny_model("llama").requires_grad_(False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", [1e-5, 1e-3])
def test_what_a_step_moves_is_what_the_warning_says(dtype, step):
    """Against the truth: the share of weights that differ after so large a step."""
    layer = torch.nn.Linear(64, 64, bias=False).to(dtype)
    before = layer.weight.detach().clone()
    moved = float((before + step != before).float().mean() + (before - step != before).float().mean()) / 2
    with pytest.warns(UserWarning, match="are stored in") as told:
        warn_of_half(layer, step)
    (warning,) = told
    share = float(str(warning.message).split("moves ")[1].split("%")[0]) / 100
    assert f"4,096 trained weights are stored in {str(dtype)[6:]}" in str(warning.message)
    assert share == pytest.approx(moved, abs=0.03)


def test_frozen_halves_and_adapters_in_float32_are_not_warned_of(half, recwarn):
    warn_of_half(wrap_peft(load_model(half, CausalLM, whole=False), lora()), 1e-5)
    warn_of_half(tiny_model("llama"), 1e-5)
    assert not recwarn.list


# -- memory -----------------------------------------------------------------------------------


class Sized(torch.nn.Module):
    """Weights that take no memory."""

    def __init__(self, numbers, dtype, trained):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(numbers, dtype=dtype, device="meta"), requires_grad=trained)


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        ("adamw_torch_fused", ", optimizer 1.1 GB"),
        ("adamw_8bit", ", optimizer 0.3 GB"),
        ("sgd", ", optimizer 0.0 kB"),
        ("adafactor", ""),
        (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9), ", optimizer 0.5 GB"),
        (torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))]), ", optimizer 1.1 GB"),
    ],
)
def test_memory_of_whole_training(optimizer, says):
    model = Sized(134_515_008, torch.float32, True)
    assert memory_line(model, [], optimizer) == (f"memory: trained weights 0.5 GB float32, gradients 0.5 GB{says}")


def test_memory_of_an_adapter_beside_a_reference_that_shares_its_base():
    model = torch.nn.ModuleList([Sized(134_515_008, torch.bfloat16, False), Sized(921_600, torch.float32, True)])
    other = torch.nn.ModuleList([model[0], Sized(100_000_000, torch.float32, False)])
    assert memory_line(model, [], "adamw_torch") == (
        "memory: trained weights 3.7 MB float32, gradients 3.7 MB, optimizer 7.4 MB, frozen weights 0.3 GB bfloat16"
    )
    assert memory_line(model, [other], "adamw_torch").endswith("frozen weights 0.7 GB float32 and bfloat16")


# -- computed, and tolerated ------------------------------------------------------------------


@pytest.fixture
def switches():
    backends = (torch.backends, torch.backends.cudnn, torch.backends.mkldnn, torch.backends.cuda.matmul,
                torch.backends.mkldnn.matmul)  # fmt: skip
    before = [each.fp32_precision for each in backends]
    for each in backends:
        each.fp32_precision = "none"  # as torch starts
    yield
    torch.set_float32_matmul_precision("highest")  # which keeps a state of its own
    for each, value in zip(backends, before, strict=True):
        each.fp32_precision = value


@pytest.mark.parametrize(
    ("switch", "cuda", "cpu"),
    [
        (lambda: None, "float32", "float32"),
        (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), "tf32", "float32"),
        (lambda: torch.set_float32_matmul_precision("high"), "tf32", "tf32"),
        (lambda: torch.set_float32_matmul_precision("medium"), "tf32", "bfloat16"),
        (lambda: setattr(torch.backends, "fp32_precision", "tf32"), "tf32", "tf32"),
    ],
)
def test_every_switch_of_torch_is_known(switch, cuda, cpu, switches):
    switch()
    assert (switched_products("cuda"), switched_products("cpu")) == (cuda, cpu)
    assert precision_of(tiny_model("llama")) == cpu


@pytest.mark.parametrize(("bits", "precision"), [(10, "tf32"), (7, "bfloat16"), (23, "float32")])
def test_products_that_a_device_rounds_are_seen(bits, precision, monkeypatch):
    """Though no switch says so: factors with so many bits of mantissa, as tensor cores read them."""
    plain, mask = F.linear, -(1 << (23 - bits))

    def linear(x, weight, bias=None):
        return plain(*((each.view(torch.int32) & mask).view(torch.float32) for each in (x, weight)), bias)

    monkeypatch.setattr(F, "linear", linear)
    assert products(CPU) == precision
    assert precision_of(tiny_model("llama")) == precision


def test_the_coarsest_part_decides():
    mixed = tiny_model("llama")
    mixed.lm_head.to(torch.float16)
    assert precision_of(mixed) == "float16"
    with torch.autocast("cpu", torch.bfloat16):
        assert precision_of(mixed) == "bfloat16"
    mixed.model.is_quantized = True
    assert precision_of(mixed) == "bfloat16"
    assert coarsest(["tf32", "float32"]) == "tf32"
    for fine, coarse in zip(list(TOLERANCES), list(TOLERANCES)[1:], strict=False):
        assert all(a <= b for a, b in zip(TOLERANCES[fine], TOLERANCES[coarse], strict=True))
