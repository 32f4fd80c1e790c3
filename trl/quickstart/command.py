"""`trl quickstart`: fine-tune, reward and reinforce a model on one machine with one command."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trl.import_utils import pip_install

if TYPE_CHECKING:
    from trl.quickstart.language_model import Pair
    from trl.quickstart.progress import Progress
    from trl.quickstart.report import Run
    from trl.reports.intervals import Interval

NEEDED = ("peft", "scipy", "vaderSentiment")


def command(
    model: Annotated[
        str | None,
        typer.Option(
            help="Causal language model to start from: a folder or a name on the Hub. [SmolLM2-135M-Instruct]"
        ),
    ] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Train a model of a million weights from scratch.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of training and sampling; the data stay the same.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("trl-quickstart"),
    save_models: Annotated[
        bool, typer.Option("--save-models", help="Save the policy and the reward model there too (up to 0.7 GB).")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of torch. [the number of idle cores, at most 4]")
    ] = None,
) -> None:
    """Teach a model to write movie-review lines, learn a reward from people's ratings, and reinforce it with PPO.

    The model and the data are fetched once from the package registry into a cache. The result is a report, one HTML
    file. Exit code 1: the gain by the independent judge may be chance.
    """
    if tiny and model is not None:
        raise ValueError(f"--model {model}: --tiny trains a new model; leave one of the two out")
    check_extras()
    prepare_folder(output)
    prepare_libraries(threads)
    from trl.quickstart.progress import Progress

    with Progress() as progress, tempfile.TemporaryDirectory(prefix="trl-") as scratch:
        run, trained = perform(model, tiny, seed, Path(scratch), progress)
    from trl.quickstart.report import write_report

    report = write_report(run, output)
    if save_models:
        keep(trained, output)
    summarise(run, report, progress)
    if not run.succeeded:
        raise typer.Exit(1)


def check_extras() -> None:
    """ImportError with the names of missing packages, before anything is computed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"the quickstart needs {', '.join(missing)}: {pip_install(*missing)}")


def prepare_folder(folder: Path) -> None:
    """Create the folder and try to write there, so that a wrong path is an error now and not after minutes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"--output {folder}: cannot write there ({error.strerror}); name another folder") from error


def prepare_libraries(threads: int | None) -> None:
    """Silence the libraries and limit the threads of torch."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import logging
    import warnings

    import datasets
    import torch
    import transformers

    torch.set_num_threads(threads or min(4, idle_cores()))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    for library in ("accelerate", "peft", "torch", "transformers"):
        warnings.filterwarnings("ignore", module=library)


