"""The checks of `make check` that are our own."""

import importlib.util
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


def load(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def play(trainer, rows): ...", ["play"]),
        ("def play(rows, *, trainer: Any = None): ...", ["play"]),
        ("class Loop:\n    def run(self, trainer: 'Any'): ...", ["run"]),
        ("order = lambda trainer: trainer.rows", ["lambda"]),
        ("def play(trainer: PPOTrainer): ...", []),
        ("def play(rows): ...", []),
        ("class MyTrainer: ...\ndef help(trainer): ...", []),
    ],
)
def test_functions_that_take_a_trainer_of_unknown_type(source, names):
    assert list(load("check_trainer_arguments").offenders(source)) == names


def test_no_function_of_the_package_does():
    assert load("check_trainer_arguments").main() == 0


def test_long_forms_are_apart(request):
    """`make test` runs none of the tests marked `long`; `--long` runs nothing else."""
    marked = {item.get_closest_marker("long") is not None for item in request.session.items}
    assert marked == {request.config.getoption("--long")}
