"""Shows which tokens of a row are learned, as coloured text or HTML."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from trl.data.any_text import visible
from trl.data.encode import unwrap_tokenizer
from trl.data.pictures import number_of, reader_of
from trl.data.thumbnails import Gallery, mark

if TYPE_CHECKING:
    from rich.text import Text

CONTEXT = "grey50"
PICTURE = "dark_cyan"
_SHADES = ("black on light_green", "black on pale_green3")
_BROKEN = "\ufffd"


class Piece(NamedTuple):
    """The text of one token, or of the few tokens that share a character; or a picture."""

    text: str
    """of a picture its mark, see `trl.data.thumbnails.mark`"""
    ids: tuple[int, ...]
    learned: bool
    picture: int | None = None
    """its number in the album"""


def pieces(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], loss_mask: Sequence[int]) -> Iterator[Piece]:
    """The row's text token by token; joined, the pieces are the decoded row, with marks in place of pictures.

    Each token is decoded after the one before it, which keeps blanks in place; tokens that only together make a
    character are one piece, and so are those of a picture.
    """
    if len(input_ids) != len(loss_mask):
        raise ValueError(f"a row has {len(input_ids)} `input_ids` but {len(loss_mask)} entries in `loss_mask`")
    ids = [int(i) for i in input_ids]

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    before, start, shown = 0, 0, iter(_pictures(tokenizer, ids))
    picture = next(shown, None)
    for end in range(1, len(ids) + 1):
        if picture is not None and end > picture.start:
            if end == picture.stop:
                yield _picture_piece(ids[start:end], any(loss_mask[start:end]))
                before = start = end
                picture = next(shown, None)
            continue
        known, text = decode(ids[before:start]), decode(ids[before:end])
        whole = end == len(ids) or (picture is not None and end == picture.start)
        if text.endswith(_BROKEN) and end - start < 4 and not whole:
            continue  # inside a character
        yield Piece(text[len(known) :], tuple(ids[start:end]), any(loss_mask[start:end]))
        before, start = start, end


def read_out(tokenizer: Any, input_ids: Sequence[int], specials: bool = False) -> str:
    """The text of a row with marks for its pictures; specials: with special tokens."""
    ids, parts, start = [int(i) for i in input_ids], list[str](), 0
    for picture in _pictures(tokenizer, ids):
        parts.append(str(tokenizer.decode(ids[start : picture.start], skip_special_tokens=not specials)))
        parts.append(_picture_piece(ids[picture.start : picture.stop], False).text)
        start = picture.stop
    return "".join([*parts, str(tokenizer.decode(ids[start:], skip_special_tokens=not specials))])


def _pictures(tokenizer: Any, ids: Sequence[int]) -> Iterator[range]:
    """Where the pictures of a row are, from their first token to their last one.

    A processor may put tokens of its own between those of one picture (rows of tiles).
    """
    reader, end = reader_of(tokenizer), 0
    for start, token in enumerate(ids):
        if token >= 0 or start < end:
            continue
        left = None if reader is None else reader.count(number_of(token))
        end = start
        for place in range(start, len(ids)):
            if ids[place] == token and left != 0:
                end, left = place + 1, None if left is None else left - 1
            elif ids[place] < 0 or not left:  # the next picture
                break
        yield range(start, end)


def _picture_piece(ids: Sequence[int], learned: bool) -> Piece:
    runs = [token for token, _ in groupby(ids) if token < 0]
    number, count = number_of(runs[0]), sum(token < 0 for token in ids)
    return Piece(mark(number, count, len(runs)), tuple(ids), learned, number)


def inspect_row(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], loss_mask: Sequence[int]) -> Text:
    """The row as rich text: learned tokens on green in two alternating shades, the others grey."""
    from rich.text import Text  # which trainers that read rows out do without

    text = Text()
    for number, piece in enumerate(pieces(unwrap_tokenizer(tokenizer), input_ids, loss_mask)):
        shown = visible(piece.text)
        text.append(
            shown.replace("\n", "↵\n") if piece.learned else shown,
            style=_SHADES[number % 2] if piece.learned else CONTEXT if piece.picture is None else PICTURE,
        )
    return text


_STYLE = """
body { font-family: system-ui, sans-serif; margin: 2rem auto; max-width: 60rem;
  padding: 0 1rem; color: #222; background: #fff; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7; padding: 1rem; background: #f6f6f6; }
pre > span { color: #888; }
pre b { font-weight: normal; background: #b7e4b0; }
pre b:nth-of-type(even) { background: #9bd493; }
small { color: #666; }
"""


def inspect_html(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[tuple[str, Sequence[int], Sequence[int]]], title: str = "Rows"
) -> str:
    """One self-contained page of `(heading, input_ids, loss_mask)` rows; a token's id shows when it is pointed at.

    Pictures are thumbnails, each embedded once.
    """
    sections, gallery = [], Gallery()
    for heading, input_ids, loss_mask in rows:
        spans = []
        for piece in pieces(unwrap_tokenizer(tokenizer), input_ids, loss_mask):
            if piece.picture is not None:
                spans.append(gallery.tag(piece.picture, piece.text[1:-1], piece.learned))
                continue
            tag = "b" if piece.learned else "span"
            shown = escape(piece.text.replace("\n", "↵\n") if piece.learned else piece.text)
            spans.append(f'<{tag} title="{" ".join(map(str, piece.ids))}">{shown}</{tag}>')
        counts = f"{len(input_ids)} tokens, {sum(map(bool, loss_mask))} learned (green)"
        sections.append(f"<h2>{escape(heading)}</h2><small>{counts}</small><pre>{''.join(spans)}</pre>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{_STYLE}{gallery.style}</style>"
    body = f"<h1>{escape(title)}</h1>{''.join(sections)}"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'
