"""`trl report`: the folder of a run as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(help="Folder of a run: its `output_dir`, or a checkpoint in it.")],
    html: Annotated[Path | None, typer.Option(help="File to write (default: report.html in the run's folder).")] = None,
) -> None:
    """Write the report of a run: curves, samples, data, settings, what to look at and what to do next.

    The run may still be going on. Of several seeds it is their spread. The file loads nothing from elsewhere.
    """
    from trl.reports.findings import findings
    from trl.reports.run_folder import read_run
    from trl.reports.run_report import title_of, write_report
    from trl.reports.spread import holds_seeds, read_spread, spread_lines, write_spread

    if holds_seeds(run):
        found = read_spread(run)
        for line in spread_lines(found):
            print(line)
        print(f"wrote {write_spread(found, html or run)}")
        return
    seen = read_run(run)
    status, how = seen.status
    steps = f"{seen.last_step:,} step{'' if seen.last_step == 1 else 's'}"
    print(f"{title_of(seen)}: {status}{f' {how}' if how else ''}, {steps}")
    if "trainer" not in seen.record:
        print("- no run.json, which says how it was made and how it ended: trl's RunFolderCallback writes it")
    for line in findings(seen):
        print(f"- {line}")
    print(f"wrote {write_report(run, html)}")
