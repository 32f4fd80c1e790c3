"""From responses and their scores to what PPO learns from: log-probabilities, values, rewards, advantages, returns.

Shape letters: B responses, T tokens of the longest one. Masks: 1 = the policy chose this token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trl.data.microbatches import balanced_pieces
from trl.data.packing import pack
from trl.data.records import Branch, PackedBatch
from trl.losses.advantages import generalized_advantages, whiten
from trl.losses.kl import KL_PENALTIES, full
from trl.losses.loss_sum import LossSum
from trl.models.forward import in_head, scored_states, within_forward
from trl.models.head import Head, chunk_rows
from trl.models.reference import Reference
from trl.models.scoring import Scores, score, scores_at
from trl.rollout.loader import prompt_trees

PACKED_TOKENS = 4096
"""tokens that a pass without gradient takes at a time, if that is more than the minibatch"""


@dataclass(frozen=True, slots=True)
class Sample:
    """A response, the query that it answers, and which of its tokens the policy chose."""

    query: list[int]
    response: list[int]
    mask: list[int]

    @property
    def tokens(self) -> int:
        return len(self.query) + len(self.response)


def pack_samples(samples: Sequence[Sample]) -> PackedBatch:
    """The samples in order; equal queries that follow each other are computed once."""
    branches = [Branch(sample.response, sample.mask) for sample in samples]
    return pack(prompt_trees([sample.query for sample in samples], branches))


@dataclass(frozen=True)
class ActorCritic:
    """Who says what a token's log-probability is, and who what it is worth."""

    model: nn.Module
    value_model: nn.Module | None = None
    """a model with a score head; None: the policy's own value head"""
    temperature: float = 1.0

    @property
    def models(self) -> list[nn.Module]:
        return [self.model] if self.value_model is None else [self.model, self.value_model]

    def __call__(self, packed: PackedBatch, *, entropy: bool = False) -> Scores:
        """Log-probabilities and values of the scored tokens; a value is read where its token is predicted."""
        own = self.value_model is None
        scores = score(self.model, packed, temperature=self.temperature, entropy=entropy, values=own)
        if own:
            return scores
        values_S = scores_at(self.value_model, packed, packed.scored_S, packed.row_S)[:, 0]  # type: ignore[arg-type]
        return Scores(scores.logprobs_BT, scores.entropy_BT, packed.spread(values_S))

    def within_forward(self, function: Callable[[ActorCritic], LossSum]) -> LossSum:
        """`function` of these models below their wrappers, run as if it were the forward of each."""

        def below(policy: nn.Module) -> LossSum:
            if self.value_model is None:
                return function(replace(self, model=policy))
            return within_forward(
                self.value_model, lambda critic: function(replace(self, model=policy, value_model=critic))
            )

        return within_forward(self.model, below)


@dataclass(frozen=True)
class Measured:
    """What the models say of a batch of samples before the update. All [B, T], 0 where `mask_BT` is."""

    mask_BT: Tensor
    logprobs_BT: Tensor
    values_BT: Tensor
    reference_BT: Tensor
    kl_BT: Tensor
    """the penalised KL"""


@dataclass(frozen=True)
class PPOBatch:
    """Samples and what to learn from each of their tokens. Tensors are [B, T], 0 where `mask_BT` is."""

    samples: Sequence[Sample]
    mask_BT: Tensor
    old_logprobs_BT: Tensor
    old_values_BT: Tensor
    advantages_BT: Tensor
    returns_BT: Tensor

    def select(self, rows: Sequence[int]) -> PPOBatch:
        """The batch of these rows, as wide as their longest response."""
        samples = [self.samples[row] for row in rows]
        width = max((len(sample.response) for sample in samples), default=0)
        index = torch.as_tensor(list(rows), dtype=torch.long, device=self.mask_BT.device)
        columns = (self.mask_BT, self.old_logprobs_BT, self.old_values_BT, self.advantages_BT, self.returns_BT)
        return PPOBatch(samples, *(column[index, :width] for column in columns))

    def cut(self, parts: Sequence[Sequence[int]], tokens: int | None) -> list[PPOBatch]:
        """Micro-batches of these rows, part by part; those of more `tokens` in several, equally full."""
        if tokens is None:
            return [self.select(part) for part in parts]
        lengths = [[self.samples[row].tokens for row in part] for part in parts]
        return [
            self.select([part[at] for at in piece])
            for part, own in zip(parts, lengths, strict=True)
            for piece in balanced_pieces(own, tokens)
        ]


