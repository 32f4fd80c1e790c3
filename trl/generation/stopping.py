"""What ends a completion: end tokens and stop strings."""

from collections.abc import Sequence
from typing import Any

from trl.generation.sampler import SamplingParams


def end_tokens(params: SamplingParams, model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a completion: those asked for, or else the model's own and the tokenizer's."""
    if params.stop_token_ids is not None:
        return tuple(params.stop_token_ids)
    return own_end_tokens(model, tokenizer)


def own_end_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The end tokens of a model, by its generation config or else its config, and the tokenizer's."""
    own = _listed(getattr(model, "generation_config", None)) or _listed(getattr(model, "config", None))
    return tuple(sorted({*own, *_listed(tokenizer)}))


def _listed(owner: Any) -> list[int]:
    tokens = getattr(owner, "eos_token_id", None)
    if tokens is None:
        return []
    return [tokens] if isinstance(tokens, int) else list(tokens)


class StopStrings:
    """Finds stop strings in generated text while it grows."""

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        if tokenizer is None:
            raise ValueError(f"stop_strings={tuple(strings)!r} are searched in text: give the sampler a tokenizer")
        self.strings = tuple(strings)
        self.tokenizer = tokenizer
        # A character takes at most 4 byte tokens; the rest keeps the edge, where some decoders strip a space, outside.
        self.window = 4 * max(map(len, strings)) + 8

    @classmethod
    def of(cls, params: SamplingParams, tokenizer: Any) -> "StopStrings | None":
        return cls(params.stop_strings, tokenizer) if params.stop_strings else None

    def found(self, generated: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each row's last token has completed a stop string. To be asked after every token."""
        tails = [list(ids[-self.window :]) for ids in generated]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=False) if tails else []
        return [any(stop in text for stop in self.strings) for text in texts]
