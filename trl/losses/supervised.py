"""Objectives with right answers: the likelihood of tokens, rewards of chosen and rejected, labels of steps."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trl.losses.loss_sum import LossSum, Measure, aggregate, masked_sum


def nll(logprobs_BT: Tensor, mask_BT: Tensor, entropy_BT: Tensor | None = None) -> LossSum:
    """Negative log-likelihood, summed over the counted tokens.

    A fractional mask weighs tokens. `entropy_BT` is only recorded.
    """
    total, count = aggregate(-logprobs_BT, mask_BT, "token")
    return LossSum(total, count, {} if entropy_BT is None else {"entropy": masked_sum(entropy_BT, mask_BT)})


def smoothed(loss: LossSum, lift_BT: Tensor | None, mask_BT: Tensor, factor: float) -> LossSum:
    """Cross-entropy with smoothed labels: `(1 - factor) nll + factor * mean_v(-log p_v)`, from the nll.

    That is the nll plus `factor` times how far each target's logit lies above the mean over the vocabulary (its lift).
    """
    if lift_BT is None:
        return loss
    return LossSum(loss.total + factor * (lift_BT * mask_BT).sum(), loss.count, loss.metrics)


def dft(logprobs_BT: Tensor, mask_BT: Tensor, entropy_BT: Tensor | None = None) -> LossSum:
    """Dynamic fine-tuning: each token's likelihood term weighs its own (detached) probability.

    `-sg[p_t] log p_t` (arXiv:2508.05629). Its gradient is that of `-p_t`, so hard tokens do not dominate.
    """
    total, count = aggregate(-logprobs_BT.detach().exp() * logprobs_BT, mask_BT, "token")
    metrics: dict[str, Measure] = {"nll": masked_sum(-logprobs_BT, mask_BT)}
    if entropy_BT is not None:
        metrics["entropy"] = masked_sum(entropy_BT, mask_BT)
    return LossSum(total, count, metrics)


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


def stepwise_cross_entropy(
    logits_BTC: Tensor, labels_BT: Tensor, ignore_index: int = -100, smoothing: float = 0.0
) -> LossSum:
    """Cross-entropy of a process reward model at the end of each reasoning step, summed over the labelled steps.

    `labels_BT` holds the class of the step that ends there and `ignore_index` everywhere else (arXiv:2211.14275).
    """
    total = F.cross_entropy(
        logits_BTC.flatten(0, -2), labels_BT.flatten(), ignore_index=ignore_index, reduction="sum",
        label_smoothing=smoothing,
    )  # fmt: skip
    labelled_BT = labels_BT != ignore_index
    correct = ((logits_BTC.detach().argmax(-1) == labels_BT) & labelled_BT).sum()
    return LossSum(total, labelled_BT.sum(), {"accuracy": correct.to(torch.float32)})
