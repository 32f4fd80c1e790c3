"""The `trl` command: lazy, errors of one line, exit codes."""

import subprocess
import sys
import types

import pytest

from trl.cli import main as command_line

LAZY = """
import sys
from trl.cli.main import run
code = run(sys.argv[1:])
heavy = {"torch", "transformers", "matplotlib", "datasets", "scipy"} & set(sys.modules)
sys.exit(f"loaded {heavy}" if heavy else code)
"""


@pytest.mark.parametrize("name", ["chat", "generate", "compare", "merge"])
def test_paragraphs_of_a_help_text_are_wrapped_by_the_terminal(name):
    """Not where the source breaks its lines."""
    text = command_line.load_command(name).help
    assert all(len(part.splitlines()) == 1 for part in text.split("\n\n"))
    assert len(text.split("\n\n")) >= 2


@pytest.fixture
def job(monkeypatch):
    """Installs a function as the command `trl job`."""

    def install(function):
        module = types.ModuleType("a_job")
        module.command = function
        monkeypatch.setitem(sys.modules, "a_job", module)
        monkeypatch.setitem(command_line.COMMANDS, "quickstart", command_line.Other("a_job", "A job."))

    return install


def failing(error):
    def command() -> None:
        raise error

    return command


def last_line(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["quickstart", "--help"], ["schema", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    done = subprocess.run([sys.executable, "-c", LAZY, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "trl" in done.stdout


def cpu_seconds(*words):
    """CPU time of a new interpreter: the best of three, as a busy machine makes it longer."""
    code = "import subprocess, sys, os; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);" + (
        "t = os.times(); print(t.children_user + t.children_system)"
    )
    line = [sys.executable, "-c", code, sys.executable, *words]
    return min(float(subprocess.run(line, capture_output=True, text=True, check=True).stdout) for _ in range(3))


def test_starting_is_quick():
    empty = cpu_seconds("-c", "pass")
    assert cpu_seconds("-m", "trl", "--help") < 0.5
    assert cpu_seconds("-c", "import trl") - empty < 0.1


def test_every_command_of_the_table_loads_and_says_what_it_does():
    for name in command_line.COMMANDS:
        assert command_line.load_command(name).help


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no column\n  'text'"), "error: no column 'text'"),
        (ImportError("pip install peft"), "error: pip install peft"),
        (OSError(28, "No space left on device", "a.bin"), "error: a.bin: No space left on device"),
        (KeyError("x"), "error: KeyError: 'x' (an unforeseen error; --debug shows where)"),
        (ZeroDivisionError(), "error: ZeroDivisionError: ZeroDivisionError (an unforeseen error; --debug shows where)"),
    ],
)
def test_an_error_is_one_line_and_code_2(job, capsys, error, line):
    job(failing(error))
    assert command_line.run(["quickstart"]) == 2
    captured = capsys.readouterr()
    assert captured.err == line + "\n"
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [["quickstart", "--debug"], ["--debug", "quickstart"]])
def test_debug_shows_the_traceback(job, capsys, arguments):
    job(failing(ValueError("wrong")))
    assert command_line.run(arguments) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quikstart"], "'quikstart'"),
        (["quickstart", "--sed", "3"], "--sed"),
        (["quickstart", "--seed", "-1"], "--seed"),
        (["quickstart", "--threads", "many"], "--threads"),
    ],
)
def test_a_wrong_command_line_names_the_word(capsys, arguments, words):
    assert command_line.run(arguments) == 2
    line = last_line(capsys)
    assert line.startswith("error: ")
    assert words in line
    assert "--help" in line


def test_the_exit_code_of_a_command_is_kept(job):
    import typer

    job(failing(typer.Exit(1)))
    assert command_line.run(["quickstart"]) == 1


def test_an_interrupted_command_says_so(job, capsys):
    job(failing(KeyboardInterrupt()))
    assert command_line.run(["quickstart"]) == 130
    assert last_line(capsys) == "interrupted"


def test_a_shell_completes_commands_and_options(monkeypatch, capsys):
    from trl.cli.main import run

    for words, at, wanted in (
        ("trl s", "1", ["sft", "simpo", "serve", "schema"]),
        ("trl inspect sft --ht", "3", ["--html"]),
    ):
        monkeypatch.setenv("_TRL_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", at)
        with pytest.raises(SystemExit):
            run([])
        assert capsys.readouterr().out.split() == wanted
