"""`trl compare`: two or more models on the same rows."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trl.data.any_text import many
from trl.scripts.evaluate import (
    Chat,
    Data,
    Json,
    Judge,
    MaxNew,
    N,
    Reward,
    Seed,
    as_json,
    check_wanted,
    measure,
    write_json,
)
from trl.scripts.generate import Limit, Split
from trl.scripts.open_model import Dtype, find_model
from trl.scripts.quiet import quiet
from trl.scripts.sampling import Asked, MinP, Penalty, Temperature, TopK, TopP

if TYPE_CHECKING:
    from trl.reports.comparison import Comparison, Line

PRINTED = 3
"""prompts whose answers the terminal shows"""
LONGEST = 300
"""characters of a text there"""


def command(
    models: Annotated[list[str], typer.Argument(help="Two models or more; the others are compared with the first.")],
    data: Data = None,
    split: Split = None,
    limit: Limit = None,
    reward: Reward = None,
    judge: Judge = None,
    samples: Annotated[int, typer.Option(min=0, help="Prompts whose answers stand side by side; 0: none.")] = 8,
    n: N = 1,
    chat: Chat = False,
    max_new_tokens: MaxNew = 128,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file.", dir_okay=False)] = None,
    json_file: Json = None,
    dtype: Dtype = None,
) -> None:
    """Compare models, the first of which is the one to beat, on rows that none of them has seen.

    All are measured as `trl eval` does it, on the same rows. A difference counts where its interval does not hold 0;
    otherwise the models are not distinguishable by these rows. With --reward or --judge answers to all prompts are
    sampled, with the same random numbers for each model.
    """
    from trl.scripts.measure import Judging

    if len(models) < 2:
        raise ValueError(f"{models[0]}: give two models or more; `trl eval` measures one")
    if len(set(models)) < len(models):
        raise ValueError(f"{', '.join(models)}: a model stands there twice")
    check_wanted(data, reward, judge)
    asked = Asked(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty)
    judging = Judging(asked, tuple(reward or ()), judge, n, seed, chat)
    with quiet():
        for name in models:
            find_model(name)  # what is no model is told before the first one is measured
        found = comparison(models, str(data), split, limit, judging, samples, dtype)
    print_comparison(found)
    if html is not None:
        from trl.reports.comparison import write_page

        write_page(found, html)
        print(f"wrote {html}")
    if json_file is not None:
        write_json(json_file, {"models": models, "data": data, "lines": [_line_json(line) for line in found.lines]})


def comparison(
    models: Sequence[str],
    data: str,
    split: str | None,
    limit: int | None,
    judging: Any,
    samples: int,
    dtype: str | None,
) -> Comparison:
    """Measure all models, one after the other, and compare them."""
    from trl.reports.comparison import Comparison, compared, reward_wins, win_measures
    from trl.scripts.measure import hold, judge_of, prompts_of, wins

    held = hold(data, split, limit)
    judge = None if judging.judge is None else judge_of(judging.judge)
    several = []
    for name in models:
        several.append(measure(name, held, judging, None, dtype, samples))
        gc.collect()  # one model at a time
    measures = [list(each.measures) for each in several]
    prompts = [row["prompt"] for row in prompts_of(held)] if several[0].answers else []
    lines = compared(models, measures)
    for place in range(1, len(models)):
        pairs = []
        rewards = {each.name: each for each in measures[0] if each.name.startswith("reward ")}
        for after in measures[place]:
            if after.name in rewards:
                won = reward_wins(rewards[after.name], after)
                pairs.append(win_measures(f"wins by {after.name.removeprefix('reward ')}", won))
        if judge is not None and several[0].answers and several[place].answers:
            first, other = ([one[0] for one in each.answers] for each in (several[0], several[place]))
            pairs.append(win_measures("wins by the judge", wins(judge, prompts, first, other)))
        if pairs:
            lines += compared([models[0], models[place]], [list(side) for side in zip(*pairs, strict=True)])
    shown = min(samples, *(len(each.answers) for each in several))
    pictures = [next((each.pictures[i] for each in several if each.pictures[i]), ()) for i in range(shown)]
    table = [(read_out(prompts[i], pictures[i]), [each.answers[i][0] for each in several]) for i in range(shown)]
    return Comparison(list(models), data, len(held), lines, table, facts_of(models, held, judging, limit), pictures)


def facts_of(models: Sequence[str], held: Any, judging: Any, limit: int | None) -> list[tuple[str, str]]:
    """How a comparison was made."""
    from trl.trainer.run_record import versions

    found = [(f"Model {place}", name) for place, name in enumerate(models, 1)]
    found += [("Rows", f"{held.name}: {many(len(held), f'{held.kind} row')}{' (the first ones)' if limit else ''}")]
    if judging.rewards or judging.judge:
        found += [("Answers", f"{judging.n} to each prompt, seed {judging.seed}")]
    found += [("Rewards", ", ".join(judging.rewards)), ("Judge", judging.judge or "")]
    known = versions()
    found += [("Versions", ", ".join(f"{name} {known[name]}" for name in ("trl", "torch", "transformers")))]
    return [(name, text) for name, text in found if text]


def read_out(prompt: Any, pictures: Sequence[int] = ()) -> str:
    """A prompt as a reader wants it: of a conversation the turns, with roles where there are several.

    pictures: those that are shown in it, as marks where they stand, or at its start.
    """
    from trl.data.thumbnails import has_pictures, mark, said_in
    from trl.rewards.texts import text_of

    marks = iter([mark(each) for each in pictures])
    if isinstance(prompt, str):
        return "\n".join([*marks, prompt])
    texts = [
        (
            turn["role"],
            said_in(turn["content"], marks) if has_pictures([turn]) else text_of([{**turn, "role": "assistant"}]),
        )
        for turn in prompt
    ]
    said = texts[0][1] if len(texts) == 1 else "\n".join(f"{role}: {text}" for role, text in texts)
    return "\n".join([*marks, said])


def _line_json(line: Line) -> dict[str, Any]:
    intervals = {"before": line.before, "after": line.after, "difference": line.gain}
    numbers = {name: as_json(interval) for name, interval in intervals.items()}
    return {"measure": line.name, "model": line.other, **numbers, "verdict": line.verdict}


def print_comparison(found: Comparison) -> None:
    """Print the figures of each model beside the first one's, and some answers side by side."""
    from rich.table import Table
    from rich.text import Text

    from trl.data.any_text import console, visible
    from trl.reports.comparison import number, short_names, span

    names = [Text(visible(name)) for name in short_names(found.names)]
    styles = {"better": "green", "worse": "red"}
    out = console()
    for place, other in enumerate(found.names[1:], 1):
        out.print(Text.assemble(names[place], " against ", names[0], f", {many(found.rows, 'row')}", style="bold"))
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("measure", min_width=10, overflow="fold")
        for name in (names[0], names[place]):
            table.add_column(name, justify="right", min_width=7, overflow="fold")
        table.add_column("difference (95 %)", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for line in found.lines:
            if line.other == other:
                change = f"{number(line.gain.mean, sign=True)} ({span(line.gain, sign=True)})"
                table.add_row(Text(visible(line.name)), number(line.before.mean), number(line.after.mean), change,
                              Text(line.verdict, styles.get(line.verdict, "")))  # fmt: skip
        out.print(table)
        for note in dict.fromkeys(f"{x.name}: {x.unit}" for x in found.lines if x.unit and x.other == other):
            out.print(Text(note, "dim"))
        out.print()
    _print_answers(out, found, names)


def _print_answers(out: Any, found: Comparison, names: Sequence[Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from trl.data.any_text import visible

    if not found.samples:
        return

    def cut(text: str) -> Text:
        whole = visible(text.strip())
        return Text(whole if len(whole) <= LONGEST else f"{whole[:LONGEST]} …")

    for prompt, answers in found.samples[:PRINTED]:
        table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim", expand=True, title=cut(prompt),
                      title_justify="left", title_style="cyan")  # fmt: skip
        for name in names:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*map(cut, answers))
        out.print(table)
        out.print()
