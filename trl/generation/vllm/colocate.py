"""The engine in this process: vLLM's offline engine, beside the trainer on the same device."""

from __future__ import annotations

import gc
import importlib
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from trl.data.records import Completion, VersionSpan
from trl.generation.vllm.engine import About, EngineError, Request, Settings
from trl.generation.vllm.pictures import check_read, opened
from trl.import_utils import VLLM, is_gpu_available, is_vllm_available, pip_install

logger = logging.getLogger(__name__)


class ColocatedEngine:
    """vLLM's `LLM` as an `Engine`.

    sleeps: it gives its memory on the device back after each round of completions, and takes it again before the next.
    """

    urls: tuple[str, ...] = ()

    def __init__(self, llm: Any, *, sleeps: bool = False) -> None:
        self.llm, self.sleeps = llm, sleeps
        self.vllm = _vllm()
        self._adapters: dict[str, Any] = {}
        self._asleep = False
        self._rest()

    @classmethod
    def start(cls, model: str, *, sleeps: bool = False, **settings: Any) -> ColocatedEngine:
        """An engine that serves a folder or name; settings: keywords of vLLM's `LLM`."""
        # in this process, so that weights can be handed over and random numbers are its own
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        vllm = _vllm()
        given = {"logprobs_mode": "processed_logprobs", "enable_sleep_mode": sleeps, **settings}
        if not is_gpu_available():
            # on a CPU a row with a seed whose prompt is read in parts ends vLLM: "CPU Generator does not use offset"
            given.setdefault("enable_chunked_prefill", False)
        try:
            llm = vllm.LLM(model=model, **given)
        except (RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())[:300]
            raise EngineError(
                f"vLLM could not start in this process with {model}: {said}; where memory is short, lower "
                "vllm_gpu_memory_utilization or vllm_max_model_length, or take vllm_mode='server'"
            ) from error
        return cls(llm, sleeps=sleeps)

    def about(self) -> About:
        config = self.llm.llm_engine.model_config
        return About(str(self.vllm.__version__), str(config.model), config.max_model_len, tuple(self._adapters))

    def settings(self) -> Settings:
        config = getattr(self.llm.llm_engine, "vllm_config", None)
        if config is None:
            return Settings()
        adapters = getattr(config, "lora_config", None)
        rank = 0 if adapters is None else int(adapters.max_lora_rank)
        return Settings(str(config.model_config.dtype), rank, (int(config.parallel_config.world_size),))

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        adapters = [None if each.adapter is None else self._adapter(each.adapter) for each in requests]
        answers = self._run(requests, [self._params(each.params) for each in requests], adapters)
        for request, answer in zip(requests, answers, strict=True):
            check_read(request, getattr(answer, "prompt_token_ids", None))
        return [[_completion(one) for one in answer.outputs] for answer in answers]

    def prompt_logprobs(self, rows: Sequence[Sequence[int]], top: int = 0, adapter: str | None = None) -> list[Any]:
        asked = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": top, "detokenize": False}
        chosen = None if adapter is None else self._adapter(adapter)
        requests = [Request(row, asked) for row in rows]
        answers = self._run(requests, [self._params(asked) for _ in rows], [chosen] * len(rows))
        return [
            [{token: float(one.logprob) for token, one in entry.items()} for entry in answer.prompt_logprobs[1:]]
            for answer in answers
        ]

    def tokenized(self, text: str) -> list[int] | None:
        tokenizer = self.llm.get_tokenizer()
        return None if tokenizer is None else list(tokenizer.encode(text, add_special_tokens=False))

    def pause(self, *, clear_cache: bool = True, mode: str = "wait") -> None:
        """Nothing is in flight between two calls; only the cache is emptied."""
        self._wake()
        if clear_cache:
            self.llm.reset_prefix_cache()

    def resume(self) -> None:
        self._rest()

    def load_adapter(self, name: str, folder: str) -> None:
        self._wake()
        number = len(self._adapters) + 1 if name not in self._adapters else self._adapters[name].lora_int_id
        request = importlib.import_module("vllm.lora.request").LoRARequest
        loaded = request(lora_name=name, lora_int_id=number, lora_path=str(folder), load_inplace=True)
        try:
            self.llm.llm_engine.add_lora(loaded)
        except Exception as error:
            raise EngineError(f"vLLM could not load the adapter of {folder}: {_one_line(error)}") from error
        # once in its place, it is not read again for every request
        self._adapters[name] = request(lora_name=name, lora_int_id=number, lora_path=str(folder))

    def reload_weights(self, folder: str) -> None:
        self._wake()
        try:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        except Exception as error:
            raise EngineError(f"vLLM could not load the weights of {folder}: {_one_line(error)}") from error
        self.llm.reset_prefix_cache()

    def take_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the weights by these, one after the other."""
        self._wake()
        try:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        except Exception as error:
            raise EngineError(f"vLLM could not take the weights: {_one_line(error)}") from error
        self.llm.reset_prefix_cache()

    def set_version(self, version: str) -> None:
        self.llm.update_weight_version(version)

    def close(self) -> None:
        """Give the device's memory back."""
        llm, self.llm = self.llm, None
        core = getattr(getattr(llm, "llm_engine", None), "engine_core", None)
        if core is not None and hasattr(core, "shutdown"):
            core.shutdown()
        del llm, core
        gc.collect()  # its parts hold each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # -- what vLLM's own transfer of weights asks (its `VLLMWeightSyncClient`) ----------------------

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def shutdown_weight_transfer_engine(self) -> None:
        self.llm.shutdown_weight_transfer_engine()

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.llm.finish_weight_update(weight_version)

    # -- inside ------------------------------------------------------------------------------------

    def _run(self, requests: Sequence[Request], params: Sequence[Any], adapters: Sequence[Any]) -> list[Any]:
        if not requests:
            return []
        self._wake()
        prompts = list(map(_prompt, requests))
        one = adapters[0] if len({id(adapter) for adapter in adapters}) == 1 else None
        try:
            answers = self.llm.generate(prompts, list(params), use_tqdm=False, lora_request=one or list(adapters))
        except Exception as error:
            raise EngineError(f"vLLM failed in this process: {_one_line(error)}{_way_out(error)}") from error
        self._rest()
        return list(answers)

    def _params(self, asked: dict[str, Any]) -> Any:
        given = dict(asked)
        structured = given.pop("structured_outputs", None)
        if structured is not None:
            made = importlib.import_module("vllm.sampling_params").StructuredOutputsParams
            given["structured_outputs"] = made(**structured)
        return self.vllm.SamplingParams(**given)

    def _adapter(self, name: str) -> Any:
        if name not in self._adapters:
            raise EngineError(f"vLLM has no adapter {name!r}; it has {', '.join(self._adapters) or 'none'}")
        return self._adapters[name]

    def _wake(self) -> None:
        if self._asleep:
            self.llm.wake_up()
            self._asleep = False

    def _rest(self) -> None:
        if self.sleeps and not self._asleep:
            self.llm.sleep(level=1)
            self._asleep = True


