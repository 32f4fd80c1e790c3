"""Each filter against distributions worked out by hand, the processors of transformers, and sampled frequencies."""

import pytest
import torch
from sampled_models import build, next_logits, random_prompts
from scipy.stats import chi2

from trl.generation import LocalSampler, SamplingParams
from trl.generation.filters import (
    beyond_nucleus,
    filter_logits,
    inverse_cdf,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    log_partition,
    logprobs_of,
    penalize_seen,
)


def logits_of(*probs: float) -> torch.Tensor:
    return torch.tensor([probs]).log()


def probs_of(logits: torch.Tensor) -> list[float]:
    return logits.softmax(-1)[0].tolist()


def test_top_k_by_hand():
    assert probs_of(keep_top_k(logits_of(0.4, 0.1, 0.3, 0.2), 2)) == pytest.approx([4 / 7, 0, 3 / 7, 0])
    assert probs_of(keep_top_k(logits_of(0.25, 0.25, 0.5), 2)) == pytest.approx([0.25, 0.25, 0.5])  # ties stay


def test_top_p_by_hand():
    """A token stays while those before it have not reached p: .4, then .3 (.4 < .5), not .2 (.7 >= .5)."""
    assert probs_of(keep_top_p(logits_of(0.4, 0.1, 0.3, 0.2), 0.5)) == pytest.approx([4 / 7, 0, 3 / 7, 0])
    assert probs_of(keep_top_p(logits_of(0.4, 0.1, 0.3, 0.2), 0.01)) == pytest.approx([1, 0, 0, 0])


def test_min_p_by_hand():
    assert probs_of(keep_min_p(logits_of(0.5, 0.05, 0.25, 0.2), 0.45)) == pytest.approx([2 / 3, 0, 1 / 3, 0])


def test_repetition_penalty_by_hand():
    seen = torch.tensor([[True, True, False]])
    assert penalize_seen(torch.tensor([[2.0, -2.0, 2.0]]), seen, 4.0).tolist() == [[0.5, -8.0, 2.0]]


def test_top_p_of_flat_and_of_sharp_rows_equals_transformers():
    """Flat rows need more than the first few hundred tokens, and are widened; sharp ones are not."""
    from transformers import TopPLogitsWarper

    torch.manual_seed(1)
    logits = torch.randn(4, 3000) * torch.tensor([0.1, 1.0, 4.0, 12.0])[:, None]
    for p in (0.3, 0.9, 0.999):
        expected = TopPLogitsWarper(p)(torch.zeros(4, 1, dtype=torch.long), logits.clone())
        ours = keep_top_p(logits, p)
        different = (torch.isinf(ours) != torch.isinf(expected)).sum(-1)
        assert int(different.max()) <= 1  # the one at the edge, where sums round differently
        torch.testing.assert_close(ours.softmax(-1), expected.softmax(-1), rtol=0.01, atol=1e-5)


def test_filter_logits_leaves_its_argument():
    logits = torch.randn(2, 10)
    kept = logits.clone()
    params = SamplingParams(max_new_tokens=1, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1)
    filter_logits(logits, params, None, None)
    assert torch.equal(logits, kept)


def test_log_partition():
    scores = torch.randn(3, 50) * 20
    torch.testing.assert_close(log_partition(scores, scores.softmax(-1)), scores.logsumexp(-1))


@pytest.mark.parametrize("vocab", [3, 256, 257, 700])
def test_inverse_cdf_is_the_cumulated_sum(vocab):
    torch.manual_seed(0)
    probs = (torch.randn(64, vocab) * 3).softmax(-1)
    uniform = torch.rand(64, dtype=torch.float64)
    cumulated = probs.double().cumsum(-1) / probs.double().sum(-1, keepdim=True)
    expected = torch.searchsorted(cumulated, uniform[:, None], right=True).squeeze(1)
    assert torch.equal(inverse_cdf(probs, uniform), expected)


