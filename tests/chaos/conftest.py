"""What the tests of chaos share: runs that were left alone, and a file of counts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launch import starter

from benchmarks.kill_resume import left_alone


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`whole(name, steps)`: the folder of a run that was left alone."""
    folders: dict[tuple[str, int], Path] = {}

    def of(name: str, steps: int) -> Path:
        if (name, steps) not in folders:
            folder = tmp_path_factory.mktemp("whole") / name
            left_alone(starter(name, steps), folder)
            folders[name, steps] = folder
        return folders[name, steps]

    return of


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Adds a line to the file that `--counts` names."""

    def add(**counts: Any) -> None:
        if path := request.config.getoption("--counts"):
            with open(path, "a") as file:
                file.write(json.dumps({"test": request.node.name, **counts}) + "\n")

    return add
