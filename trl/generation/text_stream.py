"""The text of a completion while it grows, token by token."""

from collections.abc import Sequence
from typing import Any

from trl.generation.stopping import without_ends

_LOST = "\ufffd"
"""what stands for the bytes of a character that is not whole yet"""


class TextStream:
    """Gives the text that is new, once no further token can change it.

    Padding, BOS and end tokens are left out, and so is a stop string that ends the text. ends: the model's end tokens.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int] = (), stop_strings: Sequence[str] = ()) -> None:
        self.tokenizer, self.ends, self.stop_strings = tokenizer, tuple(ends), tuple(stop_strings)
        self.text = ""
        """what was given so far"""

    def push(self, ids: Sequence[int], finished: bool = False) -> str:
        """The new text of a completion that has these tokens by now."""
        whole = without_stop(without_ends(self.tokenizer, [ids], self.ends)[0], self.stop_strings)
        if not finished:
            whole = whole[: len(whole) - self._unsure(whole)]
        if not whole.startswith(self.text):  # a decoder that changes what it said
            return ""
        new, self.text = whole[len(self.text) :], whole
        return new

    def _unsure(self, text: str) -> int:
        """Characters at the end that may yet change, or become a stop string."""
        lost = len(text) - len(text.rstrip(_LOST))
        begun = [n for stop in self.stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return max(lost, *begun, 0)


def without_stop(text: str, stop_strings: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    places = [place for stop in stop_strings if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text
