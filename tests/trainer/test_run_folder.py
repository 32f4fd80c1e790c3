"""The folder of a run: one live run at a time, one run's checkpoints, and a record of what was logged."""

import json
import math
import os
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

import conformity
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from checkpoint_cases import KINDS, weights
from conformity import build, history
from datasets import Dataset
from tokenizers_for_tests import word_tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback

import trl
from trl import PPOConfig
from trl.rewards.panel import RewardError
from trl.trainer.checkpoints import is_whole, keep_newest
from trl.trainer.run_folder import LOCK, FolderInUse, RunFolder, check_writable
from trl.trainer.tally import write_metrics

pytestmark = pytest.mark.filterwarnings("ignore:No dataset is provided")


def saving(folder, name="sft", **settings):
    return build(name, folder, **{"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 9, **settings})


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder):
    return [line["step"] for line in lines_of(folder) if "grad_norm" in line]


# -- C12: whose checkpoints -------------------------------------------------------------------------


def test_another_runs_checkpoints(tmp_path):
    first = saving(tmp_path)
    first.train()
    first.train()  # the same trainer once more: its own checkpoints
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match=r"holds checkpoint-2 of another run: .*resume_from_checkpoint=True.*overwrite_output_dir=True"
    ):
        saving(tmp_path, save_strategy="no").train()
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert not (tmp_path / LOCK).exists()
    saving(tmp_path, max_steps=3).train(resume_from_checkpoint=True)
    assert is_whole(tmp_path / "checkpoint-3")
    saving(tmp_path, max_steps=1, overwrite_output_dir=True).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert steps_of(tmp_path) == [1]


def test_what_saved_no_checkpoint_runs_again(tmp_path):
    """A cell of a notebook; a run that was killed in its first save; rollouts of a longer run before."""
    for steps in (2, 1):
        build("grpo", tmp_path, max_steps=steps).train()
        assert len(list((tmp_path / "rollouts").glob("*.parquet"))) == steps
        assert steps_of(tmp_path) == [1, 2][:steps]
    assert len(list((tmp_path / "earlier-1" / "rollouts").glob("*.parquet"))) == 2
    assert steps_of(tmp_path / "earlier-1") == [1, 2]
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model.safetensors").write_text("torn")
    build("grpo", tmp_path, max_steps=1).train()


def test_nothing_of_an_earlier_run_is_lost(tmp_path, caplog):
    """Records without rollouts, after several runs; nothing is put aside twice, or where it is not wanted."""
    first = build("sft", tmp_path, max_steps=1)
    first.train()
    first.train()
    second = build("sft", tmp_path, max_steps=1)
    second.evaluate()  # its own line, which stays
    second.train()
    assert f"metrics.jsonl of an earlier run, which left no checkpoint: now in {tmp_path / 'earlier-1'}" in caplog.text
    assert "eval_loss" in lines_of(tmp_path)[0]
    build("sft", tmp_path, max_steps=1).train()
    assert sorted(path.name for path in tmp_path.glob("earlier-*")) == ["earlier-1", "earlier-2"]
    assert [steps_of(tmp_path / name) for name in ("earlier-1", "earlier-2", "")] == [[1, 1], [1], [1]]
    build("sft", tmp_path, max_steps=1, overwrite_output_dir=True).train()
    assert not (tmp_path / "earlier-3").exists()


def test_a_checkpoint_from_elsewhere(tmp_path, caplog):
    """Who asks for another folder's checkpoint gets it; that the folder holds another run's is one line."""
    saving(tmp_path / "a", max_steps=2).train()
    saving(tmp_path / "b", max_steps=4).train()
    start = str(tmp_path / "a" / "checkpoint-1")
    trainer = saving(tmp_path / "b", max_steps=2)
    trainer.train(resume_from_checkpoint=start)
    assert "b holds checkpoint-4 of another run than the checkpoint that this one goes on with" in caplog.text
    assert trainer.state.global_step == 2
    assert (tmp_path / "b" / "checkpoint-4" / "manifest.json").exists()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    saving(tmp_path / "a", max_steps=2).train(resume_from_checkpoint=str(tmp_path / "link" / "checkpoint-1"))
    build("sft", tmp_path / "c", max_steps=1).train()
    saving(tmp_path / "c", max_steps=2).train(resume_from_checkpoint=start)
    assert steps_of(tmp_path / "c") == [2]
    assert steps_of(tmp_path / "c" / "earlier-1") == [1]
    ppo = RunFolder()
    assert [ppo.goes_on(resume, tmp_path / "a") for resume in (None, False, True, start, tmp_path / "b")] == [
        False, False, True, True, False
    ]  # fmt: skip


