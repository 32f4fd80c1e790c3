"""The example script, offline and in seconds."""

import runpy
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_example_learns(monkeypatch, capsys):
    script = Path(__file__).parents[2] / "examples" / "ppo.py"
    assert len(script.read_text().splitlines()) < 60
    monkeypatch.setattr(sys, "argv", [str(script), "--steps", "8"])
    runpy.run_path(str(script), run_name="__main__")
    scores = [float(line.split("score")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(scores) == 8
    assert scores[-1] > scores[0] + 0.2