def pieces(samples: Sequence[Sample], rows: int, tokens: int = PACKED_TOKENS) -> Iterator[Sequence[Sample]]:
    """Runs of at least `rows` samples (the last may be shorter); more while they take at most `tokens` when padded."""
    start = width = 0
    for end, sample in enumerate(samples):
        if end - start >= rows and (end - start + 1) * max(width, sample.tokens) > tokens:
            yield samples[start:end]
            start, width = end, 0
        width = max(width, sample.tokens)
    if start < len(samples):
        yield samples[start:]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """[b, t] tensors under each other, padded with 0 to the widest."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


@torch.no_grad()
def measure(
    actor: ActorCritic,
    reference: Reference,
    samples: Sequence[Sample],
    *,
    kl_penalty: str,
    rows: int,
    tokens: int,
    device: Any,
) -> Measured:
    """One pass of the policy and one of the reference over the samples, in pieces; the full KL takes two more."""
    columns: list[tuple[Tensor, ...]] = []
    for piece in pieces(samples, rows, tokens):
        packed = pack_samples(piece).to(device)
        scores = actor(packed)
        with reference.model() as model:
            assert model is not None
            reference_BT = score(model, packed, temperature=actor.temperature).logprobs_BT
        if kl_penalty == "full":
            kl_BT = full_kl(actor, reference, packed)
        else:
            kl_BT = KL_PENALTIES[kl_penalty](scores.logprobs_BT, reference_BT)
        columns.append((packed.mask_BT, scores.logprobs_BT, scores.values_BT, reference_BT, kl_BT))  # type: ignore[arg-type]
    return Measured(*(_joined(parts) for parts in zip(*columns, strict=True)))


@torch.no_grad()
def full_kl(actor: ActorCritic, reference: Reference, packed: PackedBatch) -> Tensor:
    """KL(policy || reference) over the vocabulary at each scored token, [B, T]; a chunk of logits exists at a time."""
    with reference.model() as model:
        assert model is not None
        reference_head, reference_SD = scored_states(model, packed)

    def measure_kl(head: Head, states_SD: Tensor) -> Tensor:
        other = head if reference_head.module is head.module else reference_head
        rows, chunks = chunk_rows(head.vocabulary), []
        for ours, theirs in zip(states_SD.split(rows), reference_SD.split(rows), strict=True):
            logprobs_SV = (head.logits(ours) / actor.temperature).log_softmax(-1)
            with reference.model():  # an adapter may sit on the head itself
                reference_SV = (other.logits(theirs) / actor.temperature).log_softmax(-1)
            chunks.append(full(logprobs_SV, reference_SV))
        return torch.cat(chunks) if chunks else states_SD.new_zeros(0)

    return packed.spread(*in_head(actor.model, packed, measure_kl))


def get_global_statistics(
    accelerator: Any, xs: Tensor, mask: Tensor | None = None, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """`(mean, population variance, count)` over the processes of what `mask` (1 = counts) lets through. [], [], []"""
    xs = xs.to(accelerator.device).float()
    weight = torch.ones_like(xs) if mask is None else mask.to(xs)
    total, count = accelerator.reduce(torch.stack([(xs * weight).sum(), weight.sum()]))
    mean = total / count
    variance = accelerator.reduce(((xs - mean) ** 2 * weight).sum()) / count
    return mean.to(device), variance.to(device), count.to(device)


def whitened(accelerator: Any, values_BT: Tensor, mask_BT: Tensor, shift_mean: bool = True) -> Tensor:
    """Values of unbiased variance 1 and, if `shift_mean`, mean 0; statistics of what counts, over all processes.

    A single value has no spread: it becomes its distance from the mean, 0.
    """
    mean, variance, count = get_global_statistics(accelerator, values_BT, mask_BT, device=values_BT.device)
    if count < 1:
        raise ValueError("no token of the batch counts: all responses are empty or masked out")
    return whiten(values_BT, (mean, variance, count), shift_mean=shift_mean)


def steps_of(mask_BT: Tensor) -> Tensor:
    """1 but in holes: positions that do not count, between some that do (the text of a tool, say). [B, T]"""
    counts_BT = (mask_BT > 0).long()
    begun, to_come = counts_BT.cumsum(1) > 0, counts_BT.flip(1).cumsum(1).flip(1) > 0
    return (counts_BT.bool() | ~(begun & to_come)).to(mask_BT.dtype)


def advantages(
    accelerator: Any,
    values_BT: Tensor,
    rewards_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float,
    whiten_rewards: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(masked values, whitened advantages, returns), [B, T] each. GAE passes over holes in the mask."""
    values_BT = values_BT * mask_BT
    if whiten_rewards:
        rewards_BT = whitened(accelerator, rewards_BT, mask_BT, shift_mean=False)
    gae_BT = generalized_advantages(rewards_BT * mask_BT, values_BT, gamma, lam, steps_of(mask_BT))
    return values_BT, whitened(accelerator, gae_BT, mask_BT).detach(), gae_BT + values_BT


def ppo_batch(
    accelerator: Any,
    samples: Sequence[Sample],
    measured: Measured,
    rewards_BT: Tensor,
    *,
    gamma: float,
    lam: float,
    whiten_rewards: bool,
) -> PPOBatch:
    """What to learn from the samples, given the reward of each token."""
    mask_BT = measured.mask_BT
    values_BT, advantages_BT, returns_BT = advantages(
        accelerator, measured.values_BT, rewards_BT, mask_BT, gamma=gamma, lam=lam, whiten_rewards=whiten_rewards
    )
    return PPOBatch(samples, mask_BT, measured.logprobs_BT, values_BT, advantages_BT * mask_BT, returns_BT * mask_BT)
