"""Intervals against published values and against scipy; verdicts of comparisons."""

import numpy as np
import pytest
import scipy.stats

from trl.reports.comparison import Line, compared, reward_wins, win_measures
from trl.reports.intervals import (
    Interval,
    Measure,
    difference,
    gain_interval,
    interval_of,
    mean_interval,
    share_interval,
)


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


# -- by resampling the rows ----------------------------------------------------------------------


def measure(totals, counts=None, better=1, name="x"):
    totals = np.asarray(totals, dtype=float)
    return Measure(name, totals, np.ones(len(totals)) if counts is None else np.asarray(counts, dtype=float), better)


def test_an_interval_is_that_of_scipy():
    values = np.random.default_rng(3).exponential(size=40)
    wanted = scipy.stats.bootstrap((values,), np.mean, n_resamples=9999, rng=0, method="BCa").confidence_interval
    found = interval_of(measure(values))
    assert (found.mean, found.n) == (pytest.approx(values.mean()), 40)
    assert (found.low, found.high) == (pytest.approx(wanted.low), pytest.approx(wanted.high))


def test_a_figure_of_tokens_is_a_ratio_of_sums():
    found = interval_of(measure([2.0, 9.0, np.nan, 5.0], [1, 3, 0, 4]))  # 16 of 8 tokens; a row without tokens
    assert (found.mean, found.n) == (2.0, 3)
    assert 5 / 4 <= found.low < 2.0 < found.high <= 3.0  # no resample lies beyond the rows' own figures


def test_a_difference_is_paired():
    """Rows that differ much from each other and little between two models: paired, the difference is sure."""
    base = np.random.default_rng(0).normal(scale=10, size=30)
    step = np.random.default_rng(1).normal(0.5, 0.1, size=30)
    found = difference(measure(base), measure(base + step))
    assert found.mean == pytest.approx(step.mean())
    assert 0.4 < found.low < found.high < 0.6
    alone = interval_of(measure(base + step))
    assert alone.high - alone.low > 5


def test_resampling_two_rows_by_hand():
    """Differences 0 and 1: a resample's mean is 0, 1/2 or 1 with probabilities 1/4, 1/2, 1/4."""
    found = difference(measure([0.0, 0.0]), measure([0.0, 1.0]))
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([1.0, 2.0, 3.0], [1.5, 2.5, 3.5], (0.5, 0.5, 0.5)),  # the same in all rows
        ([1.5, 1.5], [1.5, 1.5], (0.0, 0.0, 0.0)),
        ([1.0], [2.0], (1.0, np.nan, np.nan)),  # one row says nothing of others
        ([np.nan, 1.0], [1.0, np.nan], (np.nan, np.nan, np.nan)),  # no row that both have
    ],
)
def test_rows_that_leave_no_room(before, after, expected):
    found = difference(measure(before), measure(after))
    assert (found.mean, found.low, found.high) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(("hits", "low", "high"), [(0, 0.0, 0.2425), (12, 0.7575, 1.0), (6, 0.2538, 0.7462)])
def test_a_share_of_rows_is_wilsons(hits, low, high):
    """By hand, z = 1.959964: (p + z2/2n +- z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n); 0 of 12: z2 / (12 + z2)."""
    found = interval_of(measure([1.0] * hits + [0.0] * (12 - hits)))
    assert (found.mean, found.n) == (hits / 12, 12)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_all_tokens_of_all_rows_are_no_certainty():
    found = interval_of(measure([3.0, 5.0, 4.0], [3, 5, 4]))
    z2 = 1.959964**2
    assert (found.mean, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(3 / (3 + z2), abs=1e-4)
    assert interval_of(measure([0.0, 0.0, 0.0], [3, 5, 4])).high == pytest.approx(z2 / (3 + z2), abs=1e-4)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        # with a gain and a loss more: (13 - 1) / 14 +- 1.96 sqrt((14/14 - (12/14)^2) / 14), cut at 1
        (0.0, 1.0, (1.0, 0.5874, 1.0)),
        (1.0, 0.0, (-1.0, -1.0, -0.5874)),
        (1.0, 1.0, (0.0, -0.1980, 0.1980)),  # 1.96 sqrt((2/14) / 14)
        (0.5, 1.0, (0.5, 0.2575, 0.5)),  # Wilson's of 12 of 12, less the half
    ],
)
def test_rows_that_change_alike_are_no_certainty(before, after, expected):
    found = difference(measure([before] * 12), measure([after] * 12))
    assert (found.mean, found.low, found.high) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("low", "high", "better", "verdict"),
    [
        (0.1, 0.3, 1, "better"), (0.1, 0.3, -1, "worse"), (-0.3, -0.1, -1, "better"), (-0.3, -0.1, 1, "worse"),
        (-0.1, 0.3, 1, "not distinguishable"), (0.0, 0.3, 1, "not distinguishable"), (0.1, 0.3, 0, "higher"),
        (-0.3, -0.1, 0, "lower"), (np.nan, np.nan, 1, "too few rows for an interval"),
    ],
)  # fmt: skip
def test_verdicts(low, high, better, verdict):
    one = Interval(0.0, -1.0, 1.0, 9)
    assert Line("x", "b", one, one, Interval(0.2, low, high, 9), better).verdict == verdict


def test_losses_of_two_tokenizers_are_compared_row_by_row():
    (line,) = compared(
        ["a", "b"], [[measure([2.0, 4.0], [2, 4], -1, "loss")], [measure([1.0, 3.0], [1, 1], -1, "loss")]]
    )
    assert (line.name, line.before.mean, line.after.mean, line.gain.mean) == ("loss of a row", 3.0, 2.0, -1.0)
    assert "tokenizers differ" in line.unit


def test_wins_by_a_reward():
    outcomes = reward_wins(measure([1.0, 2.0, 3.0, np.nan]), measure([2.0, 2.0, 1.0, 1.0]))
    assert outcomes == pytest.approx([1.0, 0.5, 0.0, np.nan], nan_ok=True)
    half, won = win_measures("wins", [1.0, 1.0, 0.5])
    assert difference(half, won).mean == pytest.approx(5 / 6 - 1 / 2)
