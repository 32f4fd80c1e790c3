"""Write examples/notebooks/*.ipynb from the tutorials: their text and programs, a cell each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TUTORIALS = ("sft", "dpo", "ppo", "grpo")
BLOCK = re.compile(r"```python\n(.*?)```\n?", re.DOTALL)
LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")


def cells_of(text: str) -> list[dict[str, Any]]:
    """Text and programs in turn; links, which would lead nowhere from a notebook, are their text."""
    cells: list[dict[str, Any]] = []
    for place, part in enumerate(BLOCK.split(text)):
        source = part.strip() if place % 2 else LINK.sub(r"\1", part).strip()
        if not source:
            continue
        cell: dict[str, Any] = {"id": f"cell-{len(cells)}", "metadata": {}, "source": source.splitlines(keepends=True)}
        code = {"cell_type": "code", "execution_count": None, "outputs": []}
        cells.append(cell | (code if place % 2 else {"cell_type": "markdown"}))
    return cells


def notebook(tutorial: str) -> str:
    cells = cells_of((ROOT / "docs" / "tutorials" / f"{tutorial}.md").read_text(encoding="utf-8"))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def file_of(tutorial: str) -> Path:
    return ROOT / "examples" / "notebooks" / f"{tutorial}.ipynb"


if __name__ == "__main__":
    for name in TUTORIALS:
        file_of(name).parent.mkdir(exist_ok=True)
        file_of(name).write_text(notebook(name), encoding="utf-8")
