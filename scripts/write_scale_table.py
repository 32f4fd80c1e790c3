"""Runs the conformity table of `tests/trainer/sharded_runs.py` and writes it into docs/scale.md between its markers.

Run `python scripts/write_scale_table.py` after a change of the table: about three minutes on two cores.
"""

import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "trainer")]

from process_group import on_ranks  # noqa: E402
from sharded_runs import COLUMNS, ENGINES, RUNS, differences, runs_of, train_all  # noqa: E402

PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- conformity -->", "<!-- /conformity -->"


def found(engine: str, names: list[str], lora: bool, folder: str) -> list[dict]:
    """What came of the rows on each rank."""
    world = 1 if engine == "one" else 2
    path = f"{folder}/{engine}-{lora}"
    on_ranks(train_all, world, path, engine, names, lora)
    return [torch.load(f"{path}-{rank}") for rank in range(world)]


def table() -> str:
    """A row for each trainer, a column for each engine: the largest difference from one process."""
    cells: dict[tuple[str, str], str] = {}
    with tempfile.TemporaryDirectory() as folder:
        one = {lora: found("one", runs_of("lora" if lora else ""), lora, folder)[0] for lora in (False, True)}
        for engine in ENGINES:
            lora = engine.endswith("lora")
            for rank in found(engine, runs_of(engine), lora, folder):
                for name, result in rank.items():
                    apart = differences(one[lora][name], result)
                    text = " ".join(f"{size:.0e}" if size else "0" for size in apart.values())
                    cells[name, engine] = max(cells.get((name, engine), ""), text)
    lines = [
        f"Each cell: {', '.join(COLUMNS)}: the largest difference of two ranks from one process, over three steps.",
        "",
        "| trainer | " + " | ".join(ENGINES.values()) + " |",
        "| --- |" + " --- |" * len(ENGINES),
        *(f"| {name} | " + " | ".join(cells.get((name, engine), "") for engine in ENGINES) + " |" for name in RUNS),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    made = table()
    page = PAGE.read_text() if PAGE.is_file() else ""
    if BEGIN not in page:
        print(made)
    else:
        before, rest = page.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}")
