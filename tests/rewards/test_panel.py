"""What becomes of reward functions that do as asked, and of those that do not."""

import asyncio
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch

from trl.rewards.panel import RewardError, RewardPanel, name_of


def ask(functions, count=2, timeout=None, **columns):
    return RewardPanel(functions if isinstance(functions, list) else [functions], timeout)(count, columns)


def test_every_column_reaches_every_function_by_name():
    def first(prompts, solution, **columns):
        return [float(p == s) for p, s in zip(prompts, solution, strict=True)]

    def second(prompts, **columns):
        return [len(p) for p in prompts]

    verdict = ask([first, second], prompts=["a", "bb"], solution=["a", "c"])
    assert verdict.scores == [[1.0, 0.0], [1.0, 2.0]]
    assert verdict.timed_out == [False, False]


@pytest.mark.parametrize(
    "values",
    [
        [1, 0.5],
        (1.0, 0.5),
        torch.tensor([1.0, 0.5]),
        torch.tensor([[1.0], [0.5]]),
        np.array([[1], [0.5]]),
        torch.tensor([1.0, 0.5], requires_grad=True),
        torch.tensor([1.0, 0.5]).bfloat16(),
        iter([1, 0.5]),
        np.array([1, 0.5], np.float32),
        [np.float32(1), True / 2],
    ],
)
def test_any_numbers_will_do(values):
    assert ask(lambda **_: values).scores == [[1.0, 0.5]]


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_each_function_may_edit_what_it_gets(timeout):
    """R2: neither the rollout nor another function sees it, nor the next row, whose prompt is the same object."""
    message = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    given = {
        "prompts": [[message]] * 2,
        "completion_ids": [[3, 4], [5]],
        "solution": ["x", "y"],
    }
    before = repr(given)
    seen = []

    def edits(prompts, completion_ids, solution):
        seen.append(repr([prompts, completion_ids, solution]))
        completion_ids[0].pop()
        completion_ids.clear()
        prompts[0][0]["content"][0]["text"] += "!"
        prompts[0].append(message)
        solution.reverse()
        return [float(len(prompts[1])), 0.0]

    assert ask([edits, edits], timeout=timeout, **given).scores == [[1.0, 0.0], [1.0, 0.0]]
    assert len(set(seen)) == 1
    assert repr(given) == before


def test_none_is_no_opinion():
    (scores,) = ask(lambda **_: [None, 2.0]).scores
    assert np.isnan(scores[0])
    assert scores[1] == 2.0


def broken(**columns):
    raise KeyError("solution")


def reads(**columns):
    return open("no/such/words.txt").read()


async def yields(**columns):
    yield 1.0


def unknown(prompts, answer, *, level, log_metric, further=None, **columns):
    return [1.0] * len(prompts)


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (broken, "'broken' failed: KeyError"),
        (reads, r"'reads' failed: FileNotFoundError\(.*words\.txt"),
        (lambda **_: [1.0], "gave 1 values for 2 completions"),
        (lambda **_: None, "gave None: give a list"),
        (lambda **_: 3.0, "gave 3.0: give a list"),
        (lambda **_: [1.0, float("nan")], "gave nan for completion 1"),
        (lambda **_: [float("inf"), 1.0], "gave inf for completion 0"),
        (lambda **_: ["1", 1.0], "gave '1' for completion 0"),
        (lambda **_: [{}, 1.0], "gave {} for completion 0"),
        (lambda **_: [1e39, 1.0], r"gave 1e\+39 for completion 0: give a finite number of at most 1e\+15 in size"),
        (lambda **_: [0.0, -1e30], r"gave -1e\+30 for completion 1: give a finite number of at most"),
        (lambda **_: [0.0, 10**400], "for completion 1: give a finite number"),
        (lambda **_: torch.tensor(1.0), "gave one Tensor; give a list, with a value each"),
        (lambda **_: torch.ones(2, 2), r"gave \[1.0, 1.0\] for completion 0"),
        (yields, "gave one async_generator; give a list"),
        (unknown, "'unknown' needs answer, level; there are the columns prompts: add one, or give the parameter a def"),
    ],
)
@pytest.mark.parametrize("timeout", [None, 5.0])
def test_a_function_that_does_not_do_as_asked_is_named(function, what, timeout):
    with pytest.raises(RewardError, match=what):
        ask(function, timeout=timeout, prompts=["a", "b"])


def test_the_cause_stays_visible():
    with pytest.raises(RewardError) as caught:
        ask(broken)
    assert isinstance(caught.value.__cause__, KeyError)


