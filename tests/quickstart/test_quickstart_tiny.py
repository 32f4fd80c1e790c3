"""The whole quickstart as a user runs it, with the tiny model."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.asset
def test_the_tiny_quickstart_improves_its_model_and_reports(tmp_path):
    command = [sys.executable, "-m", "trl.cli.main", "quickstart", "--tiny", "--threads", "1", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert str(tmp_path / "report.html") in done.stdout
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["succeeded"]
    assert record["figures"]["Judge"]["gain"]["low"] > 0
    assert record["preference"]["accuracy"]["low"] > 0.5
    assert record["imitation"]["heldout_after"] < record["imitation"]["heldout_before"] - 1
    assert record["peak_mebibytes"] < 4096
