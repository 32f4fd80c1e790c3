from math import log

import pytest
import torch

from trl.losses.kl import KL_ESTIMATORS, KL_PENALTIES, absolute, full, k1, k2, k3

P, Q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.4, 0.4, 0.2]).double()


def test_estimators_at_a_difference_of_one():
    d, zero = torch.tensor([1.0, -1.0]), torch.zeros(2)
    assert k1(d, zero).tolist() == [1.0, -1.0]
    assert k2(d, zero).tolist() == [0.5, 0.5]
    assert k3(d, zero).tolist() == pytest.approx([0.367879, 0.718282], abs=1e-6)
    assert absolute(d, zero).tolist() == [1.0, 1.0]


def test_expectations_under_the_policy():
    expected = {name: (P * estimate(P.log(), Q.log())).sum().item() for name, estimate in KL_ESTIMATORS.items()}
    assert expected == pytest.approx({"k1": 0.02526715, "k2": 0.02486241, "k3": 0.02526715}, abs=1e-8)
    assert full(P.log(), Q.log()).item() == pytest.approx(0.02526715, abs=1e-8)


def test_full_equals_torch():
    policy, reference = torch.randn(2, 3, 5).log_softmax(-1), torch.randn(2, 3, 5).log_softmax(-1)
    expected = torch.nn.functional.kl_div(reference, policy, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(full(policy, reference), expected)


def test_full_passes_over_what_the_policy_excludes():
    logits = torch.tensor([0.0, 0.0, -torch.inf], requires_grad=True)
    policy = logits.log_softmax(-1)
    divergence = full(policy, torch.tensor([0.25, 0.25, 0.5]).log())
    assert divergence.item() == pytest.approx(log(2))
    divergence.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_small_differences_do_not_vanish_in_rounding():
    """k3 = d^2 / 2 to leading order; exp(-d) - 1 alone would lose it in single precision."""
    assert k3(torch.tensor([1e-3]), torch.zeros(1)).item() == pytest.approx(5e-7, rel=0.05)


def test_names_of_the_penalty():
    """Those of release 0.7.7, and k3, which today's form of PPO has too."""
    assert {"kl": k1, "abs": absolute, "mse": k2, "full": full, "k3": k3} == KL_PENALTIES
