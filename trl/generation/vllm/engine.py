"""What sampler and makers of weights ask of an engine of vLLM: a server over HTTP, or the one in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trl.data.records import Completion


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and what is asked for it, in vLLM's own words."""

    prompt: Sequence[int]
    """token ids; where it has pictures, a placeholder for each"""
    params: dict[str, Any]
    """vLLM's sampling parameters: n, max_tokens, temperature, top_p, ..., seed"""
    adapter: str | None = None
    """name of a loaded adapter; None: the model itself"""
    pictures: tuple[int, ...] = ()
    """the numbers of its pictures, in order"""
    whole: tuple[int, ...] = ()
    """the prompt with all tokens of its pictures, as the engine has to read it; of one with pictures"""


@dataclass(frozen=True, slots=True)
class About:
    """What an engine says of itself."""

    release: str
    """of vLLM, such as "0.32.0\""""
    model: str
    """the folder or name that it serves"""
    max_model_len: int | None
    adapters: tuple[str, ...] = ()
    """names of loaded adapters"""


@dataclass(frozen=True, slots=True)
class Settings:
    """How an engine was started, as far as it says so."""

    dtype: str | None = None
    """in which it computes, such as "torch.float32\""""
    max_lora_rank: int | None = None
    """of adapters; 0: it takes none"""
    workers: tuple[int, ...] = ()
    """processes of each server"""


class Engine(Protocol):
    """Samples tokens from tokens, scores tokens, takes weights. Every verb raises `EngineError` where it fails."""

    def about(self) -> About:
        """Who answers; asked at the start and after each failure."""
        ...

    def settings(self) -> Settings:
        """How it was started; asked once."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """The completions of each request, in their order, with log-probabilities and the spans of weight versions."""
        ...

    def prompt_logprobs(self, rows: Sequence[Sequence[int]], top: int = 0, adapter: str | None = None) -> list[Any]:
        """For each row and token but the first: `{token id: log-probability}` of the token, and of the `top` best."""
        ...

    def tokenized(self, text: str) -> list[int] | None:
        """The text as tokens of the engine's own tokenizer, without special ones; None where it has none."""
        ...

    def pause(self, *, clear_cache: bool = True, mode: str = "wait") -> None:
        """Take no further request until `resume`. mode of those in flight: wait for them, abort them, or keep them."""
        ...

    def resume(self) -> None:
        """Go on after `pause`."""
        ...

    def load_adapter(self, name: str, folder: str) -> None:
        """Load an adapter, in the place of one of the same name."""
        ...

    def reload_weights(self, folder: str) -> None:
        """Replace the weights by those of a folder."""
        ...

    def set_version(self, version: str) -> None:
        """Stamp the weights that are there now: completions made from here on bear it in their spans."""
        ...

    def close(self) -> None:
        """Give back what the engine holds here; a server goes on."""
        ...


class WeightSync(Protocol):
    """Gives the policy's weights to an engine, in one of several ways."""

    @property
    def adapter(self) -> str | None:
        """Name of the engine's adapter that is the policy; None: its model is."""
        ...

    def push(self, engine: Engine, version: str) -> None:
        """Give the engine the policy's weights of now and stamp them; returns when it samples by them. Collective."""
        ...

    def again(self, engine: Engine, version: str) -> None:
        """Give an engine that has lost them the same weights once more. Not collective; EngineError if it cannot."""
        ...


class EngineError(RuntimeError):
    """An engine did not do what it was asked for: what, where, the way out."""