def test_one_that_hangs_has_no_opinion_and_the_others_count():
    release = threading.Event()

    def hangs(**columns):
        release.wait(20)
        return [1.0, 1.0]

    start = time.monotonic()
    verdict = ask([hangs, lambda **_: [3.0, 4.0]], timeout=[0.1, None])
    release.set()
    assert time.monotonic() - start < 5
    assert np.isnan(verdict.scores[0]).all()
    assert verdict.scores[1] == [3.0, 4.0]
    assert verdict.timed_out == [True, False]


def test_time_outs_run_at_the_same_time():
    release = threading.Event()

    def hangs(**columns):
        release.wait(20)

    start = time.monotonic()
    verdict = ask([hangs] * 4, timeout=0.4)
    taken = time.monotonic() - start
    release.set()
    assert verdict.timed_out == [True] * 4
    assert taken < 1.2


def test_async_functions_wait_together():
    running = []

    async def slow(**columns):
        running.append(1)
        while len(running) < 2:  # neither ends before the other has begun
            await asyncio.sleep(0.01)
        return [1.0, 2.0]

    assert ask([slow, slow]).scores == [[1.0, 2.0]] * 2


def test_an_async_function_past_its_time_is_cancelled():
    cancelled = threading.Event()

    async def hangs(**columns):
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    assert ask(hangs, timeout=0.1).timed_out == [True]
    assert cancelled.wait(5)


def test_an_object_with_an_async_call():
    class Judge:
        async def __call__(self, **columns):
            await asyncio.sleep(0)
            return [0.0, 1.0]

    assert ask(Judge()).scores == [[0.0, 1.0]]


def test_without_a_time_out_a_function_keeps_the_thread():
    seen = []

    def where(**columns):
        seen.append(threading.current_thread())
        return [0.0, 0.0]

    ask(where)
    assert seen == [threading.main_thread()]


def test_names_are_told_apart():
    def reward(**columns):
        return [0.0]

    assert RewardPanel([reward, partial(reward, x=1), broken]).names == ["reward_0", "reward_1", "broken"]
    assert name_of(partial(partial(broken))) == "broken"


CASES = [([], None, "at least one"), ([3], None, "3 is not"), ([broken], [1.0, 2.0], "reward_timeout")]


@pytest.mark.parametrize(("functions", "timeout", "what"), CASES)
def test_what_cannot_be_a_panel(functions, timeout, what):
    with pytest.raises(ValueError, match=what):
        RewardPanel(functions, timeout)


# --- what ends and what never does --------------------------------------------------------------------------------


def leaves(**columns):
    raise SystemExit(0)


def leaves_by_exec(**columns):
    exec("import sys; sys.exit()")


async def leaves_later(**columns):
    leaves()


class Leaves:
    def __call__(self, **columns):
        quit(3)


@pytest.mark.parametrize("function", [leaves, leaves_by_exec, leaves_later, Leaves()])
@pytest.mark.parametrize("timeout", [None, 20])
def test_a_function_cannot_end_the_run(function, timeout):
    """R4"""
    with pytest.raises(RewardError, match=rf"'{name_of(function)}' failed: .*SystemExit\("):
        ask(function, timeout=timeout)


def test_ctrl_c_is_no_failure_of_a_function():
    def interrupted(**columns):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(interrupted)


def test_functions_that_hang_do_not_pile_up():
    """C23: a cap with an error, and calls that have ended after all do not count."""
    release = threading.Event()

    def hangs(**columns):
        release.wait(20)

    panel, threads = RewardPanel([hangs, lambda **_: [1.0, 1.0]], [0.01, None]), threading.active_count()
    for number in range(4):
        assert panel(2, {}).timed_out == [True, False]
        assert threading.active_count() == threads + number + 1
    with pytest.raises(RewardError, match="'hangs': 4 calls still run after their reward_timeout"):
        panel(2, {})
    assert threading.active_count() == threads + 4
    release.set()
    for late in panel._late["hangs"]:
        late._thread.join()
    assert threading.active_count() == threads
    with pytest.raises(RewardError, match="gave None"):  # it is asked again
        panel(2, {})


def test_late_calls_that_end_never_add_up():
    """C23"""
    releases = []

    def slow(**columns):
        releases.append(threading.Event())
        releases[-1].wait(20)
        return [1.0]

    panel, threads = RewardPanel([slow], 0.01), threading.active_count()
    for _ in range(12):
        assert panel(1, {}).timed_out == [True]
        releases[-1].set()
        panel._late["slow"][-1]._thread.join()
    assert threading.active_count() == threads


