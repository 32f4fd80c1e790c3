"""Charts as inline SVG, drawn here: a report needs no library for them and loads nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

from trl.data.any_text import visible

BEFORE = "#8a94a6"
AFTER = "#0f766e"
TRAINED = "#3f5bd9"
COST = "#b45309"
LIMIT = "#c2410c"
INK = "#1f2937"
SOFT = "#64748b"
MOST_POINTS = 300
"""of a line; a longer one keeps the least and the most of each stretch"""
WIDTH, HEIGHT = 320.0, 200.0
"""of a panel, in units of about a pixel"""

HALF_LETTER = 2.9
"""half the width of a digit at an axis"""
LARGEST = 1e300
"""a number beyond it is drawn there"""

Numbers = Sequence[float | None]


def plain(value: float, digits: int = 2) -> str:
    """The rounded number as text; zero has no sign."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def moving_average(values: Numbers, window: int) -> list[float | None]:
    """Mean of each value and those before it, `window` values together at most; None where there is none."""
    means: list[float | None] = []
    total, count = 0.0, 0
    for place, value in enumerate(values):
        gone = values[place - window] if place >= window else None
        total += (value or 0.0) - (gone or 0.0)
        count += (value is not None) - (gone is not None)
        means.append(total / count if count else None)
    return means


def window_of(count: int) -> int:
    """How many values a smoothed line is a mean of: a tenth of them."""
    return max(2, count // 10)


def ticks(low: float, high: float, most: int = 5, whole: bool = False) -> list[float]:
    """Round numbers within a range."""
    rough = (high - low) / max(1, most)
    size = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(size * one for one in (1, 2, 2.5, 5, 10) if size * one >= rough * (1 - 1e-9))
    step = max(1.0, float(math.ceil(step))) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float, step: float) -> str:
    """A number at an axis, with as many digits as the distance to the next one needs."""
    if abs(value) < 1e-9 * step:
        return "0"
    size = max(abs(value), step)
    if size >= 1e6 or (size < 1e-3 and value):
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}"
    digits_needed = min(6, max(0, -math.floor(math.log10(step) + 1e-9))) if step > 0 else 0
    if step > 0 and abs(step * 10**digits_needed - round(step * 10**digits_needed)) > 1e-6:
        digits_needed += 1
    return f"{round(value, digits_needed) + 0.0:,.{digits_needed}f}"


