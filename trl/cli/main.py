"""The `trl` command: a table of commands whose modules load when they are called, and errors of one line."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

COMMANDS = {
    "quickstart": (
        "trl.quickstart.command",
        "Imitate, reward, reinforce: the whole job here, with a report.",
    ),
    "sft": ("trl.cli.training:sft", "Fine-tune on texts, prompts with completions, or conversations."),
    "reward": ("trl.cli.training:reward", "Train a reward model on preference pairs."),
    "prm": ("trl.cli.training:prm", "Train a reward model of single steps."),
    "dpo": ("trl.cli.training:dpo", "Optimise on preference pairs, against a reference."),
    "orpo": ("trl.cli.training:orpo", "Optimise on preference pairs, without a reference (odds ratio)."),
    "cpo": ("trl.cli.training:cpo", "Optimise on preference pairs, without a reference (contrastive)."),
    "simpo": ("trl.cli.training:simpo", "Optimise on preference pairs, without a reference (per token)."),
    "kto": ("trl.cli.training:kto", "Optimise on completions that are good or not."),
    "grpo": ("trl.cli.training:grpo", "Reinforce on groups of own completions."),
    "rloo": ("trl.cli.training:rloo", "Reinforce, each completion against the mean of the others."),
}
"""command -> (module of a function `command`, or module:function; its line in `trl --help`)"""

INTERRUPTED = 130
BAD_INPUT = 2
SPEAK_FOR_THEMSELVES = (ValueError, OSError, ImportError, RuntimeError, NotImplementedError)
"""errors whose text is written for users; others are named by their type too"""


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
UsageError: Any = typer.BadParameter.__base__
"""of the click that typer brings along, which is not always the installed one"""


def load_command(name: str) -> Any:
    """The command of the module in `COMMANDS`."""
    module, _, function = COMMANDS[name][0].partition(":")
    loaded = importlib.import_module(module)
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    settings = getattr(loaded, "PASS_ON", None)  # fields of a config are no options of the command
    single.command(name, context_settings=settings)(getattr(loaded, function or "command"))
    return typer.main.get_command(single)


class LazyGroup(TyperGroup):
    """Lists stand-ins of the commands; the module of a command is imported when it is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, stand_in, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if stand_in is not None and name in COMMANDS else stand_in, rest


@app.callback(cls=LazyGroup)
def root(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error; goes anywhere in the line."),
) -> None:
    """Post-training of language models: one command a job."""


def _stand_in() -> None:
    """Never called: `LazyGroup` puts the real command in its place."""


for _name, (_module, _line) in COMMANDS.items():
    app.command(_name, help=_line)(_stand_in)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code: 0, 1 (the job says no), 2 (bad input), 130 (interrupted)."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """The exit code of the command line; an error becomes one line on stderr."""
    debug = "--debug" in arguments
    # spinning OpenMP threads make a shared machine many times slower; read when torch is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    words = [word for word in arguments if word != "--debug"] or ["--help"]
    try:
        code = typer.main.get_command(app)(words, prog_name="trl", standalone_mode=False)
    except UsageError as error:
        where = error.ctx.command_path if error.ctx else "trl"
        return _fail(f"{error.format_message()} (`{where} --help` lists what there is)")
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _fail(one_line(error))
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def one_line(error: BaseException) -> str:
    """An error as a single line that names the thing."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, SPEAK_FOR_THEMSELVES):
        return text
    return f"{type(error).__name__}: {text} (an unforeseen error; --debug shows where)"


def _fail(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    main()
