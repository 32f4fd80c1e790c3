"""Shows which tokens of a row are learned, as coloured text or HTML."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import NamedTuple

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from trl.data.any_text import visible
from trl.data.encode import unwrap_tokenizer

CONTEXT = "grey50"
_SHADES = ("black on light_green", "black on pale_green3")
_BROKEN = "\ufffd"


class Piece(NamedTuple):
    """The text of one token, or of the few tokens that share a character."""

    text: str
    ids: tuple[int, ...]
    learned: bool


def pieces(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], loss_mask: Sequence[int]) -> Iterator[Piece]:
    """The row's text token by token; joined, the pieces are the decoded row.

    Each token is decoded after the one before it, which keeps blanks in place; tokens that only together make a
    character are one piece.
    """
    if len(input_ids) != len(loss_mask):
        raise ValueError(f"a row has {len(input_ids)} `input_ids` but {len(loss_mask)} entries in `loss_mask`")
    ids = [int(i) for i in input_ids]

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    before = start = 0
    for end in range(1, len(ids) + 1):
        known, text = decode(ids[before:start]), decode(ids[before:end])
        if text.endswith(_BROKEN) and end - start < 4 and end < len(ids):
            continue  # inside a character
        yield Piece(text[len(known) :], tuple(ids[start:end]), any(loss_mask[start:end]))
        before, start = start, end


def inspect_row(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], loss_mask: Sequence[int]) -> Text:
    """The row as rich text: learned tokens on green in two alternating shades, the others grey."""
    text = Text()
    for number, piece in enumerate(pieces(unwrap_tokenizer(tokenizer), input_ids, loss_mask)):
        shown = visible(piece.text)
        text.append(
            shown.replace("\n", "↵\n") if piece.learned else shown,
            style=_SHADES[number % 2] if piece.learned else CONTEXT,
        )
    return text


_STYLE = """
body { font-family: system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; color: #222; background: #fff; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7; padding: 1rem; background: #f6f6f6; }
pre span { color: #888; }
pre b { font-weight: normal; background: #b7e4b0; }
pre b:nth-of-type(even) { background: #9bd493; }
small { color: #666; }
"""


def inspect_html(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[tuple[str, Sequence[int], Sequence[int]]], title: str = "Rows"
) -> str:
    """One self-contained page of `(heading, input_ids, loss_mask)` rows; a token's id shows when it is pointed at."""
    sections = []
    for heading, input_ids, loss_mask in rows:
        spans = []
        for piece in pieces(unwrap_tokenizer(tokenizer), input_ids, loss_mask):
            tag = "b" if piece.learned else "span"
            shown = escape(piece.text.replace("\n", "↵\n") if piece.learned else piece.text)
            spans.append(f'<{tag} title="{" ".join(map(str, piece.ids))}">{shown}</{tag}>')
        counts = f"{len(input_ids)} tokens, {sum(map(bool, loss_mask))} learned (green)"
        sections.append(f"<h2>{escape(heading)}</h2><small>{counts}</small><pre>{''.join(spans)}</pre>")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    body = f"<h1>{escape(title)}</h1>{''.join(sections)}"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'