class Panel:
    """A drawing with axes. What is drawn is given in the units of the axes."""

    def __init__(
        self,
        title: str,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        width: float = WIDTH,
        height: float = HEIGHT,
        left: float = 46.0,
        bottom: float = 34.0,
        top: float = 30.0,
    ):
        self.title, self.width, self.height = visible(title), width, height
        self._left, self._bottom, self._top, self._right = left, bottom, top, 10.0
        self._x, self._y = _wider(*x), _wider(*y)
        self._parts: list[str] = []

    def at_x(self, value: float) -> float:
        share = (value - self._x[0]) / (self._x[1] - self._x[0])
        return self._left + share * (self.width - self._left - self._right)

    def at_y(self, value: float) -> float:
        share = (value - self._y[0]) / (self._y[1] - self._y[0])
        return self.height - self._bottom - share * (self.height - self._bottom - self._top)

    def _add(self, text: str) -> None:
        self._parts.append(text)

    def x_axis(self, at: Sequence[tuple[float, str]], label: str = "") -> None:
        base = self.height - self._bottom
        self._add(f'<path d="M{self._left:.1f} {base:.1f}H{self.width - self._right:.1f}" stroke="#cbd5e1"/>')
        for value, text in at:
            place = min(self.at_x(value), self.width - HALF_LETTER * len(text))  # the last one may be wide
            self.text(place, base + 14, text, SOFT, "middle", units=False)
        if label:
            self.text(self.width - self._right, base + 29, label, SOFT, "end", units=False)

    def y_axis(self, at: Sequence[tuple[float, str]], grid: bool = True) -> None:
        for value, text in at:
            place = self.at_y(value)
            if grid:
                end = self.width - self._right
                self._add(f'<path d="M{self._left:.1f} {place:.1f}H{end:.1f}" stroke="#e8edf4"/>')
            self.text(self._left - 6, place + 3.5, text, SOFT, "end", units=False)

    def numbers(self, label: str = "step", whole: bool = True) -> None:
        """Axes with round numbers. To be called before anything is drawn: the left margin fits them."""
        for low, high, draw in ((*self._y, "y"), (*self._x, "x")):
            found = ticks(low, high, 4, whole=whole and draw == "x")
            step = found[1] - found[0] if len(found) > 1 else abs(high - low) or 1.0
            texts = [(value, tick_text(value, step)) for value in found]
            if draw == "y":
                self._left = 12 + 6 * max((len(text) for _, text in texts), default=0)
                self.y_axis(texts)
            else:
                self.x_axis(texts, label)

    def line(self, xs: Sequence[float], ys: Numbers, colour: str, width: float = 2.0, opacity: float = 1.0) -> None:
        """A line through the points; it is broken where a value is None."""
        for stretch in _stretches(xs, ys):
            if len(stretch) == 1:
                self.dot(*stretch[0], colour, 2.5, opacity)
                continue
            path = "L".join(f"{self.at_x(x):.1f} {self.at_y(y):.1f}" for x, y in thinned(stretch))
            self._add(
                f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-opacity="{opacity}" '
                'stroke-linejoin="round"/>'
            )

    def band(self, xs: Sequence[float], lows: Numbers, highs: Numbers, colour: str) -> None:
        """The area between two lines."""
        for below in _stretches(xs, lows):
            inside = {x for x, _ in below}
            above = [(x, y) for x, y in zip(xs, highs, strict=True) if x in inside and y is not None]
            around = [*thinned(below), *reversed(thinned(above))]
            path = "L".join(f"{self.at_x(x):.1f} {self.at_y(y):.1f}" for x, y in around)
            self._add(f'<path d="M{path}Z" fill="{colour}" fill-opacity="0.12"/>')

    def dot(self, x: float, y: float, colour: str, size: float = 3.0, opacity: float = 1.0) -> None:
        self._add(
            f'<circle cx="{self.at_x(x):.1f}" cy="{self.at_y(y):.1f}" r="{size}" fill="{colour}" '
            f'fill-opacity="{opacity}"/>'
        )

    def level(self, y: float, name: str, colour: str) -> None:
        """A dashed line across, with its name."""
        place, end = self.at_y(y), self.width - self._right
        self._add(f'<path d="M{self._left:.1f} {place:.1f}H{end:.1f}" stroke="{colour}" stroke-dasharray="4 3"/>')
        self.text(end - 2, place - 4, name, colour, "end", units=False)

    def upright(self, x: float, name: str, colour: str, dashed: bool = True) -> None:
        """A line from top to bottom, with its name."""
        place, base = self.at_x(x), self.height - self._bottom
        dashes = ' stroke-dasharray="4 3"' if dashed else ' stroke-width="1.6"'
        self._add(f'<path d="M{place:.1f} {self._top:.1f}V{base:.1f}" stroke="{colour}"{dashes}/>')
        self.text(place + 4, self._top + 9, name, colour, units=False)

    def box(self, x: tuple[float, float], y: tuple[float, float], colour: str, opacity: float = 1.0) -> None:
        left, right, low, high = self.at_x(x[0]), self.at_x(x[1]), self.at_y(y[0]), self.at_y(y[1])
        self._add(
            f'<rect x="{left:.1f}" y="{high:.1f}" width="{max(0.0, right - left):.1f}" '
            f'height="{max(0.0, low - high):.1f}" fill="{colour}" fill-opacity="{opacity}"/>'
        )

    def span(self, x: tuple[float, float], y: float, colour: str, width: float = 4.0, opacity: float = 0.35) -> None:
        """A bar along x, of a width in units of the drawing."""
        self._add(
            f'<path d="M{self.at_x(x[0]):.1f} {self.at_y(y):.1f}H{self.at_x(x[1]):.1f}" stroke="{colour}" '
            f'stroke-width="{width}" stroke-opacity="{opacity}" stroke-linecap="round"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        colour: str,
        anchor: str = "start",
        *,
        bold: bool = False,
        units: bool = True,
    ) -> None:
        """units: the place is in units of the axes, else in those of the drawing."""
        place = (self.at_x(x), self.at_y(y)) if units else (x, y)
        weight = ' font-weight="700"' if bold else ""
        self._add(
            f'<text x="{place[0]:.1f}" y="{place[1]:.1f}" fill="{colour}" text-anchor="{anchor}"{weight}>'
            f"{escape(visible(text))}</text>"
        )

    def svg(self) -> Markup:
        """The drawing."""
        name = escape(self.title)
        head = f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{name}" font-size="10.5">'
        title = f'<text x="4" y="15" fill="{INK}" font-size="12.5" font-weight="600">{name}</text>'
        return Markup("".join([head, title if self.title else "", *self._parts, "</svg>"]))


