"""Two ranks (gloo, CPU) train as one does: losses, gradient norms, KL estimates and evaluation to 1e-5."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def results(world, folder):
    """What each trainer logged on `world` ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1])])
    shared = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if world > 1:
        shared |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
        command = [sys.executable, str(HERE / "ranks.py"), str(world), str(folder / f"{world}-{rank}.json")]
        ranks.append(
            subprocess.Popen(command, env={**shared, **own}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        )
    errors = [rank.communicate()[1].decode()[-3000:] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(errors)
    return json.loads((folder / f"{world}-0.json").read_text())


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    one, two = results(1, tmp_path), results(2, tmp_path)
    assert one.keys() == two.keys()
    for name, expected in one.items():
        for key, values in expected.items():
            assert two[name][key] == pytest.approx(values, rel=2e-5, abs=1e-7), (name, key)
