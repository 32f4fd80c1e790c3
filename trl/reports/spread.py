"""How far the runs of several seeds spread, which differ in nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from markupsafe import Markup

from trl.data.any_text import visible
from trl.reports.charts import TRAINED, Panel, moving_average, window_of
from trl.reports.findings import trend
from trl.reports.page import rendered
from trl.reports.run_folder import RunRead, Series, read_run, seed_folders
from trl.reports.run_report import GROUPS, title_of
from trl.trainer.metrics import named
from trl.trainer.run_folder import RECORD, REPORT
from trl.trainer.run_record import write_whole
from trl.trainer.step_line import short

LEFT_OUT = re.compile(r"(eval_)?(num_tokens|learning_rate|lr|step_time|.*time.*|.*per_second)")
"""metrics that say nothing of what was learned"""
PRINTED = 8
"""figures that the terminal shows"""


@dataclass(frozen=True)
class Figure:
    """A metric at the end of each run: the mean of its last quarter."""

    name: str
    values: list[float]
    meaning: str

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The standard deviation between the seeds; None of one run."""
        return stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        around = "" if self.deviation is None else f" ± {short(self.deviation)}"
        return f"{short(self.mean)}{around}"


@dataclass
class Spread:
    """The runs of a folder, by their seeds."""

    folder: Path
    runs: dict[int, RunRead]
    figures: list[Figure]

    @property
    def unfinished(self) -> list[str]:
        """Runs that have not come to their end, in words."""
        states = {seed: run.status[0] for seed, run in self.runs.items()}
        return [f"seed {seed} {status}" for seed, status in states.items() if status not in ("finished", "unknown")]


def holds_seeds(folder: Path) -> bool:
    """Whether it is a folder of several seeds, not of a run."""
    return not (folder / RECORD).exists() and bool(seed_folders(folder))


def read_spread(folder: Path) -> Spread:
    """The runs and their figures; ValueError where no run has begun."""
    runs = {}
    for seed, path in seed_folders(folder).items():
        if (path / RECORD).is_file():
            runs[seed] = read_run(path)
    if not runs:
        raise ValueError(f"{folder}: no run of a seed lies there")
    names = dict.fromkeys(name for run in runs.values() for name in run.series)
    figures = []
    for name in sorted(names, key=_rank):
        several = [run.series[name] for run in runs.values() if name in run.series and run.series[name].known]
        if len(several) == len(runs) and not LEFT_OUT.fullmatch(name):
            metric = named(next(iter(runs.values())).trainer, name)
            figures.append(Figure(name, [_last(one) for one in several], metric.meaning if metric else ""))
    return Spread(folder, runs, figures)


def _last(series: Series) -> float:
    """The end of a curve: an evaluation as it is, other logs as the mean of their last quarter."""
    return series.known[-1] if series.name.startswith("eval_") else trend(series)[2]


def _rank(name: str) -> tuple[int, int]:
    """Evaluations and rewards first, then as the report of a run has them."""
    plain = name.removeprefix("eval_")
    group = next((place for place, (_, names) in enumerate(GROUPS) if re.fullmatch(names, plain)), len(GROUPS))
    return (0 if plain != name or plain == "reward" else 1), group


def spread_lines(found: Spread) -> list[str]:
    """The first figures as lines for a terminal."""
    seeds = list(found.runs)
    which = ", ".join(map(str, seeds))
    head = f"{len(seeds)} seeds ({which}), mean ± standard deviation between them:"
    if len(seeds) == 1:
        head = f"1 seed ({which}), which has no spread:"
    lines = [f"  {each.name} {each} ({', '.join(map(short, each.values))})" for each in found.figures[:PRINTED]]
    return [head, *lines, *(f"  not finished: {line}" for line in found.unfinished)]


def write_spread(found: Spread, target: Path) -> Path:
    """Write the page, into a folder or as a file; returns the file."""
    path = target / REPORT if target.is_dir() else target
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, render(found))
    return path


def render(found: Spread) -> str:
    """The page as HTML that loads nothing from elsewhere."""
    charts = [(figure, chart(found, figure)) for figure in found.figures if _moves(found, figure.name)]
    return rendered(
        "trl.reports", "spread.html.jinja",
        filters={"short": short, "visible": lambda text: visible(str(text))},
        found=found, title=title_of(next(iter(found.runs.values()))), charts=charts,
        steps=max(run.last_step for run in found.runs.values()),
    )  # fmt: skip


def _moves(found: Spread, name: str) -> bool:
    return any(not run.series[name].is_constant for run in found.runs.values())


def chart(found: Spread, figure: Figure) -> Markup:
    """A curve for each seed."""
    several: Sequence[Series] = [run.series[figure.name] for run in found.runs.values()]
    smooth = max(len(each.values) for each in several) > 20
    lines = [moving_average(each.values, window_of(len(each.values))) if smooth else each.values for each in several]
    shown = [value for line in lines for value in line if value is not None]
    places = [step for each in several for step in each.steps]
    room = 0.08 * (max(shown) - min(shown))
    panel = Panel(figure.name, (min(places), max(places)), (min(shown) - room, max(shown) + room))
    panel.numbers()
    for each, line in zip(several, lines, strict=True):
        panel.line(each.steps, line, TRAINED, 1.6, 0.6)
    return panel.svg()
