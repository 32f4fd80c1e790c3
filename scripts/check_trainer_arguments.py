"""No function of `trl/` takes a `trainer` of unknown type: what it needs is handed to it by name.

A file that defines a trainer may pass itself around. Run by `make check`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def offenders(source: str) -> Iterator[str]:
    """Names of the functions that have a parameter `trainer` without a type, or of type `Any`."""
    tree = ast.parse(source)
    classes = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    if any(name.endswith("Trainer") for name in classes):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            arguments = node.args
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                kind = None if argument.annotation is None else ast.unparse(argument.annotation).strip("'\"")
                if argument.arg == "trainer" and kind in (None, "Any", "object"):
                    yield getattr(node, "name", "lambda")


def found(folder: Path) -> set[str]:
    """`file:function` of every offender below the folder."""
    files = sorted(folder.rglob("*.py"))
    return {f"{file.relative_to(folder)}:{name}" for file in files for name in offenders(file.read_text("utf-8"))}


def main() -> int:
    names = found(ROOT / "trl")
    for name in sorted(names):
        print(f"trl/{name}: takes a `trainer` of unknown type; hand it what it needs, by name")
    return int(bool(names))


if __name__ == "__main__":
    sys.exit(main())
