"""The protocol of all samplers: prompts in, completions with their log-probabilities out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trl.data.records import Completion


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are sampled.

    Filters apply in the order of `transformers`: repetition penalty, `min_new_tokens`, temperature, top-k, top-p,
    min-p.
    """

    max_new_tokens: int
    """longest completion; the model's context may cut a row earlier"""
    temperature: float = 1.0
    """0: always the most probable token"""
    top_k: int = 0
    """sample among the k most probable tokens; 0: all"""
    top_p: float = 1.0
    """sample among the smallest set of tokens whose probability reaches this; 1: all"""
    min_p: float = 0.0
    """sample among tokens at least this fraction as probable as the most probable one; 0: all"""
    repetition_penalty: float = 1.0
    """positive logits of tokens in the prompt or completion are divided by it, negative ones multiplied; 1: off"""
    min_new_tokens: int = 0
    """no end token and no stop string ends a completion shorter than this"""
    say_kept: bool = False
    """say of each token which ones the filters left to choose from (`Completion.kept`)"""
    stop_token_ids: tuple[int, ...] | None = None
    """tokens that end a completion and belong to it; None: the model's own end tokens; (): none"""
    stop_strings: tuple[str, ...] = ()
    """texts that end a completion and belong to it; only generated text is searched"""
    seed: int | tuple[int, ...] | None = None
    """A row's random numbers depend on the seed, its prompt, the number of its copy and the step, but not on the other
    rows. So one seed gives a prompt the same completion in every call: use another seed for each call. A tuple: one
    seed for each prompt. None: drawn from torch's global generator."""

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 or more")
        _require(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0, up to 1 (off)")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 (off) to 1")
        _require(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "more than 0; 1 is off")
        _require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens", self.min_new_tokens, f"from 0 to max_new_tokens={self.max_new_tokens}",
        )  # fmt: skip
        _require(not isinstance(self.stop_strings, str), "stop_strings", self.stop_strings, "a tuple of strings")
        _require(all(self.stop_strings), "stop_strings", self.stop_strings, "strings that are not empty")
        if self.temperature == 0 and (self.top_k or self.top_p < 1 or self.min_p):
            raise ValueError(
                f"temperature=0 always takes the most probable token: top_k={self.top_k}, top_p={self.top_p}, "
                f"min_p={self.min_p} would have no effect; leave them off"
            )

    @property
    def reshapes(self) -> bool:
        """Whether the sampled distribution differs from the model's own."""
        off = (1.0, 0, 1.0, 0.0, 1.0, 0)
        return off != (
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, self.min_new_tokens
        )  # fmt: skip


class Sampler(Protocol):
    """Turns prompts into completions: the local engine, `model.generate`, or a server."""

    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams, n: int = 1) -> list[list[Completion]]:
        """`n` completions of each prompt, in the order of the prompts."""
        ...


class FollowingSampler(Sampler, Protocol):
    """A sampler with weights of its own, which follow the policy's: an engine beside the trainer."""

    def follow(self, version: int) -> None:
        """Take the policy's weights of now, which bear this number; nothing where it has them. Collective.

        What is sampled afterwards was sampled by these weights, and says so (`Completion.versions`).
        """
        ...

    def close(self) -> None:
        """Give back what the sampler holds."""
        ...


def is_exact(sampler: Any) -> bool:
    """Whether the sampler computes with the policy's own weights and code, so that a first ratio is 1.

    An engine of its own differs by rounding at least; a user's sampler may say `exact = True`.
    """
    return bool(getattr(sampler, "exact", False))


def check_sampler(sampler: Any) -> None:
    """ValueError for a user's sampler that is none."""
    if sampler is not None and not callable(getattr(sampler, "sample", None)):
        raise ValueError(
            f"sampler: a {type(sampler).__name__} has no `sample(prompts, params, n)`; see trl.generation.Sampler"
        )


def _require(holds: bool, field: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{field}={value!r}: give {allowed}")
