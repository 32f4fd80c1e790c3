"""Texts to token ids within length limits; finds out once where a tokenizer puts BOS, EOS and blanks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

Ids = list[int]
Span = tuple[int, int]
TRUNCATION_MODES = ("keep_start", "keep_end")


def unwrap_tokenizer(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or the one inside a processor."""
    tokenizer = processing_class
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = getattr(processing_class, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"a tokenizer (or a processor that holds one) is needed, got {type(processing_class)}")
    return tokenizer


class TextEncoder:
    """Batched tokenisation without special tokens, and the special tokens that belong around a row.

    `add_bos`: None does as the tokenizer does, True puts BOS first if the tokenizer has one, False never.
    """

    def __init__(self, processing_class: Any, add_bos: bool | None = None) -> None:
        self.tokenizer = unwrap_tokenizer(processing_class)
        self.add_bos = add_bos

    @cached_property
    def bos_id(self) -> int | None:
        bos_id = self.tokenizer.bos_token_id
        return None if bos_id is None else int(bos_id)

    @cached_property
    def eos_id(self) -> int | None:
        eos_id = self.tokenizer.eos_token_id
        return None if eos_id is None else int(eos_id)

    @cached_property
    def _own_specials(self) -> tuple[Ids, Ids]:
        """The special tokens that the tokenizer puts before and after a text."""
        plain = self.encode(["x"])[0]
        whole = list(self.tokenizer("x", verbose=False)["input_ids"])
        for start in range(len(whole) - len(plain) + 1):
            if plain and whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
        return [], []

    @cached_property
    def head(self) -> Ids:
        """Tokens that open a row (BOS, or [CLS]); empty for a tokenizer without."""
        if self.add_bos is None:
            return self._own_specials[0]
        return [self.bos_id] if self.add_bos and self.bos_id is not None else []

    @cached_property
    def tail(self) -> Ids:
        """Tokens that close a row: EOS, or what a tokenizer without EOS adds itself ([SEP])."""
        tail = [self.eos_id] if self.eos_id is not None else self._own_specials[1]
        if not tail:
            raise ValueError(
                "the tokenizer has no EOS token, so the model could not learn to stop: set `tokenizer.eos_token` "
                "to one of its tokens, or pass `add_eos=False`"
            )
        return tail

    @cached_property
    def source_tail(self) -> Ids:
        """Tokens that the tokenizer puts after an encoder's input (T5: EOS)."""
        return self._own_specials[1]

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of the texts, without special tokens around them; equal texts are tokenised once."""
        if not texts:
            return []
        unique = list(dict.fromkeys(texts))
        encoded = self.tokenizer(unique, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids = dict(zip(unique, encoded["input_ids"], strict=True))
        return [list(ids[text]) for text in texts]

    def encode_with_masks(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[tuple[Ids, Ids]]:
        """The ids of each text, and a mask that is 1 where a token has characters in one of the text's spans."""
        if not texts:
            return []
        if not self.tokenizer.is_fast:
            return [self._mask_by_prefixes(text, text_spans) for text, text_spans in zip(texts, spans, strict=True)]
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        masked = []
        for ids, offsets, text_spans in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True):
            masked.append((list(ids), _mask_by_offsets(offsets, text_spans)))
        return masked

    def _mask_by_prefixes(self, text: str, spans: Sequence[Span]) -> tuple[Ids, Ids]:
        """For tokenizers without offsets: a span's tokens begin where those of the text before it end."""
        ids, *before = self.encode([text, *(text[:edge] for span in spans for edge in span)])
        edges = [common_prefix(ids, prefix) for prefix in before]
        mask = [0] * len(ids)
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            mask[start:end] = [1] * (end - start)
        return ids, mask

    @cached_property
    def _anchor(self) -> str | None:
        """A text to put before a continuation, for tokenizers that treat the first word of a text in another way."""
        for anchor in ("\n", ">", "a"):
            alone, joint, plain = self.encode([anchor, anchor + "x", "x"])
            if joint[: len(alone)] == alone:
                return None if joint[len(alone) :] == plain else anchor
        return None

    def continuations(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of texts that continue another text, without the blank that some tokenizers put before a text."""
        if self._anchor is None:
            return self.encode(texts)
        (anchor,) = self.encode([self._anchor])
        continued = []
        for text, ids in zip(texts, self.encode([self._anchor + text for text in texts]), strict=True):
            merged = ids[: len(anchor)] != anchor  # before this text the anchor merges with the next token
            continued.append(self.encode([text])[0] if merged else ids[len(anchor) :])
        return continued

    def continuations_with_masks(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[tuple[Ids, Ids]]:
        """The ids of texts that continue another text, and masks as `encode_with_masks` makes them."""
        continued = []
        for ids, text, text_spans in zip(self.continuations(texts), texts, spans, strict=True):
            if list(text_spans) == [(0, len(text))]:
                continued.append((ids, [1] * len(ids)))
                continue
            anchor = self._anchor or ""
            shifted = [(start + len(anchor), end + len(anchor)) for start, end in text_spans]
            ((whole, mask),) = self.encode_with_masks([anchor + text], [shifted])
            if whole[len(whole) - len(ids) :] != ids:  # the anchor merges with the text
                ((whole, mask),) = self.encode_with_masks([text], [text_spans])
            continued.append((ids, mask[len(mask) - len(ids) :]))
        return continued

    def open_row(self, ids: Ids) -> tuple[Ids, bool]:
        """The ids with the tokens that open a row, and whether the ids began with them already."""
        if not self.head:
            return ids, False
        if ids[: len(self.head)] == self.head:
            return ids, True
        return self.head + ids, False

    def without_double_bos(self, ids: Ids) -> Ids:
        """The ids with at most one BOS at their start; a tokenizer whose BOS also ends documents keeps all of them."""
        extra = 0
        if self.bos_id is not None and self.bos_id != self.eos_id:
            while ids[extra : extra + 2] == [self.bos_id, self.bos_id]:
                extra += 1
        return ids[extra:]

    def fingerprint(self) -> str:
        """What the ids depend on, as text."""
        tokenizer = self.tokenizer
        if tokenizer.is_fast:
            backend = json.loads(tokenizer.backend_tokenizer.to_str())
            backend.pop("truncation", None)
            backend.pop("padding", None)
        else:
            backend = sorted(tokenizer.get_vocab().items())
        parts = [backend, tokenizer.chat_template, tokenizer.special_tokens_map, self.add_bos, type(tokenizer).__name__]
        return json.dumps(parts, sort_keys=True, default=str)


def _mask_by_offsets(offsets: Sequence[Span], spans: Sequence[Span]) -> Ids:
    """1 for tokens that share a character with a span; both are in order."""
    mask = []
    rest = list(spans)[::-1]
    for start, end in offsets:
        if start == end:  # a blank whose offsets were trimmed away: it is the character before
            start -= 1
        while rest and rest[-1][1] <= start:
            rest.pop()
        mask.append(int(bool(rest) and rest[-1][0] < end))
    return mask


def common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of what two sequences have in common at their start."""
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return min(len(first), len(second))


def cut(tokens: Sequence[Any], limit: int, mode: str, pinned: int = 0) -> list[Any]:
    """At most `limit` tokens from the start or the end; keep_end also keeps the first `pinned` ones (BOS)."""
    if len(tokens) <= limit:
        return list(tokens)
    if mode == "keep_start":
        return list(tokens[:limit])
    pinned = min(pinned, limit)
    return [*tokens[:pinned], *tokens[len(tokens) - (limit - pinned) :]]


@dataclass(frozen=True)
class Limits:
    """`max_length` bounds a whole row, the others its parts; None: no bound."""

    max_length: int | None = None
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_mode: str = "keep_start"
    asked_length: int | None = None
    """a longer `max_length` that was asked for and the model has no positions for: rows that need it are refused"""

    def __post_init__(self) -> None:
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ValueError(f"truncation_mode={self.truncation_mode!r}: choose 'keep_start' or 'keep_end'")
        for name in ("max_length", "max_prompt_length", "max_completion_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: should be at least 1, or None for no limit")

    def _refuse(self, length: int) -> None:
        if self.asked_length is not None and self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"max_length={self.asked_length}: a row has {length} tokens and the model {self.max_length} positions; "
                f"set max_length={self.max_length}, which cuts such rows"
            )

    def fit_row(self, ids: list[int], mask: list[int], pinned: int) -> tuple[list[int], list[int]]:
        """A row and its mask within `max_length`."""
        if self.max_length is None:
            return ids, mask
        self._refuse(len(ids))
        limit, mode = self.max_length, self.truncation_mode
        return cut(ids, limit, mode, pinned), cut(mask, limit, mode, pinned)

    def fit_answers(
        self, prompt: list[int], answers: Sequence[list[int]], pinned: int
    ) -> tuple[list[int], list[list[int]]]:
        """A prompt and the answers that share it, each whole within the limits.

        Prompt and answers are first cut to their own limits, answers at their end. Where a whole is still too long,
        keep_start cuts the answers at their end; keep_end cuts the prompt at its start, and answers only when no
        prompt is left.
        """
        mode = self.truncation_mode
        if self.max_prompt_length is not None:
            prompt = cut(prompt, self.max_prompt_length, mode, pinned)
        if self.max_completion_length is not None:
            answers = [answer[: self.max_completion_length] for answer in answers]
        if self.max_length is not None:
            longest = max(map(len, answers))
            self._refuse(len(prompt) + longest)
            if mode == "keep_end":
                prompt = cut(prompt, max(0, self.max_length - longest), mode, pinned)
            answers = [answer[: max(0, self.max_length - len(prompt))] for answer in answers]
            prompt = prompt[: self.max_length]
        return prompt, [list(answer) for answer in answers]
