"""Writes `trl/__init__.pyi` from the lazy table in `trl/__init__.py`. Run it where diffusers is installed."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAD = '''"""Public names, for type checkers and editors. Written by `scripts/write_stub.py`."""

'''


def stub() -> str:
    """The text of the stub."""
    import trl

    lines = [
        f"from {module} import {name} as {name}" for module in sorted(trl._names) for name in sorted(trl._names[module])
    ]
    return HEAD + "\n".join([*lines, "", "__version__: str", "__all__: list[str]", ""])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    (ROOT / "trl" / "__init__.pyi").write_text(stub(), encoding="utf-8")
