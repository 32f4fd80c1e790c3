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
from trl.rollout.report import print_samples, print_table, table_of, write_parquet
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


SCORED = {"reward_one": "0.00", "reward_two_with_a_long_name": "1.00", "advantage": "-0.87"}


@pytest.mark.parametrize("columns", [30, 80, 120])
def test_samples_are_whole_at_every_width(columns, monkeypatch, capsys):
    """Long words fold, a prompt stands above its completions once, a conversation is read as turns."""
    monkeypatch.setenv("COLUMNS", str(columns))
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "word " * 40}]
    called = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    said = ["x" * 300, "two\n\nlines", ""]
    print_samples("step 7", [(chat, text, SCORED) for text in said] + [(called, "done", {}), ("plain", "[b]", {})])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert "step 7" in lines[0]
    joined = "".join(line.strip(" │") for line in lines)
    assert "x" * 300 in joined
    assert joined.replace(" ", "").count("word" * 40) == 1
    assert "user: word" in "\n".join(lines)
    assert [line for line in lines if line.strip(" │") in ("two", "lines")] == ["  │   two", "  │   lines"]
    assert '{"tool_calls": [{"name": "f"}]}' in " ".join(line.strip() for line in lines) or columns == 30
    assert "reward_two_with_a_long_name" in joined
    assert "[b]" in joined


def test_the_middle_of_a_long_prompt_is_left_out(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    print_samples("step 1", [("a" * 1500 + "b" * 1500, "c" * 5000, {})])
    shown = capsys.readouterr().out
    assert "... 1,000 characters ..." in shown
    assert (shown.count("a") - 2, shown.count("b"), shown.count("c") - 2) == (1000, 1000, 5000)


def test_what_is_printed_stands_above_bars(monkeypatch):
    """While rich shows bars it takes what goes to the standard output, and so what our consoles print."""
    from rich.console import Console
    from rich.file_proxy import FileProxy

    of_bars, below = Console(file=io.StringIO(), width=40), io.StringIO()
    monkeypatch.setattr(sys, "stdout", FileProxy(of_bars, below))
    print_samples("step 1", [("a prompt", "said", {})])
    assert "said" in of_bars.file.getvalue()
    assert below.getvalue() == ""
