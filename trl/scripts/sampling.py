"""The sampling options that several commands take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from trl.generation.sampler import SamplingParams

Temperature = Annotated[
    float | None, typer.Option(help="0: the likeliest word always (default: the model's own setting, else 0.7).")
]
TopK = Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens; 0: all.")]
TopP = Annotated[float | None, typer.Option(help="Sample among the likeliest tokens of this probability; 1: all.")]
MinP = Annotated[float | None, typer.Option(help="Sample among tokens at least this fraction as likely as the best.")]
Penalty = Annotated[float | None, typer.Option(help="Penalty for tokens that are there already; 1: none.")]
USUAL = 0.7
"""temperature of a model whose generation config does not say how it samples"""


@dataclass(frozen=True)
class Asked:
    """How a user wants to sample; None: as the model's generation config says."""

    max_new_tokens: int
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def params(self, model: Any, stop_strings: Sequence[str] = (), ends: Sequence[int] | None = None) -> SamplingParams:
        """For this model."""
        from trl.generation.sampler import SamplingParams

        own = _own(model)
        temperature = own.get("temperature", USUAL) if self.temperature is None else self.temperature
        given = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        filters: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if temperature > 0:
            filters = {**{name: own[name] for name in given if name in own}, **filters}
        penalty = own.get("repetition_penalty", 1.0) if self.repetition_penalty is None else self.repetition_penalty
        return SamplingParams(
            self.max_new_tokens, temperature=temperature, repetition_penalty=penalty, stop_strings=tuple(stop_strings),
            stop_token_ids=None if ends is None else tuple(ends), **filters,
        )  # fmt: skip


def _own(model: Any) -> dict[str, Any]:
    """What the model's generation config says of sampling, where it samples."""
    from trl.models.unwrap import below_peft

    config = getattr(below_peft(model), "generation_config", None)
    if config is None or not getattr(config, "do_sample", False):
        return {}
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {name: value for name in names if (value := getattr(config, name, None)) is not None}


def in_words(params: SamplingParams) -> str:
    """How it samples, for a line."""
    parts = [f"temperature {params.temperature:g}"]
    usual = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    parts += [f"{name} {getattr(params, name):g}" for name, off in usual.items() if getattr(params, name) != off]
    return ", ".join(parts)
