"""Reviews: joined with their ratings, without doubles, dealt by film."""

import bz2
import csv
import io

import pytest

from trl.quickstart.reviews import Review, clean, openings, part_of, rating_pairs, read_reviews

LINE = "a film that goes on and on"


@pytest.fixture
def folders(tmp_path):
    rows = [
        ("fresh", "It\u2019s a  well-made film that works", "Alpha"),
        ("fresh", "It's a well made film, that works!", "Alpha"),  # the same letters again
        ("plot", "A man goes to town and comes back", "Alpha"),
        ("rotten", "Too short", "Alpha"),
        ("rotten", "a dull and lifeless thing to sit through", "Beta"),
        ("rotten", "nobody ever rated this one, poor thing", "Gamma"),
    ]
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerows([("category", "text", "movie_name", "has_plot_and_reviews"), *((*row, True) for row in rows)])
    (tmp_path / "rotten_tomatoes_corpus_full.csv.bz2").write_bytes(bz2.compress(table.getvalue().encode()))
    ratings = "1\t2.5\tIt's a well made film that works\n2\t-1.5\tA dull and lifeless thing to sit through\n"
    (tmp_path / "movieReviewSnippets_GroundTruth.txt").write_text(ratings)
    return tmp_path


def test_quotes_and_ratings_meet_by_letters_and_digits(folders):
    parts = read_reviews(folders, folders)
    reviews = {review.film: review for part in (parts.imitate, parts.rated, parts.heldout) for review in part}
    assert reviews == {
        "Alpha": Review("It's a well-made film that works", "Alpha", True, 2.5),
        "Beta": Review("a dull and lifeless thing to sit through", "Beta", False, -1.5),
        "Gamma": Review("nobody ever rated this one, poor thing", "Gamma", False, None),
    }


def test_a_film_is_in_the_part_that_its_name_decides(folders):
    parts = read_reviews(folders, folders)
    for name in ("imitate", "rated", "heldout"):
        assert all(part_of(review.film) == name for review in getattr(parts, name))


def test_films_are_dealt_in_the_stated_shares():
    dealt = [part_of(f"film {i}") for i in range(2000)]
    assert dealt.count("imitate") / 2000 == pytest.approx(0.40, abs=0.04)
    assert dealt.count("rated") / 2000 == pytest.approx(0.45, abs=0.04)
    assert dealt.count("heldout") / 2000 == pytest.approx(0.15, abs=0.03)


def test_text_is_cleaned():
    assert clean(" \u201cOne\u201d \n two\u2014three\u00a0four ") == '"One" two-three four'


def test_pairs_are_far_enough_apart_and_use_a_line_once():
    reviews = [Review(f"line {i}", "f", True, rating) for i, rating in enumerate([-3, -1, 0, 0.2, 1, 3])]
    pairs = rating_pairs([*reviews, Review("unrated", "f", True, None)], gap=1.0, seed=3)
    rating = {review.text: review.rating for review in reviews}
    assert pairs
    assert all(rating[pair["chosen"]] - rating[pair["rejected"]] >= 1 for pair in pairs)
    used = [text for pair in pairs for text in pair.values()]
    assert len(used) == len(set(used))


def test_pairs_are_those_of_the_seed():
    reviews = [Review(f"line {i}", "f", True, float(i)) for i in range(20)]
    assert rating_pairs(reviews, 0.5, 1) == rating_pairs(reviews, 0.5, 1)
    assert rating_pairs(reviews, 0.5, 1) != rating_pairs(reviews, 0.5, 2)
    assert rating_pairs(reviews, 0.5, 1, limit=2) == rating_pairs(reviews, 0.5, 1)[:2]


def test_openings_are_first_words_once_each():
    lines = [LINE, LINE.replace("on and on", "off and off"), "too short a line", "one film that has a bit to say"]
    starts = openings([Review(text, "f", True, None) for text in lines], words=3, seed=0)
    assert sorted(starts) == ["a film that", "one film that"]
