"""The turns of the model: by a sampler that gives every row its own random numbers, or else by `generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from trl.environment.plain_generate import plain_generate
from trl.generation.choose import make_sampler
from trl.generation.generate_kwargs import sampling_params
from trl.generation.sampler import Sampler
from trl.models.prepare import context_length
from trl.models.scoring import backbone, is_encoder_decoder

Turn = tuple[Tensor, Tensor | None]
"""ids, and their log-probabilities if they are known"""


@dataclass
class ModelTurns:
    """A model that continues texts up to a stop string or end token, as the keywords of `generate` say."""

    model: Any
    tokenizer: Any
    generation_kwargs: Mapping[str, Any]
    stop_strings: Sequence[str]
    samplers: dict[int, Sampler] = field(default_factory=dict)
    """those made so far, by their number of rows"""

    def __post_init__(self) -> None:
        self.params = sampling_params(self.model, self.generation_kwargs, stop_strings=self.stop_strings)

    @property
    def rows_are_apart(self) -> bool:
        """Whether a row's turn is the same whatever rows are in the same batch."""
        return self.params is not None

    def speak(self, texts: Sequence[Tensor], seeds: Sequence[int] | None = None, max_rows: int = 128) -> list[Turn]:
        """What the model adds to each of the 1-d `texts`; nothing where its context is full."""
        room = [self._has_room(text) for text in texts]
        speaking = [text for text, has_room in zip(texts, room, strict=True) if has_room]
        if self.params is None or not speaking:
            turns: list[Turn] = [(tokens, None) for tokens in self.generate(speaking, max_rows)]
        else:
            own = None if seeds is None else tuple(seed for seed, there in zip(seeds, room, strict=True) if there)
            turns = self._sample(speaking, own, max_rows)
        said = iter(turns)
        return [next(said) if has_room else (text[:0], None) for text, has_room in zip(texts, room, strict=True)]

    def _has_room(self, text: Tensor) -> bool:
        limit = None if is_encoder_decoder(self.model) else context_length(backbone(self.model))
        return limit is None or len(text) < limit

    def _sample(self, texts: Sequence[Tensor], seeds: tuple[int, ...] | None, max_rows: int) -> list[Turn]:
        assert self.params is not None
        if max_rows not in self.samplers:
            self.samplers[max_rows] = make_sampler(self.model, self.tokenizer, max_rows=max_rows)
        sampled = self.samplers[max_rows].sample([text.tolist() for text in texts], replace(self.params, seed=seeds))
        return [
            (text.new_tensor(completion.ids), torch.tensor(completion.logprobs, device=text.device))
            for text, (completion,) in zip(texts, sampled, strict=True)
        ]

    def generate(self, texts: Sequence[Tensor], batch_size: int, pad_to_multiple_of: int | None = None) -> list[Tensor]:
        """The same by the model's own `generate`, which draws from torch's global generator."""
        return plain_generate(
            backbone(self.model), self.tokenizer, texts, self.generation_kwargs, self.stop_strings, batch_size,
            pad_to_multiple_of,
        )  # fmt: skip
