"""The `trl` command: one table of commands, whose modules load when they are called, and errors of one line."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


@dataclass(frozen=True)
class Training:
    """A command that trains on a file of rows."""

    trainer: str
    help: str
    rewards: bool = False
    """the trainer takes reward functions"""
    task: str = "CAUSAL_LM"
    """`task_type` of the LoRA config"""

    @property
    def config(self) -> str:
        return self.trainer.removesuffix("Trainer") + "Config"


@dataclass(frozen=True)
class Other:
    """A command of another kind: the function `command` of a module."""

    module: str
    help: str


COMMANDS: dict[str, Training | Other] = {
    "quickstart": Other("trl.quickstart.command", "Imitate, reward, reinforce: the whole job here, with a report."),
    "sft": Training("SFTTrainer", "Fine-tune on texts, prompts with completions, or conversations."),
    "reward": Training("RewardTrainer", "Train a reward model on preference pairs.", task="SEQ_CLS"),
    "prm": Training("PRMTrainer", "Train a reward model of single steps.", task="TOKEN_CLS"),
    "dpo": Training("DPOTrainer", "Optimise on preference pairs, against a reference."),
    "orpo": Training("ORPOTrainer", "Optimise on preference pairs, without a reference (odds ratio)."),
    "cpo": Training("CPOTrainer", "Optimise on preference pairs, without a reference (contrastive)."),
    "simpo": Training("SimPOTrainer", "Optimise on preference pairs, without a reference (per token)."),
    "kto": Training("KTOTrainer", "Optimise on completions that are good or not."),
    "grpo": Training("GRPOTrainer", "Reinforce on groups of own completions.", rewards=True),
    "rloo": Training("RLOOTrainer", "Reinforce, each completion against the mean of the others.", rewards=True),
}
"""every command and its line in `trl --help`; an entry here is all that a new command needs"""

INTERRUPTED = 130
BAD_INPUT = 2
SPEAK_FOR_THEMSELVES = (ValueError, OSError, ImportError, RuntimeError, NotImplementedError)
"""errors whose text is written for users; for others the type is printed too"""


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
UsageError: Any = typer.BadParameter.__base__
"""the class of typer's own copy of click, which may differ from the installed click"""


def load_command(name: str) -> Any:
    """The command with its options; its module is imported here."""
    entry, settings = COMMANDS[name], None
    if isinstance(entry, Training):
        training = importlib.import_module("trl.cli.training")
        function, settings = training.command_of(entry), training.PASS_ON
    else:
        function = importlib.import_module(entry.module).command
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    single.command(name, context_settings=settings)(function)
    return typer.main.get_command(single)


class LazyGroup(TyperGroup):
    """Lists the commands of the table; the module of a command is imported when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name].help) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if command is None else load_command(str(name)), rest


@app.callback(cls=LazyGroup)
def root(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error; goes anywhere in the line."),
) -> None:
    """Post-training of language models: one command for each job."""


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
        return _fail(f"{error.format_message()} (see `{where} --help`)")
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
