"""What models say of the tokens of a rollout, and what an actor-critic learns from that: advantages and returns.

Shape letters: B responses, T tokens of the longest one, S scored tokens, V vocabulary. Masks: 1 = the policy chose
this token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trl.data.records import PackedBatch
from trl.losses.advantages import generalized_advantages, whiten
from trl.losses.kl import KL_PENALTIES, full
from trl.losses.loss_sum import LossSum, Measure
from trl.models.forward import in_pass, within_forward
from trl.models.precision import TOLERANCES
from trl.models.reference import Reference
from trl.models.scoring import Head, Scores, chunk_rows, in_head, score, scored_states, scores_at
from trl.rollout.experience import Experience, joined

PACKED_TOKENS = 4096
"""tokens that a pass without gradient takes at a time, if that is more than the minibatch"""


def pieces(experience: Experience, rows: int, tokens: int = 0) -> Iterator[range]:
    """Runs of at least `rows` rows (the last may be shorter); more while they take at most `tokens` when padded."""
    lengths = [len(p) + len(c) for p, c in zip(experience.prompts, experience.completions, strict=True)]
    start = width = 0
    for end, length in enumerate(lengths):
        if end - start >= rows and (end - start + 1) * max(width, length) > tokens:
            yield range(start, end)
            start, width = end, 0
        width = max(width, length)
    if start < len(lengths):
        yield range(start, len(lengths))


@torch.no_grad()
def in_pieces(
    experience: Experience,
    runs: Iterator[range],
    ask: Callable[[PackedBatch], Sequence[Tensor]],
    device: Any,
    *,
    masked: bool = True,
) -> list[Tensor]:
    """What `ask` says of each token, one run of rows after the other, without gradient. [B, T] each

    masked: of the tokens that count only; else of all tokens of the completions.
    """
    columns = [tuple(ask(experience.select(run).packed(masked=masked).to(device))) for run in runs]
    return [joined(parts) for parts in zip(*columns, strict=True)]


def means_of(metrics: Mapping[str, Measure]) -> dict[str, Tensor]:
    """The mean of each metric that brings its own count."""
    pairs = {name: value for name, value in metrics.items() if isinstance(value, tuple)}
    return {name: total / torch.as_tensor(count).clamp(min=1) for name, (total, count) in pairs.items()}


FIRST_RATIOS = (
    ("sampling/importance_sampling_ratio/mean", "sampling/kl", "sampling/approx_kl"),
    ("ratio", "policy_kl", "approx_kl"),
)
"""ratio, KL and half the squared log-ratio, to the sampler and to the old policy: the first that an update reports"""


def check_first_ratio(means: Mapping[str, Tensor | float], precision: Callable[[], str]) -> None:
    """RuntimeError unless a first update starts from the policy that sampled: at ratio 1 and approx_kl 0.

    means: the update's metrics; an objective that reports none of `FIRST_RATIOS` is not checked. The ratio may be of
    whole sequences, so the tokens' mean log-ratio is judged, which is minus the KL.
    precision: in which the policy computes (`precision_of`); asked only of numbers that float32 would not give.
    """
    names = next((names for names in FIRST_RATIOS if means.keys() >= set(names)), None)
    if names is None:
        return
    ratio, policy_kl, approx_kl = (float(means[name]) for name in names)
    if not ratio:  # no token counts: all completions are empty or masked out
        return
    if not math.isfinite(policy_kl) or not math.isfinite(approx_kl):
        return  # the loop stops at that, and names the weights
    for tolerance in (lambda: "float32", precision):
        bound = TOLERANCES[tolerance()]
        if abs(policy_kl) <= bound.ratio and approx_kl <= bound.kl:
            return
    raise RuntimeError(
        f"at the first update the ratio is {ratio:.7f} and approx_kl {approx_kl:.1e}, where 1 and 0 are due: the "
        "policy must still be itself. Did a callback change its weights, was it another model that sampled, or is "
        "something in its forward pass random (noise on embeddings, a router, dropout in layers that gradient "
        "checkpointing keeps in training mode)?"
    )


@dataclass(frozen=True)
class ActorCritic:
    """The policy, which gives a token's log-probability, and the critic, which gives its value."""

    model: nn.Module
    value_model: nn.Module | None = None
    """a model with a score head; None: the policy's own value head"""
    temperature: float = 1.0
    engine: nn.Module | None = None
    """of DeepSpeed, where one holds both models"""

    @property
    def models(self) -> list[nn.Module]:
        return [self.model] if self.value_model is None else [self.model, self.value_model]

    @property
    def wrapped(self) -> list[nn.Module]:
        """What accelerate has prepared."""
        return self.models if self.engine is None else [self.engine]

    def __call__(self, packed: PackedBatch, *, entropy: bool = False) -> Scores:
        """Log-probabilities and values of the scored tokens; a value is read where its token is predicted."""
        own = self.value_model is None
        scores = score(self.model, packed, temperature=self.temperature, entropy=entropy, values=own)
        if own:
            return scores
        values_S = scores_at(self.value_model, packed, packed.scored_S, packed.row_S)[:, 0]  # type: ignore[arg-type]
        return Scores(scores.logprobs_BT, scores.entropy_BT, packed.spread(values_S))

    def within_forward(self, function: Callable[[ActorCritic], LossSum]) -> LossSum:
        """`function` of the models without their wrappers, run inside the wrappers' forward calls."""
        if self.engine is not None:
            return within_forward(self.engine, lambda both: function(self))

        def below(policy: nn.Module) -> LossSum:
            if self.value_model is None:
                return function(replace(self, model=policy))
            return within_forward(
                self.value_model, lambda critic: function(replace(self, model=policy, value_model=critic))
            )

        return within_forward(self.model, below)

    def within_engine(self, ask: Callable[[PackedBatch], tuple[Tensor, ...]], packed: PackedBatch) -> Sequence[Tensor]:
        """`ask(packed)`, in a pass of the engine where one holds both models."""
        if self.engine is None:
            return ask(packed)
        return in_pass(self.engine, lambda both: ask(packed), lambda found: found[0])[0]


