"""One probe says how a network is run, and what is read of a pass is computed inside the head's own call."""

import logging

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from tiny_models import lora, tiny_model

from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.generation import LocalSampler, make_sampler
from trl.models import forward
from trl.models.forward import pattern_lengths, plan_of, precision_of, rows_padded
from trl.models.scoring import check_head, head_of, in_head, logits_and_labels, score, scored_states


def batch(longest=7):
    """A shared prompt and a row alone; the longest row has so many tokens."""
    prompt = [5 + i % 40 for i in range(longest - 3)]
    return pack([TokenTree(prompt, [Branch([9, 8, 7]), Branch([11])]), TokenTree([5], [Branch([7, 6])])])


SIZES = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip


def causal(config_class, **more):
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config_class(**SIZES, **more)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def both(model, packed):
    """Log-probabilities packed, where the probe allows it, and padded."""
    found = score(model, packed).logprobs_BT
    with rows_padded(True):
        return found, score(model, packed).logprobs_BT


# -- the probe --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_an_adapter_is_probed_as_it_is():
    """A learned prefix stands before each row, so packed rows would share one: padded, but packed without it."""
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(num_virtual_tokens=6, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model("llama"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prompt_encoder" in name:
                parameter.normal_()
    with model.disable_adapter():  # a reference pass comes first
        without = both(model, batch())
        assert plan_of(model).packed
    found, expected = both(model, batch())
    assert not plan_of(model).packed
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*without, rtol=0, atol=1e-5)
    assert not torch.allclose(found, without[0], atol=1e-2)


def test_a_learned_prompt_stands_before_each_row():
    """Log-probabilities, and whole logits with their labels, are those of PEFT's own forward."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model("llama"), peft.PromptTuningConfig(num_virtual_tokens=6, task_type="CAUSAL_LM")
    ).eval()
    packed = batch()
    with torch.no_grad():
        model.prompt_encoder.default.embedding.weight.normal_()
        found_BT = score(model, packed).logprobs_BT
        logits, labels = logits_and_labels(model, packed)
        for row in range(packed.rows):
            ids = packed.ids_N[packed.row_indices(row)]
            logprobs = model(input_ids=ids[None]).logits[0, -len(ids) :].log_softmax(-1)
            expected = logprobs[:-1].gather(1, ids[1:, None])[packed.prompt_tokens[row] - 1 :, 0]
            torch.testing.assert_close(found_BT[row, : len(expected)], expected, rtol=0, atol=1e-5)
            learned = (labels[row] >= 0).nonzero()[:, 0]
            own = logits[row, learned - 1].log_softmax(-1).gather(1, labels[row, learned, None])[:, 0]
            torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)


def test_rows_beyond_a_pattern_are_probed_when_they_come(caplog):
    """Attention in chunks of 8 is told to the mask alone: rows within one chunk can be packed, longer ones cannot."""
    model = causal(
        t.Llama4TextConfig, attention_chunk_size=8, num_local_experts=2, num_experts_per_tok=1,
        interleave_moe_layer_step=2, intermediate_size_mlp=24,
    )  # fmt: skip
    torch.testing.assert_close(*both(model, batch(7)), rtol=0, atol=1e-4)
    assert plan_of(model).packed
    assert plan_of(model).reach == 8
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(*both(model, batch(20)), rtol=0, atol=1e-4)
    assert not plan_of(model).packed
    assert [record.message.split()[0] for record in caplog.records] == ["Llama4ForCausalLM"]


def test_short_rows_cost_a_short_probe(monkeypatch):
    model, widths, run = causal(t.MistralConfig, sliding_window=40), [], forward._run

    def counted(model, packed, *how):
        widths.append(len(packed.ids_N))
        run(model, packed, *how)

    monkeypatch.setattr(forward, "_run", counted)
    score(model, batch(10))
    assert max(widths) <= 20
    assert plan_of(model).reach == 40
    score(model, batch(40))
    assert plan_of(model).reach == 40
    widths.clear()
    score(model, batch(41))
    assert plan_of(model).reach == float("inf")
    assert plan_of(model).packed
    assert max(widths) >= 44
    widths.clear()
    score(model, batch(100))
    assert len(widths) == 1


def test_patterns_are_found_in_a_config():
    assert pattern_lengths(t.MistralConfig(sliding_window=4096)) == [4096]
    assert pattern_lengths(t.LlamaConfig()) == []
    assert 16 in pattern_lengths(t.LlamaConfig(sparse_attention={"block_size": 16, "levels": [{"window": 64}]}))
    assert 64 in pattern_lengths(t.LlamaConfig(sparse_attention={"block_size": 16, "levels": [{"window": 64}]}))


def test_the_sampler_and_the_passes_fill_one_record():
    model = tiny_model("llama")
    LocalSampler(model)
    assert plan_of(model).samples_locally
    assert not plan_of(model).packed
    score(model, batch())
    assert plan_of(model).samples_locally
    assert plan_of(model).packed


# -- precision --------------------------------------------------------------------------------


@pytest.fixture
def rounded():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def test_the_precision_that_is_really_used(rounded):
    model = tiny_model("llama")
    assert precision_of(model) == "tf32"
    assert precision_of(tiny_model("llama").double()) == "float64"
    with torch.autocast("cpu", torch.bfloat16):
        assert precision_of(model) == "bfloat16"


def test_exact_products_are_the_default():
    assert precision_of(tiny_model("llama")) == "float32"
    assert precision_of(tiny_model("llama").half()) == "float16"


def test_rounded_products_leave_the_engine_and_packing(rounded, monkeypatch):
    """As tensor cores read float32 while it is allowed: 10 bits of the mantissa."""
    plain = F.linear

    def linear(x, weight, bias=None):
        if torch.backends.mkldnn.matmul.fp32_precision == "ieee":
            return plain(x, weight, bias)
        return plain(*((each.view(torch.int32) & -8192).view(torch.float32) for each in (x, weight)), bias)

    monkeypatch.setattr(F, "linear", linear)
    model = causal(t.LlamaConfig)
    assert isinstance(make_sampler(model), LocalSampler)
    score(model, batch())
    assert plan_of(model).packed


def test_each_precision_has_its_own_probe():
    model = tiny_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        score(model, batch())
        assert plan_of(model).packed
    assert plan_of(model).reach == 0


@pytest.mark.parametrize("how", ["autocast", "bfloat16", "float16", "rounded"])
def test_what_float32_refuses_no_coarser_precision_accepts(how, request):
    """Bloom's biases of far keys count places in the packed row: rounding hides it on a few tokens."""
    if how == "rounded":
        request.getfixturevalue("rounded")
    for initial in (0.02, 0.08):
        torch.manual_seed(0)
        sizes = {"vocab_size": 60, "hidden_size": 16, "n_layer": 2, "n_head": 2}
        model = t.BloomForCausalLM(t.BloomConfig(**sizes, initializer_range=initial)).eval()
        half = getattr(torch, how, None) if "float" in how else None
        model = model if half is None else model.to(half)
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            torch.testing.assert_close(*both(model, batch()), rtol=0, atol=0)
            assert not plan_of(model).packed
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, weights[name])
            assert weight.dtype == weights[name].dtype


