"""The report of a run's folder as one HTML file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from trl.data.any_text import visible
from trl.data.thumbnails import Gallery, Thumbnail
from trl.reports.charts import AFTER, COST, TRAINED, Curve, curve, window_of
from trl.reports.findings import findings, job_of, next_steps, trend
from trl.reports.page import rendered
from trl.reports.run_folder import RunRead, Series, read_run, reward_check, spread_of
from trl.rollout.report import prompt_text
from trl.trainer.metrics import named
from trl.trainer.run_folder import REPORT
from trl.trainer.run_record import write_whole
from trl.trainer.step_line import duration, gibibytes, short

LONGEST = 700
"""characters of a text that are shown"""
GROUPS: tuple[tuple[str, str], ...] = (
    ("Loss and learning", r"loss|nll|nll_loss|mean_token_accuracy|learning_rate|grad_norm|lr"),
    (
        "Rewards",
        r"reward|reward_std|rewards?/.*|judge/.*|accuracy|margin|(min|mean|max)_reward|.*zero_std|unscored_ratio|.*scores?",
    ),
    ("Entropy, distance and clipping", r".*kl|ratio|clip_ratio/.*|.*entropy.*|policy/.*|kept_ratio"),
    ("Lengths", r"completions/.*|episodes/.*|tokens/.*"),
    ("Likelihoods", r"logps/.*|logits/.*|log_odds.*"),
    ("Speed", r"num_tokens|step_time|ppo/time.*"),
)
"""headings, and which metrics stand below them; what fits none stands below the last heading, Others"""
EXACT = ("learning_rate", "num_tokens")
"""metrics without noise, which nothing smooths"""
GAINS = re.compile(
    r"reward|objective/scores|rewards/(?!.*(std|timed_out)).*|accuracy|.*accurac.*|margin|rewards/margins|(mean|min|max)_reward"
)
COSTS = re.compile(r".*kl|clip_ratio/.*|.*clipped_ratio|.*zero_std|.*timed_out|unscored_ratio|rewards/rejected|.*_std")


@dataclass
class Chart:
    """A curve with what is said below it."""

    drawing: Markup
    caption: str
    healthy: str
    colour: str = TRAINED
    smoothed: int = 0
    """how many values the bold line is a mean of; 0: there is but one line"""
    shaded: bool = False
    evaluated: bool = False


@dataclass
class Group:
    """Charts below a heading, and metrics that never changed."""

    title: str
    charts: list[Chart] = field(default_factory=list)
    constant: list[tuple[str, str]] = field(default_factory=list)


def write_report(folder: Path, target: Path | None = None) -> Path:
    """Write the report of a run's folder, into it if no other file is named; returns the file."""
    run = read_run(folder)
    path = target or run.folder / REPORT
    if path.is_dir():
        raise ValueError(f"--html {path}: that is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, render(run))
    return path


def render(run: RunRead) -> str:
    """The report as HTML that loads nothing from elsewhere."""
    status, how = run.status
    groups, gallery = groups_of(run), Gallery()
    pictures = [[shots_of(each, gallery) for each in moment.pictures] for moment in run.samples]
    return rendered(
        "trl.reports",
        "run.html.jinja",
        strict=False,
        filters={
            "shown": shown,
            "asked": asked,
            "short": short,
            "visible": lambda text: visible(str(text)),
            "moment": moment,
        },
        run=run,
        record=run.record,
        title=title_of(run),
        status=status,
        how=how,
        lead=lead_of(run),
        tiles=tiles_of(run),
        findings=findings(run),
        steps=next_steps(run),
        groups=groups,
        legend=legend(groups),
        data=run.record.get("data", {}),
        checked=reward_check(run.folder),
        facts=facts_of(run),
        sizes=sizes_of,
        pictures=pictures,
        gallery=Markup(gallery.style),
    )


def shots_of(pictures: Sequence[Thumbnail], gallery: Gallery) -> Markup:
    """The pictures of a row."""
    return Markup("".join(gallery.tag(each, f"picture {place}") for place, each in enumerate(pictures, 1)))


def title_of(run: RunRead) -> str:
    """What was trained, in a few words."""
    what = run.record.get("model") or ("a model" if "trainer" in run.record else run.folder.resolve())
    return f"{run.trainer or 'A run'}: {Path(str(what)).name}"


def lead_of(run: RunRead) -> str:
    """On what it was trained, and how much of the model."""
    parts, known = [], run.record.get("data", {}).get("train", {})
    if known.get("rows"):
        name = Path(str(known.get("name", ""))).name
        parts.append(f"{short(known['rows'])} rows{f' of {name}' if name else ''}")
    if run.record.get("parameters"):
        total, trained = run.record["parameters"], run.record["trained"]
        parts.append(f"{short(total)} weights, {'all' if trained == total else short(trained)} trained")
    return f"{'; '.join(parts)}." if parts else ""


def shown(text: Any) -> str:
    """A text that a page can show: control characters spelled out, the rest of a long one counted."""
    whole = visible(text if isinstance(text, str) else str(text))
    rest = len(whole) - LONGEST
    return whole if rest <= 0 else f"{whole[:LONGEST]} … ({rest:,} more characters)"


def asked(prompt: Any) -> str:
    """A prompt as it is read: of a conversation, which the files hold as JSON, the turns."""
    try:
        turns = json.loads(prompt) if isinstance(prompt, str) and prompt.startswith('[{"') else None
    except (ValueError, RecursionError):
        turns = None
    said = isinstance(turns, list) and all(isinstance(turn, dict) and "role" in turn for turn in turns)
    return f"{shown(prompt_text(turns))}\n" if said else shown(prompt)


def sizes_of(files: Mapping[str, Any]) -> list[str]:
    """Files with their sizes."""
    return [f"{path} ({short(size)} bytes)" if isinstance(size, int) else str(path) for path, size in files.items()]


def tiles_of(run: RunRead) -> list[tuple[str, str, str]]:
    """Name, figure and note of what matters first."""
    record, tiles = run.record, []
    most = record.get("max_steps")
    tiles.append(("Steps", short(run.last_step), f"of {short(most)}" if most else ""))
    for name, label in (("reward", "Reward"), ("loss", "Loss"), ("eval_loss", "Evaluation loss")):
        series = run.series.get(name)
        if series is not None and series.known and len(tiles) < 4:
            tiles.append((label, short(series.known[-1]), f"{short(series.known[0])} at step {short(series.steps[0])}"))
    seconds, memory = seconds_of(record), record.get("peak_memory") or {}
    if seconds:
        parts = len(record.get("earlier") or [])
        tiles.append(("Time", duration(seconds), f"in {parts + 1} parts" if parts else "of training"))
    if memory.get("device_bytes"):
        tiles.append(("GPU memory", gibibytes(memory["device_bytes"]), "at most"))
    elif memory.get("bytes"):
        tiles.append(("Memory", gibibytes(memory["bytes"]), "at most, of the process"))
    return tiles


def seconds_of(record: Mapping[str, Any], kind: str = "wall") -> float:
    """Of the run and of its earlier parts."""
    parts = [record, *(record.get("earlier") or [])]
    return sum(float((part.get("seconds") or {}).get(kind) or 0) for part in parts)


def groups_of(run: RunRead) -> list[Group]:
    """All that was logged, below headings."""
    groups = {title: Group(title) for title, _ in GROUPS} | {"Others": Group("Others")}
    for name, series in run.series.items():
        twin = name.removeprefix("eval_")
        if (twin != name and twin in run.series) or any(spread_of(one, run.series) == name for one in run.series):
            continue  # stands in the chart of the other
        group = groups[next((title for title, names in GROUPS if re.fullmatch(names, twin)), "Others")]
        if series.is_constant and name != "loss":
            value = series.values[0] if series.values else None
            group.constant.append((name, "not finite" if value is None else short(value)))
        else:
            group.charts.append(chart_of(run, series))
    return [group for group in groups.values() if group.charts or group.constant]


def chart_of(run: RunRead, series: Series) -> Chart:
    """A metric's curve, with its spread and its twin of the evaluations."""
    name, metric = series.name, named(run.trainer, series.name)
    twin = run.series.get(f"eval_{name}")
    others = [] if twin is None else [(s, v) for s, v in zip(twin.steps, twin.values, strict=True) if v is not None]
    spread = run.series.get(spread_of(name, run.series) or "")
    around = spread.values if spread is not None and len(spread.values) == len(series.values) else ()
    limit = None if metric is None or metric.most is None or not series.known else metric.most
    near = limit is not None and max(series.known) > 0.5 * limit
    smooth, colour = len(series.values) > 20 and name not in EXACT, colour_of(name)
    drawing = curve(
        Curve(
            name,
            series.values,
            mark=limit if near else None,
            mark_name="healthy below",
            smooth=smooth,
            bad_mark=True,
            steps=series.steps,
            spread=around,
            others=others,
            colour=colour,
        )
    )
    caption = caption_of(series, metric.meaning if metric else "")
    healthy = metric.healthy.replace("`", "") if metric else ""
    window = window_of(len(series.values)) if smooth else 0
    return Chart(drawing, caption, healthy, colour, window, any(value is not None for value in around), bool(others))


def legend(groups: Sequence[Group]) -> str:
    """What the lines of the charts are, as far as there are such lines."""
    charts = [chart for group in groups for chart in group.charts]
    window, colours = max((chart.smoothed for chart in charts), default=0), {chart.colour for chart in charts}
    words = []
    if window:
        words.append(f"Faint: each log as it was. Bold: the mean of it and those before it, {window} at most.")
    else:
        words.append("A dot is a log.")
    if any(chart.shaded for chart in charts):
        words.append("Shaded: one standard deviation around it.")
    if any(chart.evaluated for chart in charts):
        words.append("Black dots: evaluations.")
    means = ((AFTER, "green", "what should be gained"), (COST, "brown", "what is paid for it"))
    said = [(name, meaning) for colour, name, meaning in means if colour in colours]
    if said:
        (name, meaning), *rest = said
        words.append(", ".join([f"{name.capitalize()} is {meaning}", *(" ".join(one) for one in rest)]) + ".")
    return " ".join([*words, "Below a chart: the means of the first and the last quarter."])


def moment(text: Any) -> str:
    """A date and time as people write it: 2026-11-27 15:54:33 UTC."""
    return str(text or "").replace("T", " ").replace("+00:00", " UTC")


def caption_of(series: Series, meaning: str) -> str:
    if not series.known:
        return "never a finite number"
    _, before, after = trend(series)
    went = f"{short(before)} → {short(after)}" if len(series.known) > 1 else short(after)
    meaning = meaning.replace("`", "")
    return f"{went}. {meaning[:1].upper()}{meaning[1:]}" if meaning else went


def colour_of(name: str) -> str:
    """Green for what should be gained, brown for what is paid for it, blue for the rest."""
    plain = name.removeprefix("eval_")
    return COST if COSTS.fullmatch(plain) else AFTER if GAINS.fullmatch(plain) else TRAINED


def facts_of(run: RunRead) -> list[tuple[str, str]]:
    """How the run was made."""
    record = run.record
    process, seconds = record.get("process") or {}, seconds_of(record)
    facts = [
        ("Command", str(record.get("command", ""))),
        ("Folder", str(run.folder)),
        ("Started", moment(record.get("started"))),
        ("Ended", moment(record.get("ended"))),
        ("Time", f"{duration(seconds)}; {duration(seconds_of(record, 'cpu'))} of CPU" if seconds else ""),
        ("Planned", planned(record)),
        (
            "Trainer",
            f"{record.get('trainer', '')} (trl {job_of(run)})" if job_of(run) else str(record.get("trainer", "")),
        ),
        ("Model", _model(record)),
        ("Device", _device(record)),
        ("Process", f"{process.get('id')} on {process.get('host')}" if process else ""),
        ("Checkpoints", ", ".join(map(str, run.checkpoints))),
        ("Versions", ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())),
    ]
    for number, part in enumerate(record.get("earlier") or [], 1):
        how = f" {part.get('how')}" if part.get("how") else ""
        facts.append(
            (f"Part {number}", f"{moment(part.get('started'))}: {part.get('status')}{how} at step {part.get('step')}")
        )
    return [(name, text) for name, text in facts if text]


