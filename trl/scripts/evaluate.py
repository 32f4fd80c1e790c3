"""`trl eval`: figures of a model on rows, each with its interval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from trl.import_utils import is_installed, pip_install
from trl.reports.intervals import Interval, Measure, interval_of
from trl.scripts.generate import Limit, Split
from trl.scripts.open_model import LANGUAGE_MODEL, Dtype, find_model, open_model
from trl.scripts.quiet import quiet, say
from trl.scripts.sampling import Asked, MinP, Penalty, Temperature, TopK, TopP

Data = Annotated[
    str | None,
    typer.Option(help="Rows that the model has not seen: a file, a folder, or a Hub name."),
]
Reward = Annotated[
    list[str] | None,
    typer.Option(help="What to reward answers by: a name, package.module.function, file.py:function, or a folder."),
]
Judge = Annotated[str | None, typer.Option(help="Judge of two answers: package.module:name, or file.py:name.")]
N = Annotated[int, typer.Option("--n", min=1, help="Answers to each prompt.")]
Chat = Annotated[bool, typer.Option("--chat", help="Put texts of rows to the model as a user's turn.")]
MaxNew = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Seed = Annotated[int, typer.Option(help="Of sampling.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.", dir_okay=False)]


def command(
    model: Annotated[str, typer.Argument(help="Output folder of a run, checkpoint, adapter, or model.")],
    data: Data = None,
    split: Split = None,
    limit: Limit = None,
    reward: Reward = None,
    judge: Judge = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, with commas between.")] = None,
    n: N = 1,
    chat: Chat = False,
    max_new_tokens: MaxNew = 256,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
    json_file: Json = None,
    dtype: Dtype = None,
) -> None:
    """Measure a model on rows that it has not seen; every figure has a 95 % interval.

    Answers give loss and token accuracy, pairs give pair accuracy and margin (of a reward model too), and with --reward
    or --judge the model answers the prompts of the rows: rewards, or the share of answers that are judged better than
    those of the rows.
    """
    from trl.scripts.measure import Judging, Measured, hold, judge_of

    check_wanted(data, reward, judge, tasks)
    asked = Asked(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty)
    judging = Judging(asked, tuple(reward or ()), judge, n, seed, chat)
    measured = Measured(model, [])
    with quiet():
        if data is not None:
            held = hold(data, split, limit)
            decide = None if judge is None else judge_of(judge)
            measured = measure(model, held, judging, decide, dtype)
        results = {} if tasks is None else of_harness(model, tasks, dtype, limit)
        lines = [(each, interval_of(each)) for each in measured.measures]
    if data is not None:
        print_measures(f"{model} on {data}", lines)
    if results:
        print_tasks(results)
    if json_file is not None:
        write_json(json_file, {"model": model, "data": data, "measures": figures(lines), "tasks": results})


def check_wanted(data: str | None, reward: Sequence[str] | None, judge: str | None, tasks: str | None = None) -> None:
    """What an evaluation needs, before anything is loaded."""
    if not is_installed("scipy"):
        raise ImportError(f"intervals need the package scipy: {pip_install('scipy')}")
    if data is None and (tasks is None or reward or judge):
        raise ValueError("--data: say which rows to measure on")
    if tasks is not None and not is_installed("lm_eval"):
        raise ImportError(f"--tasks {tasks}: it needs lm-evaluation-harness; {pip_install('lm_eval')}")


def measure(name: str, held: Any, judging: Any, judge: Any, dtype: str | None, samples: int = 0) -> Any:
    """All figures of a model. samples: prompts to answer where nothing judges answers; 0: none."""
    from trl.scripts.measure import Measured, given_answers, of_rows, of_samples, prompts_of, wins

    opened = open_model(name, dtype, wants=None)
    if opened.found.kind == LANGUAGE_MODEL and (held.talks or judging.chat):
        opened.spell_roles()
    found = Measured(name, of_rows(opened, held))
    writes = opened.found.kind == LANGUAGE_MODEL
    judged = bool(judging.rewards or judging.judge)
    if judged and not writes:
        say(f"{name}: a {opened.found.kind} answers nothing, so --reward and --judge have no effect on it")
    elif judged or (writes and samples):
        part = (
            held if judged else replace(held, dataset=held.dataset.select(range(min(samples, len(held)))), prompts=[])
        )
        said = of_samples(opened, part, judging)
        found = Measured(name, found.measures + (said.measures if judged else []), said.answers, said.pictures)
    elif not found.measures:
        raise ValueError(f"--data {held.name}: it has prompts without answers; say --reward or --judge")
    if judge is not None and found.answers:
        given = given_answers(held)
        prompts = [row["prompt"] for row in prompts_of(held)]
        rounds = [wins(judge, prompts, given, [one[k] for one in found.answers]) for k in range(judging.n)]
        found.measures.append(Measure("wins over the rows", np.mean(rounds, axis=0), np.ones(len(held))))
    return found


def figures(lines: Sequence[tuple[Measure, Interval]]) -> dict[str, Any]:
    """The figures for a file; a number that is not there is null."""
    return {each.name: as_json(interval) for each, interval in lines}


def as_json(interval: Interval) -> dict[str, Any]:
    numbers = {"value": interval.mean, "low": interval.low, "high": interval.high}
    return {name: value if np.isfinite(value) else None for name, value in numbers.items()} | {"rows": interval.n}


def write_json(path: Path, found: dict[str, Any]) -> None:
    """Write figures as a whole file, and say so."""
    from trl.trainer.run_record import write_whole

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {path}")


def print_measures(title: str, lines: Sequence[tuple[Measure, Interval]]) -> None:
    """Print figures with their intervals as a table."""
    from rich.table import Table
    from rich.text import Text

    from trl.data.any_text import console, visible
    from trl.reports.comparison import number, span

    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("measure")
    for name in ("value", "95 % interval", "rows"):
        table.add_column(name, justify="right")
    for each, interval in lines:
        table.add_row(Text(visible(each.name)), number(interval.mean), span(interval), f"{interval.n:,}")
    console().print(Text(visible(title), "bold"))
    console().print(table)


# -- lm-evaluation-harness -----------------------------------------------------------------------


def of_harness(name: str, tasks: str, dtype: str | None, limit: int | None) -> dict[str, dict[str, Any]]:
    """What lm-evaluation-harness measures on its tasks, as it says it."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    found = find_model(name)
    if found.kind != LANGUAGE_MODEL:
        raise ValueError(f"{name}: it is a {found.kind}; the tasks are for language models")
    opened = open_model(name, dtype)
    harnessed = HFLM(pretrained=opened.model, tokenizer=opened.tokenizer)
    wanted = [task.strip() for task in tasks.split(",") if task.strip()]
    results = lm_eval.simple_evaluate(model=harnessed, tasks=wanted, limit=limit)
    return {task: dict(figures) for task, figures in (results or {}).get("results", {}).items()}


def print_tasks(results: dict[str, dict[str, Any]]) -> None:
    """Print the tasks' figures, each with 1.96 of its standard errors where there is one."""
    for task, found in results.items():
        for name, value in found.items():
            metric, _, rule = name.partition(",")
            if not isinstance(value, int | float) or isinstance(value, bool) or metric.endswith("_stderr"):
                continue
            error = found.get(f"{metric}_stderr,{rule}")
            around = f" ± {1.96 * error:.3g}" if isinstance(error, int | float) else ""
            print(f"{task}: {metric} {value:.4g}{around}")
