"""Divergences between a teacher's and a student's distributions over the vocabulary, for distillation."""

from math import log, log1p

import torch
import torch.nn.functional as F
from torch import Tensor

from trl.losses.kl import full


def generalized_jsd(student_SV: Tensor, teacher_SV: Tensor, *, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """GKD's divergence of each position, from logits: eq. 1 and section 2 of arXiv:2306.13649. [..., V] -> [...]

    `beta KL(teacher || m) + (1 - beta) KL(student || m)` with `m = beta teacher + (1 - beta) student`. The ends are
    replaced by their limits up to scale: beta 0 is the forward KL(teacher || student), beta 1 the reverse
    KL(student || teacher). Each position stands alone, so the caller may cut S into chunks and add.
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta={beta}: lies in [0, 1]; 0 is the forward KL, 1 the reverse KL")
    if temperature <= 0.0:
        raise ValueError(f"temperature={temperature}: logits are divided by it; choose a positive one")
    student, teacher = F.log_softmax(student_SV / temperature, -1), F.log_softmax(teacher_SV / temperature, -1)
    return _divergence(student, teacher, beta)


def _divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """`generalized_jsd` of log-distributions. [..., V] -> [...]"""
    if beta == 0.0:
        return full(teacher, student)
    if beta == 1.0:
        return full(student, teacher)
    mixture = torch.logaddexp(teacher + log(beta), student + log1p(-beta))
    return beta * full(teacher, mixture) + (1 - beta) * full(student, mixture)


def partial_jsd(student_SV: Tensor, tokens_SK: Tensor, teacher_SK: Tensor, *, beta: float, whole: bool) -> Tensor:
    """`generalized_jsd` where the teacher's log-probabilities of K tokens are known. [S, V], [S, K], [S, K] -> [S]

    All other tokens are one class, of both. So it is at most the divergence over all tokens (data-processing
    inequality), equal to it where student and teacher share out the rest alike, and its gradient moves the student's
    rest as one. whole: the K tokens are all that both have; then it is the divergence itself.
    """
    if whole:
        return generalized_jsd(student_SV.gather(1, tokens_SK), teacher_SK, beta=beta)
    student_SV = F.log_softmax(student_SV, -1)
    other_S = student_SV.scatter(1, tokens_SK, -torch.inf).logsumexp(-1).clamp(min=log(_LEAST))
    left_S = torch.log1p(-teacher_SK.exp().sum(-1).clamp(max=1 - _LEAST))
    student = torch.cat([student_SV.gather(1, tokens_SK), other_S[:, None]], 1)
    return _divergence(student, torch.cat([teacher_SK, left_S[:, None]], 1), beta)


_LEAST = 1e-6
"""probability of all other tokens together, at least: below it float32 knows no more"""


def sampled_reverse_kl(logprobs_BT: Tensor, teacher_BT: Tensor, old_BT: Tensor) -> Tensor:
    """Estimate of KL(student || teacher) from sampled tokens, `r (log student - log teacher)`. [B, T] -> [B, T]

    `r`, the ratio of the student to the policy that sampled, is 1 before the first update. Value and gradient are
    unbiased for each token's reverse KL: the gradient's factor is the log-ratio itself, because the score has mean 0.
    """
    ratio_BT = (logprobs_BT - old_BT).exp()
    return ratio_BT * (logprobs_BT - teacher_BT).detach()
