"""Plots of docs/ are drawn from the numbers that lie there, and are files that load nothing."""

import importlib
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def redraw(monkeypatch):
    known = set(sys.modules)
    monkeypatch.setattr(sys, "path", [str(ROOT), str(ROOT / "benchmarks"), *sys.path])
    yield importlib.import_module("redraw").redraw
    for name in set(sys.modules) - known:
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_the_plots_of_the_documents_are_those_of_their_numbers(redraw, tmp_path):
    found = redraw(ROOT / "docs", tmp_path)
    assert len(found) == 8
    for path in found:
        text = path.read_text()
        assert text == (ROOT / "docs" / path.relative_to(tmp_path)).read_text(), path.name
        assert not re.search(r"href|url\(|<script|<style|<image", text)
        ElementTree.fromstring(text)


def test_every_picture_is_shown_and_every_shown_one_is_there():
    shown = {
        (page.parent / name).resolve()
        for page in (ROOT / "docs").rglob("*.md")
        for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    }
    assert shown == {path.resolve() for kind in ("png", "svg") for path in (ROOT / "docs").rglob(f"*.{kind}")}
