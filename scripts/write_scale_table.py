"""Writes the conformity table of `tests/trainer/sharded_runs.py` into docs/scale.md, between its markers.

`python scripts/write_scale_table.py` runs it first, about four minutes on two cores. With folders it takes what tests
have left there (`sharded0`, `zero0` below pytest's `--basetemp`) instead.
"""

import sys
import tempfile
from math import isnan
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "trainer")]

from process_group import on_ranks  # noqa: E402
from sharded_runs import COLUMNS, ENGINES, RUNS, differences, runs_of, train_all  # noqa: E402

PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- conformity -->", "<!-- /conformity -->"
ZERO = {"zero3": "ZeRO-3", "zero3-lora": "ZeRO-3 with LoRA", "zero2": "ZeRO-2"}
Found = dict[tuple[str, str], list[dict[str, Any]]]
"""engine and row -> what came of them on each rank; those of one process are under "one" and "one-lora" """


def run(folder: str) -> None:
    """Run all rows of the engines that need nothing but PyTorch."""
    for engine, lora in [("one", False), ("one", True), *((engine, engine.endswith("lora")) for engine in ENGINES)]:
        names = runs_of("lora" if lora else "")
        on_ranks(train_all, 1 if engine == "one" else 2, f"{folder}/{engine}-{lora}", engine, names, lora)


def read(folder: Path) -> Found:
    """What a run, or the tests, have left in a folder."""
    found: Found = {}
    for path in sorted(folder.iterdir()):
        name, _, rank = path.name.rpartition("-")
        if not path.is_file() or not rank.isdigit():
            continue
        for key, result in torch.load(path).items():
            if isinstance(key, tuple):  # of the tests of ZeRO
                engine, row = ({"lora": "zero-one-lora", "one": "zero-one"}.get(key[0], key[0]), key[1])
            else:
                engine, row = name.rpartition("-")[0], key
                engine = f"{engine}-lora" if (engine, name.rpartition("-")[2]) == ("one", "True") else engine
            found.setdefault((engine, row), []).append(result)
    return found


def cell(found: Found, engine: str, row: str) -> str:
    """The largest differences of any rank from one process."""
    one = f"{'zero-' * (engine in ZERO)}one{'-lora' * engine.endswith('lora')}"
    if (engine, row) not in found or (one, row) not in found:
        return ""
    apart = [differences(found[one, row][0], rank) for rank in found[engine, row]]
    sizes = [max(each[column] for each in apart) for column in COLUMNS]
    return " ".join("–" if isnan(size) else f"{size:.0e}" if size else "0" for size in sizes)


def table(found: Found) -> str:
    """A row for each trainer, a column for each engine that was run."""
    engines = {name: title for name, title in {**ENGINES, **ZERO}.items() if any(key[0] == name for key in found)}
    return "\n".join(
        [
            "Two ranks of a CPU (gloo) against one process, three steps of SGD. A cell has the largest differences of",
            f"{', '.join(COLUMNS)}: of numbers by their size, or by 0.25 if smaller.",
            "A – was not asked there, an empty cell was not run. The resumed run went on from a checkpoint of step 2.",
            "",
            "| | " + " | ".join(engines.values()) + " |",
            "|---|" + "---|" * len(engines),
            *(f"| {row} | " + " | ".join(cell(found, engine, row) for engine in engines) + " |" for row in RUNS),
        ]
    )


def main(folders: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if not folders:
            run(folder)
        found: Found = {}
        for each in folders or [folder]:
            found |= read(Path(each))
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