# --- rewards as people write them -----------------------------------------------------------------------------------


def test_what_is_async_shares_one_loop_for_all_rollouts():
    """R1"""
    gate = asyncio.Semaphore(1)  # of the module, as a client is

    async def judge(completions, **columns):
        async def ask(text):
            async with gate:
                await asyncio.sleep(0)
            return float(len(text))

        return await asyncio.gather(*map(ask, completions))

    class Object:
        async def __call__(self, completions):
            return await judge(completions)

    panel = RewardPanel([judge, Object(), partial(judge), lambda completions: judge(completions)], [None, 9, None, 9])
    for _ in range(3):
        assert panel(2, {"completions": ["a", "bb"]}).scores == [[1.0, 2.0]] * 4

    async def notebook():
        return panel(2, {"completions": ["a", "bb"]}).scores

    assert asyncio.run(notebook()) == [[1.0, 2.0]] * 4


def test_each_function_gets_values_of_its_own():
    """R2"""
    message = {"role": "user", "content": "a"}
    columns = {"prompts": [[message], [message]], "completion_ids": [[1, 2], [3]], "images": [np.zeros(1)] * 2}

    def takes(prompts, completion_ids, images):
        for prompt, ids, image in zip(prompts, completion_ids, images, strict=True):
            prompt.append(prompt[0])
            prompt[0]["content"] += "!"
            ids.pop()
            image += 1
        return [float(len(prompt) + sum(image)) for prompt, image in zip(prompts, images, strict=True)]

    def reads(prompts, completion_ids, **further):
        pairs = zip(prompts, completion_ids, strict=True)
        return [len(prompt[0]["content"]) + 10.0 * len(ids) for prompt, ids in pairs]

    assert ask([takes, reads, takes], **columns).scores == [[3.0, 3.0], [21.0, 11.0], [3.0, 3.0]]
    assert columns["prompts"] == [[{"role": "user", "content": "a"}]] * 2
    assert columns["completion_ids"] == [[1, 2], [3]]


def test_live_objects_are_not_copied():
    given = [object()]
    panel = RewardPanel([lambda state: [float(state is given)] * 2])
    assert panel(2, {}, {"state": given}).scores == [[1.0, 1.0]]
    assert panel(2, {"state": given}).scores == [[0.0, 0.0]]


def test_functions_log():
    """R3"""

    def first(log_extra, log_metric):
        log_extra("answer", np.array([3, 4]))
        log_metric("parsed", 0.5)
        log_metric("parsed", 1)
        return [1.0, 2.0]

    async def second(log_extra=None, log_metric=None, **columns):
        log_extra("note", ["x", None])
        log_metric("parsed", torch.tensor(0.0))
        return [1.0, 2.0]

    logs = ask([first, second]).logs
    assert logs.extra == {"answer": [3, 4], "note": ["x", None]}
    assert logs.metrics == {"parsed": [0.5, 1.0, 0.0]}


@pytest.mark.parametrize(
    ("log", "what"),
    [
        (lambda log_extra, log_metric: log_extra("a", [1]), "'a' has 1 values for 2 completions"),
        (lambda log_extra, log_metric: log_extra("prompt", [1, 2]), "'prompt' is a column of the table already"),
        (lambda log_extra, log_metric: log_extra("a", {1: 2, 3: 4}), "a dict; give a list"),
        (lambda log_extra, log_metric: log_metric("m", float("nan")), "'m' is nan"),
    ],
)
def test_what_cannot_be_logged(log, what):
    with pytest.raises(RewardError, match=what):
        ask(log)


@pytest.mark.parametrize("score", [1e39, 1e30, -1e16, 10**400, torch.tensor(1e20), np.float64("1e300")])
def test_a_reward_whose_square_is_no_float32_is_refused(score):
    """R5"""
    with pytest.raises(RewardError, match="for completion 1: give a finite number of at most 1e\\+15"):
        ask(lambda **_: [1.0, score])
    assert ask(lambda **_: [1.0, 1e15]).scores == [[1.0, 1e15]]


UNORDERED = ({"a": 1.0, "b": 2.0}, {1.0, 2.0}, frozenset((1.0, 2.0)), "12", b"12", {1: 1, 2: 2}.keys())


@pytest.mark.parametrize("value", UNORDERED)
def test_values_without_an_order_are_refused(value):
    """R6"""
    with pytest.raises(RewardError, match=f"gave a {type(value).__name__}; give a list, in the order"):
        ask(lambda **_: value)
