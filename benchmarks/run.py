"""Measure this library against its peers: `python -m benchmarks.run NAME ...`, `--all`, `--list`.

Every row runs ours and theirs in turn as whole processes on one thread, checks that both did the same work, and goes
into docs/benchmarks.json; docs/benchmarks.md and its chart are written from that file (`--report` does only that).
"""

import argparse
import fcntl
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import flops
from benchmarks.environments import CACHE, OURS, prepare_materials, python_of
from benchmarks.harness import Outcome, Pair, Run, in_turn, run_process, touch_memory
from benchmarks.report import machine, write_report
from benchmarks.scaling import measure_scaling
from benchmarks.table import BY_NAME, ROWS, Row

JOBS = Path(__file__).parent / "jobs"
RESULTS = OURS / "docs" / "benchmarks.json"


def measure(row: Row, pairs: int, folder: Path) -> Outcome:
    """The row's pairs, each said as it comes."""
    peer_python = python_of(row.peer)

    def settings(given: dict, number: int) -> dict:
        return {**given, **({"seed": number} if row.seeds else {})}

    def ours(number: int) -> Run:
        return run_process([python_of(None)], JOBS / f"{row.job}.py", folder, settings({**row.ours}, number), str(OURS))

    def theirs(number: int) -> Run:
        job = JOBS / f"{row.peer_job or row.job}.py"
        return run_process([peer_python], job, folder, settings({**row.theirs}, number))

    def say(pair: Pair) -> None:
        if pair.void:
            print(f"{row.name}: VOID: {pair.void}", flush=True)
        elif pair.theirs is not None:
            one, seconds = Outcome([pair], row.per_unit), [run.report["step_cpu"] for run in (pair.ours, pair.theirs)]
            print(
                f"{row.name}: step {seconds[0]:.2f} s against {seconds[1]:.2f} s of CPU: {one.step_ratio:.2f}x; "
                f"memory {one.memory_ratio:.2f}x",
                flush=True,
            )

    print(f"{row.name}: {row.work}, against {row.peer} ({row.setting})", flush=True)
    found = in_turn(ours, theirs if row.peer else None, pairs, tolerance=row.tolerance, compares=row.compares, said=say)
    return Outcome(found, row.per_unit)


def save(key: str, name: str, value: object) -> None:
    """Put one result into the file; two measurements may be running."""
    RESULTS.touch()
    with RESULTS.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = file.read()
        saved = json.loads(text) if text else {}
        saved.setdefault(key, {})[name] = value
        file.seek(0)
        file.truncate()
        json.dump(saved, file, indent=1, sort_keys=True)
        file.write("\n")


def revision() -> str:
    """The commit that is measured, and whether files other than the results differ from it; empty without git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=OURS, capture_output=True, text=True, check=False).stdout.strip()

    differs = git("status", "--porcelain", "--", ".", ":!docs/benchmarks*")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if differs else "")


def longest_first(names: list[str]) -> list[str]:
    """The rows in the order in which several streams end soonest, by what they took the last time."""
    saved = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() and RESULTS.stat().st_size else {}

    def seconds(name: str) -> float:
        runs = [run for pair in saved.get(name, {"pairs": []})["pairs"] for run in (pair["ours"], pair["theirs"])]
        return sum(run["wall"] for run in runs if run)

    return sorted(names, key=seconds, reverse=True)


def measure_all(names: list[str], pairs: int, streams: int, folder: Path) -> None:
    """Measure the rows, as many at a time as there are streams."""
    for peer in {BY_NAME[name].peer for name in names if name in BY_NAME}:
        python_of(peer)  # built before anything is measured
    prepare_materials(folder, any(BY_NAME[name].real for name in names if name in BY_NAME))
    touch_memory()

    def one(name: str) -> None:
        if name == "scaling":
            save("scaling", "revision", revision())
            save("scaling", "points", measure_scaling(folder, [python_of(None)]))
        else:
            save("rows", name, {"revision": revision(), **measure(BY_NAME[name], pairs, folder).as_json()})

    with ThreadPoolExecutor(streams) as pool:
        list(pool.map(one, longest_first(names) if streams > 1 else names))
    save("useful", "gflop", flops.steps(json.loads((folder / "rows.json").read_text())))
    save("machine", "now", {**machine(), "rows at a time": str(streams)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="rows to measure, or `scaling`")
    parser.add_argument("--all", action="store_true", help="every row, and scaling")
    parser.add_argument("--pairs", type=int, default=5, help="how often each side runs (default 5)")
    parser.add_argument("--streams", type=int, default=1, help="rows measured at a time, each on one core (default 1)")
    parser.add_argument("--list", action="store_true", help="show the rows")
    parser.add_argument("--report", action="store_true", help="only write the report from what was measured")
    options = parser.parse_args()
    names = [*BY_NAME, "scaling"] if options.all else options.names
    unknown = set(names) - {*BY_NAME, "scaling"}
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}; see --list")
    for flag, value in (("--pairs", options.pairs), ("--streams", options.streams)):
        if value < 1:
            parser.error(f"{flag} {value}: give 1 or more")
    if options.list or not (names or options.report):
        for row in ROWS:
            print(f"{row.name:15} {row.work}, against {row.peer} ({row.setting})")
        print("scaling         ours alone: lengths, group sizes, vocabularies, share of the peak")
        return
    if names:
        measure_all(names, options.pairs, options.streams, CACHE / "materials")
    write_report(json.loads(RESULTS.read_text()), OURS / "docs")


if __name__ == "__main__":
    main()
