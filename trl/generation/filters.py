"""The filters that turn a model's logits into the distribution that is sampled; and drawing from it.

All of them are vectorised over rows, and agree with the processors of `transformers` of the same name.
"""

import torch
from torch import Tensor

from trl.generation.sampler import SamplingParams

_CHUNK = 256
_NUCLEI = (256, 2048)


def filter_logits(
    logits_RV: Tensor, params: SamplingParams, seen_RV: Tensor | None, forbidden_RV: Tensor | None
) -> Tensor:
    """Logits of the distribution that is sampled: filtered tokens get -inf. `logits_RV` is not changed.

    seen_RV: True for tokens of the row's prompt and completion (needed with a repetition penalty).
    forbidden_RV: True for tokens that must not be sampled now, or None.
    """
    if params.repetition_penalty != 1.0:
        if seen_RV is None:
            raise ValueError("seen_RV=None: a repetition penalty needs the tokens that have been seen")
        logits_RV = penalize_seen(logits_RV, seen_RV, params.repetition_penalty)
    if forbidden_RV is not None:
        logits_RV = logits_RV.masked_fill(forbidden_RV, -torch.inf)
    if params.temperature not in (0.0, 1.0):
        logits_RV = logits_RV / params.temperature
    if params.top_k:
        logits_RV = keep_top_k(logits_RV, params.top_k)
    if params.top_p < 1.0:
        logits_RV = keep_top_p(logits_RV, params.top_p)
    if params.min_p:
        logits_RV = keep_min_p(logits_RV, params.min_p)
    return logits_RV


def penalize_seen(logits_RV: Tensor, seen_RV: Tensor, penalty: float) -> Tensor:
    """CTRL's repetition penalty (arXiv:1909.05858, section 4.1): negative logits are multiplied, others divided."""
    return torch.where(seen_RV, torch.where(logits_RV < 0, logits_RV * penalty, logits_RV / penalty), logits_RV)


def keep_top_k(logits_RV: Tensor, k: int) -> Tensor:
    """The k highest logits of each row, and those equal to the k-th."""
    if k >= logits_RV.shape[-1]:
        return logits_RV
    kth_R1 = logits_RV.topk(k, dim=-1).values[:, -1:]
    return logits_RV.masked_fill(logits_RV < kth_R1, -torch.inf)


def keep_top_p(logits_RV: Tensor, p: float) -> Tensor:
    """The smallest set of most probable tokens that reaches probability p (arXiv:1904.09751): a token stays if those
    before it do not reach p yet."""
    probs_RV = logits_RV.softmax(-1)
    if probs_RV.device.type != "cpu":  # to ask whether a narrower search has found it all would wait for the device
        return logits_RV.masked_fill(beyond_nucleus(probs_RV, p), -torch.inf)
    keep_RV = torch.zeros_like(probs_RV, dtype=torch.bool)
    rows_A = torch.arange(len(probs_RV), device=probs_RV.device)
    vocab = probs_RV.shape[-1]
    for width in (
        *(width for width in _NUCLEI if width < vocab),
        vocab,
    ):  # sorting whole rows costs more than the model
        top_AK, index_AK = probs_RV[rows_A].topk(width, dim=-1)
        reached_AK = top_AK.cumsum(-1)
        keep_RV[rows_A] = keep_RV[rows_A].scatter(1, index_AK, reached_AK - top_AK < p)
        rows_A = rows_A[reached_AK[:, -1] < p]
        if not len(rows_A):
            break
    return logits_RV.masked_fill(~keep_RV, -torch.inf)


def beyond_nucleus(probs_RV: Tensor, p: float) -> Tensor:
    """True for tokens whose row reaches p without them, by sorting whole rows. [R, V]"""
    top_RV, index_RV = probs_RV.sort(dim=-1, descending=True, stable=True)
    before_RV = top_RV.cumsum(-1) - top_RV
    return torch.empty_like(before_RV, dtype=torch.bool).scatter_(1, index_RV, before_RV >= p)


def keep_min_p(logits_RV: Tensor, p: float) -> Tensor:
    """Tokens at least p times as probable as the row's most probable one (arXiv:2407.01082)."""
    probs_RV = logits_RV.softmax(-1)
    return logits_RV.masked_fill(probs_RV < p * probs_RV.amax(-1, keepdim=True), -torch.inf)


def log_partition(scores: Tensor, probs: Tensor) -> Tensor:
    """log sum exp over the last dimension of `scores`; `probs` is their softmax.

    It follows from the largest entry of each, which is several times cheaper than `torch.logsumexp`.
    """
    return scores.amax(-1) - _exact_log(probs.amax(-1), probs)


def logprobs_of(tokens_R: Tensor, probs_RV: Tensor) -> Tensor:
    """log p of a token in each row. [R]"""
    return _exact_log(probs_RV.gather(1, tokens_R[:, None]).squeeze(1), probs_RV)


def _exact_log(some: Tensor, probs: Tensor) -> Tensor:
    """log of `some` of the probabilities, divided by their sum: in a large vocabulary `softmax` is off by 1e-5."""
    return (some / probs.sum(-1)).log()


def inverse_cdf(probs_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The token at which each row's cumulated probability passes its uniform number; never a token of probability 0.

    It searches the sums of chunks of 256 tokens, then one chunk, and so needs no cumulated sum over the vocabulary.
    """
    vocab = probs_RV.shape[-1]
    whole = vocab // _CHUNK * _CHUNK
    sums = [probs_RV[:, :whole].view(len(probs_RV), -1, _CHUNK).sum(-1)] if whole else []
    if whole < vocab:
        sums.append(probs_RV[:, whole:].sum(-1, keepdim=True))
    wide = torch.float32 if probs_RV.device.type == "mps" else torch.float64
    reached_RC = torch.cat(sums, 1).to(wide).cumsum(-1)
    target_R1 = _below(uniform_R[:, None].to(wide) * reached_RC[:, -1:], reached_RC)
    chunk_R1 = torch.searchsorted(reached_RC, target_R1, right=True)
    before_R1 = torch.where(chunk_R1 > 0, reached_RC.gather(1, (chunk_R1 - 1).clamp(min=0)), 0.0)
    token_RK = chunk_R1 * _CHUNK + torch.arange(_CHUNK, device=probs_RV.device)
    inside_RK = probs_RV.gather(1, token_RK.clamp(max=vocab - 1)).masked_fill(token_RK >= vocab, 0.0)
    reached_RK = inside_RK.to(wide).cumsum(-1)
    place_R1 = torch.searchsorted(reached_RK, _below(target_R1 - before_R1, reached_RK), right=True)
    return (chunk_R1 * _CHUNK + place_R1).squeeze(1).clamp(max=vocab - 1)  # NaN points beyond the vocabulary


def _below(target_R1: Tensor, reached_RC: Tensor) -> Tensor:
    """The target, but below the total where rounding has made it equal or larger."""
    total_R1 = reached_RC[:, -1:]
    return torch.minimum(target_R1, torch.nextafter(total_R1, torch.zeros_like(total_R1)))
