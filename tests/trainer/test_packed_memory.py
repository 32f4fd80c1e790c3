"""`[S, V]` logits never exist whole: 4,096 x 150,000 of them would be 2,344 MiB, once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LIMIT = 450
"""MiB beyond the model, for activations, gradients and the chunks of logits"""


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["sft", "dpo"])
def test_peak_memory(trainer, tmp_path):
    paths = os.pathsep.join([str(HERE.parent), str(HERE.parents[1])])
    run = subprocess.run(
        [sys.executable, str(HERE / "offline_memory.py"), trainer, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    used = json.loads(run.stdout.splitlines()[-1])
    assert max(used.values()) < LIMIT, used
