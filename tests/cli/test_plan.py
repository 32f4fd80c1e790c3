"""`trl plan` and `--dry_run`: what a run would take, and that nothing of it is kept."""

import json
from types import SimpleNamespace

import pytest
from test_training_commands import model, rows  # noqa: F401

from trl.cli.main import run
from trl.reports.run_report import planned
from trl.scripts import plan
from trl.scripts.plan import Schedule, lines_of

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning", "ignore:You passed a model_id")
LONG, SHORT = {"text": "a b c d e f g h"}, {"text": "a b"}


def words_of(tmp_path, model, *more):  # noqa: F811
    data = rows(tmp_path, *[SHORT] * 12, *[LONG] * 4)
    common = ["--report_to", "none", "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "out")]
    return ["sft", "--model", model, "--data", data, "--num_train_epochs", "2", *common, *more]


def test_a_plan_leaves_a_file_and_the_run_writes_it_beside_what_happened(tmp_path, model, capsys, monkeypatch):  # noqa: F811
    seen, make = [], plan.Stopwatch.on_step_end
    monkeypatch.setattr(plan.Stopwatch, "on_step_end", lambda self, *a, **k: (seen.append(1), make(self, *a, **k))[1])
    words = words_of(tmp_path, model, "--gradient_accumulation_steps", "4", "--save_steps", "2")
    assert run(["plan", *words]) == 0
    out = capsys.readouterr().out
    assert len(seen) == 2
    heads = ("memory", "time", "passes", "disk", "wrote")
    assert [line.split()[0] for line in out.splitlines() if line.startswith(heads)] == list(heads)
    assert out.splitlines()[-1] == f"wrote {tmp_path / 'out' / 'plan.json'}"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["plan.json"]
    found = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert found["steps"] == 4  # 16 rows twice, 8 in a step
    assert found["tokens_of_a_pass"] == 2 * 9  # with their end
    assert found["tokens_that_fit"] > 1000
    assert found["checkpoints"]["count"] == 2
    weights = 4 * sum(weight.numel() for weight in _loaded(model).parameters())
    assert found["checkpoints"]["bytes"] == 3 * weights
    assert found["memory"]["measured"] > 10**8
    assert run(words) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["planned"] == found
    assert record["status"] == "finished"
    assert "of memory, it took" in planned(record)


def _loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_dry_run_of_a_command_that_samples(tmp_path, model, capsys):  # noqa: F811
    data = rows(tmp_path, *[{"prompt": "a b c"}] * 3, {"prompt": "a b c d e"})
    function = "def length(completions, **columns):\n    return [float(len(x)) for x in completions]\n"
    (tmp_path / "rewards.py").write_text(function)
    words = ["grpo", "--model", model, "--data", data, "--reward", f"{tmp_path}/rewards.py:length"]
    words += ["--num_generations", "2", "--per_device_train_batch_size", "4", "--max_completion_length", "4"]
    words += ["--report_to", "none"]
    assert run([*words, "--output_dir", str(tmp_path / "out"), "--dry_run"]) == 0
    found = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert found["steps"] == 6  # 4 prompts, 2 in a step, three epochs
    assert found["cpu_seconds_a_step"] > 0
    assert "saved to" not in capsys.readouterr().out


def test_a_plan_for_ppo(tmp_path, model, capsys):  # noqa: F811
    data = rows(tmp_path, *[{"prompt": "a b c"}] * 8)
    (tmp_path / "rewards.py").write_text("def one(completions, **columns):\n    return [1.0 for _ in completions]\n")
    words = ["plan", "ppo", "--model", model, "--data", data, "--reward", f"{tmp_path}/rewards.py:one"]
    words += ["--per_device_train_batch_size", "2", "--num_mini_batches", "1", "--response_length", "4"]
    assert run([*words, "--output_dir", str(tmp_path / "out"), "--total_episodes", "20"]) == 0
    found = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert found["steps"] == 10
    assert found["cpu_seconds_a_step"] > 0
    assert capsys.readouterr().out.splitlines()[0].startswith("memory")


def test_a_job_of_no_such_name(capsys):
    assert run(["plan", "sftt"]) == 2
    assert "sftt: no training command of that name" in capsys.readouterr().err


def test_seconds_of_a_step_by_hand():
    watch = SimpleNamespace(steps=[(9.0, 9.0), (5.0, 6.0)], optimizer=[(1.0, 1.0), (1.0, 2.0)])
    # two micro-batches took 4 s on rows of 20 tokens; a step has 8 of them, of rows of 10
    whole = Schedule(steps=10, accumulation=8, mean=10.0, longest=20.0)
    assert plan._seconds(whole, watch, 0) == 4 / 2 * 8 / 2 + 1
    assert plan._seconds(whole, watch, 1) == 4 / 2 * 8 / 2 + 2
    unknown = Schedule(steps=10, accumulation=8, mean=0.0, longest=0.0)
    assert plan._seconds(unknown, watch, 0) == 4 / 2 * 8 + 1
    sampled = Schedule(steps=10, accumulation=8, mean=0.0, longest=0.0, of_rollout=1)
    assert plan._seconds(sampled, watch, 0) == 5
    rounds = Schedule(steps=10, accumulation=1, mean=0.0, longest=0.0, of_rollout=2)
    assert plan._seconds(rounds, watch, 0) == 7  # sampling is in one of the two


@pytest.mark.parametrize("seconds", [0.001, 12345.678])
def test_no_line_is_wider_than_a_terminal(seconds):
    found = {
        "steps": 123456, "memory": {"measured": 123.4e9, "formula": 118.2e9, "room": 64.3e9},
        "cpu_seconds_a_step": seconds, "seconds_a_step": seconds, "cpu_seconds": 1e9, "seconds": 1e9,
        "tokens_of_a_pass": 1234567, "tokens_that_fit": 987654321, "checkpoints": {"bytes": 612.3e9, "count": 1234},
        "model": 212.5e9, "free_disk": 1.5e9, "device": "cpu",
    }  # fmt: skip
    lines = lines_of(found)
    assert max(map(len, lines)) <= 80
    assert all(line[:9] in ("memory   ", "time     ", "passes   ", "disk     ", " " * 9) for line in lines)
    assert [line[9] for line in lines].count(" ") == 0
    assert "123,456 steps" in " ".join(" ".join(lines).split())


def test_what_does_not_fit_is_said():
    found = {
        "steps": 0, "memory": {"measured": 9e9, "formula": 8e9, "room": 4e9}, "cpu_seconds_a_step": None,
        "seconds_a_step": 0.5, "cpu_seconds": None, "seconds": 0.0, "tokens_of_a_pass": 100, "tokens_that_fit": 70,
        "checkpoints": {"bytes": 6e9, "count": 2}, "model": 2e9, "free_disk": 1e9, "device": "cuda:0",
    }  # fmt: skip
    lines = lines_of(found)
    assert lines[0] == "memory   9.0 GB on the GPU (by formula 8.0 GB); 4.0 GB there"
    assert lines[1].strip().startswith("that does not fit: an adapter (--lora_rank 16)")
    assert lines[2] == "time     0.5 s a step, without evaluations and checkpoints"
    assert lines[3] == "passes   100 tokens at most; there is room for about 64"
    assert lines[5].strip().startswith("that does not fit: --save_total_limit 1")
