"""Attention over pages against attention over whole sequences, by plain operations and by Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from trl.kernels.paged_attention import PAGE, Scores, Sequences, paged_attention

HEADS, GROUP, WIDTH = 2, 3, 24
PROMPTS = ((40, (0, 2)), (5, (1,)), (70, (3, 4, 5)))
"""tokens of each prompt, and its rows"""
ADDED = (3, 33, 1, 64, 9, 2)
"""tokens that each row has added"""


def case(dtype=torch.float32):
    """Queries, keys and values in pages that lie in no order, and each row's whole keys and values."""
    make = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(40, PAGE, HEADS, width, generator=make, dtype=dtype) for width in (WIDTH, 16))
    free = torch.randperm(39, generator=make).add(1).tolist()
    query = torch.randn(len(ADDED), HEADS, GROUP, WIDTH, generator=make, dtype=dtype)

    def pages(tokens):
        return [free.pop() for _ in range(-(-tokens // PAGE))]

    def table(lists):
        return torch.tensor([[*each, *[39] * (4 - len(each))] for each in lists], dtype=torch.int32)

    def numbers(list_):
        return torch.tensor(list_, dtype=torch.int32)

    of_prompts, of_rows = [pages(length) for length, _ in PROMPTS], [pages(length) for length in ADDED]
    owner = {row: index for index, (_, rows) in enumerate(PROMPTS) for row in rows}
    starts = [PROMPTS[owner[row]][0] for row in range(len(ADDED))]
    prompts = Sequences(
        table([*of_prompts, []]), numbers([*(length for length, _ in PROMPTS), 0]), numbers([0] * 4),
        numbers([[*rows, *[-1] * (4 - len(rows))] for _, rows in PROMPTS] + [[-1] * 4]),
    )  # fmt: skip
    rows = Sequences(table(of_rows), numbers(ADDED), numbers(starts), torch.arange(len(ADDED)).int()[:, None])

    def whole(store, row):
        parts = ((of_prompts[owner[row]], starts[row]), (of_rows[row], ADDED[row]))
        return torch.cat([store[torch.tensor(these)].flatten(0, 1)[:length] for these, length in parts])

    position = numbers([start + added - 1 for start, added in zip(starts, ADDED, strict=True)])
    texts = [(whole(keys, row), whole(values, row)) for row in range(len(ADDED))]
    return (query, keys, values, position, [prompts, rows]), texts


def expected(query, texts, scores, sinks):
    """[R, H, J, E] in float64."""
    found = []
    for query_HJD, (keys, values) in zip(query.double(), texts, strict=True):
        logits = torch.einsum("hjd,khd->hjk", query_HJD, keys.double()) * scores.scale
        if scores.softcap:
            logits = scores.softcap * torch.tanh(logits / scores.softcap)
        if scores.window:
            logits[..., : max(0, len(keys) - scores.window)] = -torch.inf
        if sinks is not None:
            logits = torch.cat([logits, sinks.double()[..., None]], -1)
        found.append(torch.einsum("hjk,khe->hje", logits.softmax(-1)[..., : len(keys)], values.double()))
    return torch.stack(found)


CASES = {
    "plain": (Scores(WIDTH**-0.5), False), "soft-cap": (Scores(0.3, softcap=1.5), False),
    "window": (Scores(0.2, window=20), False), "sinks": (Scores(0.2, window=50), True),
}  # fmt: skip


def check(name, splits):
    given, texts = case()
    scores, with_sinks = CASES[name]
    sinks = torch.linspace(-1, 2, HEADS * GROUP).view(HEADS, GROUP) if with_sinks else None
    found = paged_attention(*given, scores, sinks, splits=splits)
    torch.testing.assert_close(found.double(), expected(given[0], texts, scores, sinks), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_rows_see_their_prompt_and_their_own_tokens(name):
    check(name, 1)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_triton_computes_the_same():
    code = "import test_paged_attention as t\nfor name in t.CASES:\n    for splits in (1, 3): t.check(name, splits)\n"
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    )
