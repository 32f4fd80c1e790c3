"""What a run's folder holds, as a report reads it; what is damaged is passed over and told."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl.data.thumbnails import FOLDER, Thumbnail, read_back
from trl.rollout.reward_check import FILE
from trl.trainer.checkpoints import PREFIX
from trl.trainer.run_folder import CONFIG, RECORD, is_live
from trl.trainer.run_record import OTHER_CONFIG, read_record
from trl.trainer.tally import METRICS

MOMENTS, SHOWN = 5, 3
"""points in time of which samples are shown, and how many of each: the first ones, not the best"""
SUMMARIES = re.compile(r"train_\w+|total_flos|\w+_runtime|\w+_per_second")
"""what is logged once at the end, or says how fast this machine was: no curves are drawn of it"""


@dataclass
class Series:
    """A metric over the run."""

    name: str
    steps: list[float] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)
    """None where a number was not finite"""

    @property
    def known(self) -> list[float]:
        return [value for value in self.values if value is not None]

    @property
    def is_constant(self) -> bool:
        known = self.known
        if len(known) < len(self.values):
            return not known
        return len(known) < 2 or max(known) - min(known) <= 1e-6 * max(map(abs, known))


@dataclass
class Samples:
    """Completions of one moment."""

    step: int
    rows: list[dict[str, Any]]
    """`prompt`, `completion`, and numbers by their names"""
    pictures: list[list[Thumbnail]] = field(default_factory=list)
    """of each row"""


@dataclass
class RunRead:
    """A run, as its folder tells it."""

    folder: Path
    record: dict[str, Any]
    series: dict[str, Series]
    summary: dict[str, float]
    samples: list[Samples]
    config: Path
    """file of its settings"""
    settings: str
    """text of that"""
    checkpoints: list[int]
    skipped: list[str]
    """what could not be read, in words"""

    @property
    def last_step(self) -> int:
        logged = max((int(each.steps[-1]) for each in self.series.values() if each.steps), default=0)
        return max(logged, int(self.record.get("step") or 0))

    @property
    def trainer(self) -> str:
        """`SFT`, `DPO`, ...: the name in the table of metrics."""
        return str(self.record.get("trainer", "")).removesuffix("Trainer")

    @property
    def status(self) -> tuple[str, str]:
        """How the run stands, and how it came to that."""
        status, how = str(self.record.get("status", "unknown")), str(self.record.get("how", ""))
        if status != "running" or is_live(self.folder):
            return status, how
        return "ended", f"without a word: its process was killed, or its machine went down, after step {self.last_step}"


def reward_check(folder: Path) -> dict[str, Any]:
    """What the reward functions paid for trivial answers before training; {} where they were not tried."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


SEEDS = re.compile(r"seed-(\d+)")
"""names of the folders in which runs of several seeds lie"""


def seed_folders(folder: Path) -> dict[int, Path]:
    """The folders of the seeds, in their order."""
    found = [(int(match[1]), path) for path in folder.glob("seed-*") if (match := SEEDS.fullmatch(path.name))]
    return dict(sorted((seed, path) for seed, path in found if path.is_dir()))


def check_one_run(folder: Path) -> None:
    """ValueError where runs of several seeds lie, and one is wanted."""
    seeds = [str(path) for path in seed_folders(folder).values()]
    if seeds:
        raise ValueError(
            f"{folder}: a run of each of {len(seeds)} seeds lies there: choose one, {' or '.join(seeds)} "
            "(`trl report` shows all)"
        )


def read_run(folder: str | os.PathLike[str]) -> RunRead:
    """The run of a folder, or of the folder that a checkpoint lies in. ValueError where there is none."""
    place = Path(folder)
    if place.is_file() and place.name in (METRICS, RECORD):
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"{folder}: there is no such folder; give the `output_dir` of a run")
    if re.fullmatch(rf"{PREFIX}\d+", place.name) and not (place / METRICS).is_file():
        place = place.resolve().parent
    record, skipped = read_record(place), list[str]()
    if record is None and (place / RECORD).exists():
        skipped.append(f"{RECORD} could not be read")
    if record is None and not (place / METRICS).is_file():
        check_one_run(place)
        raise ValueError(f"{folder}: no run has written there: it has neither {RECORD} nor {METRICS}")
    series, summary = read_metrics(place / METRICS, skipped)
    config = next((path for path in (place / OTHER_CONFIG, place / CONFIG) if path.is_file()), place / CONFIG)
    return RunRead(
        place, checked(record or {}), series, summary, read_samples(place / "rollouts", skipped),
        config,
        config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        sorted(int(path.name.removeprefix(PREFIX)) for path in place.glob(f"{PREFIX}*") if _numbered(path)), skipped,
    )  # fmt: skip


