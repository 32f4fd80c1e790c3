"""Tokens a second on one CPU thread: local sampler, vLLM's offline engine, vLLM server. SmolLM2-135M, 16 x 8 x 64.

    make test-vllm ARGS=--collect-only  # makes the environment
    OMP_NUM_THREADS=1 .venv/vllm/bin/python -m benchmarks.vllm_speed FOLDER_OF_THE_MODEL

Each engine has a process of its own, and they take turns. Prints the table of docs/vllm.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from statistics import median
from typing import Any

PROMPTS, COPIES, TOKENS, TURNS = 16, 8, 64, 3
THINGS = (
    "a lighthouse", "bread", "the moon", "an old bicycle", "a lost key", "the first snow", "a night train", "honey",
    "a map without names", "thunder", "a chess game", "the sea", "a small library", "two brothers", "a clock", "a coin",
)  # fmt: skip
ENGINES = {"local": "local sampler", "offline": "vLLM, offline engine", "server": "vLLM, server"}
SETTINGS = {
    "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


def prompts(tokenizer: Any) -> list[list[int]]:
    """A question each, as a conversation."""
    asked = ([{"role": "user", "content": f"Write a short story about {thing}."}] for thing in THINGS[:PROMPTS])
    return [tokenizer.apply_chat_template(each, add_generation_prompt=True)["input_ids"] for each in asked]


def local(folder: str, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl.generation import make_sampler

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return make_sampler(model, AutoTokenizer.from_pretrained(folder)), []


def offline(folder: str, dtype: str) -> Any:
    from transformers import AutoTokenizer

    from trl.generation.vllm.colocate import ColocatedEngine
    from trl.generation.vllm.sampler import VLLMSampler

    engine = ColocatedEngine.start(
        folder, dtype=dtype, max_model_len=512, max_num_seqs=PROMPTS * COPIES, enforce_eager=True
    )
    return VLLMSampler(engine, None, AutoTokenizer.from_pretrained(folder)), []


def server(folder: str, dtype: str) -> Any:
    from transformers import AutoTokenizer

    from trl.generation.vllm.client import ServerEngine
    from trl.generation.vllm.sampler import VLLMSampler

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={folder}", "--host=127.0.0.1",
        f"--port={port}", f"--dtype={dtype}", "--max-model-len=512", f"--max-num-seqs={PROMPTS * COPIES}",
        "--enable-scale-out", "--no-enable-chunked-prefill", "--logprobs-mode=processed_logprobs", "--enforce-eager",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=sys.stderr)
    engine = ServerEngine(f"http://127.0.0.1:{port}", wait=600.0)
    return VLLMSampler(engine, None, AutoTokenizer.from_pretrained(folder)), [process]


def cpu_seconds() -> float:
    """Of this process and those below it."""
    import psutil

    own = psutil.Process()
    times = [each.cpu_times() for each in [own, *own.children(recursive=True)]]
    return sum(one.user + one.system for one in times)


def work(engine: str, folder: str, dtype: str) -> None:
    """A turn for each line of the input; a line of JSON for each."""
    from transformers import AutoTokenizer

    from trl.generation import SamplingParams

    sampler, processes = {"local": local, "offline": offline, "server": server}[engine](folder, dtype)
    try:
        asked = prompts(AutoTokenizer.from_pretrained(folder))
        sampler.sample(asked, SamplingParams(4, seed=0, stop_token_ids=()))  # what comes once comes now
        print("ready", flush=True)
        for line in sys.stdin:
            begun, cpu = time.perf_counter(), cpu_seconds()
            groups = sampler.sample(asked, SamplingParams(TOKENS, seed=int(line), stop_token_ids=()), n=COPIES)
            seconds, cpu = time.perf_counter() - begun, cpu_seconds() - cpu
            tokens = sum(len(one.ids) for group in groups for one in group)
            print(json.dumps({"tokens": tokens, "seconds": seconds, "cpu": cpu}), flush=True)
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def read(process: subprocess.Popen[str]) -> str:
    """The next line that is ours."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(("{", "ready")):
            return line
    raise SystemExit(f"{process.args} ended: look above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of the model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--worker", choices=list(ENGINES), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        work(asked.worker, asked.folder, asked.dtype)
        return
    command = [sys.executable, "-m", "benchmarks.vllm_speed", asked.folder, "--dtype", asked.dtype, "--worker"]
    workers, found = {}, {name: [] for name in asked.engines}  # type: ignore[var-annotated]
    try:
        for name in asked.engines:
            workers[name] = subprocess.Popen(
                [*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, **SETTINGS}, start_new_session=True,
            )  # fmt: skip
            read(workers[name])
        for turn in range(TURNS):
            for name, worker in workers.items():
                assert worker.stdin is not None
                print(turn, file=worker.stdin, flush=True)
                found[name].append(json.loads(read(worker)))
    finally:
        for worker in workers.values():
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGTERM)
            worker.wait()
    print("| engine | tokens a second | CPU seconds of a turn | all turns |\n|---|---|---|---|")
    for name, turns in found.items():
        speeds = [each["tokens"] / each["seconds"] for each in turns]
        cpu = median(each["cpu"] for each in turns)
        print(f"| {ENGINES[name]} | {median(speeds):.0f} | {cpu:.1f} | {', '.join(f'{each:.0f}' for each in speeds)} |")


if __name__ == "__main__":
    main()
