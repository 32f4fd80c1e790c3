"""The engine of a GPU, whose steps run here one operation after another, against the engine of the CPU."""

from dataclasses import replace

import pytest
import torch
from sampled_models import LOCAL, build, common, random_prompts, raw_logprobs
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from trl.generation import LocalSampler, SamplingParams, probe
from trl.generation.captured import LEAST_ROWS, Places
from trl.generation.kv_attention import cached_attention
from trl.generation.probe import by_captured
from trl.generation.rows import uniforms, uniforms_on_device
from trl.kernels import paged_attention
from trl.kernels.paged_attention import PAGE
from trl.models.forward import probe_rows
from trl.models.precision import TOLERANCES
from trl.models.scoring import plain_forward

MANY = SamplingParams(max_new_tokens=24, seed=4, stop_token_ids=tuple(range(2, 10)))


def both(model, prompts, params, n=1, **how):
    one = LocalSampler(model, max_rows=64).sample(prompts, params, n)
    two = LocalSampler(model, captured=True, **how).sample(prompts, params, n)
    return one, two


def assert_same(one, two):
    for a, b in zip((c for group in one for c in group), (c for group in two for c in group), strict=True):
        assert a.ids == b.ids
        assert a.finish_reason == b.finish_reason
        assert b.logprobs == pytest.approx(a.logprobs, abs=2e-5)
        assert b.raw_logprobs == pytest.approx(a.raw_logprobs, abs=2e-5)


def test_random_numbers_are_those_of_the_host():
    keys = [0, 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15, 12345678901234567890]
    steps = [0, 1, 5, 1000, 2**31, 7]
    signed = torch.tensor([key - 2**64 if key >= 2**63 else key for key in keys])
    assert uniforms_on_device(signed, torch.tensor(steps)).tolist() == uniforms(keys, steps).tolist()


@pytest.mark.parametrize("name", LOCAL)
def test_it_samples_what_the_other_engine_samples(name):
    model = build(name)
    one, two = both(model, random_prompts(20, 7, 35), replace(MANY, max_new_tokens=12), n=3)
    assert_same(one, two)
    prompt, completion = random_prompts(20, 7, 35)[2], two[2][0]
    assert completion.raw_logprobs == pytest.approx(raw_logprobs(model, prompt, completion.ids), abs=2e-5)


FILTERS = {
    "greedy": {"temperature": 0.0}, "top-p": {"top_p": 0.6}, "top-k": {"top_k": 5, "temperature": 1.3},
    "min-p": {"min_p": 0.2}, "seen": {"repetition_penalty": 1.7}, "late": {"min_new_tokens": 9},
    "none": {"stop_token_ids": ()},
}  # fmt: skip


@pytest.mark.parametrize("name", FILTERS)
def test_filters(name):
    assert_same(*both(build("llama"), random_prompts(9, 4, 33), replace(MANY, **FILTERS[name]), n=2))


def test_few_rows_at_a_time():
    """14 rows, 3 at a time: they come and go, and prompts with them."""
    one, two = both(build("llama"), random_prompts(20, 7, 7, 9, 12, 5, 30), MANY, n=2, max_rows=3)
    assert_same(one, two)
    assert len({len(c.ids) for group in two for c in group}) > 3


def test_rows_wait_for_pages(monkeypatch):
    """With 5 pages, a row of 1 + 1 pages finds room for one more beside it; with 1, no row fits."""
    from trl.generation import paged_cache

    assert PAGE == 32
    sizes = []

    def most(size, device):
        sizes.append(size)
        return room

    monkeypatch.setattr(paged_cache.Pages, "most", staticmethod(most))
    model, prompts, room = build("llama"), random_prompts(20, 7, 9), 4
    assert_same(*both(model, prompts, MANY))
    assert sizes == [2 * 2 * PAGE * 2 * 8 * 4]  # layers, keys and values, heads, width, float32
    room = 1
    with pytest.raises(MemoryError, match="need 2 pages of 32 tokens, and there is memory for 1"):
        LocalSampler(model, captured=True).sample(prompts, MANY)


