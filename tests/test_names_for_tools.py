"""Type checkers and editors see the public names, which are imported lazily."""

import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import trl
from trl.import_utils import is_diffusers_available

STUB = Path(trl.__file__).with_suffix(".pyi")


@pytest.mark.skipif(not is_diffusers_available(), reason="the stub names what needs diffusers, too")
def test_the_stub_holds_the_lazy_table():
    write_stub = runpy.run_path(str(STUB.parents[1] / "scripts" / "write_stub.py"))
    assert STUB.read_text(encoding="utf-8") == write_stub["stub"](), "run `python scripts/write_stub.py`"
    assert set(trl.__all__) == {*(name for names in trl._names.values() for name in names), "__version__"}


CONFIGS = """
[mypy]
follow_imports = silent
ignore_missing_imports = True
[mypy-transformers.*,torch.*,datasets.*,accelerate.*,peft.*,diffusers.*,numpy.*,pandas.*]
follow_imports = skip
[mypy-transformers,transformers.training_args]
follow_imports = silent
"""
SCRIPT = """
import trl
from trl import GRPOConfig, SFTConfig

SFTConfig(output_dir="o", max_length=3, learning_rate=1e-5, num_train_epochs=2)
SFTConfig(output_dir="o", max_lenght=3)
GRPOConfig(num_generations="many")
GRPOConfig(scale_rewards="sometimes")
trl.SFTTrianer
"""


@pytest.mark.slow
def test_mypy_sees_a_wrong_field(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text(CONFIGS)
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env={"MYPYPATH": str(STUB.parents[1]), "PATH": ""},
    )  # fmt: skip
    lines = [line.removeprefix("script.py:") for line in done.stdout.splitlines()]
    assert lines[0].startswith('6: error: Unexpected keyword argument "max_lenght" for "SFTConfig"')
    assert lines[1].startswith('7: error: Argument "num_generations" to "GRPOConfig" has incompatible type "str"')
    assert lines[2].startswith('8: error: Argument "scale_rewards" to "GRPOConfig" has incompatible type')
    assert 'has no attribute "SFTTrianer"' in lines[3]
    assert lines[4].startswith("Found 4 errors")


@pytest.mark.slow
def test_an_editor_completes_the_fields():
    jedi = pytest.importorskip("jedi")
    text = "from trl import SFTConfig\nSFTConfig("
    script = jedi.Script(text, environment=jedi.InterpreterEnvironment(), project=jedi.Project(STUB.parents[1]))
    names = {completion.name for completion in script.complete(2, len("SFTConfig("))}
    assert {"max_length=", "packing=", "learning_rate=", "output_dir="} <= names
    assert "max_length" in [parameter.name for parameter in script.get_signatures(2, len("SFTConfig("))[0].params]


def test_pip_never_takes_another_projects_release_for_a_newer_one():
    ours = Version(trl.__version__)
    assert ours.epoch == 1
    assert all(ours > Version(other) for other in ("0.7.7", "1.16.0", "2026.1", "1000.0"))
    assert ours in SpecifierSet(">=1.5"), "a package that requires a later release of the other project is content"
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert pyproject["project"]["version"] == trl.__version__
