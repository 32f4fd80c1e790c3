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
    if beta == 0.0:
        return full(teacher, student)
    if beta == 1.0:
        return full(student, teacher)
    mixture = torch.logaddexp(teacher + log(beta), student + log1p(-beta))
    return beta * full(teacher, mixture) + (1 - beta) * full(student, mixture)
