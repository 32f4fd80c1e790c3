"""Intervals against published values."""

import pytest

from trl.quickstart.intervals import Interval, gain_interval, mean_interval, share_interval


def test_students_t():
    # t(.975, 4) = 2.776445, s = sqrt(2.5)
    interval = mean_interval([1, 2, 3, 4, 5])
    assert (interval.mean, interval.n) == (3, 5)
    assert interval.high - 3 == pytest.approx(2.776445 * (2.5 / 5) ** 0.5, rel=1e-6)
    assert 3 - interval.low == pytest.approx(interval.high - 3)


def test_wilson():
    # 8 of 10: (0.4902, 0.9433), Wilson 1927
    interval = share_interval(8, 10)
    assert (interval.low, interval.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


def test_a_constant_gain_is_certain_however_the_prompts_differ():
    assert gain_interval([0, 5, -3], [1, 6, -2]) == Interval(1, 1, 1, 3)


@pytest.mark.parametrize(("low", "above"), [(0.01, True), (0.0, False), (-0.2, False)])
def test_above_zero(low, above):
    assert Interval(0.5, low, 1.0, 10).above_zero is above


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_what_has_no_interval(values):
    with pytest.raises(ValueError, match="an interval needs"):
        mean_interval(values)


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_what_is_no_share(hits, n):
    with pytest.raises(ValueError, match=f"hits={hits}, n={n}"):
        share_interval(hits, n)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        gain_interval([1, 2, 3], [1, 2])
