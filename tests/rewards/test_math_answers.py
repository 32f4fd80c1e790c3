"""Mathematical answers, verified by `math-verify`."""

import threading

import pytest

from trl.rewards.math_answers import accuracy_reward, exact_match_reward, reasoning_accuracy_reward, same_answer

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
