"""`trl inspect`: the rows of a training command as the model will learn them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

from trl.data.any_text import many
from trl.data.report import RowNote, TokenizationReport
from trl.scripts.exit_codes import pointing
from trl.scripts.jobs import JOBS, Training
from trl.scripts.quiet import quiet

SAMPLE = 10_000
"""rows that are read unless --sample says otherwise"""
BINS = 10
COLOURS = {"learned": "bold green", "wrong": "bold red", "": ""}
"""how a terminal of 16 colours shows tokens that are learned, steps that are wrong, and the others"""
BRACKETS = {"learned": ("⟦", "⟧"), "wrong": ("⟦✗", "⟧"), "": ("", "")}
"""the same without colours"""
PARTS = ("prompt", "chosen", "rejected", "completion")


def command(
    context: typer.Context,
    job: Annotated[str, typer.Argument(help="Training command whose rows they are: sft, dpo, grpo, ...")],
    rows: Annotated[int, typer.Option(help="Show so many rows.", min=0)] = 3,
    row: Annotated[int | None, typer.Option(help="Show this row only.", min=0)] = None,
    found: Annotated[bool, typer.Option("--found", help="Show only rows that something happened to.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Show where each token ends.")] = False,
    sample: Annotated[int, typer.Option(help="Read the first so many rows; 0: all.", min=0)] = SAMPLE,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file.", dir_okay=False)] = None,
) -> None:
    """Show the rows of `trl JOB` as they will be learned: lengths, masks, what was cut, what was met.

    Takes --model, --data and every setting of the training command, such as --max_length; no weights are loaded.
    """
    if job not in JOBS:
        raise ValueError(f"{job}: no training command of that name; choose one of {', '.join(JOBS)}")
    if job == "ppo":
        raise ValueError("ppo reads its prompts while it samples: `trl inspect grpo` shows how prompts are tokenised")
    with quiet(), pointing(job):
        given = prepared(JOBS[job], context.args)
        seen = read(given, max(sample, 0 if row is None else row + 1) if sample else None)
    if row is not None and row >= len(seen.notes):
        raise ValueError(f"--row {row}: the data set has {many(len(seen.notes), 'row')}")
    chosen = seen.notes if row is None else [seen.notes[row]]
    shown = [one for one in chosen if one.findings or not found]
    page = Page(given.title, seen, [shown_row(one, given.tokenizer, tokens) for one in shown[:rows]], tokens)
    print_page(page)
    if html is not None:
        html.write_text(page_html(page), encoding="utf-8")
        print(f"wrote {html}")


@dataclass
class Seen:
    """The rows that were read."""

    notes: list[RowNote]
    report: TokenizationReport
    kind: str
    """format of the rows, in words"""
    limit: int | None
    """the longest row"""
    learns: bool
    """whether some tokens of a row are learned and others are not"""
    packed: str = ""
    """what packing makes of the rows, in words"""

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray([note.tokens for note in self.notes])

    def facts(self) -> list[tuple[str, str]]:
        """Name and value of what is known of all rows."""
        report, lengths = self.report, self.lengths
        low, half, most, high = np.percentile(lengths, [0, 50, 95, 100]).astype(int)
        facts = [("rows", f"{report.rows:,}{' (the first ones)' if report.partial else ''}"), ("format", self.kind)]
        facts.append(("tokens", f"{report.tokens:,}"))
        facts.append(("tokens of a row", f"least {low:,}, median {half:,}, 95 % {most:,}, most {high:,}"))
        if self.learns:
            facts.append(("learned", f"{report.learned:,} tokens, {report.learned / max(1, report.tokens):.1%}"))
        if report.pictured:
            shown = f"{many(report.met.pictures, 'picture')} in {many(report.pictured, 'row')}"
            facts.append(("pictures", shown))
        if self.limit is not None:
            facts.append(
                ("longest allowed", f"{self.limit:,} tokens; {many(report.truncated, 'row was', 'rows were')} cut")
            )
        if report.left_out:
            facts.append(("left out", f"{many(report.left_out, 'row has', 'rows have')} nothing to learn"))
        return facts + ([("packing", self.packed)] if self.packed else [])

    def histogram(self) -> list[tuple[str, int]]:
        """Numbers of rows by their length."""
        counts, edges = np.histogram(self.lengths, bins=min(BINS, max(1, int(np.ptp(self.lengths)))))
        low = np.ceil(edges[:-1]).astype(int)
        high = np.append(np.ceil(edges[1:-1]).astype(int) - 1, self.lengths.max())
        names = [f"{a:,}" if a >= b else f"{a:,} to {b:,}" for a, b in zip(low, high, strict=True)]
        return list(zip(names, counts.tolist(), strict=True))


@dataclass
class Part:
    """Tokens of a row, under the name of their part, as runs of text with the same mark."""

    name: str
    runs: list[Run]


class Run(NamedTuple):
    """Text whose tokens have the same mark, or a picture."""

    text: str
    mark: str
    """`learned`, `wrong` or nothing"""
    picture: int | None = None
    """its number in the album"""


@dataclass
class ShownRow:
    note: RowNote
    parts: list[Part]

    @property
    def has_steps(self) -> bool:
        return "step_labels" in self.note.columns

    @property
    def title(self) -> str:
        note = self.note
        share = f", {note.learned:,} learned" if note.learned != note.tokens else ""
        return f"row {note.index:,}: {note.tokens:,} tokens{share}{', left out' if note.left_out else ''}"


@dataclass
class Page:
    title: str
    seen: Seen
    rows: list[ShownRow]
    tokens: bool
    """whether it shows where each token ends"""


@dataclass
class Prepared:
    """What a training command would begin with."""

    dataset: Any
    row_job: Any
    tokenizer: Any
    config: Any
    title: str


def prepared(job: Training, words: Sequence[str]) -> Prepared:
    """The data set, and what tokenises it, by the words of the training command."""
    import trl
    from trl.models.prepare import load_tokenizer
    from trl.scripts.model_config import loading_keywords
    from trl.scripts.training import datasets_of, read_settings
    from trl.trainer.preparation import prepare_tokenizer

    parser, settings = read_settings(job, words)
    model_config, script, mixture, config, own = parser.parse_dict(settings)[:5]
    dataset, _ = datasets_of(script, mixture, own.eval_data, evaluates=False)
    keywords = loading_keywords(model_config, config.trust_remote_code)
    where: dict[str, Any] = {name: keywords[name] for name in ("revision", "trust_remote_code") if name in keywords}
    name = str(model_config.model_name_or_path)
    model = weightless(name, where)
    tokenizer = prepare_tokenizer(load_tokenizer(name, **where), model, config)
    row_job = getattr(trl, job.trainer).row_job(tokenizer, config, model)
    title = f"{job.trainer}: {script.dataset_name or 'a mixture of data sets'} for {name}"
    return Prepared(dataset, row_job, tokenizer, config, title)


def read(given: Prepared, most: int | None) -> Seen:
    """The first `most` rows (None: all) as the trainer would tokenise them."""
    from trl.data.tokenize import noted

    rows = noted(given.dataset, given.row_job, most=most)
    report = TokenizationReport(unread=rows.unread)
    notes = list(progress(rows.notes, most))
    for note in notes:
        report.add([int(note.flags)], [note.cut], [note.tokens], [note.learned], *([one] for one in note.met))
    whole = len(given.dataset) if hasattr(given.dataset, "__len__") else math.inf
    report.partial = most is not None and most < whole and len(notes) == most
    kind = f"{rows.format.kind}{' in messages' if rows.format.conversational else ''}"
    kind += f" ({', '.join(rows.format.columns)})"
    seen = Seen(notes, report, kind, given.row_job.limits.max_length, "loss_mask" in notes[0].columns)
    if getattr(given.config, "packing", False):
        seen.packed = packed(notes, given.config.max_length, given.config.packing_strategy)
    return seen


def packed(notes: Sequence[RowNote], length: int, strategy: str) -> str:
    """What packing makes of the rows, in words."""
    from datasets import Dataset

    from trl.data.packed_dataset import pack_dataset

    if strategy == "constant_length":
        return "a stream of constant length, which knows no rows"
    rows = [note.columns for note in notes if not note.left_out]
    bins = len(pack_dataset(Dataset.from_list(rows), length, strategy))
    tokens = sum(len(row["input_ids"]) for row in rows)
    return f"{len(rows):,} rows fill {bins:,} rows of {length:,} tokens to {min(1.0, tokens / (bins * length)):.1%}"


def progress(notes: Iterator[RowNote], most: int | None) -> Iterator[RowNote]:
    """The notes; a terminal sees how many there are."""
    if not sys.stderr.isatty():
        return notes
    from rich.console import Console
    from rich.progress import track

    return iter(track(notes, "tokenising", total=most, console=Console(stderr=True), transient=True))


def weightless(name: str, where: dict[str, Any]) -> Any:
    """The model of a folder or Hub name, or the base of an adapter, without its weights."""
    import torch
    from transformers import AutoConfig, AutoModel, GenerationConfig

    from trl.models.peft_support import find_adapter

    adapter = find_adapter(name, **where)
    base = name if adapter is None else str(adapter.base_model_name_or_path)
    config = AutoConfig.from_pretrained(base, **({} if adapter is not None else where))
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    try:
        model.generation_config = GenerationConfig.from_pretrained(base)
    except OSError:  # not every model has one
        model.generation_config = GenerationConfig.from_model_config(config)
    return model


def shown_row(note: RowNote, tokenizer: Any, tokens: bool) -> ShownRow:
    """The row as text, part by part."""
    columns = note.columns
    if "input_ids" in columns:
        labels = columns.get("step_labels") or [one or -100 for one in columns["loss_mask"]]
        marks = [{0: "wrong", 1: "learned"}.get(label, "") for label in labels]
        return ShownRow(note, [Part("", _runs(tokenizer, columns["input_ids"], marks, tokens))])
    parts = []
    for name in PARTS:
        ids = columns.get(f"{name}_ids")
        if ids is not None:
            mask = columns.get(f"{name}_mask") or [int(name != "prompt")] * len(ids)
            marks = ["learned" if one else "" for one in mask]
            parts.append(Part(name, _runs(tokenizer, ids, marks, tokens)))
    if "label" in columns:
        parts[-1].name += " (good)" if columns["label"] else " (bad)"
    return ShownRow(note, parts)


def _runs(tokenizer: Any, ids: Sequence[int], marks: Sequence[str], tokens: bool) -> list[Run]:
    """The text in pieces of the same mark, or token by token."""
    from trl.data.any_text import visible
    from trl.data.inspect import pieces

    runs: list[Run] = []
    end = 0
    for piece in pieces(tokenizer, ids, [int(bool(mark)) for mark in marks]):
        end += len(piece.ids)
        text, mark = visible(piece.text), marks[end - 1]
        joins = runs and runs[-1].mark == mark and not tokens
        if joins and piece.picture is None and runs[-1].picture is None:
            runs[-1] = Run(runs[-1].text + text, mark)
        else:
            runs.append(Run(text, mark, piece.picture))
    return runs


def print_page(page: Page) -> None:
    """Print everything on a terminal; without colours, ⟦ ⟧ stand around what is learned."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=False)
    console.print(Text(page.title, "bold"))
    facts = Table.grid(padding=(0, 2))
    for name, value in page.seen.facts():
        facts.add_row(Text(name, "cyan"), Text(value))
    console.print(facts)
    console.print()
    bars, histogram = Table.grid(padding=(0, 2)), page.seen.histogram()
    most = max(count for _, count in histogram)
    for name, count in histogram:
        bars.add_row(Text(name, justify="right"), Text("█" * round(30 * count / most)), Text(f"{count:,}"))
    console.print(Text("rows by their number of tokens", "bold"))
    console.print(bars)
    for line in page.seen.report.findings:
        console.print(Text(f"! {line}", "yellow"))
    for row in page.rows:
        console.print()
        console.print(Text(row.title, "bold"))
        for finding in row.note.findings:
            console.print(Text(f"! {finding}", "yellow"))
        for part in row.parts:
            if part.name:
                console.print(Text(part.name, "cyan"))
            console.print(Padding(_text(part, console.color_system is None, page.tokens), (0, 0, 0, 2)))
    if any(run.mark for row in page.rows for part in row.parts for run in part.runs):
        console.print()
        console.print(Text(_legend(console.color_system is None, page.rows[0].has_steps), "cyan"))


