"""Ranks that disagree, fail, hang or are killed: all of them end, and each one says what came first."""

import json
import multiprocessing as mp
import os
import re
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from trl.trainer.ranks import after_restart, first_cause, say_unsharded

HERE = Path(__file__).parent
server = mp.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    """A process that has imported everything, from which ranks are forked off."""
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1]), before])
    server.set_forkserver_preload(["lost_rank_runs"])
    yield
    os.environ["PYTHONPATH"] = before


def played(name, folder, seconds=40):
    """What each of two ranks has said, its exit code, and the seconds until both had ended."""
    import lost_rank_runs

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.monotonic()
    arguments = [(name, rank, 2, port, str(folder)) for rank in range(2)]
    processes = [server.Process(target=lost_rank_runs.play, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=max(0.0, began + seconds - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    took = time.monotonic() - began
    files = [Path(folder, f"rank-{rank}.json") for rank in range(2)]
    said = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    print(name, f"{took:.1f} s", said, [process.exitcode for process in processes])
    return said, [process.exitcode for process in processes]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("seed", "seed: the processes of this run differ: 3 on rank 0, 4 on rank 1; give every process the same"),
        ("config", "learning_rate: the processes of this run differ: 0.1 on rank 0, 0.5 on rank 1; give every"),
        ("saving", "save_steps: the processes of this run differ: 1 on rank 0, 2 on rank 1; give every"),
        ("data", r"train data: .* '8 rows \(\w+\)' on rank 0, '8 rows \(\w+\)' on rank 1; let every process load"),
        ("weights", r"model.embed_tokens.weight and \d+ more: .* differ in the weights of the trained model; load"),
        ("reference", r"model.embed_tokens.weight and \d+ more: .* differ in the weights of a frozen model; load"),
        ("ppo", "learning_rate: the processes of this run differ: 0.001 on rank 0, 0.002 on rank 1; give every"),
    ],
)
def test_ranks_that_disagree(name, message, tmp_path):
    said, codes = played(name, tmp_path)
    assert codes == [1, 1]
    for one in said:
        assert re.match("ValueError: " + message, one["error"]), one


@pytest.mark.slow
def test_what_may_differ(tmp_path):
    """Folders and names; of weights those that are new, which all take from rank 0."""
    (first, second), codes = played("output", tmp_path / "output")
    assert codes == [0, 0]
    assert "fsdp: accelerate shares weights out over accelerators only" in (tmp_path / "output/rank-0.err").read_text()
    (first, second), codes = played("new weights", tmp_path / "new")
    assert codes == [0, 0]
    assert first["end"] == second["end"]
    assert (
        "lora_A.default.weight and of 3 more: new weights differ between the processes"
        in (tmp_path / "new" / "rank-0.err").read_text()
    )


@pytest.mark.slow
def test_a_rank_that_fails(tmp_path):
    said, codes = played("fails", tmp_path)
    assert codes == [1, 1]
    for one in said:
        assert "failing_reward" in one["error"]
        assert "the judge of this machine" in one["error"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "where"), [("hangs", "slow_reward"), ("slow rows", "slow_collator")])
def test_a_rank_that_hangs(name, where, tmp_path):
    """The others wait for `ddp_timeout`, say where it is, and it ends with them."""
    (first, second), codes = played(name, tmp_path)
    assert codes == [1, 1]
    seconds = 4 if name == "hangs" else 5
    assert re.match(
        rf"LostRank: rank 0 has waited {seconds} s \(ddp_timeout\) for the others: rank 1 has been in {where} "
        rf"\(lost_rank_runs.py, line \d+\) for \d+ s \(step 0\); if that may take so long, raise ddp_timeout",
        first["error"],
    ), first
    assert not second  # it was ended by its watch
    told = (tmp_path / "rank-1.err").read_text()
    assert "error: rank 0 failed first: LostRank: rank 0 has waited" in told
    assert "(this one, rank 1, is ended)" in told


@pytest.mark.slow
def test_a_rank_that_is_killed(tmp_path):
    (first, _), codes = played("killed", tmp_path)
    assert codes == [1, -signal.SIGKILL]
    assert re.match(
        r"LostRank: rank 1 is gone: it was in killing_reward \(lost_rank_runs.py, line \d+\) for \d+ s \(step 0\); "
        "killed from outside",
        first["error"],
    ), first


def launched(name, folder, restarts):
    """Two ranks as torchrun starts them; how often they began, and the launcher's error."""
    import lost_rank_runs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    folder.mkdir(exist_ok=True)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id=folder.name, rdzv_backend="c10d", max_restarts=restarts,
        rdzv_endpoint="localhost:0", start_method="forkserver", monitor_interval=0.1,
    )  # fmt: skip
    began = time.monotonic()
    try:
        elastic_launch(config, lost_rank_runs.started)(name, str(folder))
        error = None
    except ChildFailedError as found:
        error = found
    print(name, f"{time.monotonic() - began:.1f} s")
    return len(list(folder.glob("rank-0.*.err"))), error


@pytest.mark.slow
def test_a_restart_goes_on_from_the_newest_whole_checkpoint(tmp_path):
    assert launched("whole", tmp_path / "whole", 0) == (1, None)
    assert launched("killed", tmp_path / "killed", 1) == (2, None)
    told = (tmp_path / "killed" / "rank-0.1.err").read_text()
    assert "restart 1: the run goes on from the newest whole checkpoint in" in told
    lines = [json.loads(line) for line in (tmp_path / "killed" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    for rank in range(2):
        whole, killed = (torch.load(tmp_path / name / f"end-{rank}.pt") for name in ("whole", "killed"))
        assert all(torch.equal(weight, killed[name]) for name, weight in whole.items())


@pytest.mark.slow
def test_the_launcher_is_told_the_first_cause(tmp_path):
    starts, error = launched("fails", tmp_path / "fails", 0)
    assert starts == 1
    rank, text = first_cause(error.failures)
    assert rank == 1
    assert text == ("RewardError: reward function 'failing_reward' failed: KeyError('the judge of this machine')")


def test_what_to_resume_from(tmp_path, monkeypatch, caplog):
    """After a restart the run's own folder, but a checkpoint elsewhere as it was told."""
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert after_restart(None, tmp_path) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert after_restart(False, tmp_path) is False
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert after_restart(None, None) is None
    assert after_restart(None, tmp_path) is True
    assert after_restart(str(tmp_path / "checkpoint-3"), tmp_path) is True
    assert "restart 2: the run goes on from the newest whole checkpoint in" in caplog.text
    assert after_restart("elsewhere/checkpoint-3", tmp_path) == "elsewhere/checkpoint-3"
    assert "resume_from_checkpoint=elsewhere/checkpoint-3 lies elsewhere, so the run begins there again" in caplog.text


def test_fsdp_that_is_not_turned_on_is_said(monkeypatch, caplog):
    """S3: on a CPU accelerate leaves the weights whole."""
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.MULTI_CPU, is_main_process=True, device=torch.device("cpu")
    )
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    say_unsharded(accelerator)
    assert not caplog.records
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    say_unsharded(accelerator)
    assert (
        "fsdp: accelerate shares weights out over accelerators only; here on the CPU every process holds" in caplog.text
    )
    accelerator.distributed_type = DistributedType.FSDP
    say_unsharded(accelerator)
    assert len(caplog.records) == 1