def _vllm() -> Any:
    if not is_vllm_available():
        raise ImportError(
            f"vLLM is not installed: {pip_install(VLLM)}; or sample by a server (vllm_mode='server'), or without "
            "vLLM (use_vllm=False)"
        )
    return importlib.import_module("vllm")


def _prompt(request: Request) -> dict[str, Any]:
    """A prompt in vLLM's own words."""
    prompt: dict[str, Any] = {"prompt_token_ids": list(map(int, request.prompt))}
    if request.pictures:
        prompt["multi_modal_data"] = {"image": list(map(opened, request.pictures))}
        prompt["multi_modal_uuids"] = {"image": list(map(str, request.pictures))}
    return prompt


def _completion(output: Any) -> Completion:
    ids = list(map(int, output.token_ids))
    if output.finish_reason not in ("stop", "length") or not ids:
        raise EngineError(f"vLLM ended a completion of {len(ids)} tokens by {output.finish_reason!r}, not by itself")
    logprobs = [float(entry[token].logprob) for entry, token in zip(output.logprobs, ids, strict=True)]
    spans = tuple(VersionSpan(str(s.version), s.start, s.end) for s in output.weight_versions or ())
    mask = None if output.sampling_mask is None else [list(kept) for kept in output.sampling_mask.token_ids]
    return Completion(ids, logprobs, logprobs, output.finish_reason, spans, mask, output.routed_experts)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _way_out(error: object) -> str:
    short = "out of memory" in str(error).lower()
    return "; lower vllm_gpu_memory_utilization, or the trainer's batch" if short else ""