def _text(part: Part, plain: bool, tokens: bool) -> Any:
    from rich.text import Text

    text = Text()
    for number, (piece, mark, picture) in enumerate(part.runs):
        left, right = BRACKETS[mark] if plain else BRACKETS[""]
        text.append("│" if tokens and number else "", "cyan")
        text.append(f"{left}{piece}{right}", COLOURS[mark] or ("magenta" if picture is not None else ""))
    return text


def _legend(plain: bool, steps: bool) -> str:
    if steps:
        return "right steps: ⟦ ⟧, wrong steps: ⟦✗ ⟧" if plain else "right steps: green, wrong steps: red"
    return "learned: between ⟦ and ⟧" if plain else "learned: green"


def page_html(page: Page) -> str:
    """One file without links, for a browser."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    from trl.data.thumbnails import Gallery

    gallery = Gallery()
    tags = {
        run: Markup(gallery.tag(run.picture, run.text[1:-1], run.mark == "learned"))  # it escapes the caption
        for row in page.rows
        for part in row.parts
        for run in part.runs
        if run.picture is not None
    }
    environment = Environment(loader=PackageLoader("trl.scripts"), autoescape=True, trim_blocks=True)
    histogram = page.seen.histogram()
    most = max(count for _, count in histogram)
    return environment.get_template("inspect.html.jinja").render(
        page=page, histogram=histogram, most=most, tags=tags, style=Markup(gallery.style)
    )
