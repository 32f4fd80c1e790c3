"""Stop generation when every row has said one of the stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria


class StringStoppingCriteria(StoppingCriteria):
    """A criterion for `generate` that is True once all rows hold a stop string; then it is ready for the next batch.

    Only generated text is searched: the first call is taken to come after the first generated token.
    """

    def __init__(self, stop_strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.stop_strings = list(stop_strings)
        self.tokenizer = tokenizer
        self.first_call = True
        self.start_length = 0
        self.generated_tokens: list[int] = []
        """tokens that each row had generated when its stop string was complete; one too many if it never was"""

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
