"""Pairwise objectives that need no reference model: `(pair, *, ...) -> losses_B`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trl.losses.pairs import PairLogps, smoothed_logistic


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
    mean = pair.averaged()
    chosen_odds = mean.chosen_B - _log1mexp(mean.chosen_B)
    rejected_odds = mean.rejected_B - _log1mexp(mean.rejected_B)
    return -mean.chosen_B - beta * F.logsigmoid(chosen_odds - rejected_odds)


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
