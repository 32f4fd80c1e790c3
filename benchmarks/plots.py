"""Plots of results as SVG files, in the style of the reports: their colours, grid, raw and smoothed lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from trl.reports.charts import AFTER, BEFORE, COST, INK, LIMIT, SOFT, TRAINED, Panel, moving_average, plain

COLOURS = (TRAINED, AFTER, COST, "#7c3aed", "#be185d")
"""of lines beside each other"""
FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
GAP, FOOT, EDGE = 18, 26, 10
WINDOW = 10
"""values that a bold line is a mean of, at most"""
RAW = "faint: each step; bold: the mean of it and those before it, {} at most"


@dataclass(frozen=True)
class Mark:
    """A dashed line across, or from top to bottom, with its name."""

    at: float
    name: str
    limit: bool = False
    upright: bool = False
    below: bool = False
    """whether its name stands below it"""


def lines(
    title: str,
    curves: Mapping[str, Sequence[float]],
    colours: Mapping[str, str],
    y: tuple[float, float] = (0.0, 1.0),
    marks: Sequence[Mark] = (),
    window: int = WINDOW,
    label: str = "step",
    width: float = 320.0,
) -> Panel:
    """A panel of curves by their names, steps from 1 on. window: of the bold lines; 1: each value as it is."""
    longest = max(map(len, curves.values()))
    panel = Panel(title, (1, longest), y, width=width, height=200)
    panel.numbers(label)
    for mark in marks:
        draw, colour = panel.upright if mark.upright else panel.level, LIMIT if mark.limit else BEFORE
        draw(mark.at, "" if mark.below else mark.name, colour)
        if mark.below:
            panel.text(width - 12, panel.at_y(mark.at) + 12, mark.name, colour, "end", units=False)
    for name, values in curves.items():
        steps = [float(step) for step in range(1, len(values) + 1)]
        if window > 1:
            panel.line(steps, values, colours[name], 1.0, 0.3)
        panel.line(steps, moving_average(values, window), colours[name], 1.8)
    return panel


def by_seed(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name."""
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}


def bars(rows: Sequence[tuple[str, str, float, float | None]], title: str, unit: str = "x", grid: int = 5) -> Panel:
    """A bar for each name with what it is held against, its figure, and a mark where the target is.

    unit: behind each number; "x": how many times as much, so that 1 is marked. grid: between numbers of the axis.
    """
    most = max(max(value, target or 0.0) for _, _, value, target in rows)
    panel = Panel(title, (0, 1.1 * most), (-0.7, len(rows) - 0.3), width=760, height=44 + 34 * len(rows), left=240)
    base, places = list(range(0, int(1.1 * most) + 1, grid)), range(len(rows))[::-1]
    panel.x_axis([(value, f"{value}{unit}") for value in base])
    if unit == "x":
        panel.upright(1, "", SOFT)
    for place, (name, against, value, target) in zip(places, rows, strict=True):
        panel.box((0, value), (place - 0.3, place + 0.3), TRAINED)
        middle, beside = panel.at_y(place), value
        panel.text(230, middle - 1, name, INK, "end", bold=True, units=False)
        panel.text(230, middle + 11, against, SOFT, "end", units=False)
        if target is not None:
            panel.box((target - 0.002 * most, target + 0.002 * most), (place - 0.4, place + 0.4), LIMIT)
            beside = target if value < target else value  # the mark is not to cross the figure
        panel.text(panel.at_x(beside) + 6, middle + 4, f"{plain(value, 1)}{unit}", INK, bold=True, units=False)
    return panel


def write(path: Path, panels: Sequence[Panel], columns: int, colours: Mapping[str, str], note: str = "") -> None:
    """The panels in rows, below them what the colours and the lines are. One file, which loads nothing."""
    wide, high = max(panel.width for panel in panels), max(panel.height for panel in panels)
    columns, rows = min(columns, len(panels)), -(-len(panels) // columns)
    width = 2 * EDGE + columns * wide + (columns - 1) * GAP
    height = 2 * EDGE + rows * high + (rows - 1) * GAP + (FOOT if colours or note else 0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="{FONT}">',
        f'<rect width="{width:g}" height="{height:g}" rx="10" fill="#fff"/>',
    ]
    for number, panel in enumerate(panels):
        x, y = EDGE + number % columns * (wide + GAP), EDGE + number // columns * (high + GAP)
        place = f'<svg x="{x:g}" y="{y:g}" width="{panel.width:g}" height="{panel.height:g}" '
        parts.append(str(panel.svg()).replace("<svg ", place, 1))
    named = [f'<tspan fill="{colour}" dx="12">● {escape(name)}</tspan>' for name, colour in colours.items()]
    said = [f'<tspan dx="12" fill="{SOFT}">{escape(note)}</tspan>'] if note else []
    if named or said:
        parts.append(f'<text x="{EDGE - 8}" y="{height - 10:g}" font-size="11">{"".join(named + said)}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")
