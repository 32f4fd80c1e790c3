"""Sentiment of text by VADER, a lexicon of human ratings with rules (Hutto & Gilbert 2014, ICWSM)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from trl.import_utils import pip_install
from trl.rewards.texts import Completion, text_of

LONGEST = 10_000
"""characters of a text that are rated; VADER's time grows with the square of the words"""


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError(
            f"the sentiment reward needs vaderSentiment: {pip_install('vaderSentiment==3.3.2')}"
        ) from error
    return SentimentIntensityAnalyzer()


def sentiment(text: str) -> float:
    """VADER's compound score of the first `LONGEST` characters, -1 (most negative) to 1 (most positive)."""
    return float(_analyzer().polarity_scores(text[:LONGEST])["compound"])


def variety(text: str) -> float:
    """The number of distinct words over that of words, 0 to 1; 1 for a text without words."""
    words = text.lower().split()
    return len(set(words)) / len(words) if words else 1.0


def varied_sentiment(text: str) -> float:
    """Sentiment times variety where it is positive: repeated praise counts less, repeated criticism counts in full."""
    compound = sentiment(text)
    return compound * variety(text) if compound > 0 else compound


def sentiment_reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float]:
    """A reward function: `varied_sentiment` of each prompt and completion; in a conversation, of the reply alone."""
    return [
        varied_sentiment(prompt + text_of(completion) if isinstance(prompt, str) else text_of(completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
