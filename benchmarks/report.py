"""docs/benchmarks.md and its chart, from the file of results."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import plots
from benchmarks.environments import PEERS, folder_of, python_of, versions
from benchmarks.harness import Outcome
from benchmarks.scaling import useful_gflop
from benchmarks.table import BY_NAME, ROWS, USEFUL_TARGET, Row

HEAD = """# Measured against the peers

Written by `make bench` (`python -m benchmarks.run --all`); one row again: `python -m benchmarks.run NAME --pairs 5`.

Every row runs ours and theirs in turn (A B A B ...) as whole processes on one thread (`OMP_NUM_THREADS=1`,
`torch.set_num_threads(1)`), two rows at a time on two cores, in float32, from the same weights and the same rows: a
Llama of 22 M parameters (width 384, 6 layers, vocabulary 32,000, tied; random weights), lengths log-normal; the rows
with LoRA take SmolLM2-135M-Instruct and what critics say of films. A peer
lives in an environment of its own with pinned versions and is used through its public API; wherever the API allows,
both sides run the very same script (`benchmarks/jobs/`).

- **Seconds** are CPU seconds (user + system) of one step: from the start of training to the end of the last step,
  divided by the steps, so imports and the loading of model and data are not in them, but everything that happens only
  in the first step is. **Ratios** are theirs over ours, the median over the pairs. *Later* is the ratio of the steps
  after the first, which alone pays for the optimizer's states and other new memory; *whole* that of the whole
  processes, imports included; *wall* that of the steps' wall time, which other work on the machine disturbs. **Memory**
  is the largest resident size of the process.
- **The gate.** Both report what they computed: losses and log-probabilities before and after the first update, or the
  tokens. Where these differ by more than 1e-3 (relative), or a side crashes, the row is void and says so. Where lengths
  are drawn at random the two draw different ones: cost is then taken for each completion token.
- **Settings.** Each peer runs as it comes, and once more set up as well as a CPU allows.
"""


def machine() -> dict[str, str]:
    """Where this ran."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": f"{name}, {os.cpu_count()} logical cores, {memory:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "load": f"{os.getloadavg()[1]:.1f} other busy processes on average over the last five minutes",
        "ours": versions(python_of(None)),
        **{peer: versions(python_of(peer)) for peer in PEERS if (folder_of(peer) / "DONE").exists()},
    }


