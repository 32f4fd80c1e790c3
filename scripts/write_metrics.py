"""Writes the table of metrics into `docs/metrics.md` from the table in the code."""

from pathlib import Path

from trl.trainer.metrics import table

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
MARK = "## Glossary\n\n"


def written(page: str) -> str:
    """The page with the table of now."""
    return page.split(MARK)[0] + MARK + table() + "\n"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
