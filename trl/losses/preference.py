"""Pairwise preference objectives in one table: `f(pair, *, beta, ...) -> losses_B`.

A new one is one function (its keyword-only parameters are its options), one test and one entry in `PAIR_LOSSES`.
c and r are the log-ratios of chosen and rejected to the reference, and h = c - r.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from math import log, log1p
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trl.losses.kto import mismatched_kl
from trl.losses.loss_sum import LossSum, Measure
from trl.losses.pairs import PairLogps, apply_divergence, smoothed_logistic

PairLoss = Callable[..., Tensor]


def sigmoid(pair: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: `-log sigma(beta h)`, eq. 7 of arXiv:2305.18290.

    `label_smoothing` is the probability that a label is flipped: cDPO, eq. 3 of E. Mitchell's note.
    """
    return smoothed_logistic(beta * pair.margin_B, label_smoothing)


def robust(pair: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO's loss made unbiased under labels flipped with probability `label_smoothing` < 1/2 (arXiv:2403.00409)."""
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: the robust loss needs a flip probability in [0, 0.5)")
    scaled = beta * pair.margin_B
    kept, flipped = -F.logsigmoid(scaled), -F.logsigmoid(-scaled)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def sigmoid_norm(pair: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO on log-ratios per token: `-log sigma(beta (c / |w| - r / |l|))`, Tülu 3's DPO (arXiv:2411.15124).

    `label_smoothing` as in `sigmoid`.
    """
    return smoothed_logistic(beta * pair.averaged().margin_B, label_smoothing)


def hinge(pair: PairLogps, *, beta: float) -> Tensor:
    """`max(0, 1 - beta h)`: RSO's normalised SLiC, section 3 of arXiv:2309.06657."""
    return torch.relu(1 - beta * pair.margin_B)


def ipo(pair: PairLogps, *, beta: float, average: bool = False) -> Tensor:
    """`(h - 1 / (2 beta))^2`, eq. 17 of arXiv:2310.12036.

    h sums log-probabilities over the completion as in the paper; `average` takes them per token, which is what
    the paper's authors advise for language models and makes h comparable across lengths.
    """
    margin_B = pair.averaged().margin_B if average else pair.margin_B
    return (margin_B - 1 / (2 * beta)) ** 2


def kto_pair(
    pair: PairLogps, *, beta: float, kl_chosen: Tensor | float | None = None, kl_rejected: Tensor | float | None = None
) -> Tensor:
    """Paired KTO: `1 - sigma(beta (c - KL_rejected))` of every chosen, then `1 - sigma(beta (KL_chosen - r))`. [2 B]

    Taken over the whole batch: each KL is the mean log-ratio over all given completions of its side, not below 0.
    To take it over more than this batch, pass both in (arXiv:2402.01306).
    """
    if kl_chosen is None:
        kl_chosen = mismatched_kl(pair.chosen_ratio_B.sum(), len(pair.chosen_ratio_B))
    if kl_rejected is None:
        kl_rejected = mismatched_kl(pair.rejected_ratio_B.sum(), len(pair.rejected_ratio_B))
    chosen = torch.sigmoid(beta * (pair.chosen_ratio_B - kl_rejected))
    rejected = torch.sigmoid(beta * (kl_chosen - pair.rejected_ratio_B))
    return 1 - torch.cat([chosen, rejected])


def exo_pair(pair: PairLogps, *, beta: float, label_smoothing: float = 1e-3) -> Tensor:
    """Reverse KL from the model's preference to the label's, smoothed: eq. 16 of arXiv:2402.00856.

    The smoothing must be positive: a certain label is infinitely far from any model.
    """
    if not 0.0 < label_smoothing < 1.0:
        raise ValueError(f"label_smoothing={label_smoothing}: exo_pair needs it in (0, 1); the paper uses 1e-3")
    scaled = beta * pair.margin_B
    kept, flipped = F.logsigmoid(scaled), F.logsigmoid(-scaled)
    return kept.exp() * (kept - log1p(-label_smoothing)) + flipped.exp() * (flipped - log(label_smoothing))


def nca_pair(pair: PairLogps, *, beta: float) -> Tensor:
    """`-log sigma(beta c) - 1/2 log sigma(-beta c) - 1/2 log sigma(-beta r)` (arXiv:2402.05369)."""
    chosen, rejected = beta * pair.chosen_ratio_B, beta * pair.rejected_ratio_B
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(pair: PairLogps, *, beta: float, delta: Tensor | float = 0.0) -> Tensor:
    """`-log sigma(beta c - delta) - log sigma(delta - beta r)` (arXiv:2404.04656).

    `delta` is the running mean of all rewards `beta c` and `beta r` so far; the caller keeps it.
    """
    chosen, rejected = beta * pair.chosen_ratio_B - delta, beta * pair.rejected_ratio_B - delta
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_hard(pair: PairLogps, *, beta: float) -> Tensor:
    """`(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2`: SPPO with win probabilities 1 and 0 (arXiv:2405.00675)."""
    target = 0.5 / beta
    return (pair.chosen_ratio_B - target) ** 2 + (pair.rejected_ratio_B + target) ** 2


def aot(pair: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO between quantiles: the policy's sorted margins against the reference's (paired AOT, arXiv:2406.05882).

    Taken over the whole batch: the sort pairs what this call is given, and one pair is DPO. Losses are in sorted order.
    """
    policy = pair.chosen_B - pair.rejected_B
    return _dominance(policy, policy - pair.margin_B, beta, label_smoothing)


def aot_unpaired(pair: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO between quantiles: sorted log-ratios of the chosen against those of the rejected (arXiv:2406.05882).

    Taken over the whole batch: the sort pairs what this call is given, and one pair is DPO. Losses are in sorted order.
    """
    return _dominance(pair.chosen_ratio_B, pair.rejected_ratio_B, beta, label_smoothing)


def _dominance(above_B: Tensor, below_B: Tensor, beta: float, label_smoothing: float) -> Tensor:
    return smoothed_logistic(beta * (above_B.sort().values - below_B.sort().values), label_smoothing)


def apo_zero(pair: PairLogps, *, beta: float) -> Tensor:
    """`1 - sigma(beta c) + sigma(beta r)`: chosen up, rejected down; eq. 7 of arXiv:2408.06266."""
    return 1 - torch.sigmoid(beta * pair.chosen_ratio_B) + torch.sigmoid(beta * pair.rejected_ratio_B)


def apo_down(pair: PairLogps, *, beta: float) -> Tensor:
    """`sigma(beta c) + 1 - sigma(beta h)`: both down, rejected more; eq. 8 of arXiv:2408.06266."""
    return torch.sigmoid(beta * pair.chosen_ratio_B) + 1 - torch.sigmoid(beta * pair.margin_B)


def discopop(pair: PairLogps, *, beta: float, discopop_tau: float = 0.05) -> Tensor:
    """Logistic loss blended into the exponential one by `sigma(beta h / tau)`: LRML of arXiv:2406.08414."""
    scaled = beta * pair.margin_B
    blend = torch.sigmoid(scaled / discopop_tau)
    return -F.logsigmoid(scaled) * (1 - blend) + torch.exp(-scaled) * blend


# --- without a reference --------------------------------------------------------------------------------------


def sft(pair: PairLogps) -> Tensor:
    """Negative log-likelihood of the chosen completion per token; added to another objective it is RPO's or CPO's."""
    return -pair.averaged().chosen_B


def _log1mexp(log_p: Tensor) -> Tensor:
    """`log(1 - exp(log_p))` for log_p < 0, kept finite at 0; M. Maechler, "Accurately computing log(1 - exp(-|a|))"."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    small = log_p > -0.6931471805599453
    near = torch.where(small, log_p, torch.full_like(log_p, -0.5))  # the branch not taken must not reach the gradient
    far = torch.where(small, torch.full_like(log_p, -1.0), log_p)
    return torch.where(small, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def orpo(pair: PairLogps, *, beta: float) -> Tensor:
    """Likelihood of the chosen plus `beta` (the paper's lambda) times the odds-ratio term; eq. 6-7 of arXiv:2403.07691.

    `-logp_w - beta log sigma(log odds(w) - log odds(l))` on log-probabilities per token.
    """
    return sft(pair) - beta * F.logsigmoid(log_odds(pair))


def log_odds(pair: PairLogps) -> Tensor:
    """Log of the chosen's odds over the rejected's, of probabilities per token."""
    mean = pair.averaged()
    return mean.chosen_B - _log1mexp(mean.chosen_B) - (mean.rejected_B - _log1mexp(mean.rejected_B))


def cpo(pair: PairLogps, *, beta: float, label_smoothing: float = 0.0, cpo_alpha: float = 1.0) -> Tensor:
    """DPO with a uniform reference plus `cpo_alpha` times the chosen likelihood per token (arXiv:2401.08417)."""
    scaled = beta * (pair.chosen_B - pair.rejected_B)
    losses_B = smoothed_logistic(scaled, label_smoothing)
    return losses_B + cpo_alpha * sft(pair) if cpo_alpha else losses_B


def simpo(pair: PairLogps, *, beta: float, gamma: float = 0.5, label_smoothing: float = 0.0) -> Tensor:
    """`-log sigma(beta (logp_w / |w| - logp_l / |l|) - gamma)`, eq. 6 of arXiv:2405.14734.

    `gamma` is the target margin itself; the paper tunes `gamma / beta`.
    """
    mean = pair.averaged()
    scaled = beta * (mean.chosen_B - mean.rejected_B) - gamma
    return smoothed_logistic(scaled, label_smoothing)


def alphapo(pair: PairLogps, *, beta: float, gamma: float = 0.5, alpha: float = 0.0) -> Tensor:
    """SimPO with the reward `beta (1 - p^-alpha) / alpha` of the per-token probability p (arXiv:2501.03884).

    alpha 0 is SimPO; alpha 1 punishes an unlikely chosen completion most.
    """
    mean = pair.averaged()

    def shaped(log_p: Tensor) -> Tensor:
        return -torch.expm1(-alpha * log_p) / alpha if alpha else log_p

    return -F.logsigmoid(beta * (shaped(mean.chosen_B) - shaped(mean.rejected_B)) - gamma)


PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "kto_pair": kto_pair,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": sft,
    "orpo": orpo,
    "cpo": cpo,
    "simpo": simpo,
    "alphapo": alphapo,
}

REFERENCE_FREE = frozenset({"sft", "orpo", "cpo", "simpo", "alphapo"})
"""objectives that do not use the reference, so it is not computed for them"""

WHOLE_BATCH = frozenset({"kto_pair", "aot", "aot_unpaired"})
"""objectives that compare the pairs of one call: a split into micro-batches changes their value"""

PER_TOKEN = frozenset({"sigmoid_norm", "sft", "orpo", "simpo", "alphapo"})
"""objectives on log-probabilities per token, which is also how their rewards are reported"""


@cache
def pair_options(name: str) -> dict[str, Any]:
    """The options that the objective `name` reads, with their defaults (`inspect.Parameter.empty`: must be given)."""
    if name not in PAIR_LOSSES:
        raise ValueError(f"Unknown loss type: {name}. Should be one of {list(PAIR_LOSSES)}")
    parameters = inspect.signature(PAIR_LOSSES[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_pair_options(losses: Iterable[str], given: Iterable[str]) -> None:
    """Raise for an unknown objective, and for an option that none of the objectives reads. Call it at construction."""
    names = list(losses)
    read = {option for name in names for option in pair_options(name)}
    for option in given:
        if option not in read:
            users = [name for name in PAIR_LOSSES if option in pair_options(name)]
            way_out = f"it belongs to loss_type {', '.join(users)}" if users else "no objective reads it"
            raise ValueError(f"{option}: has no effect with loss_type={names}; {way_out}")


def preference_loss(
    pair: PairLogps,
    losses: Mapping[str, float],
    options: Mapping[str, Any],
    *,
    weight_B: Tensor | None = None,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> LossSum:
    """Weighted sum of objectives, summed over the pairs, with the metrics of preference training.

    losses: name -> weight. options: each objective takes those that it reads; `beta` also scales the rewards.
    weight_B: a detached weight of each pair (`wpo_weights`).
    """
    total_B = losses_of_pairs(
        pair, losses, options, weight_B=weight_B, divergence=divergence, divergence_alpha=divergence_alpha
    )
    metrics = pair_metrics(reported(pair, losses), float(options.get("beta", 1.0))) | likelihood_metrics(pair, losses)
    return LossSum(total_B.sum(), len(total_B), metrics)


def reported(pair: PairLogps, losses: Iterable[str]) -> PairLogps:
    """The pairs as their rewards are reported: per token where all the losses are."""
    return pair.averaged() if PER_TOKEN.issuperset(losses) else pair


def losses_of_pairs(
    pair: PairLogps,
    losses: Mapping[str, float],
    options: Mapping[str, Any],
    *,
    weight_B: Tensor | None = None,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Tensor:
    """The loss of each pair; see `preference_loss`. [B]"""
    seen = apply_divergence(pair, divergence, divergence_alpha)
    total_B = torch.zeros_like(pair.chosen_B)
    for name, weight in losses.items():
        own = {option: options[option] for option in pair_options(name) if option in options}
        given = pair if name in REFERENCE_FREE else seen
        losses_B = PAIR_LOSSES[name](given, **own).view(-1, len(total_B)).mean(0)  # kto_pair gives two per pair
        total_B = total_B + weight * losses_B
    if weight_B is not None:
        if not WHOLE_BATCH.isdisjoint(losses):
            raise ValueError(f"weights per pair: {sorted(WHOLE_BATCH.intersection(losses))} mix the pairs of a batch")
        total_B = total_B * weight_B
    return total_B


@torch.no_grad()
def likelihood_metrics(pair: PairLogps, losses: Iterable[str]) -> dict[str, Measure]:
    """The terms of the losses that learn the chosen completion itself; sums over pairs."""
    names, metrics = set(losses), dict[str, Measure]()
    if names & {"sft", "orpo", "cpo"}:
        metrics["nll_loss"] = sft(pair).sum()
    if "orpo" in names:
        odds_B = log_odds(pair)
        metrics |= {"log_odds_chosen": odds_B.sum(), "log_odds_ratio": F.logsigmoid(odds_B).sum()}
    return metrics


@torch.no_grad()
def pair_metrics(pair: PairLogps, beta: float) -> dict[str, Measure]:
    """Implicit rewards `beta` times the log-ratio, their margin and accuracy, log-probabilities; sums over pairs."""
    chosen, rejected = beta * pair.chosen_ratio_B, beta * pair.rejected_ratio_B
    return {
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype).sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "logps/chosen": pair.chosen_B.sum(),
        "logps/rejected": pair.rejected_B.sum(),
    }