def checked(record: dict[str, Any]) -> dict[str, Any]:
    """A record of which nothing is of another kind than a report reads."""
    kinds: dict[str, Any] = dict.fromkeys(("data", "settings", "process", "versions", "seconds", "peak_memory"), dict)
    kinds |= dict.fromkeys(("step", "max_steps", "parameters", "trained"), int | float) | {"earlier": list}
    kept = {name: value for name, value in record.items() if isinstance(value, kinds.get(name, object))}
    for name in ("seconds", "peak_memory"):
        kept[name] = {key: value for key, value in kept.get(name, {}).items() if _is_number(value)}
    kept["earlier"] = [checked(part) for part in kept.get("earlier", []) if isinstance(part, dict)]
    facts = {name: one for name, one in kept.get("data", {}).items() if isinstance(one, dict)}
    for one in facts.values():
        for key, kind in (("met", list), ("files", dict)):
            if not isinstance(one.get(key), kind):
                one.pop(key, None)
    kept["data"] = facts
    return kept


def _numbered(path: Path) -> bool:
    return path.is_dir() and path.name.removeprefix(PREFIX).isdigit()


def read_metrics(path: Path, skipped: list[str]) -> tuple[dict[str, Series], dict[str, float]]:
    """The curves, and what was logged once at the end. A line that is no log goes to `skipped`."""
    series: dict[str, Series] = {}
    summary: dict[str, float] = {}
    torn: list[int] = []
    for number, line in enumerate(_lines(path), 1):
        logged = _logged(line)
        if logged is None:
            torn += [number] if line.strip() else []
            continue
        step = logged.pop("step")
        for name, value in logged.items():
            if SUMMARIES.fullmatch(name):
                if value is not None:
                    summary[name] = value
                continue
            found = series.setdefault(name, Series(name))
            found.steps.append(step)
            found.values.append(value)
    series.pop("epoch", None)
    if torn:
        shown = ", ".join(map(str, torn[:5])) + (", ..." if len(torn) > 5 else "")
        what = f"line {shown} of {METRICS} is" if len(torn) == 1 else f"{len(torn)} lines of {METRICS} ({shown}) are"
        skipped.append(f"{what} no log of a step and left out")
    return series, summary


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from file


def _logged(line: str) -> dict[str, Any] | None:
    """The numbers of a line, with its step; None where it is no log."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = found.get("step") if isinstance(found, dict) else None
    if isinstance(step, bool) or not isinstance(step, int | float) or not math.isfinite(step):
        return None
    return {"step": step, **{str(k): _number(v) for k, v in found.items() if k != "step" and _is_number(v)}}


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _number(value: Any) -> float | None:
    try:
        number = None if value is None else float(value)
    except OverflowError:
        return None
    return number if number is not None and math.isfinite(number) else None


def read_samples(folder: Path, skipped: list[str]) -> list[Samples]:
    """The first completions of some rollouts over the run."""
    files = sorted(folder.glob("**/rollout-*.parquet"))
    places = sorted({round(i * (len(files) - 1) / max(1, MOMENTS - 1)) for i in range(MOMENTS)}) if files else []
    found = []
    for place in places:
        try:
            rows = _first_rows(files[place])
        except Exception as error:  # of Arrow, which has many
            skipped.append(f"{files[place].name} could not be read ({' '.join(str(error).split())[:80]})")
            continue
        if rows:
            pictures = [_take_pictures(row, files[place].parent) for row in rows]
            found.append(Samples(int(rows[0].pop("step", 0) or 0), rows, pictures))
    return found


def _take_pictures(row: dict[str, Any], folder: Path) -> list[Thumbnail]:
    """The thumbnails of a row, whose columns of paths are taken out of it."""
    found = []
    for name, value in list(row.items()):
        if isinstance(value, list) and all(each is None or str(each).startswith(f"{FOLDER}/") for each in value):
            found += [read_back(folder, path) for path in row.pop(name)]
    return [each for each in found if each is not None]


def _first_rows(file: Path) -> list[dict[str, Any]]:
    from pyarrow import parquet

    read = parquet.ParquetFile(file)
    names = [name for name in read.schema_arrow.names if name != "completion_ids"]
    batch = next(read.iter_batches(batch_size=SHOWN, columns=names), None)
    return [] if batch is None else batch.to_pylist()


def spread_of(name: str, names: Sequence[str] | Mapping[str, Any]) -> str | None:
    """The metric that is the spread of another one."""
    wanted = "reward_std" if name == "reward" else f"{name.removesuffix('/mean')}/std" if name.endswith("/mean") else ""
    return wanted if wanted in names else None
