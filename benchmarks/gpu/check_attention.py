"""Attention of packed rows on a device: exactness, compilations, time. `run(device)` takes about 100 seconds on a GPU.

On a CPU the same code runs in tiny sizes, without kernels: FlexAttention has no backward pass there.
"""

from __future__ import annotations

import json
import random
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from trl.data.records import Segment
from trl.kernels import block_mask
from trl.kernels.tree_attention import TreeLayout
from trl.models import attention

Shape = tuple[int, int, int, int]
"""query heads, key heads, numbers of a key's head, and of a value's"""


def forest(trees: Sequence[tuple[int, Sequence[int]]]) -> list[Segment]:
    """Prompts with the lengths of their branches; a prompt without branches is a row of its own."""
    segments: list[Segment] = []
    at = 0
    for prompt, branches in trees:
        parent = len(segments)
        segments.append(Segment(at, at + prompt, -1))
        at += prompt
        for tokens in branches:
            segments.append(Segment(at, at + tokens, parent))
            at += tokens
    return segments


def grown(seed: int, tokens: int, depth: int = 2) -> list[Segment]:
    """Random trees of several levels, with about this many tokens."""
    draw, segments = random.Random(seed), list[Segment]()
    while not segments or segments[-1].end < tokens:
        parents = [-1]
        for _ in range(draw.randint(1, depth + 1)):
            level = []
            for parent in parents:
                for _ in range(draw.randint(1, 3)):
                    at = segments[-1].end if segments else 0
                    segments.append(Segment(at, at + draw.choice((1, 17, 127, 128, 200)), parent))
                    level.append(len(segments) - 1)
            parents = level
    return segments


def tensors(device: torch.device, dtype: torch.dtype, tokens: int, shape: Shape, learns: bool) -> list[Tensor]:
    """Query, key, value [1, H, N, D] with the strides of a model's."""
    heads, of_keys, width, of_values = shape
    sizes = ((heads, width), (of_keys, width), (of_keys, of_values))
    made = [torch.randn(1, tokens, *size, device=device).to(dtype) for size in sizes]
    return [x.requires_grad_(learns) for x in made]


def computed(function: Callable[..., Tensor], leaves: list[Tensor], sinks: Tensor | None, **how: Any) -> list[Tensor]:
    """Output and, where there is autograd, gradients."""
    given = [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in leaves]
    sinks = None if sinks is None else sinks.detach().requires_grad_(leaves[0].requires_grad)
    out = function(*(x.transpose(1, 2) for x in given), sinks=sinks, **how)
    if not out.requires_grad:
        return [out]
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).sin().view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, given if sinks is None else [*given, sinks], weight)]


CASES: dict[str, tuple[list[Segment], Shape, dict[str, Any]]] = {
    "two rows of one prompt": (forest([(300, (200, 77))]), (4, 4, 64, 64), {}),
    "trees of three levels, GQA": (grown(1, 2500), (8, 2, 128, 128), {}),
    "window": (grown(2, 2500), (8, 2, 64, 64), {"window": 150}),
    "soft-cap, own scale": (grown(3, 1500), (4, 2, 128, 128), {"softcap": 20.0, "scale": 0.11}),
    "sinks, window": (grown(4, 1500), (4, 2, 64, 64), {"sinks": True, "window": 128}),
    "soft-cap and sinks, head of 256": (grown(5, 800), (2, 1, 256, 256), {"sinks": True, "softcap": 5.0}),
    "narrow heads, other width of values": (grown(6, 900), (4, 4, 48, 32), {}),
    "rows alone": (forest([(n, ()) for n in (1, 130, 700, 128)]), (8, 2, 128, 128), {}),
    "rows alone, window": (forest([(n, ()) for n in (1, 130, 700, 128)]), (8, 2, 64, 64), {"window": 100}),
}
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


