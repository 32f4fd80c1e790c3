"""Text of any kind in terminals and files (C24, E7)."""

import io
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl.data.any_text import console, encodable, encodable_values, visible
from trl.data.records import Rollout
from trl.environment import TextHistory
from trl.rollout.report import print_table, table_of, write_parquet
from trl.rollout.rewards import Rewards

ODD = [
    "[/INST]",
    "[bold]x[/bold]",
    "[link=x]",
    "\ud800",
    "a\x1b[31mb",
    "\x1b]0;t\x07",
    "é",
    "\u202eabc",
    "a\rb",
    "\0",
    "[/]",
]
SHOWN = ["[/INST]", "[bold]x[/bold]", "[link=x]", "\\ud800", "a\\x1b[31mb", "\\x1b]0;t\\x07", "\\xe9", "\\u202eabc",
         "a\\rb", "\\x00", "[/]"]  # fmt: skip


def ascii_output(monkeypatch):
    """From now on the standard output has bytes for ASCII only; gives what was written."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "200")

    def written():
        stream.flush()
        return stream.buffer.getvalue().decode("ascii")

    return written


def table(text):
    rollout = Rollout([[1]], [[2]], [[0.0]], [[1]], texts=[text])
    rewards = Rewards(["[red]"], torch.tensor([[1.0]]), torch.ones(1), [False])
    return table_of(3, rollout, [text], rewards, {"advantage": [0.5]})


@pytest.mark.parametrize(("text", "shown"), list(zip(ODD, SHOWN, strict=True)))
def test_a_table_shows_texts_literally(text, shown, monkeypatch):
    """E7, C24: no markup, no control characters, whatever the console's encoding."""
    output = ascii_output(monkeypatch)
    print_table(table(text), None, unique=False)
    written = output()
    assert written.count(shown) == 2
    assert "reward_[red]" in written
    assert "\x1b" not in written


@pytest.mark.parametrize(("text", "shown"), list(zip(ODD, SHOWN, strict=True)))
def test_a_history_shows_texts_literally(text, shown, monkeypatch):
    history = TextHistory(text, torch.tensor([1]))
    output = ascii_output(monkeypatch)
    history.show_text()
    assert output().startswith(shown)
    assert history.to_html().encode()


def test_html_is_escaped():
    history = TextHistory("<script>alert(1)</script>\"'&", torch.tensor([1]))
    assert "<script>" not in history.to_html()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&amp;" in history._repr_html_()


@pytest.mark.parametrize("text", ODD)
def test_files_hold_any_text(text, tmp_path):
    """C24: lone surrogates are spelled out, all other text is unchanged; conversations too."""
    from pyarrow import parquet

    columns = table(text)
    columns["prompt"] = [[{"role": "user", "content": text}]]
    read = parquet.read_table(write_parquet(tmp_path, 1, columns)).to_pylist()[0]
    assert read["completion"] == encodable(text)
    assert read["completion"] == (text if text != "\ud800" else "\\ud800")
    assert read["prompt"].encode()


def test_the_callbacks_table_is_literal(monkeypatch):
    from rich.table import Table

    shown = Table("prompt")
    shown.add_row(visible("[/INST] [bold]x"))
    output = ascii_output(monkeypatch)
    console().print(shown, markup=False)
    assert "[/INST] [bold]x" in output()


@given(st.text(max_size=20))
def test_what_is_encodable_is_unchanged(text):
    assert encodable(text) == text
    assert encodable(encodable(text + "\ud800")) == text + "\\ud800"
    assert not any(0xD800 <= ord(letter) <= 0xDFFF or ord(letter) == 27 for letter in visible(text + "\udfff\x1b"))


def test_values_are_encodable_at_any_depth():
    assert encodable_values({"\ud800": ["\ud801", {"x": 1, "y": None}]}) == {
        "\\ud800": ["\\ud801", {"x": 1, "y": None}]
    }
    nested = []
    for _ in range(101):
        nested = [nested]
    with pytest.raises(ValueError, match="nested too deeply"):
        encodable_values(nested)
