"""The head as GPUs compute it, on a CPU: against plain `log_softmax`; Triton's kernels against torch's operations."""

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from trl.kernels import head_blocks
from trl.kernels.head_blocks import After, BlockLogprobs, blocks
from trl.models import scoring as heads


def found(head, module, hidden, ids, temperature=1.0, entropy=True):
    return BlockLogprobs.apply(hidden, module.weight, module.bias, ids, head, temperature, entropy, True)


def plain(module, hidden, ids, scale, softcap, temperature):
    logits = module(hidden).float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = (logits / temperature).log_softmax(-1)
    return logp.gather(1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1), (logp.argmax(-1) == ids).float()


@pytest.fixture
def small_blocks(monkeypatch):
    """Three blocks of words, three of rows."""
    monkeypatch.setattr(head_blocks, "MOST_ROWS", 3)
    monkeypatch.setattr(head_blocks, "blocks", lambda *shape: [slice(0, 9), slice(9, 18), slice(18, 23)])


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_like_a_log_softmax(softcap, trained, bias, small_blocks):
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 23, bias=bias).requires_grad_(trained)
    hidden, ids = torch.randn(7, 4, requires_grad=True), torch.randint(0, 23, (7,))
    ids[::2] = module(hidden).argmax(-1)[::2]  # some are the first choice
    weights = torch.randn(7)
    ours = found(heads.Head(module, 23, 0.7, softcap), module, hidden, ids, 1.3)
    theirs = plain(module, hidden, ids, 0.7, softcap, 1.3)
    torch.testing.assert_close(ours, theirs)
    learned = [hidden, *(module.parameters() if trained else [])]
    gradients = [torch.autograd.grad((weights * each[0]).sum(), learned) for each in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_bfloat16_has_its_products_and_sums_in_float32(stored, trained, small_blocks):
    """Factors are rounded once, in the backward pass too; nothing else is."""
    torch.manual_seed(0)
    module = torch.nn.Linear(16, 23, bias=False).to(stored).requires_grad_(trained)
    hidden, ids, weights = torch.randn(7, 16, requires_grad=True), torch.randint(0, 23, (7,)), torch.rand(7)
    with torch.autocast("cpu", torch.bfloat16):
        ours = found(heads.Head(module, 23), module, hidden, ids)
    (weights * ours[0]).sum().backward()
    states, weight = (x.detach().bfloat16().float() for x in (hidden, module.weight))
    logp = (states @ weight.T).log_softmax(-1)
    torch.testing.assert_close(ours[0].detach(), logp.gather(1, ids[:, None])[:, 0], rtol=1e-6, atol=1e-6)
    slopes = (torch.nn.functional.one_hot(ids, 23) - logp.exp()) * weights[:, None]
    torch.testing.assert_close(hidden.grad, slopes @ weight, rtol=0, atol=3e-3)
    if trained:
        assert module.weight.grad.dtype == stored
        rounded = slopes.bfloat16().float().T @ states
        torch.testing.assert_close(module.weight.grad.float(), rounded, rtol=0.01, atol=2e-3)


@pytest.mark.parametrize("rows", [1, 100, 8192])
@pytest.mark.parametrize("vocabulary", [5, 32_000, 151_936])
def test_blocks_cover_the_vocabulary_once_and_stay_below_256_mib(rows, vocabulary):
    words = blocks(rows, vocabulary)
    assert [index for part in words for index in range(part.start, part.stop)] == list(range(vocabulary))
    assert all(rows * (part.stop - part.start) * 4 <= 2**28 for part in words)


class NoSync(torch.overrides.TorchFunctionMode):
    """Refuses what waits for a device: numbers for Python, and shapes that depend on numbers."""

    WAITS = ("item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select", "__bool__", "__int__", "__float__")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert getattr(function, "__name__", "") not in self.WAITS, function
        indexes = getattr(function, "__name__", "") in ("__getitem__", "__setitem__")
        assert not (indexes and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("trained", [True, False])
def test_nothing_waits_for_the_device(trained, small_blocks):
    module = torch.nn.Linear(4, 23).requires_grad_(trained)
    hidden, ids = torch.randn(7, 4, requires_grad=True), torch.arange(7)
    with NoSync():
        found(heads.Head(module, 23), module, hidden, ids)[0].sum().backward()
    with pytest.raises(AssertionError), NoSync():
        heads.token_logprobs(heads.Head(module, 23), hidden, ids)  # a CPU has nobody to wait for


def test_words_that_never_come(small_blocks):
    module = torch.nn.Linear(2, 23)
    with torch.no_grad():
        module.bias[:9] = -torch.inf  # a whole block
        module.bias[20] = -torch.inf
    hidden, ids = torch.randn(2, 2, requires_grad=True), torch.tensor([12, 20])
    logprobs, entropies, _ = found(heads.Head(module, 23), module, hidden, ids)
    keep = torch.tensor([index for index in range(9, 23) if index != 20])
    logp = module(hidden)[:, keep].log_softmax(-1)
    torch.testing.assert_close(entropies, -(logp.exp() * logp).sum(-1).detach())
    torch.testing.assert_close(logprobs[0], logp[0, 3])
    assert logprobs[1].item() == -torch.inf


@pytest.mark.parametrize("trained", [True, False])
def test_no_scored_token(trained):
    module = torch.nn.Linear(3, 5).requires_grad_(trained)
    hidden = torch.zeros(0, 3, requires_grad=True)
    logprobs, *_ = found(heads.Head(module, 5), module, hidden, torch.zeros(0, dtype=torch.long))
    logprobs.sum().backward()
    assert hidden.grad.shape == (0, 3)
    assert module.weight.grad is None or not module.weight.grad.any()


def compare_kernels():
    """Both kernels, interpreted, on blocks that their columns cut unevenly."""
    import triton.runtime.interpreter as interpreter

    from trl.kernels import head_triton
    from trl.kernels.head_tiles import Softmax

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):  # triton 3.6 takes arrays of one number for numbers, which numpy 2.4 refuses
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    head_triton.COLUMNS = 32
    for softcap in (None, 5.0):
        torch.manual_seed(0)
        after, rows, cut = After(0.7, softcap, 1.3), 5, (0, 40, 87)
        logits = 4 * torch.randn(rows, cut[-1])
        ids = torch.tensor([0, 39, 40, 86, 60])
        ours, theirs = Softmax(rows, logits.device, True), Softmax(rows, logits.device, True)
        for first, end in pairwise(cut):
            block = logits[:, first:end].contiguous()
            pair = [
                kind.walk(block.clone(), ids, first, after, sums, torch.float32)
                for kind, sums in ((head_triton, ours), (head_blocks, theirs))
            ]
            torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)
        for name in ("logprobs", "tops", "entropies", "target_slope"):
            torch.testing.assert_close(getattr(ours, name)(), getattr(theirs, name)(), rtol=1e-5, atol=1e-5)
        expected = head_blocks.capped(logits, after)[0].log_softmax(-1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(ours.logprobs(), expected, rtol=1e-5, atol=1e-5)
        share, own = torch.rand(rows), torch.rand(rows)
        last = block, ids, cut[1], after, ours.peak, share, own, torch.float32
        torch.testing.assert_close(head_triton.slopes_of(*last), head_blocks.slopes_of(*last), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_that_cannot_be_built_are_replaced(monkeypatch, caplog):
    """There is no GPU here, which is such a case."""
    head_blocks.kernels_for.cache_clear()
    monkeypatch.setattr(head_blocks, "find_spec", lambda name: object())
    assert head_blocks.kernels_for(torch.device("cpu")) is None
    assert not caplog.records
    for _ in range(2):
        assert head_blocks.kernels_for(torch.device("cuda", 0)) is None
    assert ["computed by torch's operations" in record.message for record in caplog.records] == [True]
    head_blocks.kernels_for.cache_clear()


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_compute_what_the_operations_do():
    """In a process of its own: triton reads `TRITON_INTERPRET` when it is imported."""
    code = "import test_head_blocks as t; t.compare_kernels()"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2]), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
