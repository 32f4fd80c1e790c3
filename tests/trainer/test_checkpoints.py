"""Checkpoints of every trainer: what is damaged, torn, hostile or of another run is found out before it is read.

The ids (C3 ...) name the faults that release 1.0.0 had.
"""

import copy
import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_cases import ENDED, KINDS, ended_at, in_a_process, two_ranks, two_ranks_resume, weights, whole_runs
from conformity import build, causal_lm, config, pairs, tokenizer
from process_group import on_ranks
from transformers import AutoModelForCausalLM, TrainerCallback

from trl import DPOConfig, DPOTrainer
from trl.models.weight_files import WEIGHT_FILES, writing
from trl.trainer.checkpoints import (
    MANIFEST,
    Run,
    check_files,
    checkpoints,
    clean_up,
    data_fingerprint,
    is_whole,
    keep_newest,
    numpy_globals,
    random_state,
    read_manifest,
    read_state,
    seal,
    set_random_state,
    verified,
    write_state,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return whole_runs(tmp_path_factory)


@pytest.fixture
def run(whole, tmp_path):
    """A copy of a run that the test may damage: `(folder, weights at the end, newest checkpoint, the one before)`."""

    def of(kind):
        folder, end = whole(kind)
        mine = tmp_path / "run"
        shutil.copytree(folder, mine)
        return mine, end, KINDS[kind].checkpoint(mine, 4), KINDS[kind].checkpoint(mine, 3)

    return of


def without_last(checkpoint):
    """Take away the newest checkpoint, so that a resumed run has a step to do."""
    shutil.rmtree(checkpoint)


def files_of(checkpoint):
    return sorted(read_manifest(checkpoint)["files"])


# -- whole or not --------------------------------------------------------------------------------


@every_kind
def test_a_manifest_lists_every_file(run, kind):
    """C3: sizes and checksums of all files, of all ranks; what the run was made of."""
    _, _, newest, _ = run(kind)
    there = {path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()}
    manifest = read_manifest(newest)
    assert there - {MANIFEST} == set(manifest["files"])
    assert any("rng_state" in name for name in there)
    assert manifest["step"] == 4
    assert manifest["world_size"] == 1
    assert {"trl", "torch", "transformers"} <= set(manifest["versions"])
    assert manifest["run"]["identity"]["trainer"].endswith("Trainer")


@every_kind
def test_a_missing_file_is_named(run, kind):
    """C3: also `extra_state.pt`, `optimizer.pt`, `scheduler.pt`, without which release 1.0.0 went on."""
    _, _, newest, _ = run(kind)
    for name in [*files_of(newest), MANIFEST]:
        (newest / name).rename(newest / "away")
        with pytest.raises(ValueError, match=rf"not whole: .*{name}") as error:
            verified(newest)
        assert "\n" not in str(error.value)
        (newest / "away").rename(newest / name)
    verified(newest)


@every_kind
@pytest.mark.parametrize("damage", ["cut", "garbage", "bit", "empty"])
def test_a_damaged_file_is_named(run, kind, damage):
    """C4: cut off, overwritten, one bit flipped."""
    _, _, newest, _ = run(kind)
    for name in [*files_of(newest), MANIFEST]:
        content = (newest / name).read_bytes()
        spoilt = {
            "cut": content[: len(content) // 2], "garbage": b"\x80" * len(content), "empty": b"",
            "bit": bytes([content[0] ^ 1]) + content[1:],
        }[damage]  # fmt: skip
        (newest / name).write_bytes(spoilt)
        if spoilt != content:
            with pytest.raises(ValueError, match=rf"not whole: .*{name}"):
                verified(newest)
        (newest / name).write_bytes(content)


@every_kind
def test_a_damaged_checkpoint_is_passed_over_and_said(run, kind, caplog):
    """C3, C4, C17: True falls back to the newest whole one, says so, and ends the same; a path is an error."""
    folder, end, newest, before = run(kind)
    name = next(name for name in files_of(newest) if "optimizer" in name or "trainer_state" in name)
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 4
    (newest / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"the content of {name} has changed"):
        KINDS[kind].run(folder, newest)
    caplog.clear()
    assert torch.equal(KINDS[kind].run(folder, True), end)
    assert f"the content of {name} has changed; it is passed over" in caplog.text
    assert f"training goes on from {before}" in caplog.text
    verified(newest)  # written anew


@every_kind
def test_only_torn_checkpoints(tmp_path, whole, kind, caplog):
    """C6: a kill in the very first save, then `resume_from_checkpoint=True`: the run starts anew and says so."""
    torn = KINDS[kind].checkpoint(tmp_path, 1)
    torn.mkdir(parents=True)
    (torn / "model.safetensors").write_bytes(b"half")
    torch.manual_seed(0)
    assert torch.equal(KINDS[kind].run(tmp_path, True), whole(kind)[1])
    assert "training starts anew" in caplog.text
    verified(torn)


@every_kind
def test_leftovers_of_killed_saves_go(run, kind):
    """C7: hidden folders, with whole weights in them, are removed at the next start."""
    folder, _, newest, _ = run(kind)
    for name in (f".saving-{newest.name}", ".saving-x1y2z3", f".removing-{newest.name}"):
        shutil.copytree(newest, newest.parent / name)
    shutil.copytree(newest, newest / ".saving-x")
    (newest.parent / "rollouts" / ".saving-x").mkdir(parents=True)
    (newest.parent / "another-run" / ".saving-x").mkdir(parents=True)
    shutil.rmtree(newest.parent / f"{KINDS[kind].prefix}3")
    KINDS[kind].run(folder, True)
    left = [path for path in folder.rglob(".*") if path.is_dir()]
    assert left == [newest.parent / "another-run" / ".saving-x"]  # which may be at work


@every_kind
def test_an_empty_or_half_newest_folder(run, kind):
    """C14: an empty `checkpoint-6` beside a good 4, and a state file that is cut off in a 5."""
    folder, end, *_ = run(kind)
    for number in (5, 6):
        KINDS[kind].checkpoint(folder, number).mkdir()
    for name in ("trainer_state.json", "trainer_state.pt"):
        (KINDS[kind].checkpoint(folder, 5) / name).write_text('{"global_step"')
    assert torch.equal(KINDS[kind].run(folder, True), end)


@every_kind
def test_torn_checkpoints_are_not_counted(run, kind, tmp_path):
    """The newest whole one stays, however many torn ones are newer."""
    _, _, newest, before = run(kind)
    (newest / MANIFEST).unlink()
    keep_newest(newest.parent, 1, prefix=KINDS[kind].prefix)
    assert [path.name for path in checkpoints(newest.parent, KINDS[kind].prefix)] == [before.name, newest.name]


def test_what_is_kept(tmp_path):
    def make(*numbers):
        for number in numbers:
            (tmp_path / f"checkpoint-{number}").mkdir()
            seal(tmp_path / f"checkpoint-{number}", Run({}, {}, {}), step=number, world_size=1)

    def left():
        return [int(path.name.removeprefix("checkpoint-")) for path in checkpoints(tmp_path)]

    make(1, 2, 3, 10)
    (tmp_path / "checkpoint-2" / MANIFEST).write_text("{")
    (tmp_path / "checkpoint-notes").mkdir()
    keep_newest(tmp_path, None)
    assert left() == [1, 2, 3, 10]
    keep_newest(tmp_path, 2, keep=[tmp_path / "checkpoint-1"])
    assert left() == [1, 10]  # as transformers counts: the one to keep is one of the two
    make(4)
    keep_newest(tmp_path, 1, keep=[tmp_path / "checkpoint-4"])
    assert left() == [4, 10]  # the newest is of an earlier run; the one just written stays


# -- kills ---------------------------------------------------------------------------------------


@pytest.mark.slow
@every_kind
def test_killed_at_any_operation_of_a_save(whole, kind, tmp_path):
    """C3, C6, C7, C14, C17: wherever a run ends, the next one takes it up and ends with the same weights."""
    end = whole(kind)[1]
    for operation in (1, 2, 4, 7, 12, 20, 33, 54):
        folder = tmp_path / str(operation)

        def go(folder=folder):
            torch.manual_seed(0)
            KINDS[kind].run(folder, True)

        assert ended_at(operation, go) in (0, ENDED)
        torch.manual_seed(0)
        assert torch.equal(KINDS[kind].run(folder, True), end), operation
        assert not [path for path in folder.rglob(".*") if path.is_dir()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "ppo"])
def test_a_second_run_killed_while_it_overwrites(run, kind, tmp_path):
    """C26: a folder is the first run's or the second's, never one's weights with the other's optimizer."""
    folder, _, _, before = run(kind)
    first = read_manifest(before)["files"]
    for operation in range(1, 60, 7):
        mine = tmp_path / str(operation)
        shutil.copytree(folder, mine)
        for number in (1, 4):
            shutil.rmtree(KINDS[kind].checkpoint(mine, number))
        before_it = KINDS[kind].checkpoint(mine, 2)
        ended_at(operation, lambda mine=mine, start=before_it: KINDS[kind].run(mine, start, learning_rate=0.1))
        clean_up(mine)
        target = KINDS[kind].checkpoint(mine, 3)
        assert target.exists()
        found = verified(target).manifest
        if found["files"] != first:  # all of it is the second run's
            assert found["run"]["settings"]["learning_rate"] == 0.1
        shutil.rmtree(mine)


def small_model(value):
    model = AutoModelForCausalLM.from_config(config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def save_in_shards(model, folder, size="20KB"):
    with writing(folder, WEIGHT_FILES) as beside:
        model.save_pretrained(beside, max_shard_size=size)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [("20KB", "20KB"), ("20KB", "1GB"), ("1GB", "20KB"), ("20KB", "30KB")])
def test_a_save_in_shards_killed_between_two_renames(tmp_path, sizes):
    """C27: what loads is the old model or the new one, never some tensors of each."""
    save_in_shards(small_model(1.0), tmp_path / "old", sizes[0])
    new, seen = small_model(2.0), set()
    for operation in range(1, 80):
        folder = tmp_path / "model"
        shutil.copytree(tmp_path / "old", folder)
        ended = ended_at(operation, lambda folder=folder: save_in_shards(new, folder, sizes[1]))
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        values = {value for parameter in loaded.parameters() for value in parameter.unique().tolist()}
        assert len(values) == 1, operation
        seen |= values
        save_in_shards(new, folder, sizes[1])  # the next save finds what the killed one left
        assert not [path for path in folder.iterdir() if path.name.startswith(".former")]
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert {value for parameter in loaded.parameters() for value in parameter.unique().tolist()} == {2.0}
        shutil.rmtree(folder)
        if ended == 0:
            break
    assert ended == 0
    assert seen == {1.0, 2.0}


def test_older_checkpoints_go_after_the_new_one_is_whole(tmp_path):
    """Trainer would remove them before; the user's limit is as it was, in the callbacks too."""
    seen = []

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.append(sorted(path.name for path in Path(args.output_dir).glob("checkpoint-*")))
            assert args.save_total_limit == 1

        def on_step_end(self, args, state, control, **kwargs):
            assert args.save_total_limit == 1

    trainer = KINDS["dpo"].start(tmp_path, save_total_limit=1)
    trainer.add_callback(Watch())
    trainer.train()
    assert seen[1] == ["checkpoint-1", "checkpoint-2"]  # not sealed yet, so the older one is still there
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4"]
    assert trainer.args.save_total_limit == 1


def test_the_limit_comes_back_where_no_on_save_follows(tmp_path):
    """Saved by something else than the loop, in a run and outside; a run that ends amid a save."""
    seen = []

    class Saves(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.save_model(str(tmp_path / "mine" / f"checkpoint-{state.global_step}"), _internal_call=True)

        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(args.save_total_limit)

    trainer = KINDS["dpo"].start(tmp_path / "run", save_total_limit=3, save_strategy="no", max_steps=2)
    trainer.add_callback(Saves())
    trainer.save_model(str(tmp_path / "checkpoint-0"), _internal_call=True)
    assert trainer.args.save_total_limit == 3
    trainer.train()
    assert seen == [3, 3]
    assert trainer.args.save_total_limit == 3

    def interrupted(*args):
        raise KeyboardInterrupt

    trainer = KINDS["dpo"].start(tmp_path / "run", save_total_limit=3)
    trainer._save_rng_state = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.args.save_total_limit == 3


def test_only_a_checkpoint_is_written_as_one(tmp_path):
    """`Trainer`'s inner flag with another folder saves the model: what else lies there stays."""
    trainer = KINDS["dpo"].start(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path), _internal_call=True)
    assert is_whole(tmp_path / "checkpoint-1", contents=True)
    assert (tmp_path / "model.safetensors").exists()


def test_the_best_checkpoint_is_kept(tmp_path):
    trainer = KINDS["dpo"].start(
        tmp_path, save_total_limit=2, eval_strategy="steps", eval_steps=1, metric_for_best_model="eval_loss",
        greater_is_better=True, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    kept = [path.name for path in checkpoints(tmp_path)]
    assert len(kept) == 2
    assert Path(trainer.state.best_model_checkpoint).name in kept
    assert kept[-1] == "checkpoint-4"
    assert all(is_whole(path, contents=True) for path in checkpoints(tmp_path))


def test_what_other_callbacks_add_is_listed(tmp_path):
    class Adds(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            Path(args.output_dir, f"checkpoint-{state.global_step}", "note.txt").write_text("mine")

    trainer = KINDS["dpo"].start(tmp_path, max_steps=1)
    trainer.add_callback(Adds())
    trainer.train()
    assert "note.txt" in files_of(tmp_path / "checkpoint-1")


def test_push_to_hub_saves_no_state(tmp_path):
    """What `push_to_hub` writes into `output_dir` is the model, not what a run needs to go on."""
    trainer = KINDS["grpo"].start(tmp_path, max_steps=1, save_strategy="no")
    trainer.save_model(_internal_call=True)  # as `Trainer.push_to_hub` calls it
    assert (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "extra_state.pt").exists()


# -- ranks ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_files_of_all_ranks_make_a_checkpoint_whole(tmp_path, caplog):
    """C8, C15, C25: rank 1's random state is listed; without it, or on one process, nobody goes on silently."""
    folder = tmp_path / "two"
    on_ranks(two_ranks, 2, str(folder))
    ends = [torch.load(f"{folder}-{rank}")["weights"] for rank in (0, 1)]
    assert torch.equal(*ends)
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(files_of(folder / "checkpoint-4"))
    (folder / "checkpoint-4" / "rng_state_1.pth").unlink()  # a kill between the two ranks' files
    with pytest.raises(ValueError, match=r"rng_state_1\.pth is missing"):
        verified(folder / "checkpoint-4")
    on_ranks(two_ranks_resume, 2, str(folder))
    assert all(torch.equal(torch.load(f"{folder}-{rank}")["weights"], ends[0]) for rank in (0, 1))
    verified(folder / "checkpoint-4")
    assert torch.equal(KINDS["dpo"].run(folder, True), ends[0])
    assert "checkpoint-4 was written by 2 processes with whole weights, this run has 1" in caplog.text


def test_a_file_that_another_rank_did_not_write(tmp_path):
    """C15: the manifest is not written without it."""
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    with pytest.raises(OSError, match=r"rng_state_1\.pth of another process is not there"):
        seal(folder, Run({}, {}, {}), step=1, world_size=2, expected=["rng_state_1.pth"])
    assert not is_whole(folder)


# -- hostile files -------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@every_kind
def test_nothing_in_a_checkpoint_can_run_code(run, kind, tmp_path):
    """C5, C17: a bomb in each pickled file, under a manifest that fits: it does not go off."""
    _, _, _, newest = run(kind)  # not the last one, after which random states are not read
    mark = tmp_path / "exploded"
    torch.save(Bomb(mark), tmp_path / "zip")
    (tmp_path / "pickle").write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    manifest = read_manifest(newest)
    names = [name for name in files_of(newest) if name.endswith((".pt", ".pth", ".bin", ".pkl"))]
    assert len(names) >= 2
    for name in names:
        for bomb in ("zip", "pickle") if kind == "dpo" else ("zip",):
            copied = tmp_path / f"{newest.name}"
            shutil.copytree(newest, copied)
            shutil.copy(tmp_path / bomb, copied / name)
            seal(copied, Run(**manifest["run"]), step=3, world_size=1)
            if name == "training_args.bin":  # which nobody reads
                KINDS[kind].run(tmp_path / f"other-{name}-{bomb}", copied)
            else:
                with pytest.raises(
                    (pickle.UnpicklingError, ValueError), match=r"Weights only load failed|could not read"
                ):
                    KINDS[kind].run(tmp_path / f"other-{name}-{bomb}", copied)
            assert not mark.exists(), name
            shutil.rmtree(copied)


def test_the_bomb_is_one(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_states_hold_plain_values(tmp_path):
    import numpy as np

    state = {"a": np.float64(1.5), "b": [np.int64(2), (3, None)], "c": np.arange(3), "d": torch.ones(2), "e": "text"}
    write_state(tmp_path / "state.pt", state)
    got = read_state(tmp_path / "state.pt")
    assert (got["a"], got["b"], got["e"]) == (1.5, [2, (3, None)], "text")
    assert got["c"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"state\.pt: a: inner: a .*Path cannot be kept in a checkpoint"):
        write_state(tmp_path / "state.pt", {"a": {"inner": tmp_path}})
    (tmp_path / "state.pt").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"could not read .*state\.pt"):
        read_state(tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"absent\.pt is missing"):
        read_state(tmp_path / "absent.pt")


def test_random_states_come_back(tmp_path):
    import random

    import numpy as np

    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()

    draw()
    write_state(tmp_path / "rng.pt", random_state())
    expected = draw()
    draw()
    set_random_state(read_state(tmp_path / "rng.pt"))
    assert draw() == expected


# -- another run ---------------------------------------------------------------------------------

MEANINGLESS = [
    ("dpo", {"per_device_train_batch_size": 2}, "rows in an optimizer step=2: .* was written with 4"),
    ("dpo", {"gradient_accumulation_steps": 2}, "rows in an optimizer step=8: .* was written with 4"),
    ("ppo", {"batch_size": 2}, "rows in a step=2: .* was written with 4"),
    ("ddpo", {"sample_num_batches_per_epoch": 3}, "samples in an epoch=6: .* was written with 4"),
]


@pytest.mark.parametrize(("kind", "changed", "what"), MEANINGLESS)
def test_what_makes_a_continuation_meaningless(run, kind, changed, what):
    """C8, C29: an error that names it; for on-policy trainers see test_grpo.py."""
    folder, *_ = run(kind)
    with pytest.raises(ValueError, match=what):
        KINDS[kind].run(folder, True, **changed)


def plain(value):
    """The same in lists and numbers, which can be compared."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value.tolist() if isinstance(value, torch.Tensor) else repr(value)


def everything(trainer):
    """All of a trainer that a step depends on, and this process's random state."""
    own = {"weights": weights(trainer), "random": random_state()}
    if trainer.optimizer is not None:
        own["optimizer"] = trainer.optimizer.state_dict()
    for name in ("extra_state", "_state"):
        own[name] = getattr(trainer, name, dict)()
    progress = getattr(trainer, "progress", None)
    own["progress"] = progress and progress.state_dict()
    return plain(own)


def another_optimizer(trainer):
    trainer.optimizer.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})


REFUSALS = [
    *((kind, changed, None, what) for kind, changed, what in MEANINGLESS),
    ("ppo", {}, another_optimizer, r"optimizer: the checkpoint's has groups of \[.*\] weights, this run's of"),
    ("ddpo", {}, another_optimizer, r"optimizer: the checkpoint's has groups of \[.*\] weights, this run's of"),
    *((kind, {}, "random", "could not read .*rng_state-0") for kind in ("ppo", "ddpo")),
]


@pytest.mark.parametrize(("kind", "changed", "spoil", "what"), REFUSALS)
def test_a_refused_resume_changes_nothing(run, kind, changed, spoil, what):
    """Weights, optimizer, KL coefficient, moments, counters and random state are those of before."""
    folder, _, newest, _ = run(kind)
    if spoil == "random":
        manifest = read_manifest(newest)
        (newest / "rng_state-0.pt").write_bytes(b"no state")
        seal(newest, Run(**manifest["run"]), step=manifest["step"], world_size=1)
    trainer = KINDS[kind].start(folder, **changed)
    if callable(spoil):
        spoil(trainer)
    was = everything(trainer)
    with pytest.raises(ValueError, match=what):
        KINDS[kind].resume(trainer, newest)
    now = everything(trainer)
    assert [name for name in was if was[name] != now[name]] == []


def test_ignore_data_skip_is_a_way_out(run, caplog):
    """Without a place in the data another batch size is one line, as in release 1.0.0."""
    folder, _, newest, _ = run("dpo")
    without_last(newest)
    changed = {"per_device_train_batch_size": 2}
    with pytest.raises(ValueError, match="resume with that, set ignore_data_skip=True to begin anew in the data, or"):
        KINDS["dpo"].run(folder, True, **changed)
    trainer = KINDS["dpo"].start(folder, ignore_data_skip=True, **changed)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert "rows in an optimizer step 4 -> 2" in caplog.text


DIFFERENT = [
    ("dpo", {"learning_rate": 0.5, "seed": 9}, ["learning_rate 0.01 -> 0.5", "seed 3 -> 9"]),
    ("grpo", {"temperature": 0.7, "learning_rate": 0.5}, ["temperature 1.0 -> 0.7", "learning_rate 0.01 -> 0.5"]),
    ("ppo", {"learning_rate": 0.5}, ["learning_rate 0.01 -> 0.5"]),
    ("ddpo", {"train_learning_rate": 0.5, "seed": 9}, ["train_learning_rate 0.001 -> 0.5", "seed 0 -> 9"]),
]


@pytest.mark.parametrize(("kind", "changed", "what"), DIFFERENT)
def test_what_differs_is_one_line(run, kind, changed, what, caplog):
    """C8, C29: other rates, seeds, temperatures; the run goes on."""
    folder, _, newest, _ = run(kind)
    without_last(newest)
    KINDS[kind].run(folder, True, **changed)
    lines = [record.getMessage() for record in caplog.records if "with other settings" in record.getMessage()]
    assert len(lines) == 1
    assert all(each in lines[0] for each in what)
    assert lines[0].count("->") == len(what)


@every_kind
def test_the_same_run_says_nothing(run, kind, caplog):
    caplog.set_level(logging.WARNING)
    folder, end, newest, _ = run(kind)
    without_last(newest)
    assert torch.equal(KINDS[kind].run(folder, True), end)
    assert not [record for record in caplog.records if record.name.startswith("trl.trainer.checkpoints")]


def test_other_data_another_model_another_trainer(run, tmp_path, caplog):
    """C8, C29: data are said, another shape of the model and another trainer are errors."""
    folder, *_ = run("dpo")
    settings = {"output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 4, "report_to": "none"}

    def trainer(model, rows, cls=DPOTrainer):
        return cls(model, None, args=DPOConfig(**settings), train_dataset=rows, processing_class=tokenizer())

    trainer(causal_lm(), pairs().select([7, 6, 5, 4, 3, 2, 1, 0])).train(resume_from_checkpoint=True)
    assert "data '8 rows (" in caplog.text
    larger = AutoModelForCausalLM.from_config(config(intermediate_size=64))
    with pytest.raises(ValueError, match=r"model='LlamaForCausalLM of .* was written with 'LlamaForCausalLM of "):
        trainer(larger, pairs()).train(resume_from_checkpoint=True)

    class OtherTrainer(DPOTrainer):
        pass

    with pytest.raises(ValueError, match=r"trainer='OtherTrainer': .* was written with 'DPOTrainer'"):
        trainer(causal_lm(), pairs(), OtherTrainer).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("case", ["sft", "dpo-state", "kto", "kto-bco", "grpo", "gkd"])
def test_a_run_that_is_at_its_end_makes_no_step(case, tmp_path):
    """Resumed amid an epoch, transformers' loop would make one more step than `max_steps`."""
    first = build(case, tmp_path, max_steps=3, save_strategy="steps", save_steps=3)
    first.train()
    again = build(case, tmp_path, max_steps=3, save_strategy="steps", save_steps=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert torch.equal(weights(again), weights(first))


def test_data_are_told_apart():
    rows = pairs()
    assert data_fingerprint(rows) == data_fingerprint(pairs())
    assert data_fingerprint(rows) != data_fingerprint(rows.select(range(7)))
    assert data_fingerprint(rows) != data_fingerprint(rows.map(lambda row: {"chosen": row["chosen"] + "!"}))
    assert data_fingerprint([1, 2]) == "2 rows"
    assert data_fingerprint(None) is data_fingerprint(rows.to_iterable_dataset()) is None


# -- checkpoints of release 1.0.0 ----------------------------------------------------------------


def as_release_1_0_0(checkpoint):
    """Make a checkpoint look as the release without manifests wrote it."""
    (checkpoint / MANIFEST).unlink()
    if (checkpoint / "trainer_state.json").exists():
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        del state["stateful_callbacks"][MANIFEST]
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    else:
        import random

        import numpy as np

        own = read_state(checkpoint / "rng_state-0.pt")
        (checkpoint / "rng_state-0.pt").unlink()
        before = random_state()
        set_random_state(own)
        torch.save(
            {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()},
            checkpoint / "random_state-0.pt",
        )
        set_random_state(before)
        state = read_state(checkpoint / "trainer_state.pt")
        torch.save({**state, "kl_coef": np.float64(state["kl_coef"])}, checkpoint / "trainer_state.pt")


@pytest.mark.parametrize("kind", ["dpo", "grpo", "ppo"])
def test_an_old_checkpoint_is_taken_unverified(run, kind, caplog):
    folder, end, newest, before = run(kind)
    without_last(newest)
    as_release_1_0_0(before)
    assert torch.equal(KINDS[kind].run(folder, True), end)
    assert f"{before} has no {MANIFEST}: release 1.0.0 wrote it, and it cannot be verified" in caplog.text


def test_old_files_may_hold_numbers_of_numpy_only(tmp_path):
    torch.save(Bomb(tmp_path / "exploded"), tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"could not read .*state\.pt"):
        read_state(tmp_path / "state.pt", allowed=numpy_globals())
    assert not (tmp_path / "exploded").exists()


def test_an_old_checkpoint_of_ddpo_is_refused(tmp_path, caplog):
    """C17: its pickle files could run code."""
    old = KINDS["ddpo"].checkpoint(tmp_path, 3)
    old.mkdir(parents=True)
    (old / "random_states_0.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    (old / "custom_checkpoint_0.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(ValueError, match=r"checkpoint_3 was written by release 1\.0\.0: its pickle files could run"):
        KINDS["ddpo"].run(tmp_path, old)
    assert not (tmp_path / "exploded").exists()


# -- the caller's settings -----------------------------------------------------------------------


@pytest.mark.parametrize("case", ["sft", "dpo-state", "grpo", "kto", "reward"])
def test_the_settings_of_the_caller_stay_as_they_are(case, tmp_path, monkeypatch):
    """Fault h: neither a constructor nor a run changes the object that the caller passed."""
    import conformity

    import trl

    given = []
    config_class = getattr(trl, conformity.CASES[case].config)
    init = config_class.__init__

    def remember(self, *args, **kwargs):
        init(self, *args, **kwargs)
        given.append((self, copy.deepcopy(self.to_dict())))

    monkeypatch.setattr(config_class, "__init__", remember)
    trainer = build(case, tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1)
    trainer.train()
    (own, before), *_ = given
    assert own is not trainer.args
    assert own.to_dict() == before
    assert own.accelerator_config.dispatch_batches is None


def test_a_forked_process_reports_its_end(tmp_path):
    assert in_a_process(lambda: None) == 0
    assert ended_at(1, lambda: os.mkdir(tmp_path / "x")) == ENDED
    assert not (tmp_path / "x").exists()


def test_a_disk_error_gives_a_folder_its_name_back(tmp_path):
    """C26: what was to be replaced is there again, whole."""

    class Full(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise OSError(28, "No space left on device")

    trainer = KINDS["dpo"].start(tmp_path, max_steps=2, save_total_limit=5)
    trainer.train()
    before = read_manifest(tmp_path / "checkpoint-1")
    trainer.add_callback(Full())
    with pytest.raises(OSError, match=r"could not save checkpoint-1 .*No space left on device.*earlier checkpoints"):
        trainer.train()
    assert read_manifest(tmp_path / "checkpoint-1") == before
    check_files(tmp_path / "checkpoint-1", before)
    assert trainer.args.save_total_limit == 5
    assert weights(trainer).isfinite().all()
