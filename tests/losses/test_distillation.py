from math import log

import pytest
import torch

from trl.losses.distillation import generalized_jsd
from trl.losses.kl import full

STUDENT, TEACHER = torch.tensor([[0.4, 0.4, 0.2]]).double().log(), torch.tensor([[0.5, 0.3, 0.2]]).double().log()


def test_the_ends_are_the_forward_and_the_reverse_kl():
    assert generalized_jsd(STUDENT, TEACHER, beta=0.0).item() == pytest.approx(0.02526715, abs=1e-8)
    reverse = 0.4 * log(0.4 / 0.5) + 0.4 * log(0.4 / 0.3)
    assert generalized_jsd(STUDENT, TEACHER, beta=1.0).item() == pytest.approx(reverse, abs=1e-8)


def test_the_middle_by_hand():
    """Two coins that never agree: mixture (1/2, 1/2), JSD ln 2."""
    heads, tails = torch.tensor([[1.0, 0.0]]).double().log(), torch.tensor([[0.0, 1.0]]).double().log()
    assert generalized_jsd(heads, tails, beta=0.5).item() == pytest.approx(log(2))
    mixture = 0.5 * (STUDENT.exp() + TEACHER.exp())
    expected = 0.5 * full(STUDENT, mixture.log()) + 0.5 * full(TEACHER, mixture.log())
    torch.testing.assert_close(generalized_jsd(STUDENT, TEACHER, beta=0.5), expected)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_near_the_ends_it_is_the_end_times_its_weight(beta):
    near = abs(beta - 1e-5)
    expected = 1e-5 * generalized_jsd(STUDENT, TEACHER, beta=beta)
    torch.testing.assert_close(generalized_jsd(STUDENT, TEACHER, beta=near), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_equal_distributions_cost_nothing_at_any_temperature(beta):
    logits = torch.randn(4, 9)
    torch.testing.assert_close(generalized_jsd(logits, logits + 3, beta=beta, temperature=2.0), torch.zeros(4))


def test_temperature_divides_the_logits():
    torch.testing.assert_close(
        generalized_jsd(STUDENT * 2, TEACHER * 2, beta=0.5, temperature=2.0),
        generalized_jsd(STUDENT, TEACHER, beta=0.5),
    )


def test_each_position_stands_alone():
    student, teacher = torch.randn(6, 9), torch.randn(6, 9)
    whole_S = generalized_jsd(student, teacher)
    chunks = [generalized_jsd(student[i : i + 2], teacher[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(chunks), whole_S)


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="beta=2"):
        generalized_jsd(STUDENT, TEACHER, beta=2.0)
    with pytest.raises(ValueError, match="temperature=0"):
        generalized_jsd(STUDENT, TEACHER, temperature=0.0)
