"""Wrong values are refused by name, with the way out."""

import pytest
from sampled_models import build, random_prompts

from trl.generation import LocalSampler, SamplingParams, TransformersSampler


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("min_new_tokens", 9),
        ("stop_strings", "stop"),
        ("stop_strings", ("",)),
    ],
)
def test_wrong_values(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}".replace("(", r"\(").replace(")", r"\)")):
        SamplingParams(**{"max_new_tokens": 8, field: value})


def test_filters_have_no_effect_on_greedy():
    with pytest.raises(ValueError, match=r"temperature=0 .* top_k=5"):
        SamplingParams(max_new_tokens=8, temperature=0, top_k=5)


@pytest.mark.parametrize("engine", [LocalSampler, TransformersSampler])
def test_prompts_that_cannot_be_continued(engine):
    sampler = engine(build("llama"))
    params = SamplingParams(max_new_tokens=8)
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        sampler.sample([[3], []], params)
    with pytest.raises(ValueError, match=r"prompts\[0\] has 64 tokens, the model's context 64"):
        sampler.sample(random_prompts(64), params)
    with pytest.raises(ValueError, match="n=0"):
        sampler.sample([[3]], params, n=0)
    with pytest.raises(ValueError, match="tokenizer"):
        sampler.sample([[3]], SamplingParams(max_new_tokens=8, stop_strings=("x",)))
    with pytest.raises(ValueError, match="seed holds 2 numbers for 1 prompts"):
        sampler.sample([[3]], SamplingParams(max_new_tokens=8, seed=(1, 2)))


@pytest.mark.parametrize("engine", [LocalSampler, TransformersSampler])
def test_the_context_cuts(engine):
    sampler = engine(build("gpt2"))
    params = SamplingParams(max_new_tokens=20, stop_token_ids=(), seed=0)
    long, short = sampler.sample(random_prompts(54, 4), params)
    assert len(long[0].ids) == 10
    assert len(short[0].ids) == 20
    assert {long[0].finish_reason, short[0].finish_reason} == {"length"}


def test_no_prompts():
    assert LocalSampler(build("llama")).sample([], SamplingParams(max_new_tokens=2)) == []
