"""`trl diff RUN RUN`: in what two runs differ: settings, data, then the first step and the first token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from trl.data.any_text import many
from trl.reports.run_folder import RunRead, read_run
from trl.trainer import trace
from trl.trainer.run_folder import RECORD

OF_PLACE = ("output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "overwrite_output_dir", "trace_steps")
"""settings that say where a run writes, not what it computes"""


def command(
    first: Annotated[Path, typer.Argument(help="Folder of a run.")],
    second: Annotated[Path, typer.Argument(help="Folder of another run.")],
) -> int:
    """Say in what two runs differ: settings, data, then the first step and the first token."""
    one, other = read_run(first), read_run(second)
    lines = [*settings_apart(one, other), *data_apart(one, other), *steps_apart(one, other)]
    for line in lines or ["nothing differs in settings, data and what was logged"]:
        print(line)
    return 0


def settings_of(run: RunRead) -> dict[str, Any]:
    """All settings of a run, as its YAML file has them."""
    try:
        found = yaml.safe_load(run.settings) if run.settings else {}
    except yaml.YAMLError:
        found = {}
    return found if isinstance(found, dict) else {}


def recorded(run: RunRead) -> bool:
    """Whether its record is there, with versions and data."""
    return (run.folder / RECORD).is_file()


def settings_apart(one: RunRead, other: RunRead) -> Iterator[str]:
    ours, theirs = settings_of(one), settings_of(other)
    if not ours or not theirs:
        yield "settings: one of the runs has written none"
        return
    jobs = one.trainer, other.trainer
    names = {*ours, *theirs} - {*OF_PLACE}
    if all(jobs) and jobs[0] != jobs[1]:
        yield f"trainers: {jobs[0]} | {jobs[1]}"
        alone, names = names - (ours.keys() & theirs.keys()), names & ours.keys() & theirs.keys()
        yield f"settings: {len(alone)} are known to one of the trainers alone, and are not shown"
    for name in sorted(names):
        if ours.get(name) != theirs.get(name):
            yield f"settings: {name}: {ours.get(name)!r} | {theirs.get(name)!r}"
    without = [str(run.folder) for run in (one, other) if not recorded(run)]
    if without:
        yield f"record: no run.json in {' and '.join(without)}: versions and data are not compared"
        return
    versions = one.record.get("versions") or {}, other.record.get("versions") or {}
    for name in sorted({*versions[0], *versions[1]}):
        if versions[0].get(name) != versions[1].get(name):
            yield f"versions: {name}: {versions[0].get(name)} | {versions[1].get(name)}"


def data_apart(one: RunRead, other: RunRead) -> Iterator[str]:
    if not recorded(one) or not recorded(other):
        return
    ours, theirs = one.record.get("data") or {}, other.record.get("data") or {}
    for name in sorted({*ours, *theirs}):
        here, there = ours.get(name) or {}, theirs.get(name) or {}
        for field in ("rows", "tokens", "learned_tokens", "fingerprint"):
            if here.get(field) != there.get(field):
                yield f"data: {name}: {field}: {here.get(field)} | {there.get(field)}"


def steps_apart(one: RunRead, other: RunRead) -> Iterator[str]:
    """The first step that differs: by its rows, else by what was computed of the same rows; without traces, by logs."""
    both = [step for step in trace.steps(one.folder) if step in set(trace.steps(other.folder))]
    if not both:
        yield from logs_apart(one, other)
        yield "no step was traced by both runs: with trace_steps=True the first row and token that differ are found"
        return
    for step in both:
        here, there = (trace.read(trace.file_of(run.folder, step)) for run in (one, other))
        if here is None or there is None:
            continue
        found = list(step_apart(here, there, words_of(one)))
        if found:
            yield f"step {step} is the first that differs"
            yield from found
            return
    yield f"the steps that both have traced ({both[0]} to {both[-1]}) are the same bit for bit"


def step_apart(here: Mapping[str, Any], there: Mapping[str, Any], words: Any) -> Iterator[str]:
    if here.get("weights_before") != there.get("weights_before"):
        yield "  the weights before it differ already"
    rows, others = here["rows"], there["rows"]
    if len(rows) != len(others):
        yield f"  it has {many(len(rows), 'row')} | {many(len(others), 'row')}"
    for number, (ours, theirs) in enumerate(zip(rows, others, strict=False)):
        if ours == theirs:
            continue
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        yield f"  row {number} differs from token {at} on: {said(ours, at, words)} | {said(theirs, at, words)}"
        return
    if len(rows) != len(others):
        return
    for name in ("learned", "losses", "grad_norm", "gradient", "weights_after"):
        if here.get(name) != there.get(name):
            yield f"  the same rows, but {name}: {brief(here.get(name))} | {brief(there.get(name))}"


def said(ids: Sequence[int], at: int, words: Any) -> str:
    """Some tokens from a place on, as text where the run's tokenizer is at hand."""
    from trl.data.inspect import read_out

    part = list(ids[at : at + 8])
    if not part:
        return "(the row has ended)"
    return repr(read_out(words, part, specials=True)) if words is not None else " ".join(map(str, part))


def brief(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def words_of(run: RunRead) -> Any:
    """The tokenizer in a run's folder; None where there is none."""
    if not any((run.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    from trl.models.prepare import load_tokenizer

    try:
        return load_tokenizer(str(run.folder))
    except (OSError, ValueError):
        return None


def logs_apart(one: RunRead, other: RunRead) -> Iterator[str]:
    """The first log in which a number of training differs."""
    first: tuple[float, str, Any, Any] | None = None
    for name in sorted(one.series.keys() & other.series.keys()):
        if name.endswith(("runtime", "_per_second", "step_time", "epoch")) or "time/" in name:
            continue
        ours, theirs = one.series[name], other.series[name]
        there = dict(zip(theirs.steps, theirs.values, strict=False))
        for step, value in zip(ours.steps, ours.values, strict=False):
            if step in there and there[step] != value and (first is None or step < first[0]):
                first = (step, name, value, there[step])
    if first is not None:
        yield f"step {int(first[0])} is the first whose log differs: {first[1]} {first[2]} | {first[3]}"