def test_long_prompts_are_read_a_few_at_a_time():
    one, two = both(build("llama"), random_prompts(20, 7, 30, 9), MANY, n=2, max_prefill_tokens=30)
    assert_same(one, two)


class Words:
    """A tokenizer of which a test needs one method."""

    eos_token_id = None

    def batch_decode(self, rows, **kwargs):
        return [" ".join(map(str, row)) for row in rows]


def test_stop_strings_end_a_row_amid_a_chunk():
    model, prompts = build("llama"), random_prompts(9, 4)
    params = SamplingParams(max_new_tokens=20, seed=1, stop_token_ids=())
    free = LocalSampler(model).sample(prompts, params)
    stop = " ".join(map(str, free[0][0].ids[4:6]))
    params = replace(params, stop_strings=(stop,))
    one = LocalSampler(model, Words()).sample(prompts, params)
    two = LocalSampler(model, Words(), captured=True).sample(prompts, params)
    assert_same(one, two)
    assert len(two[0][0].ids) <= 6
    assert two[0][0].finish_reason == "stop"


def test_a_poisoned_model_is_named():
    model = build("llama")
    sampler = LocalSampler(model, captured=True)

    def poison(module, inputs, output):
        if inputs[0].shape[-2] == LEAST_ROWS:  # a step, not the reading of the prompt
            output[..., 3] = torch.nan

    model.lm_head.register_forward_hook(poison)
    with pytest.raises(FloatingPointError, match="not finite"):
        sampler.sample(random_prompts(5), MANY)


def test_under_autocast_linear_layers_are_rounded_once():
    model, prompts = build("llama"), random_prompts(9, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one, two = both(model, prompts, SamplingParams(max_new_tokens=3, temperature=0, stop_token_ids=()))
    for a, b in zip(one, two, strict=True):
        assert b[0].raw_logprobs[0] == pytest.approx(a[0].raw_logprobs[0], abs=1e-6)
    assert all("forward" not in vars(module) for module in model.modules())


class Watched(TorchDispatchMode):
    """The operations inside it, and new tensors from numbers of the host."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "bincount", "item", "is_nonzero"}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3", "gpt_oss", "gpt2"])
def test_no_step_waits_for_the_host(name, monkeypatch):
    """So that it can be captured; `lift_fresh` would be a tensor that is made on the host."""
    seen, advance = [], Places.advance

    def watched(places):
        with Watched() as mode:
            advance(places)
        seen.append(mode.seen)

    monkeypatch.setattr(Places, "advance", watched)
    monkeypatch.setattr(paged_attention, "_part", lambda *args: args[-2].zero_())  # on a GPU it is a kernel
    params = replace(MANY, top_p=0.9, top_k=20, min_p=0.01, repetition_penalty=1.1, min_new_tokens=3)
    LocalSampler(build(name), captured=True).sample(random_prompts(9, 4), params)
    assert len(seen) > 3
    counts = [{name: each.count(name) for name in WAITS | {"lift_fresh"} if name in each} for each in seen]
    assert counts[1:] == [{}] * (len(seen) - 1), counts[1]


@pytest.mark.parametrize("name", LOCAL)
def test_the_probe_of_a_gpu(name):
    """What it computes for given tokens is what a plain forward computes; windows of layers are seen."""
    model = build(name).eval()
    packed, _ = probe_rows(model)
    with torch.no_grad(), cached_attention(model):
        ours_SV, windows = by_captured(model, packed)
    with torch.no_grad():
        plain_SV, _ = plain_forward(model, packed, lambda head, states_SD: head.logits(states_SD))
    torch.testing.assert_close(ours_SV, plain_SV, rtol=0, atol=2e-5)
    assert sorted(windows) == list(range(model.config.num_hidden_layers))


def test_many_layers_in_bfloat16_sample_locally():
    """Rounding puts 24 layers of large weights further off than a few; in float32 they agree."""
    torch.manual_seed(0)
    config = LlamaConfig(**common(num_hidden_layers=24, initializer_range=0.2))
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    packed, _ = probe_rows(model)
    off = probe._far(probe._ours(model, packed)[0], probe._plain(model, packed)[0])
    assert off > TOLERANCES["bfloat16"].logits
    assert probe.why_not_local(model) is None
