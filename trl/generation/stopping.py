"""What ends a completion: end tokens and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from trl.generation.sampler import SamplingParams
from trl.models.unwrap import below_peft


def end_tokens(model: Any, tokenizer: Any, asked: Sequence[int] | None = None) -> tuple[int, ...]:
    """The tokens that end a completion: those asked for; None: those of the model, if any, and the tokenizer."""
    if asked is not None:
        return tuple(asked)
    inner = None if model is None else below_peft(model)
    own = _listed(getattr(inner, "generation_config", None)) or _listed(getattr(inner, "config", None))
    return tuple(sorted({*own, *_listed(tokenizer)}))


def _listed(owner: Any) -> list[int]:
    tokens = getattr(owner, "eos_token_id", None)
    if tokens is None:
        return []
    return [tokens] if isinstance(tokens, int) else list(tokens)


def without_ends(tokenizer: Any, rows: Sequence[Sequence[int]], ends: Sequence[int] = ()) -> list[str]:
    """The rows as texts without padding, BOS and end tokens; all others stay, such as tags that are special tokens.

    ends: of the model; a word among them stays too.
    """
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    special = set(tokenizer.all_special_ids)
    special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    left_out = {getattr(tokenizer, name, None) for name in names} | (special & set(ends))
    kept = [[token for token in ids if token not in left_out and token >= 0] for ids in rows]  # no picture is a word
    return list(tokenizer.batch_decode(kept, skip_special_tokens=False))


def until_end(ids_T: Tensor, ends: Sequence[int]) -> Tensor:
    """The ids up to the first end token, that one included."""
    found = torch.isin(ids_T, ids_T.new_tensor(list(ends))).nonzero()
    return ids_T[: int(found[0]) + 1] if len(found) else ids_T


class StopStrings:
    """Finds stop strings in generated text while it grows."""

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        if tokenizer is None:
            raise ValueError(f"stop_strings={tuple(strings)!r} are searched in text: give the sampler a tokenizer")
        self.strings = tuple(strings)
        self.tokenizer = tokenizer
        # A character takes at most 4 byte tokens. The rest is for the window's edge, where some decoders strip a space.
        self.window = 4 * max(map(len, strings)) + 8

    @classmethod
    def of(cls, params: SamplingParams, tokenizer: Any) -> StopStrings | None:
        return cls(params.stop_strings, tokenizer) if params.stop_strings else None

    def found(self, generated: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each row's last token has completed a stop string. Must be called after every token."""
        tails = [list(ids[-self.window :]) for ids in generated]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=False) if tails else []
        return [any(stop in text for stop in self.strings) for text in texts]


class StringStoppingCriteria(StoppingCriteria):
    """Stops `generate` once every row contains a stop string; then it is ready for the next batch.

    Only generated text is searched: the first call must follow the first generated token.
    """

    def __init__(self, stop_strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.stop_strings = list(stop_strings)
        self.tokenizer = tokenizer
        self.first_call = True
        self.start_length = 0
        self.generated_tokens: list[int] = []
        """how many tokens each row had generated when its stop string was complete; one too many if it never was"""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:  # type: ignore[override]
        if self.first_call:
            self.generated_tokens = [1] * input_ids.shape[0]
            self.start_length = input_ids.shape[-1] - 1
            self.first_call = False
        texts = self.tokenizer.batch_decode(input_ids[:, self.start_length :])
        done = [any(stop in text for stop in self.stop_strings) for text in texts]
        self.generated_tokens = [n if over else n + 1 for n, over in zip(self.generated_tokens, done, strict=True)]
        self.first_call = all(done)
        return self.first_call
