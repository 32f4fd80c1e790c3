"""Verification of answers that would never end (C20, R10)."""

import os
import threading
from functools import partial
from pathlib import Path

import pytest

from trl.rewards import RewardPanel, accuracy_reward, verifier
from trl.rewards.math_answers import same_answer

pytest.importorskip("math_verify")
ENDLESS = ["$9^{9^{9}}$", "$99999999!$", r"$\sum_{n=1}^{100000} n^n$"]


@pytest.mark.parametrize("text", ENDLESS)
def test_an_answer_that_never_ends_is_wrong(text, caplog):
    """By the CPU time of the children, which have ended when their time is known."""
    before = os.times()
    assert same_answer(text, "42", 0.5) is False
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 3
    assert after.user - before.user < 0.5
    assert "1 of 1 completions took more than 0.5 s, or ended their process, and count as wrong" in caplog.text
    assert same_answer("42", "42") is True  # by a new process


def test_it_has_a_limit_by_default_and_others_in_the_batch_count():
    texts = ["$5$", ENDLESS[0], r"\boxed{5}", "$6$"]
    assert accuracy_reward(texts, ["5"] * 4, verify_seconds=0.5) == [1.0, 0.0, 1.0, 0.0]
    assert verifier.SECONDS == 5.0


def test_a_reward_that_holds_the_interpreter_holds_no_thread():
    """The time-out of the panel comes although the verification runs in code of C."""
    reward = partial(accuracy_reward, verify_seconds=1.0)
    verdict = RewardPanel([reward], 0.2)(1, {"completions": [ENDLESS[0]], "solution": ["42"]})
    assert verdict.timed_out == [True]
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(20)


def test_threads_files_and_processes_do_not_grow():
    def counts():
        return threading.active_count(), len(os.listdir("/proc/self/fd")), len(verifier._idle)

    accuracy_reward(["5"], ["5"])
    before = counts()
    for _ in range(3):
        accuracy_reward([ENDLESS[0], "5"], ["4", "5"], verify_seconds=0.2)
    assert counts() == before


def test_many_are_shared_out_and_stay_in_order():
    texts = [f"The answer is ${i}$" for i in range(40)]
    assert accuracy_reward(texts, ["7"] * 40) == [float(i == 7) for i in range(40)]
    assert len(verifier._idle) <= 4


@pytest.mark.parametrize("text", ["", "\ud800 $5", "$" * 1000, "{" * 3000, "\x00", r"\boxed{" * 500, "\n?\nright\n"])
def test_any_text_is_an_answer(text):
    assert same_answer(text, "42") is False
    assert same_answer("42", "42") is True


def test_the_child_has_no_environment_of_value(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_TRAINER", "1")
    child = verifier._Child()
    try:
        said = Path(f"/proc/{child._process.pid}/environ").read_bytes()
    finally:
        child.close()
    assert b"SECRET_OF_THE_TRAINER" not in said


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_limit_is_a_number_of_seconds(seconds):
    with pytest.raises(ValueError, match=f"seconds={seconds}"):
        same_answer("1", "1", seconds)


def test_a_child_that_was_killed_while_it_waited_is_replaced():
    assert same_answer("1", "1") is True
    verifier._idle[-1]._process.kill()
    verifier._idle[-1]._process.wait()
    assert same_answer("2", "2") is True


@pytest.mark.parametrize("times", [1, 2])
def test_a_child_that_is_killed_while_it_works_is_asked_again(times, monkeypatch, caplog):
    """By the system, for its memory, say: that is not the answer's fault, unless it happens again."""
    ask, killed = verifier._Child.ask, []

    def kill(self, *args):
        if len(killed) < times:
            killed.append(self._process.pid)
            self._process.kill()
            self._process.wait()
            self.is_ready = True
        return ask(self, *args)

    monkeypatch.setattr(verifier._Child, "ask", kill)
    assert same_answer("2", "2") is (True if times == 1 else None)
    assert ("ended their process" in caplog.text) is (times == 2)
    assert len(set(killed)) == times


def test_a_child_that_does_not_start_is_an_error(tmp_path, monkeypatch):
    """Not a reward of None for every completion."""
    verifier._close_all()
    monkeypatch.setattr(verifier, "_WORKER", tmp_path / "nowhere.py")
    with pytest.raises(RuntimeError, match=r"math-verify: its process does not start \(exit code 2\); `.*nowhere.py`"):
        same_answer("2", "2")


def test_it_works_where_the_directory_is_gone(tmp_path, monkeypatch):
    verifier._close_all()
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert same_answer("2", "2") is True
