"""Recorded log-probabilities are those of a plain forward over the finished text: the raw and the sampled ones."""

import math

import pytest
import torch
from sampled_models import LOCAL, build, next_logits, random_prompts, raw_logprobs

from trl.generation import LocalSampler, SamplingParams, TransformersSampler

TOLERANCE = 1e-5


def close(recorded: list[float], expected: torch.Tensor) -> bool:
    return bool((torch.tensor(recorded) - expected).abs().max() < TOLERANCE)


@pytest.mark.parametrize("name", LOCAL)
def test_raw_logprobs_of_every_architecture(name):
    model = build(name)
    prompts = random_prompts(9, 1, 5, 14)
    params = SamplingParams(max_new_tokens=16, seed=1, stop_token_ids=(2, 3, 4, 5))
    for prompt, group in zip(prompts, LocalSampler(model, max_rows=7).sample(prompts, params, n=4), strict=True):
        for completion in group:
            assert close(completion.raw_logprobs, raw_logprobs(model, prompt, completion.ids))
            assert completion.logprobs == pytest.approx(completion.raw_logprobs, abs=TOLERANCE)


def test_bart_counts_no_start_token():
    model = build("bart")
    prompt = random_prompts(7)[0]
    params = SamplingParams(max_new_tokens=9, seed=0, stop_token_ids=(), temperature=0.7)
    completion = TransformersSampler(model).sample([prompt], params)[0][0]
    decoder_ids = torch.tensor([[2, *completion.ids[:-1]]])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_ids).logits[0]
    target = torch.tensor(completion.ids)[:, None]
    assert close(completion.raw_logprobs, logits.log_softmax(-1).gather(1, target).squeeze(1))
    assert close(completion.logprobs, (logits / 0.7).log_softmax(-1).gather(1, target).squeeze(1))


@pytest.mark.parametrize("engine", [LocalSampler, TransformersSampler])
def test_logprobs_of_the_sampled_distribution(engine):
    """Against the processors of transformers, applied in its order to a plain forward."""
    from transformers import (
        MinNewTokensLengthLogitsProcessor,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    model = build("llama")
    prompts = random_prompts(6, 11)
    params = SamplingParams(
        max_new_tokens=8, temperature=0.6, top_k=30, top_p=0.9, min_p=0.02, repetition_penalty=1.3, min_new_tokens=4,
        seed=5, stop_token_ids=(7,),
    )  # fmt: skip
    for prompt, group in zip(prompts, engine(model).sample(prompts, params, n=3), strict=True):
        processors = [
            RepetitionPenaltyLogitsProcessor(1.3), MinNewTokensLengthLogitsProcessor(len(prompt), 4, 7, device="cpu"),
            TemperatureLogitsWarper(0.6), TopKLogitsWarper(30), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02),
        ]  # fmt: skip
        for completion in group:
            for step, token in enumerate(completion.ids):
                text = prompt + completion.ids[:step]
                scores = next_logits(model, text)[None]
                for process in processors:
                    scores = process(torch.tensor([text]), scores)
                expected = float(scores.log_softmax(-1)[0, token])
                assert completion.logprobs[step] == pytest.approx(expected, abs=TOLERANCE)
            assert close(completion.raw_logprobs, raw_logprobs(model, prompt, completion.ids))


def test_greedy_is_a_point_mass_and_keeps_the_models_own():
    model = build("llama")
    prompt = random_prompts(5)[0]
    params = SamplingParams(max_new_tokens=6, temperature=0.0, stop_token_ids=())
    completion = LocalSampler(model).sample([prompt], params)[0][0]
    assert completion.logprobs == [0.0] * 6
    assert close(completion.raw_logprobs, raw_logprobs(model, prompt, completion.ids))


def test_logits_that_are_not_finite_raise():
    model = build("llama")
    sampler = LocalSampler(model)
    model.lm_head.weight.data[3] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        sampler.sample(random_prompts(4), SamplingParams(max_new_tokens=2, seed=0))
