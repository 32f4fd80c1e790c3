import threading
import time

import pytest

from trl.environment.tool_calls import ToolCalls


def collect_all(calls: ToolCalls) -> dict[int, str]:
    answers = {}
    while len(calls):
        answers |= calls.collect(patience=0)
    return answers


@pytest.mark.parametrize("timeout", [None, 5])
def test_every_row_gets_its_answer(timeout):
    calls = ToolCalls(timeout, workers=3)
    for row in range(10):
        calls.start(row, lambda row=row: f"answer {row}")
    assert collect_all(calls) == {row: f"answer {row}" for row in range(10)}


def test_without_a_timeout_tools_run_in_the_calling_thread_in_order():
    calls, seen = ToolCalls(None, workers=3), []
    for row in range(3):
        calls.start(row, lambda row=row: seen.append((row, threading.current_thread())) or "")
    calls.collect(patience=0)
    assert seen == [(row, threading.main_thread()) for row in range(3)]


def test_a_slow_call_does_not_hold_the_others():
    calls, release = ToolCalls(20, workers=4), threading.Event()
    calls.start(0, lambda: "slow" if release.wait(20) else "never")
    calls.start(1, lambda: "fast")
    assert calls.collect(patience=0) == {1: "fast"}
    release.set()
    assert calls.collect(patience=0) == {0: "slow"}


def test_a_call_that_takes_too_long_is_answered_for_and_its_late_answer_dropped():
    calls, release = ToolCalls(0.05, workers=1), threading.Event()
    calls.start(0, lambda: "late" if release.wait(20) else "never")
    calls.start(1, lambda: "fast")  # waits for the only worker
    began = time.monotonic()
    assert collect_all(calls) == {0: "Tool error: no answer within 0.05 s", 1: "fast"}
    assert time.monotonic() - began < 2
    release.set()
    time.sleep(0.05)
    calls.start(2, lambda: "next")
    assert collect_all(calls) == {2: "next"}


def test_patience_gathers_a_fuller_batch():
    calls = ToolCalls(20, workers=4)
    calls.start(0, lambda: "now")
    calls.start(1, lambda: time.sleep(0.05) or "soon")
    assert calls.collect(patience=10) == {0: "now", 1: "soon"}


def test_no_more_than_workers_run_at_once():
    calls, running, most = ToolCalls(20, workers=2), [], []

    def call():
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        return ""

    for row in range(6):
        calls.start(row, call)
    assert len(collect_all(calls)) == 6
    assert max(most) == 2


@pytest.mark.parametrize("timeout", [None, 5])
def test_what_a_call_raises_is_raised_by_collect(timeout):
    def broken():
        raise TypeError("no string")

    calls = ToolCalls(timeout, workers=1)
    calls.start(0, broken)
    with pytest.raises(TypeError, match="no string"):
        calls.collect(patience=0)
