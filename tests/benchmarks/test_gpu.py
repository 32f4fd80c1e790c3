"""`make gpu` in tiny sizes on a CPU: the same jobs, and the page that is written from what they found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import run
from benchmarks.gpu.page import page, write_page
from benchmarks.gpu.run import PARTS, Job, chosen, compare_steps, install, merged_facts, run_job, save, training

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_tiny_jobs_give_a_page(tmp_path):
    """What a training job, the exactness and the mismatch find, in a process each."""
    results = tmp_path / "results.json"
    jobs = {
        "exact": Job("exact", "exact"), "mismatch": Job("mismatch", "mismatch"), "sft": training("1.5B")[0],
    }  # fmt: skip
    for part, job in jobs.items():
        found = run_job(job, tmp_path, [str(ROOT)], tiny=True)
        assert "failed" not in found, found["failed"]
        save(results, part, job.name, found)
    saved = json.loads(results.read_text())
    exact = [value for value in saved["exact"]["exact"].values() if isinstance(value, dict) and "holds" in value]
    assert len(exact) == 28
    assert all(value["holds"] for value in exact)
    assert saved["mismatch"]["mismatch"]["float32"]["token_most"] < 1e-5
    assert saved["sft"]["sft 1.5B"]["step"]["tokens_s"] > 0
    assert saved["sft"]["sft 1.5B"]["profile"]["waits"]
    written = page(saved)
    assert "28 of 28 hold" in written
    assert "| sft 1.5B |" in written


def test_a_job_that_fails_leaves_what_it_had_and_its_error(tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text("import sys\nopen(sys.argv[1], 'w').write('{\"a\": 1}\\n')\nraise KeyError('b')\n")
    monkeypatch.setattr(run, "JOBS", tmp_path)
    found = run_job(Job("bad", "bad"), tmp_path, [], tiny=True)
    assert found["a"] == 1
    assert found["failed"].strip().endswith("KeyError: 'b'")


def test_a_job_that_is_too_slow_is_stopped(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text(
        "import sys, time\nopen(sys.argv[1], 'w').write('{\"a\": 1}\\n')\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(run, "JOBS", tmp_path)
    found = run_job(Job("slow", "slow", limit=1), tmp_path, [], tiny=True)
    assert found["a"] == 1
    assert found["failed"].startswith("stopped at its limit of 1 s")


def test_results_of_several_calls_are_merged(tmp_path):
    results = tmp_path / "results.json"
    save(results, "sft", "one", {"step": 1})
    save(results, "sft", "two", {"step": 2})
    save(results, "head", "head", {"step": 3})
    save(results, "sft", "one", {"step": 4})
    saved = json.loads(results.read_text())
    assert saved["sft"] == {"one": {"step": 4}, "two": {"step": 2}}
    assert saved["head"] == {"head": {"step": 3}}


def test_parts_go_by_number_and_name():
    assert [part.name for part in chosen(None)] == [part.name for part in PARTS]
    assert [part.name for part in chosen("1,head")] == ["exact", "head"]
    with pytest.raises(SystemExit, match="--part 9: no part '9'; there are 1, 2"):
        chosen("9")


def test_moves_of_the_weights_are_held_against_the_cpu(tmp_path):
    import torch

    torch.save({"sft": torch.ones(4)}, tmp_path / "steps_cpu.pt")
    torch.save({"sft": torch.full((4,), 1.01)}, tmp_path / "steps_float32.pt")
    assert compare_steps(tmp_path)["sft = CPU, float32"]["error_found"] == pytest.approx(0.01, rel=1e-3)
    assert not compare_steps(tmp_path)["sft = CPU, float32"]["holds"]


def test_without_results_the_page_says_so(tmp_path):
    write_page(tmp_path)
    assert "Not run: no results of a GPU" in (tmp_path / "gpu.md").read_text()
    assert merged_facts(tmp_path / "none.jsonl") == {}


def test_the_page_is_the_one_of_the_results():
    docs = ROOT / "docs"
    results = json.loads((docs / "gpu.json").read_text()) if (docs / "gpu.json").exists() else {}
    assert (docs / "gpu.md").read_text() == page(results)


def test_wheels_go_into_a_folder_of_their_own(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append(command))
    (tmp_path / "a-1-py3-none-any.whl").touch()
    assert install(tmp_path, tmp_path / "site") == str(tmp_path / "site")
    assert calls[0][:4] == [sys.executable, "-m", "pip", "install"]
    assert calls[0][-3:] == ["--target", str(tmp_path / "site"), str(tmp_path / "a-1-py3-none-any.whl")]
