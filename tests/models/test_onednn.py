"""Products by oneDNN are those of `F.linear`."""

import pytest
import torch
import torch.nn.functional as F

from trl.models import head as heads
from trl.models.head import Head, token_logprobs
from trl.models.onednn import laid_out, rows_times, suits, works

needs_onednn = pytest.mark.skipif(not works(), reason="this build of torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("rows", [(1,), (8,), (13,), (2, 5)])
@pytest.mark.parametrize("biased", [True, False])
def test_rows_of_any_number(rows, biased):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(*rows, 24), torch.randn(40, 24), torch.randn(40) if biased else None
    expected = F.linear(hidden, weight, bias)
    for form in (weight, laid_out(weight)):
        torch.testing.assert_close(rows_times(hidden, form, bias), expected, rtol=1e-5, atol=1e-5)


def test_what_it_takes():
    weight = torch.zeros(8, 8)
    assert suits(weight, 64) == works()
    assert not suits(weight, 65)
    assert not suits(weight.double(), 1)
    assert not suits(torch.zeros(8, 16)[:, ::2], 1)


@needs_onednn
def test_full_chunks_of_the_head_take_it_and_nothing_changes(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(heads, "CHUNK_ELEMENTS", 16 * 50)
    linear, states, targets = torch.nn.Linear(12, 50, bias=False), torch.randn(40, 12), torch.randint(0, 50, (40,))
    results = []
    for elements in (1, 2**20):
        monkeypatch.setattr(heads, "LARGE_HEAD", elements)
        rows, hidden = [], states.clone().requires_grad_()
        monkeypatch.setattr(heads, "rows_times", lambda h, w, b, rows=rows: rows.append(len(h)) or rows_times(h, w, b))
        logprobs, _ = token_logprobs(Head(linear, 50), hidden, targets)
        logprobs.sum().backward()
        assert rows == ([16, 16] if elements == 1 else [])
        results.append((logprobs.detach(), hidden.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
