"""Writes the table of accepted settings into `docs/deviations/settings.md` from the tables in the code."""

from pathlib import Path

from trl.trainer.settings import table

PAGE = Path(__file__).parents[1] / "docs" / "deviations" / "settings.md"
MARK = "## Fields of other releases, and fields that move only memory or speed\n\n"


def written(page: str) -> str:
    """The page with the table of now."""
    return page.split(MARK)[0] + MARK + table() + "\n"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
