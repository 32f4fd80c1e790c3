"""The quickstart's report: one self-contained HTML file, and its content as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from trl.quickstart import plots
from trl.quickstart.recipe import Recipe
from trl.quickstart.results import Imitation, Preference, Reinforcement
from trl.reports.charts import AFTER, BEFORE, Curve, curves, plain
from trl.reports.intervals import Interval, gain_interval, mean_interval
from trl.reports.page import rendered
from trl.trainer.run_record import write_whole

SHOWN = 12
"""number of samples in the report: the first ones, not the best"""


@dataclass
class Run:
    """A finished quickstart."""

    model: str
    parameters: int
    seed: int
    tiny: bool
    recipe: Recipe
    imitation: Imitation
    preference: Preference
    reinforcement: Reinforcement
    seconds: dict[str, float]
    """of each stage"""
    threads: int
    peak_mebibytes: float
    versions: dict[str, str]
    date: str
    sources: list[tuple[str, str]] = field(default_factory=list)
    """(package and version, licence) of each asset"""

    @property
    def judge_gain(self) -> Interval:
        return gain_interval(self.reinforcement.before.judge, self.reinforcement.after.judge)

    @property
    def reward_gain(self) -> Interval:
        return gain_interval(self.reinforcement.before.reward, self.reinforcement.after.reward)

    @property
    def succeeded(self) -> bool:
        """Whether the judge, which was no part of training, rates the lines significantly higher."""
        return self.judge_gain.above_zero

    def figures(self) -> list[Figure]:
        before, after = self.reinforcement.before, self.reinforcement.after
        measured = (
            ("Judge", before.judge, after.judge, "VADER sentiment × distinct-word ratio, -1 to 1"),
            ("Reward", before.reward, after.reward, "the reward model's score; 0 and 1 are mean and spread before"),
            ("KL", before.kl, after.kl, "nats a line from the imitating model"),
            ("Variety", before.variety, after.variety, "distinct words over words"),
        )
        return [
            Figure(name, mean_interval(old), mean_interval(new), gain_interval(old, new), note)
            for name, old, new, note in measured
        ]

    def to_json(self) -> str:
        """The run and its figures as JSON."""
        record = asdict(self) | {
            "figures": {each.name: asdict(each) for each in self.figures()},
            "succeeded": self.succeeded,
        }
        return json.dumps(record, indent=2, ensure_ascii=False)


@dataclass(frozen=True)
class Figure:
    """A measured quantity before and after, with the interval of each and of the paired difference."""

    name: str
    before: Interval
    after: Interval
    gain: Interval
    note: str


def write_report(run: Run, folder: Path) -> Path:
    """Write `report.html` and `report.json` into the folder; returns the path of the first."""
    write_whole(folder / "report.json", run.to_json())
    write_whole(folder / "report.html", render(run))
    return folder / "report.html"


def render(run: Run) -> str:
    """The report as HTML that loads nothing from elsewhere."""
    return rendered(
        "trl.quickstart",
        "quickstart.html.jinja",
        filters={"signed": _signed, "plain": plain, "span": _span},
        run=run,
        figures=run.figures(),
        plots=_plots(run),
        samples=_samples(run),
        total=_minutes(sum(run.seconds.values())),
        minutes=_minutes,
    )


def _plots(run: Run) -> dict[str, Markup]:
    imitation, preference, outcome, recipe = run.imitation, run.preference, run.reinforcement, run.recipe
    judge, reward = run.figures()[:2]
    usual = sum(outcome.before.variety) / len(outcome.before.variety)
    return {
        "verdict": plots.before_after(
            [plots.Pair("Judge", judge.before, judge.after), plots.Pair("Reward", reward.before, reward.after)]
        ),
        "imitation": curves(
            [Curve("Loss, nats a token", imitation.losses, imitation.heldout_after, "held-out, after", True)]
        ),
        "preference": curves([Curve("Loss, nats a pair", preference.losses, math.log(2), "no opinion: ln 2", True)]),
        "accuracy": plots.shares(
            [
                ("reward model", preference.accuracy, AFTER),
                ("VADER", preference.judge_accuracy, BEFORE),
            ],
            chance=0.5,
        ),
        "reinforcement": curves(
            [
                Curve("Reward", outcome.history["reward"], 0.0, "before"),
                Curve("Judge", outcome.history["judge"], judge.before.mean, "before"),
                Curve("KL, nats a line", outcome.history["KL"], recipe.highest_kl, "limit", bad_mark=True),
                Curve("Variety", outcome.history["variety"], usual - recipe.lost_variety, "limit", bad_mark=True),
            ]
        ),
        "distribution": plots.distributions(outcome.before.judge, outcome.after.judge, "Judge, line by line"),
    }


def _samples(run: Run) -> list[dict[str, Any]]:
    """Prompt, both continuations and their scores, for the first held-out prompts."""
    outcome = run.reinforcement
    rows = []
    for index, prompt in enumerate(outcome.prompts[:SHOWN]):
        row: dict[str, Any] = {"prompt": prompt}
        for when, reading in (("before", outcome.before), ("after", outcome.after)):
            text = reading.texts[index]
            own = text[len(prompt) :] if text.startswith(prompt) else text
            row[when] = {"text": own, "judge": reading.judge[index], "mood": _mood(reading.judge[index])}
        rows.append(row)
    return rows


def _mood(judge: float) -> str:
    return "good" if judge > 0.2 else "bad" if judge < -0.2 else "plain"


def _signed(value: float, digits: int = 2) -> str:
    """The rounded number with its sign; zero has none."""
    return f"{value:+.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


def _span(interval: Interval, digits: int = 2) -> str:
    return f"{plain(interval.low, digits)} to {plain(interval.high, digits)}"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
