from math import log

import pytest
import torch

from trl.losses.distillation import generalized_jsd, partial_jsd, sampled_reverse_kl
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


# -- of a teacher that is known in part ----------------------------------------------------------


def best(teacher_SV, k):
    logprobs_SV = teacher_SV.log_softmax(-1)
    logprobs, tokens = logprobs_SV.topk(k)
    return tokens, logprobs


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_all_tokens_give_the_divergence_itself(beta):
    student, teacher = torch.randn(5, 9).double(), torch.randn(5, 9).double()
    tokens, logprobs = best(teacher, 9)
    exact = generalized_jsd(student, teacher, beta=beta)
    torch.testing.assert_close(partial_jsd(student, tokens, logprobs, beta=beta, whole=True), exact)
    wider = torch.cat([student, torch.randn(5, 2).double()], 1)  # rows of the student's head that the teacher lacks
    torch.testing.assert_close(partial_jsd(wider, tokens, logprobs, beta=beta, whole=True), exact)


def test_the_rest_is_one_class_by_hand():
    """Student (.4, .4, .2), teacher (.5, .3, .2), of which .5 is known: coins of .4 and .5."""
    tokens, logprobs = torch.tensor([[0]]), torch.tensor([[0.5]]).double().log()
    found = partial_jsd(STUDENT, tokens, logprobs, beta=1.0, whole=False)
    assert found.item() == pytest.approx(0.4 * log(0.4 / 0.5) + 0.6 * log(0.6 / 0.5))


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_more_tokens_bring_it_nearer_from_below(beta):
    student, teacher = torch.randn(7, 12).double(), 2 * torch.randn(7, 12).double()
    found = [partial_jsd(student, *best(teacher, k), beta=beta, whole=False) for k in range(1, 12)]
    exact = generalized_jsd(student, teacher, beta=beta)
    for less, more in zip(found, [*found[1:], exact], strict=True):
        assert (less <= more + 1e-9).all()
    torch.testing.assert_close(found[-1], exact)  # eleven of twelve, and the rest is the twelfth


def test_a_teacher_that_is_sure_gives_finite_numbers():
    student = torch.randn(1, 6).requires_grad_()
    loss = partial_jsd(student, torch.tensor([[2, 0]]), torch.tensor([[0.0, -9999.0]]), beta=0.5, whole=False).sum()
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_the_estimate_of_sampled_tokens_is_unbiased_in_value_and_gradient():
    """Enumerated over the tokens that another policy sampled."""
    logits, teacher, sampled = (torch.randn(6).double().log_softmax(-1) for _ in range(3))
    student = logits.clone().requires_grad_()
    logprobs = student.log_softmax(-1)
    losses = sampled_reverse_kl(logprobs, teacher, sampled)
    (mean := (sampled.exp() * losses).sum()).backward()
    exact_student = logits.clone().requires_grad_()
    (exact := generalized_jsd(exact_student, teacher, beta=1.0)).backward()
    torch.testing.assert_close(mean, exact)
    torch.testing.assert_close(student.grad, exact_student.grad)