def idle_cores() -> int:
    """Number of idle cores that this process may use, at least 1. Threads on busy cores only wait."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # Windows does not say
    return max(1, cores - round(busy))


def perform(model_name: str | None, tiny: bool, seed: int, scratch: Path, progress: Progress) -> tuple[Run, Any]:
    """Run all stages; returns the run for the report, and the trained models."""
    from transformers import AutoTokenizer

    from trl.core import set_seed
    from trl.quickstart import assets
    from trl.quickstart.language_model import check_length
    from trl.quickstart.recipe import SMALL, TINY
    from trl.quickstart.report import Run
    from trl.quickstart.reviews import read_reviews
    from trl.quickstart.stage_imitate_reward import imitate, learn_reward
    from trl.quickstart.stage_reinforce import reinforce

    recipe = TINY if tiny else SMALL
    used = [assets.QUOTES, assets.RATINGS, assets.MINILM]
    quotes, ratings, encoder = (assets.fetch(asset, progress.say) for asset in used)
    reviews = read_reviews(quotes, ratings)
    set_seed(seed)
    (model, tokenizer), name = start(model_name, tiny, [r.text for r in reviews.imitate], used, progress)
    check_length(model, recipe, name)
    parameters = sum(weight.numel() for weight in model.parameters())
    model, imitation = imitate(model, tokenizer, reviews, recipe, seed, scratch, progress)
    reward_tokenizer = AutoTokenizer.from_pretrained(encoder)
    reward, preference = learn_reward(encoder, reward_tokenizer, reviews, recipe, seed, scratch, progress)
    trainer, reinforcement = reinforce(model, tokenizer, reward, reviews, recipe, seed, progress)
    run = Run(
        model=name,
        parameters=parameters,
        seed=seed,
        tiny=tiny,
        recipe=recipe,
        imitation=imitation,
        preference=preference,
        reinforcement=reinforcement,
        seconds=progress.seconds,
        sources=[(f"{asset.package} {asset.version}", asset.licence) for asset in used],
        **circumstances(),
    )
    return run, (trainer, tokenizer, reward, reward_tokenizer)


def start(name: str | None, tiny: bool, lines: list[str], used: list[Any], progress: Progress) -> tuple[Pair, str]:
    """The model to start from, and its name in the report."""
    from trl.quickstart import assets
    from trl.quickstart.language_model import open_model, tiny_model

    if tiny:
        return tiny_model(lines), "A tiny Llama"
    if name is not None:
        return open_model(name), name
    used.append(assets.SMOLLM2)
    return open_model(assets.fetch(assets.SMOLLM2, progress.say)), "SmolLM2-135M-Instruct, from a 4-bit file"


def circumstances() -> dict[str, Any]:
    """Date, versions and peak memory of this process."""
    import datetime

    import torch

    from trl.trainer.run_record import peak_memory, versions

    found = versions()
    today = datetime.date.today()
    return {
        "date": f"{today.day} {today:%B %Y}",
        "versions": {name: found[name] for name in ("trl", "torch", "transformers", "peft")}
        | {"Python": found["python"]},
        "threads": torch.get_num_threads(),
        "peak_mebibytes": peak_memory() / 2**20,
    }


def keep(trained: Any, folder: Path) -> None:
    """Save the policy (adapters merged, no value head) and the reward model in folders for `from_pretrained`."""
    trainer, tokenizer, reward, reward_tokenizer = trained
    policy = trainer.accelerator.unwrap_model(trainer.model).pretrained_model
    policy = policy.merge_and_unload() if hasattr(policy, "merge_and_unload") else policy
    for name, model, its_tokenizer in (("policy", policy, tokenizer), ("reward", reward.model, reward_tokenizer)):
        replace_folder(folder / name, model, its_tokenizer)


def replace_folder(place: Path, *parts: Any) -> None:
    """Save the parts into a temporary folder, then put it in place of an older one."""
    import shutil

    with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as beside:
        fresh = Path(beside) / "new"
        try:
            for part in parts:
                part.save_pretrained(fresh)
        except OSError as error:
            raise OSError(
                f"cannot save {place}: {error.strerror or error}; free space or name another --output"
            ) from error
        if place.exists():
            place.rename(Path(beside) / "old")
        fresh.rename(place)
        shutil.rmtree(Path(beside) / "old", ignore_errors=True)


def summarise(run: Run, report: Path, progress: Progress) -> None:
    """Print the figures as a table, the verdict, and the path of the report."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    def cell(interval: Interval, form: str) -> str:
        mean, low, high = (f"{round(value, 2) + 0.0:{form}}" for value in (interval.mean, interval.low, interval.high))
        return f"{mean} [dim]({low} to {high})[/]"

    title = "Continuations of held-out prompts, with 95 % intervals"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)  # 80 columns hold it
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="right" if heading else "left")
    for each in run.figures():
        table.add_row(each.name, cell(each.before, ".2f"), cell(each.after, ".2f"), cell(each.gain, "+.2f"))
    progress.console.print(table)
    accuracy, gain = run.preference.accuracy, run.judge_gain
    progress.say(f"Reward model: {accuracy.mean:.0%} of {accuracy.n} held-out pairs in people's order.")
    progress.say(f"PPO: {run.reinforcement.ending}.")
    change = f"{gain.mean:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})"
    if run.succeeded:
        progress.say(f"[green]The independent judge rates the lines higher: {change}.[/]")
    else:
        progress.say(f"[red]Not shown: the judge's change, {change}, may be chance; the interval is not above 0.[/]")
    progress.say(f"Report: {escape(str(report.resolve()))}")
