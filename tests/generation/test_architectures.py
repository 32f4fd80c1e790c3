"""Greedy completions are those of transformers.generate, token for token."""

import logging
from itertools import chain

import pytest
import torch
from sampled_models import LOCAL, OTHERS, SEQ2SEQ, build, random_prompts
from transformers import GenerationConfig

from trl.generation import LocalSampler, SamplingParams, TransformersSampler, make_sampler
from trl.generation.probe import NotLocal

GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)
LENGTHS = (9, 1, 5, 14)


def generated(model, prompt: list[int], eos: int | None = 2) -> list[int]:
    """The greedy completion by transformers alone, one unpadded prompt at a time."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=12, eos_token_id=eos, pad_token_id=0,
        decoder_start_token_id=model.config.get_text_config().to_dict().get("decoder_start_token_id"),
    )  # fmt: skip
    ids = torch.tensor([prompt])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)[0].tolist()
    return out[1:] if model.config.is_encoder_decoder else out[len(prompt) :]


@pytest.mark.parametrize("name", LOCAL)
def test_local_greedy_is_generate(name):
    model = build(name)
    prompts = random_prompts(*LENGTHS)
    completions = LocalSampler(model, max_rows=5).sample(prompts, GREEDY, n=2)
    for prompt, group in zip(prompts, completions, strict=True):
        expected = generated(model, prompt)
        assert [c.ids for c in group] == [expected, expected]
        assert {c.finish_reason for c in group} == {"stop" if expected[-1] == 2 else "length"}


@pytest.mark.parametrize("name", OTHERS | SEQ2SEQ)
def test_fallback_greedy_is_generate(name, caplog):
    model = build(name)
    prompts = random_prompts(*LENGTHS) if name != "mamba" else random_prompts(5, 5)
    with caplog.at_level(logging.WARNING, "trl.generation"):
        make_sampler(model)
        sampler = make_sampler(model)
    assert isinstance(sampler, TransformersSampler)
    assert [type(model).__name__ in record.message for record in caplog.records] == [True]
    for prompt, group in zip(prompts, sampler.sample(prompts, GREEDY, n=2), strict=True):
        assert [c.ids for c in group] == [generated(model, prompt)] * 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3"])
def test_both_engines_sample_the_same(name):
    model = build(name)
    prompts = random_prompts(6, 6, 3)
    params = SamplingParams(max_new_tokens=10, seed=3, temperature=0.8, top_k=40, top_p=0.95, repetition_penalty=1.2)
    local = LocalSampler(model).sample(prompts, params, n=3)
    plain = TransformersSampler(model).sample(prompts, params, n=3)
    for ours, theirs in zip(chain(*local), chain(*plain), strict=True):
        assert (ours.ids, ours.finish_reason) == (theirs.ids, theirs.finish_reason)
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.raw_logprobs, theirs.raw_logprobs, rtol=0, atol=1e-4)


def test_the_probe_names_the_reason():
    with pytest.raises(NotLocal, match=r"BloomForCausalLM .* position_ids"):
        LocalSampler(build("bloom"))
    with pytest.raises(NotLocal, match="attention of 2 layers cannot be replaced"):
        LocalSampler(build("gpt_neo"))
    with pytest.raises(NotLocal, match="encoder-decoder"):
        LocalSampler(build("t5"))


def test_bfloat16_is_sampled_locally():
    model = build("llama").to(torch.bfloat16)
    prompts = random_prompts(*LENGTHS)
    completions = LocalSampler(model).sample(prompts, SamplingParams(max_new_tokens=8, seed=0), n=4)
    assert all(len(c.ids) >= 1 for group in completions for c in group)
    assert all(c.logprobs == pytest.approx(c.raw_logprobs, abs=1e-6) for group in completions for c in group)
