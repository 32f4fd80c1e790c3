"""Lines of film critics with people's ratings, split into three parts that share no film.

The rated snippets of Hutto & Gilbert (2014) are nearly all quotes of the Rotten Tomatoes corpus. So they are joined to
it by their letters and digits. Each film belongs to one part, so no part is measured on a film that another has seen.
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "\u2013": "-", "\u2014": "-", "\u00a0": " "})
PARTS = (("imitate", 0.40), ("rated", 0.85), ("heldout", 1.0))
"""each part and its upper bound: a film's hash in [0, 1) decides its part"""
WORDS = range(6, 41)
"""numbers of words that a line may have"""


@dataclass(frozen=True)
class Review:
    """A critic's line."""

    text: str
    film: str
    fresh: bool
    rating: float | None
    """mean of at least 20 people's ratings, -4 to 4"""


@dataclass(frozen=True)
class Reviews:
    """Lines to imitate, rated lines for the reward model, and held-out lines for the measurements."""

    imitate: list[Review]
    rated: list[Review]
    heldout: list[Review]


def read_reviews(quotes: Path, ratings: Path) -> Reviews:
    """Join the two assets, drop duplicates, and split the lines by film, in the same way for every seed."""
    rated = read_ratings(ratings / "movieReviewSnippets_GroundTruth.txt")
    parts: dict[str, list[Review]] = {name: [] for name, _ in PARTS}
    seen = set()
    for row in _rows(quotes / "rotten_tomatoes_corpus_full.csv.bz2"):
        text = clean(row["text"])
        if row["category"] == "plot" or _key(text) in seen or len(text.split()) not in WORDS:
            continue
        seen.add(_key(text))
        review = Review(text, row["movie_name"], row["category"] == "fresh", rated.get(_key(text)))
        parts[part_of(review.film)].append(review)
    return Reviews(**parts)


def read_ratings(path: Path) -> dict[str, float]:
    """Mean rating of each snippet; the keys are its letters and digits."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {_key(text): float(rating) for _, rating, text in (line.split("\t") for line in lines)}


def clean(text: str) -> str:
    """The text with straight quotes, plain dashes and single spaces."""
    return " ".join(text.translate(PLAIN).split())


def part_of(film: str) -> str:
    """The part that a film belongs to; only its name decides."""
    share = int.from_bytes(hashlib.sha256(film.encode()).digest()[:4]) / 2**32
    return next(name for name, end in PARTS if share < end)


def rating_pairs(reviews: Sequence[Review], gap: float, seed: int, limit: int | None = None) -> list[dict[str, str]]:
    """`chosen` and `rejected` lines whose ratings lie at least `gap` apart, as preference rows.

    Each line is in at most one pair, so that held-out pairs are independent.
    """
    rated = [review for review in reviews if review.rating is not None]
    random.Random(seed).shuffle(rated)
    pairs = []
    for one, other in zip(rated[::2], rated[1::2], strict=False):
        better, worse = sorted((one, other), key=lambda review: -(review.rating or 0))
        if (better.rating or 0) - (worse.rating or 0) >= gap:
            pairs.append({"chosen": better.text, "rejected": worse.text})
    return pairs[:limit]


def openings(reviews: Sequence[Review], words: int, seed: int, limit: int | None = None) -> list[str]:
    """Prompts to continue: the first words of lines that are at least twice as long, without duplicates."""
    starts = {" ".join(r.text.split()[:words]): None for r in reviews if len(r.text.split()) >= 2 * words}
    prompts = list(starts)
    random.Random(seed).shuffle(prompts)
    return prompts[:limit]


def _rows(path: Path) -> list[Mapping[str, str]]:
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _key(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