def table_row(cells: list[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _against(target: float | None, reached: float, unit: str = "x") -> str:
    if target is None:
        return "-"
    return f"{target:g}{unit} " + ("met" if reached >= target else "**missed**")


def line(row: Row, outcome: Outcome) -> list[Any]:
    """The cells of a row; a void one says why, and has no figures."""
    work, against = row.work, f"{row.peer}, {row.setting}"
    if outcome.void:
        why = f"**void**: {outcome.void.replace('|', '/')}" if outcome.pairs else "**not measured**"
        return [work, against, *["-"] * 8, why, len(outcome.pairs)]
    seconds = [outcome.median_of(side, lambda run: run.report["step_cpu"]) for side in ("ours", "theirs")]
    memory = [outcome.median_of(side, lambda run: run.memory_mb) for side in ("ours", "theirs")]
    digits = 2 if seconds[0] < 1 else 1
    if row.seconds_target is not None:
        verdict = f"under {row.seconds_target:g} s " + ("met" if seconds[0] < row.seconds_target else "**missed**")
    else:
        verdict = _against(row.target, outcome.step_ratio)
    if row.memory_target is not None:
        verdict += f"; memory {_against(row.memory_target, outcome.memory_ratio)}"
    return [
        work,
        against,
        *(f"{value:.{digits}f}" for value in seconds),
        f"**{outcome.step_ratio:.1f}x**",
        "-" if outcome.later_ratio is None else f"{outcome.later_ratio:.1f}x",
        f"{outcome.process_ratio:.1f}x",
        f"{outcome.wall_ratio:.1f}x",
        f"{memory[0]:.0f} / {memory[1]:.0f}",
        f"{outcome.memory_ratio:.1f}x",
        verdict,
        len(outcome.pairs),
    ]


def pair_line(row: Row, saved: Mapping[str, Any]) -> str:
    outcome = Outcome.from_json(saved)
    ratios = " ".join(f"{ratio:.2f}" for ratio in outcome.ratios(lambda run: run.cost(outcome.per_unit)))
    return f"- `{row.name}` ({saved.get('revision') or 'unknown commit'}): {ratios or 'none'}"


def scaling_lines(points: list[dict[str, Any]]) -> list[str]:
    head = ["prompts x group", "prompt", "completion", "vocabulary", "packed tokens", "tokens of the rows"]
    head += ["s a step", "row tokens/s", "GB", "useful GFLOP/s", "share of the peak"]
    lines = [table_row(head), "|" + "---|" * len(head)]
    for point in points:
        shape = [f"{point['prompts']} x {point['group']}", point["prompt"], point["completion"], point["vocabulary"]]
        if point["error"]:
            lines.append(table_row([*shape, *["-"] * 6, point["error"].replace("|", "/")]))
            continue
        rate = useful_gflop(point) / point["step_cpu"]
        lines.append(
            table_row(
                [
                    *shape,
                    point["tokens"],
                    point["rows_tokens"],
                    f"{point['step_cpu']:.2f}",
                    f"{point['rows_tokens'] / point['step_cpu']:.0f}",
                    f"{point['memory_mb'] / 1024:.2f}",
                    f"{rate:.0f}",
                    f"{rate / point['peak_gflops']:.0%}",
                ]
            )
        )
    return lines


def useful_lines(
    gflop: Mapping[str, float], outcomes: Mapping[str, Outcome], points: list[dict[str, Any]]
) -> list[str]:
    """The share of the processor's peak that useful operations reach in steps of training; none without a peak."""
    peaks = [point["peak_gflops"] for point in points if not point["error"]]
    if not peaks:
        return ["**Not measured**: no row above has a peak."]
    peak = median(peaks)
    lines = [table_row(["work", "useful GFLOP", "s a step", "useful GFLOP/s", "peak", "share", "target"])]
    lines.append("|" + "---|" * 7)
    for name, useful in gflop.items():
        outcome = outcomes.get(name, Outcome([]))
        if outcome.void:
            lines.append(table_row([BY_NAME[name].work, f"{useful:.0f}", *["-"] * 4, "**void or not measured**"]))
            continue
        seconds = outcome.median_of("ours", lambda run: run.report["step_cpu"])
        share = useful / seconds / peak
        cells = [f"{useful:.0f}", f"{seconds:.1f}", f"{useful / seconds:.0f}", f"{peak:.0f}", f"{share:.0%}"]
        lines.append(table_row([BY_NAME[name].work, *cells, _against(100 * USEFUL_TARGET, 100 * share, " %")]))
    return lines


def markdown(saved: Mapping[str, Any], notes: str = "") -> str:
    """The whole note."""
    outcomes = {name: Outcome.from_json(value) for name, value in saved.get("rows", {}).items()}
    head = [
        "work",
        "against",
        "ours, s",
        "theirs, s",
        "ratio",
        "later",
        "whole",
        "wall",
        "memory, MB",
        "ratio",
        "target",
        "pairs",
    ]
    lines = [HEAD, "![Ratios](benchmarks.svg)", "", table_row(head), "|" + "---|" * len(head)]
    lines += [table_row(line(row, outcomes.get(row.name, Outcome([])))) for row in ROWS]  # what is missing shows, too
    shown = [row for row in ROWS if row.name in outcomes]
    lines += ["", "Ratio of CPU seconds, pair by pair, and the commit that was measured:", ""]
    lines += [pair_line(row, saved["rows"][row.name]) for row in shown]
    if notes:
        lines += ["", notes.strip()]
    if "scaling" in saved:
        points, commit = saved["scaling"]["points"], saved["scaling"].get("revision") or "unknown"
        lines += ["", SCALING, f"Measured at commit {commit}.", "", *scaling_lines(points)]
        if "useful" in saved:
            lines += ["", USEFUL, *useful_lines(saved["useful"]["gflop"], outcomes, points)]
    lines += ["", "## Machine and versions", ""]
    lines += [f"- {name}: {value}" for name, value in saved.get("machine", {}).get("now", {}).items()]
    return "\n".join(lines) + "\n"


SCALING = """## How the cost of ours grows

A reference pass, a policy pass and a backward pass over trees of one shape. *Tokens of the rows* is what a trainer
without sharing would compute (before padding). Useful work is what the mathematics needs: products with the weights for
each packed token, attention inside the tree, the last layer (but for its keys and values) and the head where a logit is
wanted, and twice that for the backward pass; anything computed again is not counted. The peak is the best
single-precision product of 1024 x 1024 matrices, measured in the same process just before and after.
"""

USEFUL = """## Useful work of a training step

The same count for the steps of the first table, from the lengths of their rows, over the seconds of the whole step:
data, optimizer and the first touch of memory included. The peak is the median of those above.
"""


def chart(saved: Mapping[str, Any], path: Path) -> None:
    """A bar for each row, its target as a mark."""
    outcomes = {name: Outcome.from_json(value) for name, value in saved.get("rows", {}).items()}
    shown = [row for row in ROWS if row.name in outcomes and not outcomes[row.name].void and row.target]
    if not shown:
        return
    rows = [(row.name, f"{row.peer}, {row.setting}", outcomes[row.name].step_ratio, row.target) for row in shown]
    panel = plots.bars(rows, "CPU seconds of a step, theirs over ours")
    plots.write(path, [panel], 1, {"target": plots.LIMIT}, "dashed: as fast as theirs")


def write_report(saved: Mapping[str, Any], docs: Path) -> None:
    """`benchmarks.md` and `benchmarks.svg` in `docs`; `benchmarks_notes.md` there, if any, is taken in."""
    notes = docs / "benchmarks_notes.md"
    (docs / "benchmarks.md").write_text(markdown(saved, notes.read_text() if notes.exists() else ""))
    chart(saved, docs / "benchmarks.svg")
