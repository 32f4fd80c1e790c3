"""Plots of the quickstart's report beside its curves: changes, shares and distributions with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from trl.reports.charts import AFTER, BEFORE, INK, LIMIT, Panel, plain, tick_text, ticks
from trl.reports.intervals import Interval

BINS = 14


@dataclass(frozen=True)
class Pair:
    """One quantity before and after."""

    title: str
    before: Interval
    after: Interval


def before_after(pairs: Sequence[Pair]) -> Markup:
    """The means before and after with their 95 % intervals, a panel for each quantity."""
    return Markup('<div class="charts wide">{}</div>').format(Markup("").join(_pair(pair) for pair in pairs))


def _pair(pair: Pair) -> Markup:
    low, high = min(pair.before.low, pair.after.low), max(pair.before.high, pair.after.high)
    room = 0.15 * (high - low)
    panel = Panel(pair.title, (low - room, high + room), (-0.6, 1.75), width=420, height=140, left=52)
    found = ticks(low - room, high + room, 5)
    step = found[1] - found[0] if len(found) > 1 else 1.0
    panel.x_axis([(value, tick_text(value, step)) for value in found])
    panel.y_axis([(1, "before"), (0, "after")], grid=False)
    for row, interval, colour in ((1, pair.before, BEFORE), (0, pair.after, AFTER)):
        panel.span((interval.low, interval.high), row, colour)
        panel.dot(interval.mean, row, colour, 4.5)
        panel.text(interval.mean, row + 0.25, plain(interval.mean), colour, "middle", bold=True)
    return panel.svg()


def shares(rows: Sequence[tuple[str, Interval, str]], chance: float) -> Markup:
    """Horizontal bars of shares with their intervals, and a line at the share that chance reaches."""
    panel = Panel(
        "Held-out pairs put in people's order", (0, 1), (-0.5, len(rows) - 0.2), width=420, height=180, left=84
    )
    panel.x_axis([(0, "0"), (0.25, "25 %"), (0.5, "50 %"), (0.75, "75 %"), (1, "100 %")])
    places = list(range(len(rows)))[::-1]
    panel.y_axis([(place, name) for place, (name, _, _) in zip(places, rows, strict=True)], grid=False)
    for place, (_, share, colour) in zip(places, rows, strict=True):
        panel.box((0, share.mean), (place - 0.25, place + 0.25), colour, 0.9)
        panel.span((share.low, share.high), place, INK, 1.6, 1.0)
        panel.text(0.02, place - 0.06, f"{share.mean:.0%}", "#fff", bold=True)
    panel.upright(chance, "chance", LIMIT)
    return panel.svg()


def distributions(before: Sequence[float], after: Sequence[float], label: str) -> Markup:
    """The histograms before and after in one panel."""
    low, high = min(*before, *after), max(*before, *after)
    width = (high - low or 1.0) / BINS
    counts = {name: _counts(values, low, width) for name, values in (("before", before), ("after", after))}
    most = max(max(each) for each in counts.values())
    panel = Panel(label, (low, low + BINS * width), (0, 1.2 * most), width=420, height=200)
    panel.numbers("", whole=False)
    for (name, values), colour, place in ((("before", before), BEFORE, 12.0), (("after", after), AFTER, 26.0)):
        for number, count in enumerate(counts[name]):
            panel.box((low + number * width, low + (number + 1) * width), (0, count), colour, 0.5)
        panel.upright(sum(values) / len(values), "", colour, dashed=False)
        panel.text(52, 30 + place, f"■ {name}", colour, units=False)
    return panel.svg()


def _counts(values: Sequence[float], low: float, width: float) -> list[int]:
    counts = [0] * BINS
    for value in values:
        counts[min(BINS - 1, int((value - low) / width))] += 1
    return counts