def _wider(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty."""
    if high - low > max(1e-12 * max(abs(low), abs(high)), 1e-290):
        return low, high
    room = 0.5 * abs(low) or 0.5
    return low - room, high + room


def _stretches(xs: Sequence[float], ys: Numbers) -> Iterator[list[tuple[float, float]]]:
    """The points between those without a value, and where x goes back."""
    stretch: list[tuple[float, float]] = []
    for x, y in zip(xs, ys, strict=True):
        if stretch and (y is None or x < stretch[-1][0]):
            yield stretch
            stretch = []
        if y is not None:
            stretch.append((x, y))
    if stretch:
        yield stretch


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most so many points: of each stretch the least and the most, in their order."""
    if len(points) <= most:
        return list(points)
    size, kept = math.ceil(2 * len(points) / most), []
    for start in range(0, len(points), size):
        stretch = list(enumerate(points[start : start + size]))
        ends = {min(stretch, key=lambda one: one[1][1])[0], max(stretch, key=lambda one: one[1][1])[0]}
        kept += [stretch[place][1] for place in sorted(ends)]
    return kept


@dataclass(frozen=True)
class Curve:
    """A panel: a number for each step, and what to compare it with."""

    title: str
    values: Numbers
    mark: float | None = None
    """where a dashed line is"""
    mark_name: str = ""
    smooth: bool = False
    """draw the values faintly, and a moving average"""
    bad_mark: bool = False
    """whether the dashed line is a limit that must not be crossed"""
    steps: Sequence[float] = ()
    """of the values; none: 1, 2, 3, ..."""
    spread: Numbers = ()
    """around each value"""
    others: Sequence[tuple[float, float]] = ()
    """steps and values of the same in an evaluation"""
    colour: str = TRAINED


def curve(panel: Curve) -> Markup:
    """One panel, steps along x."""
    xs = list(panel.steps) or [float(place) for place in range(1, len(panel.values) + 1)]
    values = [None if value is None else max(-LARGEST, min(LARGEST, value)) for value in panel.values]
    panel = replace(panel, values=values)
    known = [value for value in values if value is not None] + [value for _, value in panel.others]
    lows, highs = _around(panel)
    shown = [*known, *(value for value in (*lows, *highs) if value is not None)]
    shown += [] if panel.mark is None else [panel.mark]
    places = [*xs, *(step for step, _ in panel.others)]
    room = 0.08 * (max(shown, default=1.0) - min(shown, default=0.0))
    y = (min(shown, default=0.0) - room, max(shown, default=1.0) + room)
    drawn = Panel(panel.title, (min(places, default=0.0), max(places, default=1.0)), y)
    drawn.numbers()
    if panel.spread:
        drawn.band(xs, lows, highs, panel.colour)
    if panel.mark is not None:
        drawn.level(panel.mark, panel.mark_name, LIMIT if panel.bad_mark else BEFORE)
    if panel.smooth:
        drawn.line(xs, panel.values, panel.colour, 1.0, 0.3)
        drawn.line(xs, moving_average(panel.values, window_of(len(panel.values))), panel.colour)
    else:
        drawn.line(xs, panel.values, panel.colour)
        for x, value in zip(xs, panel.values, strict=True):
            if value is not None and len(xs) <= 40:
                drawn.dot(x, value, panel.colour, 2.2)
    if panel.others:
        drawn.line([x for x, _ in panel.others], [value for _, value in panel.others], INK, 1.2, 0.6)
        for x, value in panel.others[:MOST_POINTS]:
            drawn.dot(x, value, INK)
    return drawn.svg()


def _around(panel: Curve) -> tuple[list[float | None], list[float | None]]:
    """The lower and the upper end of the spread."""
    pairs = list(zip(panel.values, panel.spread, strict=True)) if panel.spread else []
    both = [None if value is None or spread is None else (value - spread, value + spread) for value, spread in pairs]
    return [one and one[0] for one in both], [one and one[1] for one in both]


def curves(panels: Sequence[Curve]) -> Markup:
    """Panels beside each other, and below where there is no room."""
    return Markup('<div class="charts{}">{}</div>').format(
        " wide" if len(panels) % 3 else "", Markup("").join(curve(panel) for panel in panels)
    )
