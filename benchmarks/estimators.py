"""Exact bias and variance of the policy-gradient estimators, by enumerating a tiny policy; writes docs/estimators.md.

python benchmarks/estimators.py > docs/estimators.md        (about ten seconds, no random numbers)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations_with_replacement
from math import atan2, degrees, factorial, inf, isnan, nan, prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from trl.losses.advantages import masked_moments
from trl.losses.kl import KL_ESTIMATORS
from trl.losses.loss_sum import LossSum
from trl.losses.policy import (
    ADVANTAGES,
    Correction,
    Surrogate,
    cispo,
    clip,
    generalized_advantages,
    kl_in_loss,
    policy_loss,
    sapo,
    whiten,
)

WORDS, LONGEST = 3, 2  # word 0 ends a completion; so does the length limit
COMPLETIONS = [(0,)] + [(first, second) for first in (1, 2) for second in range(WORDS)]  # Y = 7 of them
STATES = 3  # nothing yet, after word 1, after word 2
LOGITS = torch.tensor([[0.3, 0.5, -0.2], [0.9, -0.4, 0.1], [-0.6, 0.7, 0.2]]).double()
REFERENCE = torch.tensor([[0.0, -0.3, 0.4], [0.2, 0.5, -0.1], [0.6, 0.0, -0.5]]).double()
REWARDS_Y = torch.tensor([0.2, 1.0, 0.0, 0.5, -0.5, 1.5, 0.3]).double()
MASK_YT = torch.tensor([[1.0] * len(y) + [0.0] * (LONGEST - len(y)) for y in COMPLETIONS]).double()
STATE_YT = torch.tensor([[0, y[0]] if len(y) > 1 else [0, 0] for y in COMPLETIONS])
NEAR, FAR = 0.2, 1.0  # lengths of the update before a later step
ERROR = torch.tensor([[0.5, -0.8, 0.3], [-0.4, 0.9, -0.5], [0.7, 0.2, -0.9]]).double()  # of an engine's logits
STALE = (0.3, 1.2)  # lengths of the updates since the weights that sampled
ROUNDING, WRONG = 0.02, 1.0  # an engine in half precision, and one that has other weights or other kernels
WORD_YT = torch.tensor([list(y) + [0] * (LONGEST - len(y)) for y in COMPLETIONS])


def logprobs(logits_SV: Tensor) -> Tensor:
    """Log-probability of each token of each completion, 0 where there is none. [Y, T]"""
    return logits_SV.log_softmax(-1)[STATE_YT, WORD_YT] * MASK_YT


def expected_reward(logits_SV: Tensor, rewards_Y: Tensor = REWARDS_Y) -> Tensor:
    return (logprobs(logits_SV).sum(-1).exp() * rewards_Y).sum()


def kl_of_completions(logits_SV: Tensor) -> Tensor:
    logprobs_YT = logprobs(logits_SV)
    return (logprobs_YT.sum(-1).exp() * (logprobs_YT - logprobs(REFERENCE)).sum(-1)).sum()


def plain_ratio(log_ratio: Tensor, logprobs_GT: Tensor, advantages: Tensor) -> Surrogate:
    """`-w A`: the importance-weighted policy gradient, unbounded."""
    never = torch.zeros_like(log_ratio, dtype=torch.bool)
    return Surrogate(-log_ratio.exp() * advantages, never, never)


def reinforce(log_ratio: Tensor, logprobs_GT: Tensor, advantages: Tensor) -> Surrogate:
    """`-A log p`: REINFORCE, blind to the ratio (Williams 1992)."""
    never = torch.zeros_like(log_ratio, dtype=torch.bool)
    return Surrogate(-advantages * logprobs_GT, never, never)


def kl_of_tokens(logits_SV: Tensor) -> Tensor:
    """The same number, but states are visited as often as LOGITS visits them: the gradient looks one token ahead."""
    policy, reference = logits_SV.log_softmax(-1), REFERENCE.log_softmax(-1)
    first = LOGITS.log_softmax(-1)[0].exp()
    visits_S = torch.stack([torch.ones_like(first[0]), first[1], first[2]])
    return (visits_S * (policy.exp() * (policy - reference)).sum(-1)).sum()


def gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
    return grad(function)(LOGITS).flatten()


class Moments(NamedTuple):
    mean: Tensor
    variance: Tensor


Estimator = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`f(logprobs_GT, rewards_G, index_G) -> loss []` of the completions that one step drew"""