def test_autocast_that_accelerate_puts_into_the_forward_is_off_in_the_probe():
    from accelerate.utils import convert_outputs_to_fp32

    model = tiny_model("bloom")
    model._original_forward = model.forward
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    score(model, batch())
    assert not plan_of(model).packed


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3", "gemma2", "gemma3", "lora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_still_packs(name, dtype):
    configs = {"qwen3": t.Qwen3Config, "gemma2": t.Gemma2Config, "gemma3": t.Gemma3TextConfig}
    if name == "lora":
        model = pytest.importorskip("peft").get_peft_model(tiny_model("llama"), lora(), autocast_adapter_dtype=False)
    else:
        model = causal(configs[name]) if name in configs else tiny_model(name)
    with torch.autocast("cpu", dtype):
        score(model, batch())
        assert plan_of(model).packed
    model = model.to(dtype)
    score(model, batch())
    assert plan_of(model).packed
    assert {weight.dtype for weight in model.parameters()} == {dtype}


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_where_nothing_is_exact_the_whole_decides(name, monkeypatch):
    """Sharded or quantised weights of half precision cannot be converted for a probe."""
    monkeypatch.setattr(forward, "_expected_exactly", lambda *how: None)
    model = tiny_model(name).bfloat16()
    score(model, batch())
    assert plan_of(model).packed == (name == "llama")


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_an_attention_set_after_the_probe_is_a_new_state(name):
    model = tiny_model(name)
    before = score(model, batch()).logprobs_BT
    for implementation in ("eager", "sdpa", "eager"):
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(score(model, batch()).logprobs_BT, before, rtol=0, atol=1e-5)
        assert plan_of(model).packed


