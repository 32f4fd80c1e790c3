"""Gradients of embeddings and heads that go straight to where they end are the ones autograd would have summed."""

import copy

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.kernels.layers import lookup
from trl.kernels.step_memory import in_place, place_of
from trl.models.scoring import score

CPU = torch.device("cpu")
PACKED = pack([TokenTree([5, 6, 7, 8], [Branch([9, 5]), Branch([11, 12, 5])]), TokenTree([0, 5], [Branch([7, 0])])])


def gradients(model, times=2):
    for _ in range(times):
        score(model, PACKED, entropy=True).logprobs_BT.square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_the_same_gradients_summed_over_passes(name, tied):
    model = tiny_model(name).double()
    if not tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    other = copy.deepcopy(model)
    with in_place(CPU, 1):
        ours = gradients(model)
    for key, expected in gradients(other).items():
        torch.testing.assert_close(ours[key], expected, rtol=1e-10, atol=1e-14, msg=key)


def test_an_embedding_by_hand():
    embedding = nn.Embedding(4, 2, padding_idx=0)
    with in_place(CPU, 1), lookup(embedding):
        out = embedding(torch.tensor([[1, 3], [1, 0]]))
        (out * torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [5.0, 5.0]]])).sum().backward()
    assert embedding.weight.grad.tolist() == [[0, 0], [11, 22], [0, 0], [3, 4]]
    assert "forward" not in vars(embedding)


HOLDS = {
    "itself": lambda grad: grad,
    "detach": lambda grad: grad.detach(),
    "view": lambda grad: grad.view(-1),
    "data": lambda grad: grad.data,
    "a part": lambda grad: grad[1:],
    "an array": lambda grad: torch.from_numpy(grad.numpy()),
    "the storage": lambda grad: grad.untyped_storage(),
}


@pytest.mark.parametrize("hold", HOLDS)
def test_memory_is_kept_unless_somebody_holds_the_last_gradient(hold):
    weight = nn.Parameter(torch.ones(3))
    with in_place(CPU, 1):
        place = place_of(weight)
        first = place.gradient().data_ptr()
        weight.grad = None
        assert place.gradient().data_ptr() == first
        held = HOLDS[hold](weight.grad.fill_(7.0))
        weight.grad = None
        assert place.gradient().data_ptr() != first
        if isinstance(held, torch.UntypedStorage):
            held = torch.empty(0).set_(held)
        assert set(held.tolist()) == {7.0}
        assert weight.grad.tolist() == [0, 0, 0]


def test_memory_that_somebody_has_let_go_of_is_used_again():
    weight = nn.Parameter(torch.ones(3))
    with in_place(CPU, 1):
        place = place_of(weight)
        held = place.gradient().detach()
        weight.grad = None
        second = place.gradient().data_ptr()
        weight.grad = None
        assert place.gradient().data_ptr() == second
        del held


@pytest.mark.parametrize("processes", [1, 2])
def test_only_where_nobody_else_waits_for_the_gradient(processes):
    leaf, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    watched = nn.Parameter(torch.ones(2))
    watched.register_post_accumulate_grad_hook(lambda parameter: None)
    assert place_of(leaf) is None
    with in_place(CPU, processes):
        assert (place_of(leaf) is not None) == (processes == 1)
        assert place_of(frozen) is None
        assert place_of(watched) is None
        assert place_of(leaf * 2) is None
        with torch.no_grad():
            assert place_of(leaf) is None
    with in_place(torch.device("cuda"), 1):
        assert place_of(leaf) is None
