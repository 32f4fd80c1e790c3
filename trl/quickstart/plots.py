"""Plots of a report as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trl.import_utils import pip_install
from trl.quickstart.intervals import Interval

BEFORE = "#8a94a6"
AFTER = "#0f766e"
TRAINED = "#3f5bd9"
LIMIT = "#c2410c"
INK = "#1f2937"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trl",
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Segoe UI", "Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#cbd5e1",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eef2f7",
    "xtick.color": "#64748b",
    "ytick.color": "#64748b",
}


@dataclass(frozen=True)
class Curve:
    """A panel: a number for each step, and a dashed line to compare it with."""

    title: str
    values: Sequence[float]
    mark: float | None = None
    mark_name: str = ""
    smooth: bool = False
    bad_mark: bool = False
    """whether the dashed line is a limit that must not be crossed"""


def _drawing(columns: int, width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"a report needs matplotlib: {pip_install('matplotlib')}") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _svg(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _styled() -> Any:
    import matplotlib

    return matplotlib.rc_context(STYLE)


def plain(value: float, digits: int = 2) -> str:
    """The rounded number as text; zero has no sign."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and those before it, at most `window` values."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def curves(panels: Sequence[Curve], width: float = 10.4, height: float = 2.6) -> str:
    """Panels side by side, steps along x."""
    with _styled():
        figure, axes = _drawing(len(panels), width, height)
        for axis, panel in zip(axes, panels, strict=True):
            steps = range(1, len(panel.values) + 1)
            if panel.smooth:
                axis.plot(steps, panel.values, color=TRAINED, alpha=0.25, linewidth=1)
                axis.plot(steps, moving_average(panel.values, max(2, len(panel.values) // 10)), color=TRAINED)
            else:
                axis.plot(steps, panel.values, color=TRAINED, marker="o", markersize=3.5)
            if panel.mark is not None:
                colour = LIMIT if panel.bad_mark else BEFORE
                axis.axhline(panel.mark, color=colour, linestyle=(0, (4, 3)), linewidth=1.2)
                axis.annotate(
                    panel.mark_name, (1, panel.mark), xycoords=("axes fraction", "data"), xytext=(-2, 3),
                    textcoords="offset points", ha="right", fontsize=9, color=colour,
                )  # fmt: skip
                axis.margins(y=0.18)
            axis.set_title(panel.title)
            axis.set_xlabel("step")
            axis.xaxis.get_major_locator().set_params(integer=True)
        return _svg(figure)


@dataclass(frozen=True)
class Pair:
    """One quantity before and after."""

    title: str
    before: Interval
    after: Interval


def before_after(pairs: Sequence[Pair], width: float = 10.4, height: float = 1.9) -> str:
    """The means before and after with their 95 % intervals, a panel for each quantity."""
    with _styled():
        figure, axes = _drawing(len(pairs), width, height)
        for axis, pair in zip(axes, pairs, strict=True):
            rows = ((1, pair.before, BEFORE), (0, pair.after, AFTER))
            for row, interval, colour in rows:
                axis.plot([interval.low, interval.high], [row, row], color=colour, linewidth=4, alpha=0.35,
                          solid_capstyle="round")  # fmt: skip
                axis.plot([interval.mean], [row], "o", color=colour, markersize=9)
                axis.annotate(
                    plain(interval.mean), (interval.mean, row), xytext=(0, 9), textcoords="offset points",
                    ha="center", color=colour, fontweight="bold",
                )  # fmt: skip
            axis.set_yticks([1, 0], ["before", "after"])
            axis.set_ylim(-0.6, 1.75)
            axis.margins(x=0.15)
            axis.grid(axis="y", visible=False)
            axis.spines["left"].set_visible(False)
            axis.tick_params(axis="y", length=0)
            axis.set_title(pair.title)
        return _svg(figure)


def shares(rows: Sequence[tuple[str, Interval, str]], chance: float, width: float = 5.0, height: float = 2.6) -> str:
    """Horizontal bars of shares with their intervals, and a line at the share that chance reaches."""
    with _styled():
        figure, (axis,) = _drawing(1, width, height)
        places = list(range(len(rows)))[::-1]
        for place, (_, share, colour) in zip(places, rows, strict=True):
            axis.barh(place, share.mean, color=colour, height=0.5, alpha=0.9)
            axis.plot([share.low, share.high], [place, place], color=INK, linewidth=1.6)
            axis.annotate(f"{share.mean:.0%}", (0.02, place), va="center", color="white", fontweight="bold")
        axis.axvline(chance, color=LIMIT, linestyle=(0, (4, 3)), linewidth=1.2)
        axis.annotate("chance", (chance, 1), xycoords=("data", "axes fraction"), xytext=(3, -3),
                      textcoords="offset points", va="top", fontsize=9, color=LIMIT)  # fmt: skip
        axis.set_yticks(places, [name for name, _, _ in rows])
        axis.set_xlim(0, 1)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
        axis.set_ylim(-0.5, len(rows) - 0.2)
        axis.grid(axis="y", visible=False)
        axis.set_title("Held-out pairs put in people's order")
        return _svg(figure)


def distributions(before: Sequence[float], after: Sequence[float], label: str, width: float = 5.0) -> str:
    """The histograms before and after in one panel."""
    with _styled():
        figure, (axis,) = _drawing(1, width, 2.6)
        low, high = min(*before, *after), max(*before, *after)
        edges = [low + (high - low or 1.0) * i / 14 for i in range(15)]
        for values, name, colour in ((before, "before", BEFORE), (after, "after", AFTER)):
            axis.hist(values, edges, color=colour, alpha=0.5, label=name)
            axis.axvline(sum(values) / len(values), color=colour, linewidth=1.6)
        axis.legend(frameon=False, loc="upper left")
        axis.set_title(label)
        axis.set_ylabel("lines")
        return _svg(figure)