# -- the head ---------------------------------------------------------------------------------


def whole_rows(model, packed):
    """Log-probabilities by the model's own logits, a row at a time."""
    for row in range(packed.rows):
        ids = packed.ids_N[packed.row_indices(row)]
        logprobs = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
        yield row, logprobs[:-1].gather(1, ids[1:, None])[packed.prompt_tokens[row] - 1 :, 0]


FACTORS = {
    "falcon_h1": (
        t.FalconH1Config,
        {"lm_head_multiplier": 0.5, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4,
         "mamba_n_groups": 1, "mamba_chunk_size": 4},
    ),
    "recurrent_gemma": (
        t.RecurrentGemmaConfig,
        {"num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 8, "num_key_value_heads": 1,
         "logits_soft_cap": 2.0},
    ),
    "cohere": (t.CohereConfig, {"logit_scale": 0.3}),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTORS)
@torch.no_grad()
def test_factors_of_the_logits_by_all_their_names(name):
    config_class, more = FACTORS[name]
    sizes = {key: value for key, value in SIZES.items() if key not in more}
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config_class(**sizes, **more)).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    packed = batch()
    found_BT = score(model, packed).logprobs_BT
    for row, expected in whole_rows(model, packed):
        torch.testing.assert_close(found_BT[row, : len(expected)], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("change", ["factor", "forbidden words"])
def test_logits_changed_in_an_unknown_way_are_refused(change, autocast):
    class Changed(t.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if change == "factor":
                output.logits = output.logits * 1.5
            else:  # as Chameleon does with the words of images
                output.logits[..., [8, 9]] = torch.finfo(output.logits.dtype).min
            return output

    model = Changed(t.LlamaConfig(**SIZES)).eval()
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(ValueError, match="Changed changes its logits after `Linear`, its head"),
    ):
        score(model, batch())


@pytest.mark.parametrize("name", ["llama", "bloom", "bart"])
def test_the_check_of_the_logits_takes_three_tokens_at_most(name):
    model, sizes = tiny_model(name), []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[:-1].numel()))
    check_head(model, head_of(model))
    assert sizes == [2 if name == "bart" else 3]  # from 4 on, MKL keeps a buffer of 5 MB for 32,000 words
    check_head(model, head_of(model))
    assert len(sizes) == 1
    hook.remove()


@pytest.mark.parametrize("name", ["llama", "bloom", "bart"])
def test_what_is_read_is_computed_in_the_heads_only_call(name):
    model, packed = tiny_model(name), batch()
    score(model, packed)  # the probe
    head, calls = model.get_output_embeddings(), []
    head.register_forward_pre_hook(lambda module, inputs: calls.append("in"))
    head.register_forward_hook(lambda module, inputs, output: calls.append("out"))

    def function(head, states_SD):
        calls.append("function")
        logits_SV = head.logits(states_SD)
        return logits_SV.sum(-1), states_SD[:, :2]

    sums_S, states_S2 = in_head(model, packed, function)
    assert calls == ["in", "function", "out"]
    _, states_SD = scored_states(model, packed)
    torch.testing.assert_close(states_S2, states_SD[:, :2])
    expected_S = F.linear(states_SD, head.weight, head.bias).sum(-1)
    torch.testing.assert_close(sums_S, expected_S, rtol=1e-4, atol=1e-4)
    assert sums_S.requires_grad


def test_numbers_without_a_gradient_stay_so():
    found = in_head(tiny_model("llama"), batch(), lambda head, states: [states[:, 0], states[:, 1].detach()])
    assert [numbers.requires_grad for numbers in found] == [True, False]


def test_more_numbers_than_positions_have_their_gradients():
    model, packed = tiny_model("llama"), batch()
    weights = torch.rand(len(packed.scored_S), 50)
    gradients = []
    for inside in (True, False):
        model.zero_grad()
        if inside:
            (logits_SV,) = in_head(model, packed, lambda head, states_SD: head.logits(states_SD)[:, :50])
        else:
            _, states_SD = scored_states(model, packed)
            logits_SV = F.linear(states_SD, model.lm_head.weight)[:, :50]
        (logits_SV * weights).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
