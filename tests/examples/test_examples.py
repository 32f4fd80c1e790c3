"""Every example script is short and runs offline, without arguments, in seconds."""

import runpy
import sys
import warnings
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
SAYS = {"sft": "5 6 -> 7 8", "reward": "accuracy 1.00", "dpo": "accuracy 1.00"}
"""what a script that has learned its little task prints"""
NEEDS_ASSETS = {"ddpo"}
"""scripts that fetch or train a base model first: their own rooms test them"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_is_short(script):
    assert len(script.read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.slow
@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.stem not in NEEDS_ASSETS], ids=lambda path: path.stem)
def test_runs(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # a script may warn its user
        runpy.run_path(str(script), run_name="__main__")
    assert SAYS.get(script.stem, "") in capsys.readouterr().out
