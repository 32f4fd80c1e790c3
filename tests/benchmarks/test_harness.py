"""The harness on peers of a few lines: what disagrees is void, what crashes is shown."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import run as run_of_rows
from benchmarks.harness import Outcome, Run, difference, in_turn, judge, run_process, touch_memory
from benchmarks.report import line, markdown, pair_line
from benchmarks.table import BY_NAME

WRITES = """
import json, sys
settings = json.loads(sys.argv[3])
report = {"gate": {"loss": [settings["loss"]]}, "steps": 1, "step_cpu": settings["cpu"], "step_wall": 1.0}
open(sys.argv[2], "w").write(json.dumps(report))
"""
CRASHES = "raise RuntimeError('no such device')"


@pytest.fixture
def run(tmp_path: Path):
    def start(code: str, **settings: float) -> Run:
        job = tmp_path / "job.py"
        job.write_text(code)
        return run_process([sys.executable], job, tmp_path, settings)

    return start


def test_equal_work_has_a_ratio(run):
    pairs = in_turn(lambda n: run(WRITES, loss=2.0, cpu=1.0), lambda n: run(WRITES, loss=2.001, cpu=3.0 + n), 3)
    outcome = Outcome.from_json(Outcome(pairs).as_json())
    assert outcome.void == ""
    assert outcome.step_ratio == 4.0  # the median of 3, 4 and 5
    assert all(pair.ours.cpu > 0 and pair.ours.memory_mb > 1 for pair in pairs)
    assert "**4.0x**" in line(BY_NAME["dpo"], outcome)


def test_other_work_voids_the_row_and_ends_it(run):
    pairs = in_turn(lambda n: run(WRITES, loss=2.0, cpu=1.0), lambda n: run(WRITES, loss=2.01, cpu=9.0), 5)
    assert len(pairs) == 1
    outcome = Outcome(pairs)
    assert outcome.void == "not the same work: loss: 2 against 2.01"
    cells = line(BY_NAME["dpo"], outcome)
    assert any("void" in str(cell) for cell in cells)
    assert not any("x**" in str(cell) for cell in cells)


def test_one_bad_pair_voids_the_good_ones(run):
    good = judge(run(WRITES, loss=1.0, cpu=1.0), run(WRITES, loss=1.0, cpu=2.0))
    bad = judge(run(WRITES, loss=1.0, cpu=1.0), run(WRITES, loss=5.0, cpu=2.0))
    assert Outcome([good, bad]).void


def test_a_crash_of_the_peer_is_shown(run):
    pairs = in_turn(lambda n: run(WRITES, loss=1.0, cpu=1.0), lambda n: run(CRASHES), 2)
    assert pairs[0].void.startswith("theirs crashed: exit code 1")
    assert "no such device" in markdown({"rows": {"dpo": Outcome(pairs).as_json()}})


def test_a_process_without_a_report_has_crashed(run):
    assert run("pass").error.startswith("exit code 0")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [({"a": [1.0]}, {"b": [1.0]}), ({"a": [1.0]}, {"a": [1.0, 1.0]}), ({"a": [float("nan")]}, {"a": [float("nan")]})],
)
def test_what_cannot_be_compared_differs(ours, theirs):
    assert difference(ours, theirs, 1e-3)


def test_a_row_without_figures_says_so():
    assert "**not measured**" in line(BY_NAME["dpo"], Outcome([]))


def test_streams_begin_with_what_took_longest(tmp_path, monkeypatch):
    saved = {
        "rows": {name: Outcome([judge(Run(wall=wall), None)]).as_json() for name, wall in (("sft", 3), ("kto", 9))}
    }
    monkeypatch.setattr(run_of_rows, "RESULTS", tmp_path / "benchmarks.json")
    assert run_of_rows.longest_first(["dpo", "sft", "kto"]) == ["dpo", "sft", "kto"]
    run_of_rows.RESULTS.write_text(json.dumps(saved))
    assert run_of_rows.longest_first(["dpo", "sft", "kto"]) == ["kto", "sft", "dpo"]


def test_memory_is_touched_in_a_process_of_its_own():
    touch_memory(1e-4)


def test_each_row_names_the_commit_it_was_measured_at():
    saved = Outcome([judge(Run(report={"step_cpu": 1.0}), Run(report={"step_cpu": 3.0}))]).as_json()
    assert pair_line(BY_NAME["dpo"], {"revision": "abc1234", **saved}) == "- `dpo` (abc1234): 3.00"
    assert pair_line(BY_NAME["dpo"], saved) == "- `dpo` (unknown commit): 3.00"


def test_steps_after_the_first_have_a_ratio_of_their_own():
    common = {"step_wall": 1.0}
    ours, theirs = (
        Run(1.0, 1.0, 1.0, {"step_cpu": step, "later_cpu": later, **common}) for step, later in ((2.0, 1.0), (6.0, 5.0))
    )
    both = Outcome([judge(ours, theirs)])
    assert both.later_ratio == 5.0
    assert line(BY_NAME["sft"], both)[4:6] == ["**3.0x**", "5.0x"]
    alone = Outcome([judge(Run(1.0, 1.0, 1.0, {"step_cpu": 2.0, **common}), theirs)])
    assert alone.later_ratio is None
    assert line(BY_NAME["sft"], alone)[5] == "-"


def test_results_that_are_written_do_not_count_as_changes_of_what_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(run_of_rows, "OURS", tmp_path)
    assert run_of_rows.revision() == ""
    (tmp_path / "docs").mkdir()
    (tmp_path / "code.py").write_text("one")
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (tmp_path / "docs" / "benchmarks.json").write_text("{}")
    assert len(run_of_rows.revision()) >= 7
    assert not run_of_rows.revision().endswith("-dirty")
    (tmp_path / "code.py").write_text("two")
    assert run_of_rows.revision().endswith("-dirty")