def planned(record: Mapping[str, Any]) -> str:
    """What was expected of memory and time, beside what came of it; empty where nobody asked."""
    plan, parts = record.get("planned"), []
    plan = plan if isinstance(plan, Mapping) else {}
    size = (plan.get("memory") or {}).get("measured") or (record.get("predicted") or {}).get("bytes")
    peak = record.get("peak_memory") or {}
    found = peak.get("device_bytes") or peak.get("bytes")
    if size and found:
        parts.append(f"{gibibytes(size)} of memory, it took {gibibytes(found)}")
    each, steps = plan.get("cpu_seconds_a_step"), record.get("step") or 0
    if each and steps and seconds_of(record, "cpu"):
        parts.append(
            f"{duration(each * steps)} of CPU in its steps, it took {duration(seconds_of(record, 'cpu'))} in all"
        )
    return "; ".join(parts)


def _device(record: Mapping[str, Any]) -> str:
    count = record.get("processes", 1)
    return f"{record['device']}, {count} {'process' if count == 1 else 'processes'}" if "device" in record else ""


def _model(record: Mapping[str, Any]) -> str:
    if "parameters" not in record:
        return str(record.get("model", ""))
    return f"{record.get('model') or '-'}: {record['parameters']:,} weights, {record['trained']:,} trained"
