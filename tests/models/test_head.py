"""The head's log-probabilities and gradients against plain `log_softmax`, whatever is kept or computed again."""

import math

import pytest
import torch

from trl.kernels import head_tiles as tiled
from trl.kernels.step_memory import in_place
from trl.models import scoring as heads


def plain(module, hidden, targets, scale, softcap, temperature):
    logits = module(hidden) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = (logits / temperature).log_softmax(-1)
    tops = (logp.argmax(-1) == targets).float()
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1), tops


@pytest.mark.parametrize("kept", [0, 60, 10**6])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("trained", [True, False])
def test_like_a_log_softmax(kept, softcap, trained, monkeypatch):
    monkeypatch.setattr(tiled, "KEPT_ELEMENTS", kept)
    monkeypatch.setattr(tiled, "MOST_ROWS", 4)
    monkeypatch.setattr(tiled, "tiles", lambda *shape: [slice(0, 9), slice(9, 18), slice(18, 23)])
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 23).requires_grad_(trained)
    hidden, targets = torch.randn(7, 4, requires_grad=True), torch.randint(0, 23, (7,))
    targets[::2] = module(hidden).argmax(-1)[::2]  # some are the first choice
    weights = torch.randn(7)
    found = heads.token_logprobs(heads.Head(module, 23, 0.7, softcap), hidden, targets, temperature=1.3, entropy=True)
    expected = plain(module, hidden, targets, 0.7, softcap, 1.3)
    torch.testing.assert_close(found, expected)
    assert 4 <= found[2].sum() < 7
    slow = heads.logprobs_and_entropy(heads.Head(module, 23, 0.7, softcap), hidden, targets, 1.3)
    torch.testing.assert_close(slow, expected)
    learned = [hidden, *(module.parameters() if trained else [])]
    ours, theirs = (torch.autograd.grad((weights * pair[0]).sum(), learned) for pair in (found, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rows", [1, 100, 512, 2048])
@pytest.mark.parametrize("vocabulary", [5, 32_000, 150_001])
def test_tiles_cover_the_vocabulary_once_and_keep_their_size(rows, vocabulary):
    words = tiled.tiles(rows, vocabulary)
    assert [index for part in words for index in range(part.start, part.stop)] == list(range(vocabulary))
    assert all(rows * (part.stop - part.start) <= tiled.CACHED_TILE for part in words)


@pytest.mark.parametrize(("rows", "sizes"), [(0, []), (1, [1]), (4, [4]), (9, [3, 3, 3]), (10, [3, 3, 4])])
def test_rows_are_cut_evenly(rows, sizes, monkeypatch):
    monkeypatch.setattr(tiled, "MOST_ROWS", 4)
    assert [part.stop - part.start for part in tiled.row_blocks(rows)] == sizes


def test_far_logits_stay_finite():
    module = torch.nn.Linear(1, 3, bias=False)
    module.weight.data[:] = torch.tensor([[1e4], [0.0], [-1e4]])
    hidden = torch.ones(3, 1, requires_grad=True)
    logprobs, entropies, _ = heads.token_logprobs(heads.Head(module, 3), hidden, torch.arange(3), entropy=True)
    assert logprobs.tolist() == [0.0, -1e4, -2e4]
    assert entropies.tolist() == [0.0] * 3
    logprobs.sum().backward()
    assert hidden.grad.flatten().tolist() == [0.0, -1e4, -2e4]


@pytest.mark.parametrize("kept", [0, 10**6])
def test_a_sure_token_keeps_its_small_slope_in_half_precision(kept, monkeypatch):
    monkeypatch.setattr(tiled, "KEPT_ELEMENTS", kept)
    module = torch.nn.Linear(1, 2).to(torch.bfloat16)
    module.weight.data[:] = torch.tensor([[8.0], [0.0]])
    module.bias.data.zero_()
    hidden = torch.ones(1, 1, dtype=torch.bfloat16)
    heads.token_logprobs(heads.Head(module, 2), hidden, torch.tensor([0]))[0].sum().backward()
    expected = 1 / (1 + math.exp(8))  # 1 - p of the target, which bfloat16 cannot tell from 0 by a difference
    assert module.bias.grad.tolist() == pytest.approx([expected, -expected], rel=0.01)


@pytest.mark.parametrize("placed", [True, False])
def test_no_scored_token_has_a_gradient_of_zero(placed):
    module = torch.nn.Linear(3, 5)
    with in_place(torch.device("cpu"), 1 if placed else 2):
        junk = torch.full_like(module.weight, float("nan"))
        del junk  # what fresh memory may hold
        hidden = torch.zeros(0, 3, requires_grad=True)
        logprobs, entropies, _ = heads.token_logprobs(heads.Head(module, 5), hidden, torch.zeros(0, dtype=torch.long))
        logprobs.sum().backward()
    assert logprobs.shape == entropies.shape == (0,)
    assert not module.weight.grad.any()
    assert not module.bias.grad.any()
    assert hidden.grad.shape == (0, 3)


def test_words_that_never_come_may_fill_tiles(monkeypatch):
    monkeypatch.setattr(tiled, "tiles", lambda *shape: [slice(0, 2), slice(2, 4), slice(4, 6)])
    module = torch.nn.Linear(2, 6)
    module.bias.data[:] = torch.tensor([-torch.inf, -torch.inf, 0.0, 0.0, -torch.inf, -torch.inf])
    module.weight.data.zero_()
    hidden = torch.ones(1, 2, requires_grad=True)
    logprobs, *_ = heads.token_logprobs(heads.Head(module, 6), hidden, torch.tensor([2]))
    logprobs.sum().backward()
    assert logprobs.item() == pytest.approx(math.log(0.5))
    assert module.bias.grad.tolist() == [0, 0, 0.5, -0.5, 0, 0]


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("width", [2, 3, 6])
def test_words_that_never_come_have_no_share_in_the_entropy(linear, trained, width, monkeypatch):
    """A bias of -inf, in whole tiles too: 0 log 0 is 0."""
    monkeypatch.setattr(tiled, "tiles", lambda *shape: [slice(i, i + width) for i in range(0, 6, width)])
    module = torch.nn.Linear(2, 6)
    module.bias.data[:] = torch.tensor([-torch.inf, -torch.inf, 0.0, 1.0, -torch.inf, 0.5])
    module.requires_grad_(trained)
    hidden, ids = torch.randn(2, 2, requires_grad=True), torch.tensor([2, 4])
    head = heads.Head(module, 6) if linear else heads.Head(torch.nn.Sequential(module), 6)
    logprobs, entropies, _ = heads.token_logprobs(head, hidden, ids, entropy=True)
    logp = module(hidden)[:, [2, 3, 5]].log_softmax(-1)
    torch.testing.assert_close(entropies, -(logp.exp() * logp).sum(-1).detach())
    torch.testing.assert_close(logprobs[0], logp[0, 0])
    assert logprobs[1].item() == -torch.inf  # never
    expected = torch.autograd.grad(logp[0, 0], hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(logprobs[0], hidden)[0][0], expected[0])
    slow = heads.logprobs_and_entropy(head, hidden, ids)[1]
    torch.testing.assert_close(slow, entropies)
    assert torch.autograd.grad(slow.sum(), hidden)[0].isfinite().all()


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
def test_entropies_of_logits_of_every_size(size, offset):
    """Flat and sharp rows, with logits far from 0: the entropy is exact to their rounding, and never below 0."""
    torch.manual_seed(0)
    module, hidden = torch.nn.Linear(8, 64), size * torch.randn(64, 8)
    module.bias.data += offset
    found = heads.token_logprobs(heads.Head(module, 64), hidden, torch.arange(64), entropy=True)
    logits = module(hidden).detach().double()
    logp, largest = logits.log_softmax(-1), float(logits.abs().max())
    torch.testing.assert_close(found[1].double(), -(logp.exp() * logp).sum(-1), rtol=0, atol=2e-6 * max(1, largest))
    torch.testing.assert_close(found[0].detach().double(), logp.diagonal(), rtol=0, atol=2e-6 * max(1, largest))
    assert (found[1] >= 0).all()


@pytest.mark.parametrize("trained", [True, False])
def test_entropies_in_autocast_and_in_half_precision(trained):
    torch.manual_seed(0)
    module, hidden = torch.nn.Linear(8, 64).requires_grad_(trained), 3 * torch.randn(5, 8)
    ids = torch.arange(5)
    with torch.autocast("cpu", torch.bfloat16):
        cast = heads.token_logprobs(heads.Head(module, 64), hidden, ids, entropy=True)
        logits = module(hidden).float()
    half = module.to(torch.bfloat16)
    plain_half = heads.token_logprobs(heads.Head(half, 64), hidden.to(torch.bfloat16), ids, entropy=True)
    for found, given in ((cast, logits), (plain_half, half(hidden.to(torch.bfloat16)).float())):
        logp = given.log_softmax(-1)
        torch.testing.assert_close(found[1], -(logp.exp() * logp).sum(-1).detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[0], logp[ids, ids])


def test_words_beyond_the_named_vocabulary_count_as_the_model_counts_them():
    module = torch.nn.Linear(2, 4, bias=False)
    logprobs, *_ = heads.token_logprobs(heads.Head(module, 3), torch.zeros(1, 2), torch.tensor([0]))
    logprobs.sum().backward()
    assert logprobs.item() == pytest.approx(math.log(1 / 4))
    assert not module.weight.grad.any()
