"""The `trl` command: one table of commands, whose modules load when they are called, and errors of one line."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from trl import __version__
from trl.scripts.exit_codes import INTERRUPTED, exit_code, fail, one_line
from trl.scripts.jobs import JOBS, Training

__all__ = ["COMMANDS", "Other", "Training", "main", "one_line", "run"]


@dataclass(frozen=True)
class Other:
    """A command of another kind: the function `command` of a module."""

    module: str
    help: str
    settings: bool = False
    """it takes words that it does not know: the settings of a training command, or of vLLM"""


COMMANDS: dict[str, Training | Other] = {
    "quickstart": Other("trl.quickstart.command", "Imitate, reward, reinforce: the whole job here, with a report."),
    **JOBS,
    "chat": Other("trl.scripts.chat", "Talk to a model in the terminal."),
    "generate": Other("trl.scripts.generate", "Write what a model answers to prompts, as JSON lines."),
    "eval": Other("trl.scripts.evaluate", "Measure a model on rows: loss, pairs, rewards, a judge, tasks."),
    "compare": Other("trl.scripts.compare", "Compare models on the same rows: which differences are more than chance."),
    "merge": Other("trl.scripts.merge", "Merge an adapter into its model: a plain folder for transformers."),
    "vllm_serve": Other("trl.scripts.vllm_serve", "Start a vLLM server that trainers sample from.", settings=True),
    "serve": Other("trl.scripts.serve", "Serve a model by vLLM or transformers, with the interface of OpenAI."),
    "inspect": Other("trl.scripts.inspect_rows", "Show what a training command learns of each row.", settings=True),
    "plan": Other("trl.scripts.plan", "Say what a training command would take: memory, time, disk.", settings=True),
    "report": Other("trl.scripts.report", "Write the report of a run's folder: curves, samples, what to look at."),
    "diff": Other("trl.scripts.diff_runs", "Say in what two runs differ: settings, data, the first step and token."),
    "replay": Other("trl.scripts.replay", "Compute a step of a run again, and show token by token what it did."),
    "schema": Other("trl.scripts.describe", "Print the JSON schema of a training command's YAML file."),
    "env": Other("trl.scripts.env", "Print the versions and devices that a bug report should name."),
}
"""every command and its line in `trl --help`; an entry here, or in `JOBS`, is all that a new command needs"""

app = typer.Typer(add_completion=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
UsageError: Any = typer.BadParameter.__base__
"""the class of typer's own copy of click, which may differ from the installed click"""


class RawCommand(TyperCommand):
    """Leaves its words to the function: a training command has hundreds of settings, read by `TrlParser`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return ctx.args


def load_command(name: str) -> Any:
    """The command with its options; its module is imported here."""
    entry = COMMANDS[name]
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    if isinstance(entry, Training):
        single.command(name, cls=RawCommand, help=entry.help)(_training_command(name, entry))
    else:
        takes = {"ignore_unknown_options": entry.settings, "allow_extra_args": entry.settings}
        function = importlib.import_module(entry.module).command
        single.command(name, context_settings=takes, help=_unwrapped(function.__doc__))(function)
    return typer.main.get_command(single)


def _unwrapped(text: str | None) -> str | None:
    """A docstring with a line for each paragraph, which the terminal wraps by its own width."""
    return text and "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n"))


def _training_command(name: str, job: Training) -> Callable[[typer.Context], int]:
    def command(context: typer.Context) -> int:
        return importlib.import_module("trl.scripts.training").command(name, job, context.args)

    return command


class LazyGroup(TyperGroup):
    """Lists the commands of the table; the module of a command is imported when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        name = cmd_name.replace("-", "_")
        return TyperCommand(name, help=COMMANDS[name].help) if name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if command is None else load_command(str(command.name)), rest


def _show_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback(cls=LazyGroup)
def root(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error; goes anywhere in the line."),
    version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True, callback=_show_version),
) -> None:
    """Post-training of language models: one command for each job."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code: 0, 1 (the job says no), 2 (an error), 130 or 143 (ended)."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """The exit code of the command line; an error becomes one line on stderr."""
    # spinning OpenMP threads make a shared machine many times slower; read when torch is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    words = [word for word in arguments if word != "--debug"] or ["--help"]
    return exit_code(lambda: _call(words), debug="--debug" in arguments)


def _call(words: list[str]) -> int:
    try:
        return typer.main.get_command(app)(words, prog_name="trl", standalone_mode=False)
    except typer.Abort:
        return INTERRUPTED
    except UsageError as error:
        where = error.ctx.command_path if error.ctx else "trl"
        return fail(f"{error.format_message()} (see `{where} --help`)")


if __name__ == "__main__":
    main()
