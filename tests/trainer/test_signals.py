"""SIGTERM: the step is finished and saved, the process ends with 143, and the resumed run equals a whole one."""

import json
import os
import signal
import threading

import pytest
import signal_runs
import torch
from checkpoint_cases import in_a_process
from process_group import on_ranks

from trl.cli.main import run
from trl.trainer.checkpoints import is_whole
from trl.trainer.guard import NonFiniteError
from trl.trainer.signals import TERMINATED, StopSignal

pytestmark = pytest.mark.filterwarnings("ignore:No dataset is provided")


def resumed_equals(run, folder, end, **settings):
    run(folder, resume=True, **settings)
    return torch.equal(torch.load(f"{folder}.pt"), end)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sft", {}),
        ("dpo-state", {"eval_strategy": "epoch", "save_strategy": "epoch"}),  # amid an epoch
        ("grpo-many", {"num_iterations": 2}),  # amid a rollout
    ],
)
def test_saved_and_resumed(name, settings, tmp_path, capfd):
    whole, folder = str(tmp_path / "whole"), str(tmp_path / "cut")

    def run(folder, **more):
        return signal_runs.run(name, folder, **settings, **more)

    run(whole)
    end = torch.load(f"{whole}.pt")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        run(folder, at=3)
    assert ended.value.code == TERMINATED == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert "SIGTERM: this step is finished and saved, then the process ends with 143" in capfd.readouterr().err
    assert is_whole(tmp_path / "cut" / "checkpoint-3", contents=True)
    assert not (tmp_path / "cut" / "checkpoint-4").exists()
    assert resumed_equals(run, folder, end)
    one, other = (_metrics(tmp_path / each) for each in ("whole", "cut"))
    assert [(line["step"], line["grad_norm"]) for line in one] == [(line["step"], line["grad_norm"]) for line in other]


def _metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "grad_norm" in line]


@pytest.mark.parametrize(("kind", "checkpoint"), [("ppo", "checkpoint-2"), ("ddpo", "logs/checkpoints/checkpoint_2")])
def test_ppo_and_ddpo(kind, checkpoint, tmp_path):
    run = getattr(signal_runs, kind)
    run(str(tmp_path / "whole"))
    end = torch.load(f"{tmp_path / 'whole'}.pt")
    with pytest.raises(SystemExit) as ended:
        run(str(tmp_path / "cut"), at=2)
    assert ended.value.code == 143
    assert is_whole(tmp_path / "cut" / checkpoint, contents=True)
    assert resumed_equals(run, str(tmp_path / "cut"), end)


def test_a_second_signal_ends_it_at_once(tmp_path):
    code = in_a_process(lambda: signal_runs.run("sft", str(tmp_path / "run"), at=2, times=2))
    assert code == -signal.SIGTERM
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_signal_after_the_last_step(tmp_path):
    """The run is over: the model is saved, so nothing is lost."""

    class Late(signal_runs.Sender):
        def on_step_begin(self, args, state, control, **kwargs):
            pass

        def on_train_end(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = signal_runs.run("sft", str(tmp_path / "run"))
    trainer.add_callback(Late(1))
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 143
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_signal_while_it_evaluates(tmp_path):
    """No further step is begun, and nothing is evaluated twice."""
    whole, folder = str(tmp_path / "whole"), str(tmp_path / "cut")
    settings = {"eval_strategy": "steps", "eval_steps": 2}
    signal_runs.run("sft", whole, **settings)
    with pytest.raises(SystemExit) as ended:
        signal_runs.run("sft", folder, at=2, amid="evaluation", **settings)
    assert ended.value.code == 143
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-2"]
    assert is_whole(tmp_path / "cut" / "checkpoint-2", contents=True)
    signal_runs.run("sft", folder, resume=True, **settings)
    assert torch.equal(torch.load(f"{folder}.pt"), torch.load(f"{whole}.pt"))
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 5]


def test_a_handler_of_the_user(tmp_path, caplog):
    """It is said that it waits, and it comes back."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        with pytest.raises(SystemExit):
            signal_runs.run("sft", str(tmp_path / "run"), at=1)
        assert "SIGTERM: the handler that was set is not called while the run trains" in caplog.text
        assert not heard
        signal.raise_signal(signal.SIGTERM)
        assert heard
    finally:
        signal.signal(signal.SIGTERM, before)


def test_off_where_it_is_not_asked_for(tmp_path):
    code = in_a_process(lambda: signal_runs.run("sft", str(tmp_path / "run"), at=2, enable_jit_checkpoint=False))
    assert code == -signal.SIGTERM


def test_children_and_other_threads(caplog):
    """A forked child keeps the meaning that the signal has for others; a thread cannot hear it."""
    stop = StopSignal()
    with stop.listening(True):
        assert in_a_process(lambda: os.kill(os.getpid(), signal.SIGTERM)) == -signal.SIGTERM
        assert not stop.asked
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked

    def elsewhere():
        with StopSignal().listening(True):
            pass

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "enable_jit_checkpoint=True: only the main thread hears SIGTERM" in caplog.text


def test_two_ranks(tmp_path):
    """The signal to one rank: both finish the step, save and end with 143. An infinite loss on one: both stop."""
    on_ranks(signal_runs.on_rank, 2, str(tmp_path))
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert first == second
    error = first.pop("error")
    assert first == {"code": 143, "checkpoints": ["checkpoint-2"], "equal": True}
    assert is_whole(tmp_path / "cut" / "checkpoint-2", contents=True)
    assert error.startswith("step 2: the loss is not finite in rank 1: micro-batch 0 (loss inf)")
    assert [path.name for path in (tmp_path / "bad").glob("checkpoint-*")] == ["checkpoint-1"]


def test_the_command_asks_for_it(tmp_path, monkeypatch):
    """Unless the line says no; and what is not finite is an exit code that is not 0."""
    seen = []

    def train(job, line, model, script, mixture, config, *others):
        seen.append(config.enable_jit_checkpoint)
        raise NonFiniteError("step 3: the loss is not finite")

    monkeypatch.setattr("trl.scripts.training.train", train)
    words = ["sft", "--model", "m", "--data", "d", "--output_dir", str(tmp_path)]
    assert run([*words]) == 2
    assert run([*words, "--enable_jit_checkpoint", "False"]) == 2
    assert seen == [True, False]
