"""Ranks that disagree, fail, hang or are killed: all of them end, and each one says what came first."""

import json
import multiprocessing as mp
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

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
