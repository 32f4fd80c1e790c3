"""What the jobs share. They run beside any release of `trl`, so they import nothing of this project by name but that.

A job is a process `python JOB.py OUT SETTINGS`: a file that gets a line of JSON for each thing that is known, so that a
job that is stopped leaves what it had measured, and a JSON of settings.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

OUT, SETTINGS = Path(sys.argv[1]), json.loads(sys.argv[2])
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
TINY = bool(SETTINGS.pop("tiny", not CUDA))
"""sizes for a test of the jobs themselves"""

MODELS = {
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "tiny": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
}
"""the shapes of Qwen2.5, with two heads of keys and values, embedding and head tied"""
VOCABULARY = 300 if TINY else 151_936


def record(name: str, value: Any) -> None:
    """One line of the result; a later value of a name replaces an earlier one."""
    with OUT.open("a") as file:
        file.write(json.dumps({name: value}) + "\n")
    print(f"{name}: {value}", flush=True)


@contextmanager
def attempt(name: str) -> Iterator[None]:
    """What fails inside is recorded under the name, and the job goes on."""
    try:
        yield
    except Exception:
        record(name, {"error": traceback.format_exc(limit=-12)})
        if CUDA:
            torch.cuda.empty_cache()


def compared(name: str, found: float, limit: float, **more: Any) -> None:
    """An error and what it may be at most."""
    record(name, {"error_found": found, "limit": limit, "holds": bool(found <= limit), **more})


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|; nan does not pass any limit."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def model_config(name: str, **more: Any) -> Any:
    from transformers import Qwen2Config

    sizes = MODELS["tiny" if TINY else name]
    return Qwen2Config(
        **sizes, vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=32_768,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=2, **more,
    )  # fmt: skip


def model(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Random weights, made on the device; the same for the same seed."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with DEVICE:
        return AutoModelForCausalLM.from_config(model_config(name), dtype=dtype)


def tokenizer() -> Any:
    """Words are `w17` and the like; no token is added in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<unk>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=32_768
    )


def text(tokens: int, seed: int) -> str:
    """So many words, each of the vocabulary equally often."""
    ids = torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(f"w{i}" for i in ids)


def forward_flops(name: str, rows: list[tuple[int, int]], scored: int) -> float:
    """Operations of a forward pass over rows of (tokens, tokens before that are seen too); the head where it is read.

    A product of M x K and K x N numbers has 2 M K N operations; attention has two of them for each key that is seen.
    """
    c = model_config(name)
    head = c.hidden_size // c.num_attention_heads
    attended = c.hidden_size * 2 + head * c.num_key_value_heads * 2
    weights = c.num_hidden_layers * c.hidden_size * (attended + 3 * c.intermediate_size)
    tokens = sum(n for n, _ in rows)
    seen = sum(n * (n + 1) // 2 + n * before for n, before in rows)
    attention = c.num_hidden_layers * 4 * c.hidden_size * seen
    return float(2 * weights * tokens + attention + 2 * c.hidden_size * c.vocab_size * scored)


class Clock:
    """Moments on the device's own clock, read when all is done; on a CPU on the wall's."""

    def __init__(self) -> None:
        self.marks: list[Any] = []

    def mark(self) -> None:
        if not CUDA:
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def seconds(self) -> list[float]:
        """Between each mark and the next."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if not CUDA:
            return [later - earlier for earlier, later in pairs]
        torch.cuda.synchronize()
        return [earlier.elapsed_time(later) / 1e3 for earlier, later in pairs]


def timed(work: Callable[[], Any], *, warm: int = 2, times: int = 5) -> float:
    """Median seconds of a call on the device."""
    if TINY:
        warm, times = 1, 1
    for _ in range(warm):
        work()
    clock = Clock()
    clock.mark()
    for _ in range(times):
        work()
        clock.mark()
    return median(clock.seconds())


def fresh_peak() -> None:
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Most memory that tensors had on the device; of the process on a CPU."""
    if CUDA:
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def folder() -> str:
    """For what a trainer writes."""
    return os.fspath(OUT.with_suffix(".run"))


WAITS = ("aten::item", "aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::nonzero")
"""what waits for the device, by its name in a profile"""


class Inside:
    """What the device did between two moments: kernels and their time, waits, and the longest by their sums."""

    def __init__(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._profile = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])])

    def start(self) -> None:
        if CUDA:
            torch.cuda.synchronize()
        self._profile.start()
        self._start = time.perf_counter()

    def stop(self) -> dict[str, Any]:
        if CUDA:
            torch.cuda.synchronize()
        wall = time.perf_counter() - self._start
        self._profile.stop()
        events = self._profile.key_averages()
        ran = [each for each in events if CUDA and "cuda" in str(each.device_type).lower()]

        def spent(event: Any) -> float:
            return float(event.self_device_time_total if event in ran else event.self_cpu_time_total) / 1e6

        def longest(of: list[Any]) -> list[list[Any]]:
            return [[each.key[:90], each.count, round(spent(each), 5)] for each in sorted(of, key=spent)[:-26:-1]]

        counts = {each.key: each.count for each in events}
        return {
            "wall": wall,
            "busy": sum(map(spent, ran)),
            "kernels": sum(each.count for each in ran),
            "waits": {name: counts[name] for name in WAITS if name in counts},
            "longest": longest(ran),
            "host": longest([each for each in events if each not in ran]),
        }
