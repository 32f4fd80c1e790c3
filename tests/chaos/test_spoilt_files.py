"""Each file of a checkpoint missing, cut off, overwritten, or with one bit flipped: never silently other weights."""

import random
import shutil

import pytest
import torch
from checkpoint_cases import KINDS, weights, whole_runs

from trl.trainer.checkpoints import MANIFEST, checkpoints, read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")]
every_kind = pytest.mark.parametrize("kind", KINDS)
DAMAGES = ("missing", "cut", "garbage", "bit")


def spoil(path, damage, rng):
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
        return
    if damage == "cut":
        del content[rng.randrange(len(content)) :]
    elif damage == "garbage":
        content[:] = rng.randbytes(len(content))
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return whole_runs(tmp_path_factory)


@every_kind
def test_one_file_is_spoilt(kind, whole, tmp_path, count):
    """By a path: an error that names the file, and the trainer is as before. Every file, every damage."""
    folder, _ = whole(kind)
    mine = tmp_path / "run"
    shutil.copytree(folder, mine)
    newest, rng = KINDS[kind].checkpoint(mine, 4), random.Random(kind)
    torch.manual_seed(0)
    trainer = KINDS[kind].start(mine)
    before, tried = weights(trainer), 0
    for name in [*read_manifest(newest)["files"], MANIFEST]:
        content = (newest / name).read_bytes()
        for damage in DAMAGES:
            spoil(newest / name, damage, rng)
            with pytest.raises(ValueError, match=rf"the checkpoint {newest} is not whole: .*{name}"):
                KINDS[kind].resume(trainer, newest)
            (newest / name).write_bytes(content)
            tried += 1
    assert torch.equal(weights(trainer), before)
    count(kind=kind, files_spoilt=tried, named=tried)


@pytest.mark.parametrize("draws", [3, pytest.param(40, marks=pytest.mark.long)])
@every_kind
def test_any_files_are_spoilt(kind, draws, whole, tmp_path, caplog, count):
    """True: of a run whose checkpoints are all hit at random, the newest whole one goes on, and the end is the same."""
    folder, end = whole(kind)
    rng = random.Random(f"{kind} {draws}")
    for draw in range(draws):
        mine = tmp_path / str(draw)
        shutil.copytree(folder, mine)
        found, hit = checkpoints(KINDS[kind].checkpoint(mine, 4).parent, KINDS[kind].prefix), []
        for checkpoint in found:
            if checkpoint == found[-1] or rng.random() < 0.5:
                name = rng.choice([*read_manifest(checkpoint)["files"], MANIFEST])
                spoil(checkpoint / name, rng.choice(DAMAGES), rng)
                hit.append(checkpoint)
        caplog.clear()
        torch.manual_seed(0)
        assert torch.equal(KINDS[kind].run(mine, True), end), hit
        left = [path for path in found if path not in hit]
        wanted = f"training goes on from {left[-1]}" if left else "training starts anew"
        assert wanted in caplog.text, (hit, caplog.text)
        shutil.rmtree(mine)
    count(kind=kind, runs_spoilt=draws, equal=True)
