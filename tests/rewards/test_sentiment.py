"""Sentiment and variety; the compound scores are those of VADER's own README."""

import sys

import pytest

from trl.rewards import sentiment as module
from trl.rewards.sentiment import sentiment, sentiment_reward, varied_sentiment, variety


@pytest.mark.parametrize(
    ("text", "compound"),
    [
        ("VADER is smart, handsome, and funny.", 0.8316),
        ("The book was only kind of good.", 0.3832),
        ("Today SUX!", -0.5461),
        ("", 0.0),
    ],
)
def test_compound(text, compound):
    assert sentiment(text) == pytest.approx(compound, abs=1e-4)


@pytest.mark.parametrize(
    ("text", "share"), [("", 1.0), ("one two", 1.0), ("Good good good good", 0.25), ("a b A b", 0.5)]
)
def test_variety(text, share):
    assert variety(text) == share


def test_repeated_praise_counts_less_and_repeated_blame_no_less():
    assert varied_sentiment("good good good good") == pytest.approx(sentiment("good good good good") / 4)
    assert varied_sentiment("awful awful awful awful") == sentiment("awful awful awful awful") < 0


def test_a_reward_is_that_of_the_whole_line():
    assert sentiment_reward(["A good", "A bad"], [" film", " film"]) == [
        sentiment("A good film"),
        sentiment("A bad film"),
    ]


def test_prompts_and_completions_must_belong_together():
    with pytest.raises(ValueError, match="argument"):
        sentiment_reward(["a"], ["b", "c"])


def test_without_vader_the_way_out_is_named(monkeypatch):
    module._analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ImportError, match="pip install"):
        sentiment("good")
    module._analyzer.cache_clear()
