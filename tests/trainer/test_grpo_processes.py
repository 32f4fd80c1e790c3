"""One process or two (gloo): the same update. A kill at any moment: the same end."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from grpo_runs import RELATIVES, relatives, resumable_run, updates

HERE = Path(__file__).parent


@pytest.mark.slow
def test_two_processes_make_the_same_update(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(updates, (2, port, str(tmp_path / "two")), nprocs=2)
    mp.spawn(updates, (1, port, str(tmp_path / "one")), nprocs=1)
    one, two = torch.load(tmp_path / "one"), torch.load(tmp_path / "two")
    torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-5, atol=1e-6)
    assert one["position"] == two["position"]
    assert one["logs"].keys() == two["logs"].keys()
    for name, values in one["logs"].items():
        assert two["logs"][name] == pytest.approx(values, rel=1e-4, abs=1e-6), name
    assert max(one["logs"]["grad_norm"]) > 0


@pytest.mark.slow
def test_two_processes_make_the_same_update_in_every_on_policy_trainer(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(relatives, (2, port, str(tmp_path / "two")), nprocs=2)
    mp.spawn(relatives, (1, port, str(tmp_path / "one")), nprocs=1)
    one, two = torch.load(tmp_path / "one"), torch.load(tmp_path / "two")
    for name in RELATIVES:
        assert max(one[name]["grad_norm"]) > 0
        for key, values in one[name].items():
            assert two[name][key] == pytest.approx(values, rel=2e-5, abs=1e-6), (name, key)


def killed_run(folder, after_step, delay):
    """A run that is killed `delay` seconds behind a step: at once means while the checkpoint is written."""
    path = os.pathsep.join([str(HERE.parent.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-c", f"from grpo_runs import resumable_run; resumable_run({str(folder)!r})"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": path},
    ) as process:  # fmt: skip
        for line in process.stdout:
            if line.strip() == str(after_step):
                time.sleep(delay)
                process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_runs_end_as_if_they_had_not_been(tmp_path, capsys):
    resumable_run(str(tmp_path / "whole"))
    folder = tmp_path / "killed"
    for after_step, delay in ((2, random.uniform(0, 0.02)), (5, random.uniform(0, 0.02)), (9, random.uniform(0, 0.1))):
        killed_run(folder, after_step, delay)
    capsys.readouterr()
    resumable_run(str(folder))
    first = int(capsys.readouterr().out.split()[0])
    assert 8 < first <= 11  # it went on, and did not start again
    ends = [torch.load(run / "end.pt") for run in (tmp_path / "whole", folder)]
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
