"""Models compared on the same rows: which figures differ beyond chance, and what each of them says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from trl.data.any_text import visible
from trl.data.thumbnails import Gallery, mark
from trl.reports.charts import AFTER, BEFORE, COST, Panel, tick_text, ticks
from trl.reports.intervals import Interval, Measure, difference, interval_of
from trl.reports.page import rendered
from trl.trainer.run_record import write_whole

SAME = "not distinguishable"
UNKNOWN = "too few rows for an interval"
SHOWN = 700
"""characters of a text on the page"""


@dataclass(frozen=True)
class Line:
    """A figure of the first model and of another one."""

    name: str
    other: str
    """the other model"""
    before: Interval
    after: Interval
    gain: Interval
    """`after - before`, row by row"""
    better: int
    unit: str = ""

    @property
    def verdict(self) -> str:
        """Whether the other model is better, in words."""
        if not (math.isfinite(self.gain.low) and math.isfinite(self.gain.high)):
            return UNKNOWN
        if self.gain.low <= 0 <= self.gain.high:
            return SAME
        rises = self.gain.low > 0
        if not self.better:
            return "higher" if rises else "lower"
        return "better" if rises == (self.better > 0) else "worse"


@dataclass
class Comparison:
    """What `trl compare` has found."""

    names: list[str]
    """of the models, the first one being what the others are compared with"""
    data: str
    rows: int
    lines: list[Line] = field(default_factory=list)
    samples: list[tuple[str, list[str]]] = field(default_factory=list)
    """a prompt, and what each model says"""
    facts: list[tuple[str, str]] = field(default_factory=list)
    """how it was made"""
    pictures: Sequence[Sequence[int]] = ()
    """of each prompt of the samples, by their numbers"""


def compared(names: Sequence[str], measures: Sequence[Sequence[Measure]]) -> list[Line]:
    """Each figure of the first model against that of every other one."""
    first = {each.name: each for each in measures[0]}
    lines = []
    for name, others in zip(names[1:], measures[1:], strict=True):
        for after in others:
            before = first.get(after.name)
            if before is None:
                continue
            before, after, unit = _comparable(before, after)
            lines.append(
                Line(before.name, name, interval_of(before), interval_of(after), difference(before, after),
                     after.better, unit)
            )  # fmt: skip
    return lines


def _comparable(before: Measure, after: Measure) -> tuple[Measure, Measure, str]:
    """The same, or per row where two tokenizers count differently."""
    kept = before.known & after.known
    if np.array_equal(before.counts[kept], after.counts[kept]):
        return before, after, ""
    if before.better > 0:  # a share of tokens of one's own
        return before, after, "of its own tokens"
    ones = np.ones(len(before.totals))
    whole = [Measure(f"{one.name} of a row", one.totals, ones, one.better) for one in (before, after)]
    return whole[0], whole[1], "the tokenizers differ, so tokens are no common measure"


def win_measures(name: str, outcomes: Sequence[float]) -> tuple[Measure, Measure]:
    """A share of wins beside the half that two equal models have."""
    ones = np.ones(len(outcomes))
    return Measure(name, 0.5 * ones, ones), Measure(name, np.asarray(outcomes, dtype=float), ones)


def reward_wins(before: Measure, after: Measure) -> list[float]:
    """Of each row 1 where the other model's reward is higher, 0.5 where it is the same; nan where one has none."""
    ahead = after.totals / after.counts - before.totals / before.counts
    return [math.nan if math.isnan(x) else 0.5 + 0.5 * float(np.sign(x)) for x in ahead]


# -- in words ------------------------------------------------------------------------------------


def number(value: float, sign: bool = False) -> str:
    """A figure with three digits, and at most four behind the point."""
    if not math.isfinite(value):
        return "-"
    if not value:
        return "0"
    size = abs(value)
    digits = 4 if size < 0.0995 else 3 if size < 9.995 else 2 if size < 99.95 else 1 if size < 999.5 else 0
    return f"{round(value, digits) + 0.0:{'+' if sign else ''},.{digits}f}"


def span(interval: Interval, sign: bool = False) -> str:
    """The ends of an interval."""
    if not math.isfinite(interval.low):
        return "-"
    return f"{number(interval.low, sign)} to {number(interval.high, sign)}"


def summary(lines: Sequence[Line]) -> str:
    """Which figures of one model differ, in a sentence."""
    found: dict[str, list[str]] = {}
    for word in ("better", "worse", "higher", "lower", SAME, UNKNOWN):
        names = [line.name for line in lines if line.verdict == word]
        if names:
            found[word] = names
    words = [f"{word}{':' if word == UNKNOWN else ' in'} {', '.join(names)}" for word, names in found.items()]
    text = "; ".join(words)
    return f"{text[:1].upper()}{text[1:]}."


# -- the page ------------------------------------------------------------------------------------


def write_page(found: Comparison, path: Path) -> None:
    """Write the comparison as one HTML file that loads nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, render(found))


def render(found: Comparison) -> str:
    def shown(text: Any) -> str:
        whole = visible(str(text))
        return whole if len(whole) <= SHOWN else f"{whole[:SHOWN]} … ({len(whole) - SHOWN:,} more characters)"

    gallery = Gallery()
    pictures = [Markup("".join(gallery.tag(each, mark(each)[1:-1]) for each in some)) for some in found.pictures]
    groups = [(other, [line for line in found.lines if line.other == other]) for other in found.names[1:]]
    return rendered(
        "trl.reports", "compare.html.jinja", filters={"shown": shown, "number": number, "span": span},
        found=found, groups=groups, short_names=short_names(found.names), summary=summary,
        charts=[chart(found, name) for name in dict.fromkeys(line.name for line in found.lines)],
        marks={"better": "good", "worse": "bad"}, pictures=pictures, gallery=Markup(gallery.style),
    )  # fmt: skip


def short_names(names: Sequence[str]) -> list[str]:
    """The last parts of the names, as many as tell them apart."""
    parts = [name.rstrip("/").split("/") for name in names]
    depth = next((d for d in range(1, 9) if len({tuple(p[-d:]) for p in parts}) == len(names)), 9)
    return ["/".join(part[-depth:]) for part in parts]


def chart(found: Comparison, name: str) -> Markup:
    """A figure of every model, with its interval."""
    lines = [line for line in found.lines if line.name == name]
    shown = dict(zip(found.names, short_names(found.names), strict=True))
    rows = [(found.names[0], lines[0].before, BEFORE)]
    colours = {"better": AFTER, "worse": COST}
    rows += [(line.other, line.after, colours.get(line.verdict, BEFORE)) for line in lines]
    ends = [end for _, each, _ in rows for end in (each.low, each.mean, each.high) if math.isfinite(end)] or [0.0, 1.0]
    room = 0.06 * (max(ends) - min(ends)) or 0.5
    low, high = min(ends) - room, max(ends) + room
    panel = Panel(name, (low, high), (0.4, len(rows) + 0.6), height=64 + 38 * len(rows), left=12)
    found_ticks = ticks(low, high, 4)
    step = found_ticks[1] - found_ticks[0] if len(found_ticks) > 1 else 1.0
    panel.x_axis([(value, tick_text(value, step)) for value in found_ticks])
    for place, (model, each, colour) in enumerate(rows):
        y = len(rows) - place
        if not math.isfinite(each.mean):
            continue
        panel.text(panel.at_x(low) + 2, panel.at_y(y) - 9, shown[model], "#64748b", units=False)
        if math.isfinite(each.low):
            panel.span((each.low, each.high), y, colour)
        panel.dot(each.mean, y, colour, 4.0)
    return panel.svg()