def test_checkpoints_without_their_optimizer_are_no_killed_saves(tmp_path):
    """Their user made room: they are refused as another run's, and removed only where a limit says so."""
    saving(tmp_path, max_steps=3).train()
    (tmp_path / "checkpoint-1" / "optimizer.pt").unlink()
    saving(tmp_path, max_steps=4, save_total_limit=4).train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()
    for number in (2, 3, 4):
        (tmp_path / f"checkpoint-{number}" / "optimizer.pt").unlink()
    with pytest.raises(FolderInUse, match="holds checkpoint-4 of another run"):
        saving(tmp_path, max_steps=1).train()
    keep_newest(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_of_a_link_only_the_link_is_removed(tmp_path):
    saving(tmp_path / "a", max_steps=2).train()
    for name, settings in (("b", {"overwrite_output_dir": True}), ("c", {"save_total_limit": 1, "max_steps": 3})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint-2").symlink_to(tmp_path / "a" / "checkpoint-2")
        trainer = saving(tmp_path / name, **{"max_steps": 1, **settings})
        trainer.train(resume_from_checkpoint=name == "c" or None)
        assert not (tmp_path / name / "checkpoint-2").exists()
        assert not list((tmp_path / name).glob(".*"))
    assert is_whole(tmp_path / "a" / "checkpoint-2", contents=True)


def test_the_folder_stays_where_the_directory_changes(tmp_path, monkeypatch):
    """A reward function that changes the directory, and a relative folder, of `Trainer`, PPO and DDPO."""
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)

    def moves(completions, **columns):
        os.chdir(tmp_path / "other")
        return [0.5] * len(completions)

    case = replace(conformity.CASES["grpo"], arguments=lambda: {"reward_funcs": moves})
    monkeypatch.setitem(conformity.CASES, "grpo", case)
    saving(Path("run"), "grpo", max_steps=1).train()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-1", "metrics.jsonl", "rollouts"]
    os.chdir(tmp_path)
    assert KINDS["ppo"].start(Path("ppo"), steps=4).config.output_dir == str(tmp_path / "ppo")
    trainer = KINDS["ddpo"].start(Path(), num_epochs=2)
    os.chdir(tmp_path / "other")
    trainer.train()
    assert is_whole(tmp_path / "logs" / "checkpoints" / "checkpoint_1")
    assert not list((tmp_path / "other").iterdir())


def test_any_log_is_a_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "lo')  # killed while it wrote
    for logs in (
        {"loss": math.nan, "table": object()},
        {("a", 1): np.float32(2.0)},
        {"long": 10**5000},
        {"t": "\ud800"},
    ):
        write_metrics(tmp_path, {"step": 2, **logs})
    assert lines_of(tmp_path) == [
        {"step": 0}, {"step": 2, "loss": None}, {"step": 2, "('a', 1)": 2.0}, {"step": 2, "t": "\ud800"}
    ]  # fmt: skip


def test_ppo_and_ddpo(tmp_path):
    def ppo(**settings):
        return KINDS["ppo"].start(tmp_path / "ppo", steps=4, **settings)

    ppo().train()
    with pytest.raises(ValueError, match="holds checkpoint-1 of another run"):
        ppo().train()
    ppo(overwrite_output_dir=True).train()
    assert [line["step"] for line in lines_of(tmp_path / "ppo")] == [1]
    assert lines_of(tmp_path / "ppo")[0]["objective/kl"] == 0.0
    with pytest.raises(ValueError, match="overwrite_output_dir=True: needs `output_dir` and `save_steps`"):
        PPOConfig(overwrite_output_dir=True)

    AcceleratorState._reset_state(reset_partial_state=True)
    (tmp_path / "d").mkdir()
    KINDS["ddpo"].start(tmp_path / "d", num_epochs=2).train()
    steps = [line["step"] for line in lines_of(tmp_path / "d" / "logs")]
    assert steps == sorted(steps)
    with pytest.raises(
        ValueError, match=r"holds checkpoint_1 of another run: go on with it by resume_from='.*logs/che"
    ):
        KINDS["ddpo"].start(tmp_path / "d", num_epochs=2).train()
    KINDS["ddpo"].start(tmp_path / "d", num_epochs=2, overwrite_output_dir=True).train()
    assert [line["step"] for line in lines_of(tmp_path / "d" / "logs")] == steps
    KINDS["ddpo"].start(tmp_path / "d", num_epochs=3, resume_from=str(tmp_path / "d/logs/checkpoints")).train()
    longer = [line["step"] for line in lines_of(tmp_path / "d" / "logs")]
    assert longer[: len(steps)] == steps
    assert len(longer) == len(steps) * 3 // 2


# -- C12: a live run --------------------------------------------------------------------------------


def holder(folder, with_child=False):
    """The id of a process that holds the folder until it is killed, and of its child."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with RunFolder().held(folder, resumes=False, overwrite=False):
                child = os.fork() if with_child else 0
                if with_child and child == 0:
                    signal.pause()
                os.write(write, f"{child}\n".encode())
                signal.pause()
        finally:
            os._exit(1)
    child = int(os.read(read, 20))
    os.close(read)
    os.close(write)
    return pid, child


def test_a_live_run_keeps_others_out(tmp_path):
    pid, child = holder(tmp_path, with_child=True)
    trainer = build("sft", tmp_path, max_steps=1)
    with pytest.raises(
        ValueError, match=rf"another run writes into '{tmp_path}' \(process {pid} on .*\): wait for its"
    ):
        trainer.train()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    trainer.train()  # although a child that was forked off lives on
    os.kill(child, signal.SIGKILL)
    assert not (tmp_path / LOCK).exists()


def test_two_runs_of_one_process(tmp_path):
    with RunFolder().held(tmp_path, resumes=False, overwrite=False):
        with pytest.raises(FolderInUse, match=f"process {os.getpid()}"), RunFolder().held(
            tmp_path, resumes=True, overwrite=True
        ):  # fmt: skip
            pass
        assert (tmp_path / LOCK).exists()
    with RunFolder().held(tmp_path, resumes=False, overwrite=False):
        pass


# -- C22: a folder that cannot be written -----------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_found_first(tmp_path, monkeypatch):
    trainer = build("sft", tmp_path / "run", max_steps=1)
    steps = []
    trainer.objective = lambda *args: steps.append(1)

    def read_only(path, *args, **kwargs):
        raise OSError(30, "Read-only file system", path)

    monkeypatch.setattr("trl.trainer.run_folder.os.open", read_only)
    with pytest.raises(ValueError, match=r"run' cannot be written \(Read-only file system\): give a folder that can"):
        trainer.train()
    assert not steps
    monkeypatch.undo()
    (tmp_path / "file").write_text("x")
    folder = RunFolder().held(tmp_path / "file" / "run", resumes=False, overwrite=False)
    with pytest.raises(ValueError, match="cannot be written"):
        folder.__enter__()


@pytest.mark.parametrize(
    ("trainer", "config", "more"),
    [
        ("SFTTrainer", "SFTConfig", {}), ("RewardTrainer", "RewardConfig", {}),
        ("GRPOTrainer", "GRPOConfig", {"reward_funcs": len}), ("PPOTrainer", "PPOConfig", {"reward_funcs": len}),
    ],
)  # fmt: skip
def test_it_is_found_before_the_model_is_loaded(trainer, config, more, tmp_path):
    """A file stands in the way; the model would not be found either."""
    (tmp_path / "file").write_text("x")
    rows = Dataset.from_list([{"prompt": "a", "text": "a", "chosen": "a", "rejected": "b"}])
    args = getattr(trl, config)(output_dir=str(tmp_path / "file" / "run"), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"file/run' cannot be written \(Not a directory\): give a folder that can"):
        getattr(trl, trainer)(
            model="./no-such-model", args=args, train_dataset=rows, processing_class=word_tokenizer(), **more
        )


def test_nothing_stays_of_the_try(tmp_path, monkeypatch):
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    check_writable(tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []

    own, tries = tempfile.TemporaryFile, []

    def tidied(*args, **kwargs):
        tries.append(1)
        if len(tries) == 1:
            raise FileNotFoundError(2, "No such file or directory")
        return own(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("trl.trainer.run_folder.tempfile.TemporaryFile", tidied)
        check_writable(tmp_path / "both")  # another run that tried it has just removed it
    assert len(tries) == 2

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trl.trainer.run_folder.tempfile.TemporaryFile", full)
    with pytest.raises(ValueError, match=r"new/run' cannot be written \(No space left on device\)"):
        check_writable(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


# -- C11: whose error -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("No space left on device"), TimeoutError("slow")]
)
def test_an_error_of_a_reward_is_its_own(error, tmp_path, monkeypatch):
    calls = []

    def reward(completions, **columns):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return [0.5] * len(completions)

    case = replace(conformity.CASES["grpo"], arguments=lambda: {"reward_funcs": reward})
    monkeypatch.setitem(conformity.CASES, "grpo", case)
    with pytest.raises(RewardError, match=r"^reward function 'reward' failed: "):
        saving(tmp_path, "grpo").train()
    assert is_whole(tmp_path / "checkpoint-1")


# -- C13: a record of the run -----------------------------------------------------------------------


def test_metrics_without_checkpoints(tmp_path):
    trainer = build("dpo-sigmoid", tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.evaluate()
    trainer.train()
    lines = lines_of(tmp_path)
    assert [line["loss"] for line in lines if "loss" in line] == history(trainer, "loss")
    assert [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line][1:] == [
        (row["step"], row["eval_loss"]) for row in trainer.state.log_history if "eval_loss" in row
    ]
    assert lines[0]["step"] == 0  # the evaluation before training stays
    assert "train_runtime" in lines[-1]
    trainer.evaluate()
    assert lines_of(tmp_path)[:-1] == lines
    build("dpo-sigmoid", tmp_path, max_steps=1).evaluate()  # of another trainer: nothing is lost
    assert lines_of(tmp_path)[:-2] == lines


def test_metrics_of_a_resumed_run(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    saving(whole, max_steps=4).train()
    trainer = saving(cut, max_steps=4, save_steps=2)
    trainer.add_callback(Stop())
    with pytest.raises(InterruptedError):
        trainer.train()
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "gr')  # killed while it wrote
    assert steps_of_torn(cut) == [1, 2, 3]
    second = saving(cut, max_steps=4, save_steps=2)
    second.train(resume_from_checkpoint=True)
    assert steps_of(cut) == [1, 2, 3, 4]
    assert [line["loss"] for line in lines_of(cut) if "loss" in line] == [
        line["loss"] for line in lines_of(whole) if "loss" in line
    ]
    assert torch.equal(weights(second), torch.cat([p.flatten() for p in _loaded(whole / "checkpoint-4")]))


class Stop(TrainerCallback):
    """Ends a run before its fourth step, as a kill would."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise InterruptedError


def steps_of_torn(folder):
    *good, torn = (folder / "metrics.jsonl").read_text().splitlines()
    assert torn == '{"step": 4, "gr'
    return [json.loads(line)["step"] for line in good]


def _loaded(folder):
    return [p.detach() for p in AutoModelForCausalLM.from_pretrained(folder).parameters()]
