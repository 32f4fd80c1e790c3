"""The inspector: no character is lost, and learned tokens are told apart."""

import pytest
from tokenizers_for_tests import byte_tokenizer, metaspace_tokenizer

from trl.data.inspect import inspect_html, inspect_row, pieces


def test_pieces_join_characters_of_several_tokens() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("é😀a")["input_ids"]  # 2 + 4 + 1 bytes, a token each
    mask = [0, 0, 0, 0, 0, 1, 1]
    assert [(p.text, len(p.ids), p.learned) for p in pieces(tokenizer, ids, mask)] == [
        ("é", 2, False),
        ("😀", 4, True),
        ("a", 1, True),
    ]


def test_pieces_keep_blanks_that_tokens_decode_without() -> None:
    tokenizer = metaspace_tokenizer()
    ids = tokenizer("The sky is blue")["input_ids"]
    found = list(pieces(tokenizer, ids, [0, 0, 0, 1, 1]))
    assert [p.text for p in found][2:] == [" sky", " is", " blue"]
    assert "".join(p.text for p in found) == tokenizer.decode(ids)


def test_row_as_rich_text() -> None:
    tokenizer = byte_tokenizer()
    text = inspect_row(tokenizer, tokenizer("ab<|im_end|>\n")["input_ids"], [0, 1, 1, 0])
    assert text.plain == "ab<|im_end|>\n"
    assert ["green" in str(span.style) for span in text.spans] == [False, True, True, False]


def test_html_escapes_and_counts() -> None:
    tokenizer = byte_tokenizer()
    page = inspect_html(tokenizer, [("<row>", tokenizer("a<|im_end|>")["input_ids"], [0, 1])], title="Rows & masks")
    assert '<b title="2">&lt;|im_end|&gt;</b>' in page
    assert "&lt;row&gt;" in page
    assert "2 tokens, 1 learned" in page
    assert "Rows &amp; masks" in page


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="1 entries in `loss_mask`"):
        inspect_row(byte_tokenizer(), [3, 4], [1])
