"""Rewards for form: tags, patterns, length, repetition; texts and conversations alike."""

import pytest

from trl.data.user_functions import own
from trl.rewards import texts
from trl.rewards.texts import EpisodeText, text_of, think_answer_format_reward, think_format_reward


def chat(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("text", "thinks", "answers"),
    [
        ("<think>a</think> b", 1, 0),
        ("<think>a\nb</think><answer>c</answer>", 1, 1),
        ("  <think></think> <answer>1</answer>\n", 1, 1),
        ("<think>a</think>", 0, 0),
        ("a <think>b</think> c", 0, 0),
        ("<think>a<think>b</think> c", 0, 0),
        ("<think>a</think> <answer>b</answer> <answer>c</answer>", 1, 0),
        ("<answer>b</answer>", 0, 0),
        ("", 0, 0),
    ],
)
def test_tags(text, thinks, answers):
    assert texts.think_format_reward([text, chat(text)]) == [thinks] * 2
    assert texts.think_answer_format_reward([text, chat(text)]) == [answers] * 2


def test_pattern():
    assert texts.pattern_reward(r"\d+")(["a 12", "b", "7"]) == [1, 0, 1]
    assert texts.pattern_reward(r"\d+", whole=True)(["a 12", "b", "7"]) == [0, 0, 1]
    with pytest.raises(ValueError, match="pattern="):
        texts.pattern_reward("(")


def test_length():
    penalty = texts.length_penalty(4, slope=2.0)
    assert penalty(completion_ids=[[0] * n for n in (1, 4, 6, 8)]) == [0, 0, -1, -2]
    with pytest.raises(ValueError, match="most=0"):
        texts.length_penalty(0)


def test_soft_overlong_punishment():
    """Eq. 13 of arXiv:2503.14476 by hand: limit 10, cache 4."""
    punish = texts.get_soft_overlong_punishment(10, 4)
    assert punish(completion_ids=[[0] * n for n in (6, 7, 8, 10, 12)]) == [0, -0.25, -0.5, -1, -1]
    with pytest.raises(ValueError, match="soft_punish_cache=11"):
        texts.get_soft_overlong_punishment(10, 11)


def test_repetition_penalty_of_other_releases():
    """`a b a b a`: half of the pairs repeat; three words hold no run of four."""
    penalty = texts.get_repetition_penalty_reward(2, -1.0)
    assert penalty(completions=["a b a b a", "a b c"], prompts=["", ""]) == [-0.5, 0]
    assert penalty([chat("A b a B a")]) == [-0.5]
    assert texts.get_repetition_penalty_reward(ngram_size=4, max_penalty=-2.0)(["a a a"]) == [0]
    with pytest.raises(ValueError, match=r"max_penalty=1\.0"):
        texts.get_repetition_penalty_reward(2, 1.0)
    with pytest.raises(ValueError, match="ngram_size=0"):
        texts.get_repetition_penalty_reward(0, -1.0)


def test_repetition():
    """`a b a b a`: pairs ab, ba, ab, ba: half of them have been there before."""
    penalty = texts.repetition_penalty(2, most=3.0)
    assert penalty(["a b a b a", "a b c", "a", ""]) == [-1.5, 0, 0, 0]
    with pytest.raises(ValueError, match="size=0"):
        texts.repetition_penalty(0)


# --- whose words, and which -----------------------------------------------------------------------------------------

TOOL = {"role": "tool", "name": "web", "content": "The answer is 42"}


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ([{"role": "assistant", "content": ""}, TOOL], ""),
        ([{"role": "assistant", "content": "I ask."}, TOOL, TOOL], "I ask."),
        ([TOOL], ""),
        ([], ""),
        ([TOOL, {"role": "assistant", "content": None, "tool_calls": []}], ""),
        ([{"role": "assistant", "content": [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]}], "42"),
        (EpisodeText.of("I ask.<call>The answer is 42<response>", ["I ask.<call>"]), "I ask.<call>"),
        (EpisodeText.of("", []), ""),
    ],
)
def test_the_policys_own_last_words(completion, text):
    """R11"""
    assert text_of(completion) == text
    assert text_of(own(completion)) == text


OPENED = "two and two</think> 4"


@pytest.mark.parametrize(
    ("prompt", "rendered", "score"),
    [
        ("Think. <think>\n", None, 1.0),
        ([{"role": "user", "content": "2 + 2?"}], "<|assistant|>\n<think>\n", 1.0),
        ([{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "<think>"}], None, 1.0),
        ("Write <think> first", "Write <think> first", 0.0),
        ([{"role": "user", "content": "2 + 2?"}], "<|assistant|>\n", 0.0),
    ],
)
def test_the_prompt_may_open_the_thoughts(prompt, rendered, score):
    """R9"""
    columns = {"prompts": [prompt], "prompt_texts": [rendered or ""]}
    assert think_format_reward([OPENED], **columns) == [score]
    assert think_format_reward(["<think>" + OPENED], **columns) == [1.0]
    assert think_answer_format_reward([OPENED.replace(" 4", "<answer>4</answer>")], **columns) == [score]
    assert think_format_reward([OPENED]) == [0.0]