@pytest.mark.parametrize("vocab", [5, 600])
def test_inverse_cdf_never_picks_the_impossible(vocab):
    probs = torch.zeros(4, vocab)
    probs[0, 0] = probs[1, vocab // 2] = probs[2, vocab - 2] = 1.0
    probs[3, 1] = probs[3, vocab - 2] = 0.5
    for uniform in (0.0, 0.5, 1 - 2**-53):
        picked = inverse_cdf(probs, torch.full((4,), uniform, dtype=torch.float64))
        assert (probs.gather(1, picked[:, None]) > 0).all()


FILTERS = {
    "plain": {},
    "temperature": {"temperature": 0.5},
    "hot": {"temperature": 2.0},
    "top_k": {"top_k": 8},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "penalty": {"repetition_penalty": 1.8},
    "all": {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("name", FILTERS)
def test_sampled_frequencies(name):
    """Pearson's chi-square of 4,000 first and second tokens against the exact distributions; no token outside them."""
    model = build("llama", scale=0.05)
    prompt = random_prompts(6)[0]
    params = SamplingParams(max_new_tokens=2, seed=11, stop_token_ids=(), **FILTERS[name])
    completions = LocalSampler(model, max_rows=4000).sample([prompt], params, n=4000)[0]
    check_frequencies(model, prompt, params, [c.ids[0] for c in completions])
    firsts = torch.tensor([c.ids[0] for c in completions])
    common = int(firsts.mode().values)
    check_frequencies(model, [*prompt, common], params, [c.ids[1] for c in completions if c.ids[0] == common])


def check_frequencies(model, text: list[int], params: SamplingParams, tokens: list[int]) -> None:
    logits = next_logits(model, text)[None]
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[0, torch.tensor(text)] = True
    expected = filter_logits(logits, params, seen, None).double().softmax(-1)[0] * len(tokens)
    observed = torch.bincount(torch.tensor(tokens), minlength=len(expected)).double()
    assert not observed[expected == 0].any()
    large = expected >= 5
    cells = [((observed - expected) ** 2 / expected)[large]]
    rest = expected[~large].sum()
    if rest >= 5:
        cells.append(((observed[~large].sum() - rest) ** 2 / rest)[None])
    statistic = torch.cat(cells)
    if len(statistic) > 1:
        assert float(statistic.sum()) < chi2.ppf(1 - 1e-4, len(statistic) - 1)


def test_min_new_tokens_forbids_the_end():
    model = build("llama")
    params = SamplingParams(max_new_tokens=6, min_new_tokens=4, seed=0, stop_token_ids=tuple(range(3, 60)))
    completions = LocalSampler(model).sample(random_prompts(5, 3), params, n=20)
    lengths = [len(c.ids) for group in completions for c in group]
    assert min(lengths) >= 4
    assert all(token not in range(3, 60) for group in completions for c in group for token in c.ids[:4])


@pytest.mark.parametrize("vocabulary", [60, 151_936])
def test_log_probabilities_are_exact_in_large_vocabularies(vocabulary):
    """A float32 softmax alone is 1e-5 off, which would show in the ratio of a first update."""
    logits_RV = 5 * torch.randn(16, vocabulary, generator=torch.Generator().manual_seed(0))
    probs_RV = logits_RV.softmax(-1)
    tokens_R = probs_RV.multinomial(1).squeeze(1)
    exact_R = logits_RV.double().log_softmax(-1).gather(1, tokens_R[:, None]).squeeze(1)
    assert (logprobs_of(tokens_R, probs_RV) - exact_R).abs().max() < 3e-6
    assert (log_partition(logits_RV, probs_RV) - logits_RV.double().logsumexp(-1)).abs().max() < 5e-6


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_sorting_whole_rows_finds_the_same_nucleus(p):
    logits = 3 * torch.randn(20, 700, generator=torch.Generator().manual_seed(1))
    assert torch.equal(beyond_nucleus(logits.softmax(-1), p), keep_top_p(logits, p).isneginf())
