"""Mathematical answers, verified by `math-verify`."""

import threading

import pytest

from trl.rewards.math_answers import (
    accuracy_reward,
    exact_match_reward,
    get_cosine_scaled_reward,
    reasoning_accuracy_reward,
    same_answer,
)

pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("text", "solution", "same"),
    [
        (r"so it is \boxed{\frac{1}{2}}", "$0.5$", True),
        ("The answer is 42.", "42", True),
        ("The answer is 43.", "42", False),
        (r"$x^2 + 2x + 1$", "$(x+1)^2$", True),
        ("I do not know", "42", False),
        (r"\boxed{7}", r"7", True),
    ],
)
def test_answers(text, solution, same):
    assert same_answer(text, solution) is same


def test_a_solution_that_is_no_mathematics_has_no_opinion():
    assert accuracy_reward(["42", "42"], ["", "42"]) == [None, 1.0]


def test_conversations_and_other_columns():
    reply = [{"role": "assistant", "content": "It is $6$."}]
    assert accuracy_reward(completions=[reply], solution=["6"], prompts=["p"], trainer_state=None) == [1.0]


def test_it_works_away_from_the_main_thread():
    """The verifier's own time limit would need the main thread's signals."""
    seen = []
    thread = threading.Thread(target=lambda: seen.extend(accuracy_reward(["3"], ["3"])))
    thread.start()
    thread.join()
    assert seen == [1.0]


def test_reasoning_counts_only_what_follows_the_thoughts():
    texts = ["<think>5</think> The answer is 4.", "<think>4</think> 5", "<think>4"]
    assert reasoning_accuracy_reward(texts, ["4"] * 3) == [1.0, 0.0, 0.0]


def test_exact_match():
    assert exact_match_reward(["12 ", "13"], [12, "12"]) == [1.0, 0.0]


def test_cosine_scaled_reward():
    """cos(0) = 1, cos(pi/3) = 1/2, cos(pi/2) = 0, cos(pi) = -1, between the ends 1 and 0.5, or -1 and -0.5."""
    reward = get_cosine_scaled_reward(max_len=6)
    right = ["42".rjust(n) for n in (2, 3, 6, 9)]
    wrong = ["", "43".rjust(2), "43".rjust(3), "43".rjust(6)]
    assert reward(right, ["42"] * 4) == pytest.approx([0.875, 0.75, 0.5, 0.5])
    assert reward(wrong, ["42"] * 4) == pytest.approx([-1, -0.875, -0.75, -0.5])
    assert reward(["42"], [""]) == [None]
    other = get_cosine_scaled_reward(-10.0, -5.0, 5.0, 10.0, 4)
    assert other([[{"role": "assistant", "content": "42"}]], solution=["42"], prompts=[""]) == pytest.approx([7.5])
    with pytest.raises(ValueError, match="max_len=0"):
        get_cosine_scaled_reward(max_len=0)


@pytest.mark.parametrize(
    ("delimiters", "texts", "scores"),
    [
        (None, ["4</think> 5", "5 4", "4</think> 4</think> 5"], [1, 0, 1]),
        (["</reasoning>"], ["4</reasoning> 5", "4</think> 5", "5"], [1, 0, 0]),
        (["</a>", "[end]"], ["4 [end] 4 </a> 5", "4 </a> 5 [end] 5", "5 </a>"], [1, 1, 0]),
    ],
)
def test_what_ends_the_reasoning_can_be_said(delimiters, texts, scores):
    """R15"""
    assert reasoning_accuracy_reward(texts, ["5"] * 3, reasoning_delimiters=delimiters) == scores


@pytest.mark.parametrize("delimiters", [[], "</a>", [""]])
def test_what_ends_no_reasoning_is_refused(delimiters):
    """R15"""
    with pytest.raises(ValueError, match=r"reasoning_delimiters=.*: give a list of texts"):
        reasoning_accuracy_reward(["5"], ["5"], delimiters)


def test_a_solution_in_prose_has_no_opinion():
    """R15"""
    prose = ["Paris", "It is hard to say", "no", "x and y", "well-known"]
    assert accuracy_reward(prose, prose) == [None] * len(prose)
    mathematics = ["2ab", "xy", "x^2+1", r"\frac{1}{2}", "F = ma", r"\text{Paris}", r"\sin x"]
    answers = [f"${each}$" for each in mathematics]
    assert accuracy_reward(answers, mathematics) == [1.0] * len(mathematics)
