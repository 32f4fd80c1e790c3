"""The example script, offline and in seconds."""

import runpy
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_example_learns(monkeypatch, capsys, tmp_path):
    script = Path(__file__).parents[2] / "examples" / "grpo.py"
    assert len(script.read_text().splitlines()) < 60
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "--steps", "8"])
    runpy.run_path(str(script), run_name="__main__")
    first, last = capsys.readouterr().out.split("mean reward")[1].split(";")[0].split("->")
    assert float(last) > float(first) + 0.1
    assert len(list((tmp_path / "grpo" / "rollouts").iterdir())) == 8
