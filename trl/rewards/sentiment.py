"""Sentiment of text by VADER, a lexicon with rules made from human ratings (Hutto & Gilbert 2014, ICWSM)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from trl.rewards.texts import Completion, text_of


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError('the sentiment reward needs vaderSentiment: `pip install "trl[rewards]"`') from error
    return SentimentIntensityAnalyzer()


def sentiment(text: str) -> float:
    """VADER's compound score, -1 (scathing) to 1 (glowing)."""
    return float(_analyzer().polarity_scores(text)["compound"])


def variety(text: str) -> float:
    """Distinct words over words, 0 to 1; 1 for a text without words, which repeats nothing."""
    words = text.lower().split()
    return len(set(words)) / len(words) if words else 1.0


def varied_sentiment(text: str) -> float:
    """Sentiment times variety: praise counts less where it repeats itself, and repetition never softens a slating."""
    compound = sentiment(text)
    return compound * variety(text) if compound > 0 else compound


def sentiment_reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float]:
    """`varied_sentiment` of each prompt with its completion, in conversations of the reply; a reward function."""
    return [
        varied_sentiment(prompt + text_of(completion) if isinstance(prompt, str) else text_of(completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