@torch.no_grad()
def measure(
    actor: ActorCritic,
    reference: Reference,
    experience: Experience,
    *,
    kl_penalty: str,
    rows: int,
    tokens: int,
    device: Any,
) -> tuple[Experience, Tensor]:
    """The experience with log-probabilities, values and the reference's numbers; and the penalised KL, [B, T].

    One pass of the policy and one of the reference, in pieces; the full KL takes two more.
    """

    def ask(packed: PackedBatch) -> tuple[Tensor, ...]:
        scores = actor(packed)
        assert scores.values_BT is not None
        with reference.model() as model:
            assert model is not None
            reference_BT = score(model, packed, temperature=actor.temperature).logprobs_BT
        if kl_penalty == "full":
            kl_BT = full_kl(actor, reference, packed)
        else:
            kl_BT = KL_PENALTIES[kl_penalty](scores.logprobs_BT, reference_BT)
        return packed.mask_BT, scores.logprobs_BT, scores.values_BT, reference_BT, kl_BT

    runs = pieces(experience, rows, tokens)
    mask_BT, logprobs_BT, values_BT, reference_BT, kl_BT = in_pieces(
        experience, runs, partial(actor.within_engine, ask), device
    )
    measured = replace(
        experience, mask_BT=mask_BT, old_logprobs_BT=logprobs_BT, values_BT=values_BT, reference_BT=reference_BT
    )
    return measured, kl_BT


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
    """`(mean, population variance, count)` over all processes of the values where `mask` is 1. [], [], []"""
    xs = xs.to(accelerator.device).float()
    weight = torch.ones_like(xs) if mask is None else mask.to(xs)
    total, count = accelerator.reduce(torch.stack([(xs * weight).sum(), weight.sum()]))
    mean = total / count
    variance = accelerator.reduce(((xs - mean) ** 2 * weight).sum()) / count
    return mean.to(device), variance.to(device), count.to(device)


def whitened(accelerator: Any, values_BT: Tensor, mask_BT: Tensor, shift_mean: bool = True) -> Tensor:
    """The values scaled to unbiased variance 1, and shifted to mean 0 if `shift_mean`, over all processes.

    A single value has no spread: it becomes its distance from the mean, 0.
    """
    mean, variance, count = get_global_statistics(accelerator, values_BT, mask_BT, device=values_BT.device)
    if count < 1:
        raise ValueError("no token of the batch counts: all responses are empty or masked out")
    return whiten(values_BT, (mean, variance, count), shift_mean=shift_mean)


def steps_of(mask_BT: Tensor) -> Tensor:
    """0 in holes, 1 elsewhere: a hole does not count but lies between tokens that do, like a tool's text. [B, T]"""
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


def with_advantages(
    accelerator: Any, measured: Experience, rewards_BT: Tensor, *, gamma: float, lam: float, whiten_rewards: bool
) -> Experience:
    """The measured experience with advantages and returns, given the reward of each token."""
    assert measured.values_BT is not None
    mask_BT = measured.mask_BT
    values_BT, advantages_BT, returns_BT = advantages(
        accelerator, measured.values_BT, rewards_BT, mask_BT, gamma=gamma, lam=lam, whiten_rewards=whiten_rewards
    )
    return replace(
        measured, values_BT=values_BT, advantages_BT=advantages_BT * mask_BT, returns_BT=returns_BT * mask_BT
    )
