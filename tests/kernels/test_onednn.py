"""Products by oneDNN are those of `F.linear`."""

import pytest
import torch
import torch.nn.functional as F

from trl.kernels.onednn import laid_out, rows_times, suits, works

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
