"""An engine of vLLM's protocol in this process: a tiny model that loads what it is given, and scores with it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from trl.data.records import Completion, VersionSpan
from trl.generation.vllm.engine import About, EngineError, Request, Settings


class LoadingEngine:
    """`calls`: the verbs in their order. `refuses`: verb -> what it says instead of doing anything."""

    def __init__(self, model: Any, **refuses: str) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.adapters: dict[str, Any] = {}
        self.version, self.calls, self.refuses = "default", [], dict(refuses)
        self.folders: list[str] = []

    def _called(self, name: str, *what: Any) -> None:
        self.calls.append(" ".join([name, *map(str, what)]))
        if name in self.refuses:
            raise EngineError(self.refuses[name])

    def about(self) -> About:
        self._called("about")
        return About("0.32.0", "folder", None, tuple(self.adapters))

    def settings(self) -> Settings:
        return Settings()

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        self._called("generate")
        if any(request.adapter not in (None, *self.adapters) for request in requests):
            raise EngineError("no such adapter")
        return [[Completion([3], [-1.0], [-1.0], "length", (VersionSpan(self.version, 0, 1),))] for _ in requests]

    def prompt_logprobs(self, rows: Sequence[Sequence[int]], top: int = 0, adapter: str | None = None) -> list[Any]:
        self._called("prompt_logprobs")
        network = self.adapters.get(adapter or "", self.model)
        found = []
        for row in rows:
            logprobs_TV = network(input_ids=torch.tensor([list(row)])).logits[0].log_softmax(-1)
            found.append([{t: float(logprobs_TV[at, t])} for at, t in enumerate(row[1:])])
        return found

    def tokenized(self, text: str) -> list[int] | None:
        return None

    def pause(self, *, clear_cache: bool = True, mode: str = "wait") -> None:
        self._called("pause", mode)

    def resume(self) -> None:
        self._called("resume")

    def load_adapter(self, name: str, folder: str) -> None:
        from peft import PeftModel

        self._called("load_adapter", name)
        self.folders.append(folder)
        self.adapters[name] = PeftModel.from_pretrained(copy.deepcopy(self.model), folder).eval()

    def reload_weights(self, folder: str) -> None:
        self._called("reload_weights")
        self.folders.append(folder)
        loaded = {
            key: value for file in sorted(Path(folder).glob("*.safetensors")) for key, value in load_file(file).items()
        }
        self.model.load_state_dict(loaded)

    def take_weights(self, weights: Any) -> None:
        self._called("take_weights")
        self.model.load_state_dict({name: tensor.clone() for name, tensor in weights})

    def set_version(self, version: str) -> None:
        self._called("set_version", version)
        self.version = version

    def close(self) -> None:
        self._called("close")
