"""What a real vLLM samples: its log-probabilities, its distribution under each filter, its seeds, its stops."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from servers import tiny_llama, tokenizer

from trl.generation import SamplingParams
from trl.generation.vllm.client import ServerEngine
from trl.generation.vllm.engine import EngineError, Request
from trl.generation.vllm.sampler import VLLMSampler

PROMPTS = [[4, 5, 6], [31, 7], [9, 9, 9, 40, 12], [60]]
DRAWS = 4096


@pytest.fixture
def sampler(server):
    made = VLLMSampler(ServerEngine(server.url), None, tokenizer(), model=tiny_llama())
    yield made
    made.close()


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def logprobs(model, prompt, ids, temperature=1.0):
    """By the forward pass of transformers. [T, V]"""
    with torch.no_grad():
        logits_NV = model(torch.tensor([[*prompt, *ids]])).logits[0].double() / temperature
    return logits_NV[len(prompt) - 1 : len(prompt) + len(ids) - 1].log_softmax(-1)


# -- log-probabilities -------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_the_forward_pass(temperature, sampler, model):
    params = SamplingParams(48, temperature=temperature, stop_token_ids=(), seed=3)
    for prompt, group in zip(PROMPTS, sampler.sample(PROMPTS, params, n=3), strict=True):
        assert len(group) == 3
        for made in group:
            assert (len(made.ids), made.finish_reason) == (48, "length")
            own_T = logprobs(model, prompt, made.ids, temperature)[range(48), made.ids]
            apart_T = (own_T - torch.tensor(made.logprobs)).abs() * temperature
            assert (apart_T.mean() < 1e-6, apart_T.max() < 5e-6) == (True, True)
            assert {span.version for span in made.versions} == {"default"}


def test_greedy_takes_the_most_probable_token(sampler, model):
    (group,) = sampler.sample([[4, 5, 6]], SamplingParams(12, temperature=0.0, stop_token_ids=()), n=2)
    best = logprobs(model, [4, 5, 6], group[0].ids).argmax(-1).tolist()
    assert [made.ids for made in group] == [best, best]


def test_texts_that_were_not_sampled_are_scored(sampler, model):
    """With the whole vocabulary: what a served teacher says."""
    rows = [[4, 5, 6, 7], [31, 60, 2]]
    for row, found in zip(rows, sampler.engine.prompt_logprobs(rows, top=-1), strict=True):
        own_TV = logprobs(model, row[:1], row[1:])
        theirs_TV = torch.tensor([[entry[token] for token in range(100)] for entry in found])
        assert (own_TV - theirs_TV).abs().max() < 5e-6  # the least likely of them have -20


# -- distributions -----------------------------------------------------------------------------


def filtered(probs, *, top_k=0, min_p=0.0, top_p=1.0):
    """Each filter by its definition; vLLM cuts by min-p first, then by top-k, then by top-p of what is left."""
    kept = probs * (probs >= min_p * probs.max())
    order = np.argsort(-kept, kind="stable")
    if top_k:
        kept[order[top_k:]] = 0
    kept /= kept.sum()
    before = np.concatenate([[0.0], np.cumsum(kept[order])[:-1]])
    kept[order[before >= top_p]] = 0
    return kept / kept.sum()


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"temperature": 0.6}, {"temperature": 1.4}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.15},
        {"temperature": 1.2, "top_k": 20, "top_p": 0.8}, {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_frequencies_are_those_of_the_exact_distribution(settings, sampler, model):
    prompt, rest = [9, 40, 12], {key: value for key, value in settings.items() if key != "temperature"}
    plain = logprobs(model, prompt, [0], settings.get("temperature", 1.0))[0].exp().numpy()
    exact = filtered(plain, **rest)
    (group,) = sampler.sample([prompt], SamplingParams(1, stop_token_ids=(), seed=11, **settings), n=DRAWS)
    tokens = [made.ids[0] for made in group]
    said = np.array([made.logprobs[0] for made in group])
    assert np.abs(said - np.log(exact[tokens])).max() < 3e-6  # infinite where a token should have been cut
    counts = np.bincount(tokens, minlength=100)
    assert p_value(counts, exact) > 1e-3
    if settings:  # so many draws would find it
        assert p_value(counts, logprobs(model, prompt, [0])[0].exp().numpy()) < 1e-9


def p_value(counts, exact):
    """Of a chi-square test; tokens that are expected less than 5 times are one class."""
    rare = exact * DRAWS < 5
    found = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(exact[~rare], exact[rare].sum()) * DRAWS
    kept = wanted > 0
    if found[~kept].any():
        return 0.0
    return chisquare(found[kept], wanted[kept]).pvalue


# -- seeds, stops, refusals --------------------------------------------------------------------


def test_a_row_does_not_depend_on_the_others(sampler):
    params = SamplingParams(16, seed=(1, 2, 3, 2), stop_token_ids=())
    together = sampler.sample(PROMPTS, params, n=3)
    for place in (3, 0, 2, 1):
        one = SamplingParams(16, seed=params.seed[place], stop_token_ids=())
        assert [made.ids for made in sampler.sample([PROMPTS[place]], one, n=3)[0]] == [
            made.ids for made in together[place]
        ]
    assert len({tuple(made.ids) for group in together for made in group}) == 12
    twice = sampler.sample([[4], [4]], SamplingParams(16, seed=1, stop_token_ids=()), n=1)
    assert twice[0][0].ids != twice[1][0].ids  # the second copy of one prompt


def test_many_long_prompts_at_once(sampler):
    """More tokens than vLLM reads in a step; on a CPU it ends where it reads a prompt in parts."""
    rows = [[4 + (7 * row + place) % 90 for place in range(240)] for row in range(64)]
    groups = sampler.sample(rows, SamplingParams(4, seed=3, stop_token_ids=()), n=2)
    assert {len(made.ids) for group in groups for made in group} == {4}


def test_end_tokens_and_stop_strings_end_a_row_and_belong_to_it(sampler):
    free = [made.ids for made in sampler.sample([[4, 5]], SamplingParams(40, seed=5, stop_token_ids=()), n=4)[0]]
    ends = {ids[9] for ids in free}
    stopped = sampler.sample([[4, 5]], SamplingParams(40, seed=5, stop_token_ids=tuple(ends)), n=4)[0]
    for ids, made in zip(free, stopped, strict=True):
        end = next(place for place, token in enumerate(ids) if token in ends)
        assert (made.ids, made.finish_reason) == (ids[: end + 1], "stop")
    word = tokenizer().convert_ids_to_tokens(free[0][6])
    (made,) = sampler.sample([[4, 5]], SamplingParams(40, seed=5, stop_token_ids=(), stop_strings=(word,)))[0]
    first = next(place for place in range(40) if word in tokenizer().decode(free[0][: place + 1]))
    assert (made.ids, made.finish_reason) == (free[0][: first + 1], "stop")


def test_refusals_are_named(sampler):
    with pytest.raises(EngineError, match="Token id 500 is out of vocabulary"):
        sampler.engine.generate([Request([4, 500], {"max_tokens": 1})])
    with pytest.raises(EngineError, match="nobody"):
        sampler.engine.generate([Request([4], {"max_tokens": 1}, "nobody")])
    assert sampler.about.release == "0.32.0"
    assert sampler.about.max_model_len == 256
    assert sampler.engine.tokenized("a b sky") == [4, 5, 31]