def moments(
    estimator: Estimator, group: int, rewards_Y: Tensor = REWARDS_Y, sampler: Tensor = LOGITS, logits: Tensor = LOGITS
) -> Moments:
    """Mean and total variance of the ascent direction at `logits` over every draw of `group` completions of `sampler`.

    Order does not matter, so multisets are enumerated and weighed by their multinomial probability.
    """
    draws = list(combinations_with_replacement(range(len(COMPLETIONS)), group))
    index_NG = torch.tensor(draws)
    orders = [factorial(group) // prod(factorial(draw.count(y)) for y in set(draw)) for draw in draws]
    weight_N = torch.tensor(orders).double() * logprobs(sampler).sum(-1).exp()[index_NG].prod(-1)
    slope = grad(lambda logprobs_GT, index_G: estimator(logprobs_GT, rewards_Y[index_G], index_G))
    slope_NGT = vmap(slope)(logprobs(logits)[index_NG], index_NG)
    jacobian_YTP = jacrev(logprobs)(logits).flatten(2)
    gradient_NP = torch.zeros(len(draws), jacobian_YTP.shape[-1]).double()
    for g in range(group):
        gradient_NP -= torch.einsum("nt,ntp->np", slope_NGT[:, g], jacobian_YTP[index_NG[:, g]])
    mean_P = weight_N @ gradient_NP
    return Moments(mean_P, weight_N @ ((gradient_NP - mean_P) ** 2).sum(-1))


@dataclass(frozen=True)
class Report:
    """The mean of an estimator against the true gradient, and its spread."""

    scale: float
    """how much of the truth the mean contains"""
    angle: float
    """degrees between the two"""
    noise: float
    """standard deviation over the length of the mean"""

    @property
    def verdict(self) -> str:
        if isnan(self.angle):
            return "no: zero"
        if self.angle > 1e-4:
            return "no"
        return "yes" if abs(self.scale - 1) < 1e-9 else "up to a constant"


def compare(got: Moments, truth_P: Tensor) -> Report:
    size, true_size = float(got.mean.norm()), float(truth_P.norm())
    scale = float(got.mean @ truth_P) / true_size**2
    if size < 1e-9 * true_size:
        return Report(0.0, nan, inf)
    across = float((got.mean - scale * truth_P).norm())
    return Report(scale, degrees(atan2(across, scale * true_size)), float(got.variance.sqrt()) / size)


def summed(loss: LossSum, group: int) -> Tensor:
    """Mean over completions of the sum over their tokens: the scale of the true gradient."""
    return loss.total / group


def critic_free(advantage: str, how: str = "constant", level: str = "token") -> Estimator:
    """The first step (old = current policy) of an algorithm without critic."""

    def estimate(logprobs_GT: Tensor, rewards_G: Tensor, index_G: Tensor) -> Tensor:
        group = len(rewards_G)
        advantages = ADVANTAGES[advantage](rewards_G, group)[:, None]
        old_GT, mask_GT = logprobs(LOGITS)[index_G], MASK_YT[index_G]
        rule = partial(clip, clip_low=0.2, clip_high=0.2)
        loss = policy_loss(
            logprobs_GT, old_GT, advantages, mask_GT, rule=rule, level=level, how=how, max_tokens=LONGEST
        )
        return summed(loss, group) if how == "constant" else loss.mean

    return estimate


def ppo(lam: float, values_S: Tensor, whitened: bool = False) -> Estimator:
    """The first step of PPO with a critic that says `values_S`, token sums."""

    def estimate(logprobs_GT: Tensor, rewards_G: Tensor, index_G: Tensor) -> Tensor:
        mask_GT, old_GT = MASK_YT[index_G], logprobs(LOGITS)[index_G]
        last_GT = mask_GT * (1 - torch.nn.functional.pad(mask_GT, (0, 1))[:, 1:])
        values_GT = values_S[STATE_YT[index_G]]
        advantages = generalized_advantages(last_GT * rewards_G[:, None], values_GT, 1.0, lam, mask_GT)
        if whitened:
            advantages = whiten(advantages, masked_moments(advantages, mask_GT))
        return summed(policy_loss(logprobs_GT, old_GT, advantages, mask_GT, rule=clip), len(rewards_G))

    return estimate


def true_values() -> Tensor:
    """Expected reward from each state on. [S]"""
    policy = LOGITS.log_softmax(-1).exp()
    after = [REWARDS_Y[1:4] @ policy[1], REWARDS_Y[4:7] @ policy[2]]
    return torch.stack([policy[0, 0] * REWARDS_Y[0] + policy[0, 1] * after[0] + policy[0, 2] * after[1], *after])


def first_step() -> dict[str, Estimator]:
    right, wrong = true_values(), torch.zeros(STATES).double()
    return {
        "REINFORCE": critic_free("none"),
        "REINFORCE, batch mean as baseline": critic_free("batch_mean"),
        "RLOO": critic_free("leave_one_out"),
        "Dr. GRPO": critic_free("group_mean"),
        "GRPO without the std": critic_free("group_mean", "sequence"),
        "GRPO without the length": critic_free("group"),
        "GRPO": critic_free("group", "sequence"),
        "GRPO, token mean (DAPO)": critic_free("group", "token"),
        "Dr. GRPO, token mean": critic_free("group_mean", "token"),
        "GSPO": critic_free("group", "sequence", "sequence"),
        "REINFORCE++": critic_free("batch"),
        "PPO, lambda 1, V = 0": ppo(1.0, wrong),
        "PPO, lambda 1, V true": ppo(1.0, right),
        "PPO, lambda .95, V true": ppo(0.95, right),
        "PPO, lambda .95, V = 0": ppo(0.95, wrong),
        "PPO, lambda 1, V true, whitened": ppo(1.0, right, whitened=True),
    }


def kl_in_reward(name: str, to_go: bool) -> Estimator:
    """REINFORCE on the estimate as a penalty: of the tokens from here on, or of the whole completion."""

    def estimate(logprobs_GT: Tensor, rewards_G: Tensor, index_G: Tensor) -> Tensor:
        mask_GT = MASK_YT[index_G]
        kl_GT = KL_ESTIMATORS[name](logprobs(LOGITS)[index_G], logprobs(REFERENCE)[index_G]) * mask_GT
        weight_GT = kl_GT.sum(-1, keepdim=True)
        if to_go:
            weight_GT = generalized_advantages(kl_GT, torch.zeros_like(kl_GT), 1.0, 1.0, mask_GT)
        return summed(policy_loss(logprobs_GT, logprobs_GT, weight_GT, mask_GT, rule=reinforce), len(rewards_G))

    return estimate


def kl_term(name: str, importance: bool, completion: bool = False) -> Estimator:
    """The estimate as a term of the loss, descended; of each token, or of the completion's summed log-probability."""

    def estimate(logprobs_GT: Tensor, rewards_G: Tensor, index_G: Tensor) -> Tensor:
        mask_GT, reference_GT = MASK_YT[index_G], logprobs(REFERENCE)[index_G]
        old_GT = logprobs(LOGITS)[index_G] if importance else None
        if completion:
            return -kl_in_loss(logprobs_GT.sum(-1), reference_GT.sum(-1), None, name).mean()
        return -(kl_in_loss(logprobs_GT, reference_GT, old_GT, name) * mask_GT).sum() / len(rewards_G)

    return estimate


def kl_estimators() -> dict[str, Estimator]:
    """Each ascends the KL, so that its mean is compared with the KL's gradient."""
    table = {f"{k} in the reward, to go": kl_in_reward(k, True) for k in KL_ESTIMATORS}
    table |= {f"{k} in the reward, whole completion": kl_in_reward(k, False) for k in KL_ESTIMATORS}
    table |= {f"{k} in the loss": kl_term(k, False) for k in KL_ESTIMATORS}
    table |= {f"{k} in the loss, times the ratio": kl_term(k, True) for k in KL_ESTIMATORS}
    return table | {"k2 of the whole completion in the loss": kl_term("k2", False, completion=True)}


def moved(distance: float) -> Tensor:
    """The policy from which a step of this length up the true gradient led to LOGITS. [S, V]"""
    slope_P = gradient(expected_reward)
    return LOGITS - distance * (slope_P / slope_P.norm()).view_as(LOGITS)


def stale(rule: Callable[..., Surrogate], level: str, old: Tensor) -> Estimator:
    """A later step: drawn from `old`, the gradient wanted at LOGITS. Rewards minus what `old` expects."""
    baseline = expected_reward(old)

    def estimate(logprobs_GT: Tensor, rewards_G: Tensor, index_G: Tensor) -> Tensor:
        tokens_GT, old_GT, mask_GT = logprobs_GT, logprobs(old)[index_G], MASK_YT[index_G]
        if level == "trajectory":  # one loss a completion: its tokens are one action
            tokens_GT, old_GT = tokens_GT.sum(-1, keepdim=True), old_GT.sum(-1, keepdim=True)
            mask_GT = mask_GT[:, :1]
        advantages = (rewards_G - baseline)[:, None]
        loss = policy_loss(tokens_GT, old_GT, advantages, mask_GT, rule=rule, level=level)
        return summed(loss, len(rewards_G))

    return estimate


def later_steps(old: Tensor) -> dict[str, Estimator]:
    return {
        "no correction": stale(reinforce, "token", old),
        "token ratio": stale(plain_ratio, "token", old),
        "token ratio, clipped at .2 (PPO, GRPO)": stale(clip, "token", old),
        "token ratio, weights cut at 1.2 (CISPO)": stale(partial(cispo, clip_high=0.2), "token", old),
        "token ratio, soft gate (SAPO)": stale(sapo, "token", old),
        "sequence ratio (GSPO, not clipped)": stale(plain_ratio, "sequence_token", old),
        "trajectory ratio": stale(plain_ratio, "trajectory", old),
        "trajectory ratio, clipped at .2": stale(clip, "trajectory", old),
    }


def engine(error: float) -> Tensor:
    """The logits by which an engine samples that computes the policy with an error. [S, V]"""
    return LOGITS + error * ERROR


def mismatched(sampler: Tensor, correction: Correction | None = None, proximal: Tensor = LOGITS) -> Estimator:
    """Drawn from `sampler`, the gradient wanted at LOGITS, clipped around `proximal`. Rewards minus what is expected.

    correction: of proximal to sampler; None: the engine's log-probabilities are taken for those of `proximal`.
    """
    baseline = expected_reward(sampler)

    def estimate(logprobs_GT: Tensor, rewards_G: Tensor, index_G: Tensor) -> Tensor:
        old_GT, sampled_GT, mask_GT = logprobs(proximal)[index_G], logprobs(sampler)[index_G], MASK_YT[index_G]
        weight = None if correction is None else correction.bounded(correction.ratio(old_GT, sampled_GT, mask_GT))
        advantages = (rewards_G - baseline)[:, None]
        loss = policy_loss(logprobs_GT, old_GT, advantages, mask_GT, rule=clip, weight_BT=weight)
        return summed(loss, len(rewards_G))

    return estimate


CORRECTIONS: dict[str, Correction | None] = {
    "no correction": None,
    "token ratio, not bounded": Correction("token_truncate", None),
    "token, cut at 2 (TIS)": Correction("token_truncate", 2.0),
    "token, masked outside [.5, 5] (IcePop)": Correction("token_mask", 5.0, 0.5),
    "sequence ratio, not bounded": Correction("sequence_truncate", None),
    "sequence, cut at 2": Correction("sequence_truncate", 2.0),
    "sequence, masked above 3 (MIS, the default)": Correction(),
    "geometric mean, cut at 2": Correction("geometric_truncate", 2.0),
    "geometric mean, masked outside [.8, 1.25]": Correction("geometric_mask", 1.25, 0.8),
}


def stale_rollouts(sampler: Tensor) -> dict[str, Estimator]:
    """A later step of an update on a rollout of older weights; the update began half of `NEAR` back."""
    proximal = moved(NEAR / 2)
    return {
        "clipped around the sampler (PPO)": stale(clip, "token", sampler),
        "clipped around the proximal policy, not weighed": mismatched(sampler, None, proximal),
        "decoupled, token ratio": mismatched(sampler, Correction("token_truncate", None), proximal),
        "decoupled, token ratio cut at 1.2": mismatched(sampler, Correction("token_truncate", 1.2), proximal),
        "decoupled, sequence ratio": mismatched(sampler, Correction("sequence_truncate", None), proximal),
    }


def difficulty_scale(advantage: str, rate: float, group: int) -> float:
    """What of the true gradient an advantage keeps on a prompt with one right completion, drawn at this rate."""
    rewards_Y = torch.zeros(len(COMPLETIONS)).double().index_fill(0, torch.tensor(0), 1.0)
    logits = torch.cat([torch.tensor([[rate, 0.5 * (1 - rate), 0.5 * (1 - rate)]]).double().log(), LOGITS[1:]])

    def estimate(logprobs_GT: Tensor, rewards_G: Tensor, index_G: Tensor) -> Tensor:
        advantages, mask_GT = ADVANTAGES[advantage](rewards_G, group)[:, None], MASK_YT[index_G]
        return summed(policy_loss(logprobs_GT, logprobs_GT, advantages, mask_GT, rule=reinforce), group)

    truth_P = grad(partial(expected_reward, rewards_Y=rewards_Y))(logits).flatten()
    return compare(moments(estimate, group, rewards_Y, sampler=logits, logits=logits), truth_P).scale


def row(*cells: object) -> str:
    shown = ("-" if cell == inf else f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells)
    return "| " + " | ".join(shown) + " |"


def header(*columns: str) -> list[str]:
    return [row(*columns), "|" + "---|" * len(columns)]


def angle(report: Report) -> str:
    return "-" if isnan(report.angle) else f"{abs(report.angle):.1f}"


def first_step_table(groups: Sequence[int] = (2, 4, 8)) -> list[str]:
    truth_P, largest = gradient(expected_reward), max(groups)
    angles = [f"angle, G {group}" for group in groups]
    lines = header("first step", "unbiased", *angles, f"scale, G {largest}", f"noise, G {largest}")
    for name, estimator in first_step().items():
        reports = [compare(moments(estimator, group), truth_P) for group in groups]
        last = reports[-1]
        lines.append(row(name, last.verdict, *map(angle, reports), last.scale, last.noise))
    return lines


def kl_table() -> list[str]:
    completion_P, token_P = gradient(kl_of_completions), gradient(kl_of_tokens)
    lines = header("KL term", "unbiased", "angle", "scale", "noise", "unbiased for the tokens' KL", "angle to that")
    for name, estimator in kl_estimators().items():
        got = moments(estimator, 1)
        whole, token = compare(got, completion_P), compare(got, token_P)
        lines.append(row(name, whole.verdict, angle(whole), whole.scale, whole.noise, token.verdict, angle(token)))
    return lines


def two_cases(
    columns: tuple[str, str, str], names: Sequence[str], one: Mapping[str, Moments], other: Mapping[str, Moments]
) -> list[str]:
    """A row for each name: angle, scale and noise of its estimator in two cases; columns: the first, and the cases'."""
    truth_P, (first, *cases) = gradient(expected_reward), columns
    shown = [f"{what} {case}" for case in cases for what in ("angle", "scale", "noise")]
    lines = header(first, "unbiased", *shown)
    for name in names:
        close, distant = (compare(each[name], truth_P) for each in (one, other))
        lines.append(row(name, distant.verdict, *(c for r in (close, distant) for c in (angle(r), r.scale, r.noise))))
    return lines


def later_table() -> list[str]:
    near, far = (
        {name: moments(each, 1, sampler=old) for name, each in later_steps(old).items()}
        for old in (moved(NEAR), moved(FAR))
    )
    return two_cases(("later step", "near", "far"), list(near), near, far)


def engine_table() -> list[str]:
    close, wrong = (
        {name: moments(mismatched(engine(e), each), 1, sampler=engine(e)) for name, each in CORRECTIONS.items()}
        for e in (ROUNDING, WRONG)
    )
    return two_cases(("engine", "rounding", "wrong"), list(CORRECTIONS), close, wrong)


def stale_table() -> list[str]:
    one, four = (
        {name: moments(each, 1, sampler=old) for name, each in stale_rollouts(old).items()} for old in map(moved, STALE)
    )
    return two_cases(("stale rollout", "near", "far"), list(one), one, four)


def largest_ratio(old: Tensor) -> float:
    return float((logprobs(LOGITS) - logprobs(old)).exp().max())


def difficulty_table(rates: Sequence[float] = (0.5, 0.2, 0.05), group: int = 8) -> list[str]:
    lines = header("solved at a rate of", *(str(rate) for rate in rates))
    for name, advantage in (("RLOO", "leave_one_out"), ("Dr. GRPO", "group_mean"), ("GRPO", "group")):
        lines.append(row(name, *(difficulty_scale(advantage, rate, group) for rate in rates)))
    return lines


TEXT = """# How good is each gradient estimator?

Written by `python benchmarks/estimators.py`; nothing here is sampled. A policy of 9 logits writes completions of one
or two tokens (7 of them). Every draw of G completions is enumerated and weighed with its probability, and the gradient
that our loss functions give for it is compared with the true gradient of the expected reward (or of the KL).

- **unbiased**: the mean over all draws is the true gradient, itself or up to a constant (which only changes the
  learning rate). **angle**: degrees between the two. **scale**: how much of the truth the mean contains.
- **noise**: standard deviation (root of the total variance) over the length of the mean.
- Losses of aggregation `constant` and of PPO are taken as token sums per completion; the others as they are.

## The first step: the policy that sampled is the policy that learns

{first}

- RLOO and REINFORCE are unbiased; so is Dr. GRPO up to (G - 1) / G, because its baseline contains the sample itself.
- Dividing by each completion's length (GRPO, GSPO) turns the gradient, at any G. Dividing by the number of tokens of
  the step turns it less and less as G grows (the divisor becomes a constant); so does dividing by the std.
- GSPO's first step is GRPO's; with one prompt a step REINFORCE++ is GRPO without the length. PPO is unbiased at
  lambda 1 with any critic, and at any lambda with the true one; the critic's worth is in the noise.
- The std is small where rewards vary little. One prompt cannot show what that does across prompts; this does: the
  scale at G = 8 for a prompt that the policy solves at a given rate. GRPO weighs hard (and very easy) prompts up.

{difficulty}

## The KL to the reference

Drawn one at a time. "Unbiased" is against the gradient of the KL of completions, which counts that a token also
decides where the policy goes next; "tokens' KL" leaves that out (the states are visited as they are).

{kl}

- In the reward only k1 is right. k3 has k1's mean, but as a penalty it depends on the policy, and that part is missing.
- In the loss k1 is nothing but noise, and k3 alone is the gradient of another divergence. k2, and k1 or k3 times the
  ratio (`kl_importance`), are the gradient of the tokens' KL. At this first step k2 and k3 times the ratio are the same
  draw by draw; later only the ratio keeps it right. None looks ahead: k2 of the whole completion does, and is k1 in
  the reward under another name.

## Later steps: the policy has moved away from the one that sampled

Drawn one at a time, rewards minus their mean. An update along the true gradient came before: a near one (token ratios
up to {near:.2f}) or a far one (up to {far:.2f}).

{later}

- Only the trajectory's ratio is exact, and its noise grows with the length. The token ratio is off to first order in
  how far the policy moved.
- Clipping cuts the gradient of what has already moved its way; what is left is smaller and points elsewhere. It is a
  brake, not an estimate. CISPO and SAPO cut less.

## An engine that computes the policy otherwise

Drawn one at a time by an engine whose logits have an error: as small as rounding (token ratios up to {rounding:.2f}),
or large (up to {wrong:.2f}). The old log-probabilities are the trainer's; the weight is `p_trainer / p_engine`, in
bounds. Rewards minus what the engine's completions bring in the mean. `Correction` says what each mode is.

{engine}

- Only the ratio of the whole completion, not bounded, is exact. Of single tokens the ratio mends what one token's
  choice got wrong, and not where the earlier tokens led.
- Where the engine is as near as rounding, all are right to a degree; there none is needed. With a large error
  each bound trades truth for noise, and a mask trades more of it than a cut, because it drops what it bounds: what is
  left of the gradient is that of the completions on which both agree.
- Noise is relative to the length of the mean: a mask that drops much has a small mean.

## Rollouts of older weights

Drawn one at a time by the policy before several updates (token ratios up to {stale_near:.2f} near, {stale_far:.2f}
far). The step at hand is a later one of its own update; the weights at the start of that update are the proximal
policy.

{stale}

- Clipped around the policy that sampled, a stale rollout is beyond the clip range before it is learned from: what is
  left of its gradient points elsewhere. The decoupled objective clips around the proximal policy, and weighs by
  proximal over sampler; its rest of bias is that of the token ratio in the step at hand.
- Without the weights the states are those of older weights; that is smaller, but does not vanish.
"""


def document() -> str:
    tables = {
        "first": first_step_table, "difficulty": difficulty_table, "kl": kl_table, "later": later_table,
        "engine": engine_table, "stale": stale_table,
    }  # fmt: skip
    policies = {
        "near": moved(NEAR), "far": moved(FAR), "rounding": engine(ROUNDING), "wrong": engine(WRONG),
        "stale_near": moved(STALE[0]), "stale_far": moved(STALE[1]),
    }  # fmt: skip
    joined = {name: "\n".join(table()) for name, table in tables.items()}
    return TEXT.format(**joined, **{name: largest_ratio(policy) for name, policy in policies.items()})


if __name__ == "__main__":
    print(document(), end="")
