"""Tokens a second of the local sampler: groups of 8 on prompts of 1,024 tokens."""

from __future__ import annotations

import sys
import time

import torch
from common import CUDA, DEVICE, SETTINGS, TINY, VOCABULARY, Inside, attempt, fresh_peak, model, peak_gib, record

from trl.generation import LocalSampler
from trl.generation.sampler import SamplingParams

PROMPT = 6 if TINY else 1024


def main() -> None:
    policy = model(SETTINGS["model"], dtype=torch.bfloat16 if CUDA else torch.float32).eval()
    if SETTINGS.get("liger") and CUDA:
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(policy, None)
    draw = torch.Generator().manual_seed(0)
    for rows in (2, 4) if TINY else SETTINGS["rows"]:
        prompts = [torch.randint(3, VOCABULARY, (PROMPT,), generator=draw).tolist() for _ in range(max(1, rows // 8))]
        group = rows // len(prompts)
        sampler = LocalSampler(policy, max_rows=max(rows, 128))
        seconds: dict[int, float] = {}
        for tokens in (8, 1, 8) if TINY else (16, 1, 32, SETTINGS["tokens"]):  # the first to warm up
            params = SamplingParams(max_new_tokens=tokens, stop_token_ids=(), seed=0)
            fresh_peak()
            start = time.perf_counter()
            with torch.no_grad():
                sampler.sample(prompts, params, n=group)
            seconds[tokens] = time.perf_counter() - start
        record(
            f"{rows} rows",
            {
                "seconds": seconds[tokens], "tokens_s": rows * tokens / seconds[tokens], "peak_gib": peak_gib(),
                "seconds_by_tokens": seconds,
            },
        )  # fmt: skip
        with attempt(f"{rows} rows, profile"), torch.no_grad():
            inside = Inside()
            inside.start()
            sampler.sample(prompts, SamplingParams(max_new_tokens=16, stop_token_ids=(), seed=0), n=group)
            record(f"{rows} rows, profile", {"tokens": 16, "device": DEVICE.type, **inside.stop()})


if __name__ == "__main__":
    main()
    sys.exit(0)
