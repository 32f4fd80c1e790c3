"""A poisoned weight, a full disk, a lost rank: the run stops, says why, and goes on from its last whole checkpoint."""

import random
import resource
import signal
import socket
from contextlib import nullcontext

import pytest
import torch
from chaos_runs import RUNS, Trouble, on_rank
from launch import Forked, attempt, starter

from benchmarks.kill_resume import left_alone, same_end
from trl.models.weight_files import is_disk_error
from trl.trainer.checkpoints import checkpoints, is_whole

pytestmark = pytest.mark.slow
STEPS, BAD = 4, 3
SOME = ("sft-lora", "dpo-synced-reference", "grpo", "ppo", "ddpo")


def resumed_equals(name, folder, whole):
    left_alone(starter(name, STEPS), folder)
    return same_end(folder, whole(name, STEPS))


def kept(name, folder):
    """The numbers of the whole checkpoints of a run; there are no others."""
    inside, prefix = (folder / "logs" / "checkpoints", "checkpoint_") if name == "ddpo" else (folder, "checkpoint-")
    found = checkpoints(inside, prefix)
    assert all(is_whole(path, contents=True) for path in found)
    return [int(path.name.removeprefix(prefix)) for path in found]


@pytest.mark.parametrize("name", RUNS)
def test_a_poisoned_weight(name, tmp_path, whole, count):
    """C1, C2: an exit code that is not 0, the step is named, the last good checkpoint is on the disk."""
    folder = tmp_path / "run"
    process = attempt(name, folder, STEPS, Trouble(BAD, poison=True))
    assert process.wait() == 1
    what = "epoch" if name == "ddpo" else "step"
    error = process.errors[-1]
    assert error.startswith(f"trl.trainer.guard.NonFiniteError: {what} {BAD}: weights that are not finite"), error
    assert kept(name, folder) == [1, 2]
    assert resumed_equals(name, folder, whole)
    count(poisoned=1, equal=True)


@pytest.mark.parametrize(
    ("name", "draws"),
    [*((name, 1) for name in SOME), *(pytest.param(name, 3, marks=pytest.mark.long) for name in RUNS)],
)
def test_a_full_disk(name, draws, tmp_path, whole, count):
    """No file may become larger than a random size: the error names the folder, what was there stays whole."""
    rng = random.Random(f"{name} {draws}")
    newest = [path.stat().st_size for path in whole(name, STEPS).rglob("checkpoint?3/*") if path.is_file()]
    for draw in range(draws):
        folder = tmp_path / str(draw)
        limit = rng.choice([size for size in sorted(newest)[len(newest) // 2 :] if size > 4096]) - rng.randint(1, 2000)
        process = attempt(name, folder, STEPS, Trouble(BAD, file_limit=limit))
        assert process.wait() == 1, limit
        error = process.errors[-1]
        assert error.startswith("OSError: could not save"), (limit, error)
        assert f"checkpoint{'_' if name == 'ddpo' else '-'}{BAD}" in error
        assert kept(name, folder) == [1, 2]
        assert resumed_equals(name, folder, whole)
    count(full_disks=draws, equal=True)


@pytest.mark.parametrize("left", [0, 100, 5000, 100_000, 200_000, -5000, -3000, -1000, -1])
@pytest.mark.parametrize("opened", [True, False])
def test_however_torch_says_that_the_disk_is_full(left, opened, tmp_path):
    """At the beginning, between two tensors, and in the last bytes, which it writes when it closes the file."""
    state, path = {"one": torch.zeros(25_000), "two": torch.zeros(25_000), "rest": list(range(3000))}, tmp_path / "x.pt"
    torch.save(state, path)
    limits, limit = resource.getrlimit(resource.RLIMIT_FSIZE), left if left >= 0 else path.stat().st_size + left
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises((OSError, RuntimeError)) as error, open(path, "wb") if opened else nullcontext(path) as file:
            torch.save(state, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert is_disk_error(error.value)


def ranks(name, folder, steps, trouble=None):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [Forked(on_rank, rank, 2, port, name, str(folder), steps, trouble) for rank in range(2)]
    return [process.wait(seconds=60) for process in processes]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("dpo", "ppo") else pytest.mark.long)
             for name in ("dpo", "ppo", "grpo-synced-reference", "sft-lora")],
)  # fmt: skip
def test_a_lost_rank(name, tmp_path, count):
    """The other one does not wait for ever: it ends by itself, and both go on with what they had saved together."""
    assert ranks(name, tmp_path / "whole", STEPS) == [0, 0]
    folder = tmp_path / "lost"
    first, second = ranks(name, folder, STEPS, Trouble(BAD, lost=True))
    assert second == -signal.SIGKILL
    assert first not in (0, -signal.SIGKILL)
    assert max(kept(name, folder), default=0) in (2, 3)
    assert ranks(name, folder, STEPS) == [0, 0]
    assert same_end(tmp_path / "whole", folder)
    count(lost_ranks=1, equal=True)
