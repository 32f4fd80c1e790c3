"""TF-style Adam against its formula."""

import pytest
import torch

from trl.trainer.optim import TFAdam


@pytest.mark.parametrize(("gradient", "ratio"), [(1e-3, 1.30), (1e-4, 3.78), (1e-5, 16.3), (1e-6, 28.8)])
def test_first_step_against_torch(gradient, ratio):
    steps = []
    for kind in (torch.optim.Adam, TFAdam):
        weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        weight.grad = torch.full_like(weight, gradient)
        kind([weight], lr=1e-5, eps=1e-5).step()
        steps.append(-weight.item())
    assert steps[0] / steps[1] == pytest.approx(ratio, rel=5e-3)


def test_two_steps_by_hand():
    # m = .1, v = .001; m = .29, v = .004999 ; lr_t = .1 sqrt(1 - .999^t) / (1 - .9^t), eps = .01
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = TFAdam([weight], lr=0.1, eps=0.01)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    first = -0.1 * 0.001**0.5 / 0.1 * 0.1 / (0.001**0.5 + 0.01)
    assert weight.item() == pytest.approx(first, rel=1e-9)
    weight.grad = torch.full_like(weight, 2.0)
    optimizer.step()
    second = first - 0.1 * 0.001999**0.5 / 0.19 * 0.29 / (0.004999**0.5 + 0.01)
    assert weight.item() == pytest.approx(second, rel=1e-9)


def test_state_travels():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = TFAdam([weight])
    weight.grad = torch.ones(2)
    optimizer.step()
    other = TFAdam([torch.nn.Parameter(weight.detach().clone())])
    other.load_state_dict(optimizer.state_dict())
    optimizer.step()
    twin = other.param_groups[0]["params"][0]
    twin.grad = torch.ones(2)
    other.step()
    assert torch.equal(weight, twin)


@pytest.mark.parametrize("fields", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": 0.0}])
def test_wrong_numbers(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        TFAdam([torch.nn.Parameter(torch.zeros(1))], **fields)
