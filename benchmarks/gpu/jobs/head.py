"""The head alone: 8,192 scored tokens of a vocabulary of 151,936, forward and backward, and its memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from common import CUDA, DEVICE, TINY, attempt, distance, fresh_peak, peak_gib, record, timed
from torch import Tensor, nn

ROWS, WIDTH, WORDS = (40, 16, 300) if TINY else (8192, 1536, 151_936)
PEAK = 989e12


def full_logits(module: nn.Linear, hidden: Tensor, ids: Tensor) -> Tensor:
    """The plain way: all logits at once, in float32."""
    return -nn.functional.cross_entropy(module(hidden).float(), ids, reduction="none")


def library(module: nn.Linear, hidden: Tensor, ids: Tensor, entropy: bool = False) -> Tensor:
    from trl.models.scoring import Head, token_logprobs

    return token_logprobs(Head(module, WORDS), hidden, ids, entropy=entropy)[0]


@contextmanager
def changed(**names: Any) -> Iterator[None]:
    """Other parts of the library's own way, for comparison."""
    from trl.kernels import head_blocks

    before = {name: getattr(head_blocks, name) for name in names}
    try:
        for name, value in names.items():
            setattr(head_blocks, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(head_blocks, name, value)


def by_addmm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b by one call."""
    torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


@cache
def compiled() -> dict[str, Any]:
    from trl.kernels import head_blocks

    return {name: torch.compile(getattr(head_blocks, name)) for name in ("walk", "slopes_of")}


OPERATIONS: dict[str, Any] = {"kernels_for": lambda device: None}
WAYS: dict[str, Callable[[], Any]] = {
    "library": nullcontext,
    "library, entropies": nullcontext,
    "by torch's operations": lambda: changed(**OPERATIONS),
    "by torch's operations, compiled": lambda: changed(**OPERATIONS, **compiled()),
    "blocks of 128 MiB": lambda: changed(BLOCK=2**25),
    "blocks of 512 MiB": lambda: changed(BLOCK=2**27),
    "blocks of 4,096 rows": lambda: changed(MOST_ROWS=2**12),
    "sums by addmm": lambda: changed(add_product=by_addmm),
}
"""by name: what is another than in the library"""


def measured(
    way: Callable[..., Tensor], during: Callable[[], Any], dtype: torch.dtype, trained: bool
) -> dict[str, Any]:
    torch.manual_seed(0)
    module = nn.Linear(WIDTH, WORDS, bias=False, device=DEVICE, dtype=dtype).requires_grad_(trained)
    states = torch.bfloat16 if CUDA or dtype == torch.bfloat16 else torch.float32
    hidden = (2 * torch.randn(ROWS, WIDTH, device=DEVICE)).to(states).requires_grad_()
    ids, factor = torch.randint(0, WORDS, (ROWS,), device=DEVICE), torch.rand(ROWS, device=DEVICE) / ROWS
    found: list[Tensor] = []

    def step() -> None:
        hidden.grad = module.weight.grad = None
        with during():
            both_passes()

    def both_passes() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=states == torch.bfloat16):
            logprobs = way(module, hidden, ids)
        (logprobs * factor).sum().backward()
        found[:] = [logprobs.detach(), hidden.grad, *([module.weight.grad] if trained else [])]

    step()
    found.clear()
    fresh_peak()
    before = torch.cuda.memory_allocated() / 2**30 if CUDA else 0.0
    step()
    peak = peak_gib() - before
    seconds = timed(step, warm=2, times=5)
    flops = (6 if trained else 4) * ROWS * WIDTH * WORDS
    return {
        "seconds": seconds, "peak_gib": peak, "gradient_gib": module.weight.nbytes / 2**30 if trained else 0.0,
        "mfu": flops / seconds / PEAK if CUDA else None, "numbers": [each.float().cpu() for each in found],
    }  # fmt: skip


def main() -> None:
    for trained in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{'trained' if trained else 'frozen'}, weights in {str(dtype).removeprefix('torch.')}"
            some = WAYS if dtype == torch.float32 else {"library": nullcontext}
            plain: list[Tensor] = []
            for way in ("full logits", *some):
                function = full_logits if way == "full logits" else partial(library, entropy="entropies" in way)
                with attempt(f"{name}: {way}"):
                    result = measured(function, WAYS.get(way, nullcontext), dtype, trained)
                    numbers = result.pop("numbers")
                    plain = plain or numbers
                    off = [distance(ours, theirs) for ours, theirs in zip(numbers, plain, strict=True)]
                    record(f"{name}: {way}", {**result, "from_full_logits": off})


if __name__ == "__main__":
    main()
    sys.exit(0)
