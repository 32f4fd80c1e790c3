from math import exp, log

import pytest
import torch

from trl.losses.supervised import dft, nll, stepwise_cross_entropy

PROBABILITIES = torch.tensor([[0.5, 0.25, 0.125]])


def test_nll_by_hand():
    loss = nll(PROBABILITIES.log(), torch.tensor([[1.0, 1.0, 0.0]]), entropy_BT=torch.tensor([[1.0, 3.0, 5.0]]))
    assert loss.total.item() == pytest.approx(3 * log(2))
    assert loss.count.item() == 2
    assert [x.item() for x in loss.metrics["entropy"]] == [4.0, 2.0]
    for function in (nll, dft):
        counted = function(PROBABILITIES.log(), torch.tensor([[1.0, 1.0, 0.0]]), None, torch.tensor([[1.0, 0.0, 1.0]]))
        assert [x.item() for x in counted.metrics["mean_token_accuracy"]] == [1.0, 2.0]
        assert "entropy" not in counted.metrics


def test_dft_by_hand():
    """-.5 log .5 - .25 log .25 = log 2"""
    loss = dft(PROBABILITIES.log(), torch.tensor([[1.0, 1.0, 0.0]]))
    assert loss.total.item() == pytest.approx(log(2))
    assert loss.metrics["nll"][0].item() == pytest.approx(3 * log(2))


def test_dft_pushes_as_the_probability_itself():
    logits = torch.randn(4, 7, requires_grad=True)
    logprobs = logits.log_softmax(-1)[:, :1]
    (expected,) = torch.autograd.grad(-logprobs.exp().sum(), logits, retain_graph=True)
    (got,) = torch.autograd.grad(dft(logprobs, torch.ones(4, 1)).total, logits)
    torch.testing.assert_close(got, expected)


def test_a_process_reward_model_is_scored_at_labelled_steps_only():
    """Step 1: logits (0, 1) with label 1; step 2: (0, 0) with label 0."""
    logits = torch.tensor([[[5.0, -5.0], [0.0, 1.0], [0.0, 0.0]]], requires_grad=True)
    loss = stepwise_cross_entropy(logits, torch.tensor([[-100, 1, 0]]))
    assert loss.total.item() == pytest.approx(log(1 + exp(-1)) + log(2))
    assert (loss.count.item(), loss.metrics["accuracy"].item()) == (2, 2.0)
    loss.total.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad[0, 0], torch.zeros(2))
