"""A real vLLM server on this machine: started, waited for, asked, killed; and the tiny models that it serves."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import torch
from safetensors.torch import load_file, save_file
from tokenizers_for_tests import WORDS, word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

READY = 420.0
"""seconds from its start until it must answer: 40 on an idle machine, 150 on a loaded one"""
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
FURTHER = ("--max-num-seqs=64", "--max-logprobs=-1")
"""words that go to vLLM as they are"""


def tiny_llama(tied: bool = False, seed: int = 0, **more: Any) -> LlamaForCausalLM:
    """Two layers with heads of width 64, the least that vLLM's attention on CPUs computes; 100 words."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": 100, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "initializer_range": 0.1,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": tied,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**shape, **more})).eval()


def tokenizer() -> Any:
    """Words, among them a call of a tool, its answer, and the end of an episode: a token each."""
    return word_tokenizer((*WORDS, CALL, ANSWER, "<submit>"))


CALL, ANSWER = "<request><double>two<call>", "four<response>"


def saying(*words: str) -> LlamaForCausalLM:
    """A model that says these words, each behind the one before it, whatever else there is."""
    model, names = tiny_llama(), tokenizer()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(100, 128))
        model.lm_head.weight.zero_()
        for word, following in itertools.pairwise(names.convert_tokens_to_ids(list(words))):
            model.lm_head.weight[following, word] = 3.0
    return model


def save(model: Any, folder: Path) -> Path:
    """With a tied head under its own name too: a server that loads the folder again would else keep its head."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    held = load_file(file)
    save_file({**held, "lm_head.weight": model.lm_head.weight.detach().clone()}, file, metadata={"format": "pt"})
    tokenizer().save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Server:
    """A process group of its own, which ends with `close`, whatever happened.

    adapters: whether it takes them; on a CPU vLLM ends where it then scores several prompts in one step.
    """

    def __init__(self, folder: Path, log: Path, port: int | None = None, *, adapters: bool = False) -> None:
        self.folder, self.log, self.adapters = folder, log, adapters
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        command = [
            sys.executable, "-m", "trl", "vllm-serve", "--model", str(self.folder), "--port", str(self.port),
            "--max-model-len", "256", "--max-lora-rank", "8" if self.adapters else "0", *FURTHER,
        ]  # fmt: skip
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **SETTINGS}, start_new_session=True
            )
        return self

    def wait(self) -> Server:
        """Until it answers; its log is in the error where it does not."""
        assert self.process is not None
        until = time.monotonic() + READY
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.tail()}")
            with contextlib.suppress(httpx2.HTTPError):
                if httpx2.get(f"{self.url}/health", timeout=10).status_code == 200:
                    return self
            time.sleep(0.5)
        raise AssertionError(f"the server did not answer in {READY:g} s:\n{self.tail()}")

    def post(self, path: str, body: dict[str, Any] | None = None, **query: Any) -> Any:
        answer = httpx2.post(self.url + path, json=body, params=query, timeout=120)
        assert answer.status_code == 200, (path, answer.status_code, answer.text)
        return answer.json() if answer.headers.get("content-type", "").startswith("application/json") else answer.text

    def begin_anew(self) -> None:
        """Its first weights, their first stamp."""
        self.post("/resume")
        self.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}})
        self.post("/reset_prefix_cache")
        self.post("/update_weight_version", {"new_version": "default"})

    def kill(self) -> None:
        """SIGKILL to all of its processes at once."""
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        self._signal(signal.SIGKILL)

    def _signal(self, which: signal.Signals) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, which)
            self.process.wait()

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