def check(device: torch.device, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """How far a case is from float32 attention segment by segment, as a share of the largest number."""
    segments, shape, how = CASES[name]
    how, tree, learns = dict(how), TreeLayout(segments), device.type == "cuda"
    torch.manual_seed(0)
    sinks = torch.randn(shape[0], device=device).to(dtype) if how.pop("sinks", False) else None
    leaves = tensors(device, dtype, segments[-1].end, shape, learns)
    plain = {"scale": None, "softcap": None, **how}
    wide = [x.detach().double().float().requires_grad_(learns) for x in leaves]
    expected = computed(
        lambda *qkv, **more: attention.segment_attention(tree, *qkv, **more),
        wide, None if sinks is None else sinks.float(), **plain,
    )  # fmt: skip
    tables = block_mask.on_device(block_mask.block_tables(segments, how.get("window")), device)
    found: dict[str, Any] = {}
    by_flex = computed(
        lambda *qkv, **more: block_mask.flex_tree_attention(*qkv, tables, compiled=learns, **more),
        leaves, sinks, **plain,
    )  # fmt: skip
    found["FlexAttention"] = [attention.share_off(a, b) for a, b in zip(by_flex, expected, strict=True)]
    kind = block_mask.kind_of(*(x.transpose(1, 2) for x in leaves), window=None, scale=None, softcap=None, sinks=sinks)
    if learns and tree.is_flat and block_mask.flash_takes(kind):
        by_flash = computed(
            lambda *qkv, **more: attention._by_flash(tree, *qkv, **more), leaves, sinks, **plain
        )  # fmt: skip
        found["flash attention"] = [attention.share_off(a, b) for a, b in zip(by_flash, expected, strict=True)]
    found["holds"] = all(max(each) <= LIMITS[dtype] for each in found.values())
    if learns:
        as_used = computed(
            lambda *qkv, **more: attention.device_attention(tree, *qkv, dropout=0.0, **more), leaves, sinks,
            **{"window": None, **plain},
        )  # fmt: skip
        found["as used"] = max(attention.share_off(a, b) for a, b in zip(as_used, expected, strict=True))
    return found


def by_flex(tree: TreeLayout, query: Tensor, key: Tensor, value: Tensor, *, window: int | None, **how: Any) -> Tensor:
    """As it is used on a GPU; without a kernel on a CPU."""
    tables = attention._tables(tree, window, query.device)
    return block_mask.flex_tree_attention(
        query, key, value, tables, window=window, compiled=query.is_cuda, **how
    )  # fmt: skip


def compilations(device: torch.device, dtype: torch.dtype, lengths: int = 20) -> dict[str, Any]:
    """Graphs that torch compiled for the first batch, and for the others, each of another length."""
    from torch._dynamo.utils import counters

    learns, after, before = device.type == "cuda", [], int(counters["stats"]["unique_graphs"])
    for seed in range(lengths):
        segments = grown(seed, 300 + 211 * seed)
        leaves = tensors(device, dtype, segments[-1].end, (4, 2, 64, 64), learns)
        tree = TreeLayout(segments)
        with torch.set_grad_enabled(learns):
            computed(lambda *qkv, t=tree, **more: by_flex(t, *qkv, **more), leaves, None,
                     window=None, scale=None, softcap=None)  # fmt: skip
        after.append(int(counters["stats"]["unique_graphs"]))
    return {
        "first": after[0] - before,
        "others": after[-1] - after[0],
        "limit hit": sum(counters["recompile_limit"].values()),
    }


def timed(device: torch.device, work: Callable[[], Any], times: int = 5) -> float:
    """Median milliseconds of a call that is warm."""
    seconds = []
    for _ in range(times + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return round(1e3 * median(seconds[1:]), 3)


def speed(device: torch.device, tokens: int, shape: Shape = (12, 2, 128, 128)) -> dict[str, Any]:
    """Milliseconds of a layer's attention, forward and backward in bf16: trees, rows alone, and rows padded by SDPA.

    Trees: 1,024 tokens with 6 branches of 512. Rows alone: of 2,048. Padded: the trees' rows, each with its prompt.
    """
    learns = device.type == "cuda"
    dtype = torch.bfloat16 if learns else torch.float32
    part = 8 if tokens < 4096 else 1  # a test of this file
    trees = forest([(1024 // part, (512 // part,) * 6)] * max(1, tokens * part // 4096))
    rows = forest([(2048 // part, ())] * max(1, tokens * part // 2048))
    found: dict[str, Any] = {}
    found["mask: ms on the host"] = timed(device, lambda: block_mask.block_tables(trees))
    found["mask: ms to the device"] = timed(
        device, lambda: block_mask.on_device(block_mask.block_tables(trees), device)
    )
    plain: dict[str, Any] = {"scale": None, "softcap": None, "window": None}
    for name, segments, kernel in (
        ("trees, flex", trees, by_flex), ("rows, flex", rows, by_flex),
        ("rows, flash", rows, attention._by_flash),
    ):  # fmt: skip
        if kernel is attention._by_flash and not learns:
            continue
        tree, leaves = TreeLayout(segments), tensors(device, dtype, segments[-1].end, shape, learns)
        with torch.set_grad_enabled(learns):
            found[f"{name}: ms"] = timed(
                device, lambda k=kernel, t=tree, x=leaves: computed(lambda *q, **m: k(t, *q, **m), x, None, **plain)
            )
    whole = tensors(device, dtype, 1536 // part, shape, learns)
    count = sum(segment.parent >= 0 for segment in trees)
    padded = [x.detach().expand(count, -1, -1, -1).contiguous().requires_grad_(learns) for x in whole]
    found["the trees' rows padded, SDPA: ms"] = timed(device, lambda: computed(
        lambda q, k, v, **_: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        padded, None,
    ))  # fmt: skip
    return found


def compiled_layers(device: torch.device, batches: int = 6) -> dict[str, Any]:
    """A model of two layers, each compiled to one graph, against itself before: loss, gradients, compilations."""
    from torch._dynamo.utils import counters
    from transformers import AutoModelForCausalLM, LlamaConfig

    from trl.data.packing import pack
    from trl.data.records import Branch, TokenTree
    from trl.models.scoring import score

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=500, num_key_value_heads=2)).to(device)
    draw = random.Random(0)

    def ids(tokens: int) -> list[int]:
        return [draw.randrange(500) for _ in range(tokens)]

    packs = [
        pack([TokenTree(ids(100 + 37 * i), [Branch(ids(50)), Branch(ids(90 + i))]) for _ in range(2 + i)]).to(device)
        for i in range(batches)
    ]

    def gradients(packed: Any) -> list[Tensor]:
        model.zero_grad()
        logprobs_BT = score(model, packed).logprobs_BT
        logprobs_BT.sum().backward()
        return [logprobs_BT.detach(), *(weight.grad.clone() for weight in model.parameters())]

    expected, after = [gradients(packed) for packed in packs], []
    before = int(counters["stats"]["unique_graphs"])
    for layer in model.model.layers:
        layer.compile(fullgraph=True, dynamic=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    off = 0.0
    for packed, plain in zip(packs, expected, strict=True):
        found = gradients(packed)
        off = max(off, *(attention.share_off(a, b) for a, b in zip(found, plain, strict=True)))
        after.append(int(counters["stats"]["unique_graphs"]))
    return {"off": off, "holds": off < 1e-3, "first": after[0] - before, "others": after[-1] - after[0]}


def run(device: torch.device | str) -> dict[str, Any]:
    """All of it, the parts that say most first; what fails leaves its error."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    results: dict[str, Any] = {"torch": torch.__version__, "flash takes": sorted(block_mask._flash()[1])}

    def attempt(name: str, work: Callable[[], Any]) -> None:
        start = time.perf_counter()
        try:
            results[name] = work()
        except Exception:
            results[name] = {"error": traceback.format_exc(limit=-6)[-3000:]}
        took = round(time.perf_counter() - start, 1)
        if isinstance(results[name], dict):
            results[name]["seconds"] = took
        print(f"{name}: {json.dumps(results[name])[:400]}", flush=True)

    dtypes = (torch.bfloat16, torch.float32) if on_gpu else (torch.float32,)
    first = "trees of three levels, GQA"
    for dtype in dtypes:
        attempt(f"{first}, {dtype}", lambda d=dtype: check(device, first, d))
    attempt("compilations", lambda: compilations(device, dtypes[0], 20 if on_gpu else 2))
    for tokens in (4096, 16384, 65536) if on_gpu else (512,):
        attempt(f"{tokens} tokens", lambda n=tokens: speed(device, n))
    for name in CASES:
        for dtype in dtypes if name == "sinks, window" else dtypes[:1]:  # each is compiled, for some ten seconds
            if name != first:
                attempt(f"{name}, {dtype}", lambda n=name, d=dtype: check(device, n, d))
    attempt("compiled layers", lambda: compiled_layers(device, 6 if on_gpu else 2))
    return results


if __name__ == "__main__":
    where = sys.argv[1] if len(sys.argv) > 1 else "cuda" if torch.cuda.is_available() else "cpu"
    print(json.dumps(run(where), indent=1))
