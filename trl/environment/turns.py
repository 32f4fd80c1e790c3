"""The turns of the model, made by a sampler, or by `generate` where no sampler knows the keywords."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from trl.generation import make_sampler
from trl.generation.generate_kwargs import sampling_params
from trl.generation.plain_generate import plain_generate
from trl.generation.sampler import Sampler, SamplingParams
from trl.models.prepare import context_length
from trl.models.unwrap import below_value_head, is_encoder_decoder

Turn = tuple[Tensor, Tensor | None]
"""token ids, and their log-probabilities if known"""


class Turns(Protocol):
    """Makes the turns of a model."""

    @property
    def rows_are_apart(self) -> bool:
        """Whether a row's turn does not depend on which rows share its batch."""
        ...

    def speak(self, texts: Sequence[Tensor], seeds: Sequence[int] | None = None, most: int | None = None) -> list[Turn]:
        """The tokens that the model adds to each of the 1-d `texts`: at most `most`, none where its context is full."""
        ...


@dataclass(frozen=True)
class SampledTurns:
    """Turns made by a sampler. `context`: most tokens of text and turn together; None: no limit is known."""

    sampler: Sampler
    params: SamplingParams
    context: int | None = None
    rows_are_apart: bool = True

    def stopping_at(self, ends: Iterable[int]) -> SampledTurns:
        """The same turns, which end at these tokens too."""
        stops = tuple(sorted({*(self.params.stop_token_ids or ()), *ends}))
        return replace(self, params=replace(self.params, stop_token_ids=stops))

    def speak(self, texts: Sequence[Tensor], seeds: Sequence[int] | None = None, most: int | None = None) -> list[Turn]:
        speaking = [i for i, text in enumerate(texts) if self.context is None or len(text) < self.context]
        turns: list[Turn] = [(text[:0], None) for text in texts]
        if not speaking:
            return turns
        own = None if seeds is None else tuple(seeds[i] for i in speaking)
        longest = self.params.max_new_tokens if most is None else min(most, self.params.max_new_tokens)
        params = replace(self.params, seed=own, max_new_tokens=longest)
        sampled = self.sampler.sample([texts[i].tolist() for i in speaking], params)
        for i, (completion,) in zip(speaking, sampled, strict=True):
            logprobs = torch.tensor(completion.logprobs, device=texts[i].device)
            turns[i] = (texts[i].new_tensor(completion.ids), logprobs)
        return turns


@dataclass
class ModelTurns:
    """Turns of a model that follows the keywords of `generate`. Each ends with a stop string or an end token."""

    model: Any
    tokenizer: Any
    generation_kwargs: Mapping[str, Any]
    stop_strings: Sequence[str]
    samplers: dict[int, Sampler] = field(default_factory=dict)
    """made so far, by their `max_rows`"""

    def __post_init__(self) -> None:
        self.params = sampling_params(self.model, self.generation_kwargs, stop_strings=self.stop_strings)
        self.context = None if is_encoder_decoder(self.model) else context_length(below_value_head(self.model))

    @property
    def rows_are_apart(self) -> bool:
        return self.params is not None

    def speak(
        self, texts: Sequence[Tensor], seeds: Sequence[int] | None = None, most: int | None = None, max_rows: int = 128
    ) -> list[Turn]:
        if self.params is not None:
            if max_rows not in self.samplers:
                self.samplers[max_rows] = make_sampler(self.model, self.tokenizer, max_rows=max_rows)
            return SampledTurns(self.samplers[max_rows], self.params, self.context).speak(texts, seeds, most)
        room = [self.context is None or len(text) < self.context for text in texts]
        said = iter(self.generate([text for text, there in zip(texts, room, strict=True) if there], max_rows))
        return [(next(said)[:most] if there else text[:0], None) for text, there in zip(texts, room, strict=True)]

    def generate(self, texts: Sequence[Tensor], batch_size: int, pad_to_multiple_of: int | None = None) -> list[Tensor]:
        """Turns made by the model's own `generate`, which draws from torch's global generator."""
        return plain_generate(
            below_value_head(self.model), self.tokenizer, texts, self.generation_kwargs, self.stop_strings, batch_size,
            pad_to_multiple_of,
        )  # fmt: skip
