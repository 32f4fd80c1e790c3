"""Objectives of reward models."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trl.losses.loss_sum import LossSum, Measure


def bradley_terry(chosen_B: Tensor, rejected_B: Tensor, margin_B: Tensor | None = None, center: float = 0.0) -> LossSum:
    """`-log sigma(chosen - rejected - margin)`, summed over the pairs; eq. 2 of arXiv:2307.09288.

    `center` times `(chosen + rejected)^2` keeps the scores around 0 (eq. 2 of arXiv:2312.09244).
    """
    difference_B = chosen_B - rejected_B
    losses_B = -F.logsigmoid(difference_B if margin_B is None else difference_B - margin_B)
    if center:
        losses_B = losses_B + center * (chosen_B + rejected_B) ** 2
    with torch.no_grad():
        metrics: dict[str, Measure] = {
            "accuracy": (difference_B > 0).to(losses_B.dtype).sum(),
            "margin": difference_B.sum(),
            "rewards/chosen": chosen_B.sum(),
            "rewards/rejected": rejected_B.sum(),
        }
    return LossSum(losses_B.sum(), len(chosen_B), metrics)
