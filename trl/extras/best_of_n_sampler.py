"""Best-of-n: sample several answers to a query and keep those with the highest scores. Nothing is trained."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from trl.core import set_seed
from trl.data.pictures import plain_ids
from trl.generation import make_sampler
from trl.generation.generate_kwargs import sampling_params
from trl.generation.plain_generate import generate_padded
from trl.generation.sampler import Sampler, check_sampler
from trl.models.modeling_base import PreTrainedModelWrapper
from trl.models.unwrap import below_value_head, is_encoder_decoder

logger = logging.getLogger(__name__)

Queries = list[int] | Tensor | list[Tensor] | list[list[int]]


class Candidate(NamedTuple):
    """A text (query included) and its score."""

    text: str
    score: float


def best_of_n_kl_bound(n: int) -> float:
    """`log n - (n - 1) / n`: the KL divergence of the best of n samples from the model that is sampled.

    It is exact for scores without ties and an upper bound with them (Beirami et al., arXiv:2401.01879).
    Compare it with the KL at which a trained policy reaches the same reward.
    """
    if n < 1:
        raise ValueError(f"n={n}: give the number of samples, 1 or more")
    return math.log(n) - (n - 1) / n


class BestOfNSampler:
    """Samples `sample_size` answers to each query; keeps the `n_candidates` that `queries_to_scores` rates highest."""

    def __init__(
        self,
        model: PreTrainedModelWrapper,
        tokenizer: PreTrainedTokenizerBase,
        queries_to_scores: Callable[[list[str]], Sequence[float]],
        length_sampler: Callable[[], int],
        sample_size: int = 4,
        seed: int | None = None,
        n_candidates: int = 1,
        generation_config: GenerationConfig | None = None,
        *,
        sampler: Sampler | None = None,
    ) -> None:
        """
        `queries_to_scores`: scores of the texts (query and answer) of one query.
        `length_sampler`: draws, for each query, the most tokens of an answer.
        `seed`: seeds Python, numpy and torch when the sampler is constructed.
        `sampler`: what samples the answers instead of the local sampler, such as a `VLLMSampler`.
        """
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(
                f"tokenizer must be a PreTrainedTokenizer or PreTrainedTokenizerFast, got {type(tokenizer)}"
            )
        if not isinstance(model, PreTrainedModelWrapper):
            raise ValueError(f"model must be a PreTrainedModelWrapper, got {type(model)}")
        if not 1 <= n_candidates <= sample_size:
            raise ValueError(f"n_candidates={n_candidates}: give from 1 to sample_size={sample_size}")
        if seed is not None:
            set_seed(seed)
        self.model = model
        self.tokenizer: Any = tokenizer
        self.queries_to_scores = queries_to_scores
        self.length_sampler = length_sampler
        self.sample_size = sample_size
        self.n_candidates = n_candidates
        self.gen_config = generation_config
        check_sampler(sampler)
        self.sampler = sampler
        self._followed, self._changes = -1, -1
        """number of the weights that a sampler of its own weights has, and how often they had been changed then"""

    def generate(
        self,
        tokenized_query: Queries,
        skip_special_tokens: bool = True,
        device: str | torch.device | int | None = None,
        **generation_kwargs: Any,
    ) -> list[list[str]]:
        """The best texts for each query, best first.

        `tokenized_query`: ids of one query (a list or a 1-d tensor), or of several (a list of those, or the rows of a
        2-d tensor). `device`: must be the model's. `generation_kwargs`: keywords of transformers' `generate`.
        """
        best = self.candidates(tokenized_query, skip_special_tokens, device, **generation_kwargs)
        return [[candidate.text for candidate in of_query] for of_query in best]

    def candidates(
        self,
        tokenized_query: Queries,
        skip_special_tokens: bool = True,
        device: str | torch.device | int | None = None,
        **generation_kwargs: Any,
    ) -> list[list[Candidate]]:
        """As `generate`, with the scores."""
        own = self._device
        if device is not None and torch.device(device).type != own.type:
            raise ValueError(f"device={device!r}: the model is on {own}; move it first, or leave device out")
        queries = _queries(tokenized_query)
        lengths = [int(self.length_sampler()) for _ in queries]
        answers = self._sample(queries, lengths, generation_kwargs)
        best = []
        for rows in answers:
            plain = [plain_ids(self.tokenizer, ids) for ids in rows]
            texts = self.tokenizer.batch_decode(plain, skip_special_tokens=skip_special_tokens)
            scores = [float(score) for score in self.queries_to_scores(texts)]
            if len(scores) != len(texts):
                raise ValueError(
                    f"queries_to_scores gave {len(scores)} scores for {len(texts)} texts; give one for each"
                )
            ranked = sorted(map(Candidate, texts, scores), key=lambda candidate: -candidate.score)
            best.append(ranked[: self.n_candidates])
        return best

    def _sample(self, queries: list[list[int]], lengths: list[int], kwargs: dict[str, Any]) -> list[list[list[int]]]:
        """The ids of `sample_size` answers to each query, with the query before them."""
        config = {} if self.gen_config is None else {"generation_config": self.gen_config}
        asked = {**config, **kwargs}
        params = sampling_params(self.model, {**asked, "max_new_tokens": max(lengths, default=1)})
        if params is None:
            answers = [self._generate(*each, asked) for each in zip(queries, lengths, strict=True)]
        else:
            if params.temperature == 0 and self.sample_size > 1:
                logger.warning(
                    "do_sample is off: all samples of a query are the same, so the best is no better than one"
                )
            sampled = self._sampler().sample(queries, params, n=self.sample_size)
            # The beginning of a sample is a sample: shorter answers are cut.
            cut = zip(sampled, lengths, strict=True)
            answers = [[completion.ids[:length] for completion in of_query] for of_query, length in cut]
        before = [[] for _ in queries] if is_encoder_decoder(self.model) else queries
        return [[[*query, *ids] for ids in of_query] for query, of_query in zip(before, answers, strict=True)]

    def _sampler(self) -> Sampler:
        """The user's, with the weights of now where it has some of its own; else the local one."""
        if self.sampler is None:
            return make_sampler(self.model, self.tokenizer)
        if hasattr(self.sampler, "follow"):
            changes = sum(parameter._version for parameter in self.model.parameters())
            self._followed, self._changes = self._followed + (changes != self._changes), changes
            self.sampler.follow(self._followed)
        return self.sampler

    def _generate(self, query: list[int], length: int, kwargs: dict[str, Any]) -> list[list[int]]:
        """Answers by the model's own `generate`, for keywords that the samplers do not know."""
        queries = [torch.tensor(query, device=self._device)] * self.sample_size
        asked = {**kwargs, "max_new_tokens": length}
        answers = generate_padded(self.model, self.tokenizer, queries, asked, several=True)
        return [answer.tolist() for answer in answers]

    @property
    def _device(self) -> torch.device:
        return next(below_value_head(self.model).parameters()).device


def _queries(tokenized: Queries) -> list[list[int]]:
    """The ids of each query."""
    if isinstance(tokenized, Tensor):
        if tokenized.ndim not in (1, 2):
            raise ValueError(f"tokenized_query has {tokenized.ndim} dimensions; give one query (1) or rows of them (2)")
        return tokenized.reshape(-1, tokenized.shape[-1]).tolist()
    rows: list[Any] = [row.tolist() if isinstance(row, Tensor) else row for row in tokenized]
    if all(isinstance(row, int) for row in rows):
        return [rows] if rows else []
    for index, row in enumerate(rows):
        if not isinstance(row, list) or not all(isinstance(token, int) for token in row):
            raise ValueError(f"tokenized_query[{index}]: give the ids of a query, a list or a 1-d tensor")
    return rows
