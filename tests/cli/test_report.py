"""`trl report`: what it reads of a run's folder, what it says, and that nothing in it is taken for HTML."""

import json
import re

import pytest

from trl.cli.main import COMMANDS, run
from trl.reports.charts import MOST_POINTS, Curve, Panel, curve, moving_average, thinned, tick_text, ticks
from trl.reports.findings import findings, next_steps
from trl.reports.run_folder import read_run
from trl.reports.run_report import colour_of, render, write_report
from trl.rollout.report import write_parquet
from trl.trainer.run_folder import LOCK

HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m\u202e</style>"


def folder_of(tmp_path, lines=(), record=None, config=None):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines)
    )
    if record is not None:
        (tmp_path / "run.json").write_text(json.dumps(record))
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    return tmp_path


def losses(count=40, **more):
    return [
        {"step": i, "epoch": 0.1, "loss": 3 - i / 20, **{k: f(i) for k, f in more.items()}} for i in range(1, count + 1)
    ]


def finished(trainer="SFTTrainer", **more):
    return {
        "status": "finished",
        "how": "",
        "trainer": trainer,
        "command": "trl sft --model m --data d",
        "step": 40,
    } | more


def is_self_contained(page):
    assert not re.search(r"""(src|href)\s*=|url\(|@import|<script|<link|https?://""", page)
    return True


# -- reading -------------------------------------------------------------------------------------


def test_lines_that_are_no_logs_are_left_out_and_said(tmp_path):
    broken = ['{"step": 3, "lo', "[1]", '{"loss": 1.0}', '{"step": "x"}', "[" * 9999, ""]
    seen = read_run(folder_of(tmp_path, [*losses(2), *broken, {"step": 9, "loss": None}]))
    assert seen.series["loss"].steps == [1, 2, 9]
    assert seen.series["loss"].values == [2.95, 2.9, None]
    assert seen.skipped == ["5 lines of metrics.jsonl (3, 4, 5, 6, 7) are no log of a step and left out"]
    page = render(seen)
    assert "5 lines of metrics.jsonl (3, 4, 5, 6, 7)" in page
    assert "loss was not a finite number in 1 of 3 logs" in page


@pytest.mark.parametrize("torn", ['{"step": 2, ', "null", "\x00\x00"])
def test_one_such_line(torn, tmp_path):
    assert read_run(folder_of(tmp_path, [*losses(1), torn])).skipped == [
        "line 2 of metrics.jsonl is no log of a step and left out"
    ]


def test_numbers_of_any_kind_are_drawn(tmp_path):
    """Not finite ones (as other tools write them), huge ones, texts, lists, steps that begin again."""
    odd = ['{"step": 1, "loss": NaN, "a": 1e308, "b": "x", "c": [1], "d": true, "e": 1' + "0" * 400 + "}"]
    odd += ['{"step": 2, "loss": Infinity, "a": -1e308}', '{"step": 1, "loss": 1, "a": 0}']
    seen = read_run(folder_of(tmp_path, odd))
    assert seen.series["loss"].values == [None, None, 1.0]
    assert set(seen.series) == {"loss", "a", "e"}
    assert "<svg" in render(seen)
    assert "nan" not in render(seen).replace("finance", "")


def test_a_run_without_a_record_is_named_by_its_folder(tmp_path, capsys):
    assert run(["report", str(folder_of(tmp_path, losses(3)))]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == f"A run: {tmp_path.name}: unknown, 3 steps"
    assert "RunFolderCallback writes it" in second


def test_a_run_without_any_log(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(finished(step=1)))
    page = render(read_run(tmp_path))
    assert "Nothing was logged" in page
    assert "<svg" not in page
    assert is_self_contained(page)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda place: place / "nowhere", "there is no such folder; give the `output_dir` of a run"),
        (lambda place: place, "no run has written there: it has neither run.json nor metrics.jsonl"),
    ],
)
def test_a_folder_of_no_run_is_one_line(make, message, tmp_path, capsys):
    assert run(["report", str(make(tmp_path))]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_checkpoint_stands_for_its_run(tmp_path):
    folder_of(tmp_path, losses(), finished())
    (tmp_path / "checkpoint-40").mkdir()
    assert read_run(tmp_path / "checkpoint-40").folder == tmp_path
    assert read_run(tmp_path / "metrics.jsonl").checkpoints == [40]


def test_a_killed_run_is_told_from_a_living_one(tmp_path):
    from trl.trainer import run_folder

    folder_of(tmp_path, losses(7), finished(status="running", step=0))
    (tmp_path / LOCK).write_text("process 1 on here")
    assert read_run(tmp_path).status[0] == "ended"
    assert read_run(tmp_path).status[1].endswith("went down, after step 7")
    descriptor = run_folder._acquire(tmp_path)
    try:
        assert read_run(tmp_path).status == ("running", "")
    finally:
        run_folder._release(tmp_path, descriptor)


def test_a_damaged_record_or_sample_is_said(tmp_path):
    folder_of(tmp_path, losses())
    (tmp_path / "run.json").write_text('{"status": ')
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "rollout-000001.parquet").write_bytes(b"PAR1 and no more")
    seen = read_run(tmp_path)
    assert seen.skipped[0] == "run.json could not be read"
    assert seen.skipped[1].startswith("rollout-000001.parquet could not be read (")
    assert "rollout-000001.parquet" in render(seen)


# -- what it says --------------------------------------------------------------------------------


def test_what_stands_out_is_by_the_table_of_metrics(tmp_path):
    curves = {
        "reward": lambda i: 1 - i / 40, "reward_std": lambda i: 0.1, "kl": lambda i: i / 100,
        "completions/clipped_ratio": lambda i: 0.9, "frac_reward_zero_std": lambda i: 0.2, "approx_kl": lambda i: 0.01,
    }  # fmt: skip
    found = findings(read_run(folder_of(tmp_path, losses(**curves), finished("GRPOTrainer"))))
    assert found == [
        "reward fell from 0.863 to 0.113; healthy: rises",
        "completions/clipped_ratio is 0.9 in the last quarter: the limit cuts completions before they end; raise "
        "max_completion_length, or reward shorter ones",
    ]


def test_nothing_stands_out(tmp_path):
    seen = read_run(folder_of(tmp_path, losses(mean_token_accuracy=lambda i: i / 40), finished()))
    assert findings(seen) == []
    assert "Nothing stands out" in render(seen)


@pytest.mark.parametrize("low", [2.0, -2.0])
def test_an_evaluation_that_gets_worse(low, tmp_path):
    judged = [{"step": s, "eval_loss": low + abs(s - 20) / 10} for s in (10, 20, 30, 40)]
    found = findings(read_run(folder_of(tmp_path, [*losses(), *judged], finished())))
    assert found[0].startswith(f"eval_loss was least at step 20 ({low:g}) and is {low + 2:g} now")


def test_a_reward_that_parts_from_a_held_out_judge(tmp_path):
    """The reward rises all the time; the judge rises up to step 20 and falls then."""

    def judge(step):
        return min(step, 40 - step) / 20 + 0.02 * (-1) ** step

    lines = [{"step": i, "loss": 0.1, "reward": i / 40, "judge/brevity/mean": judge(i)} for i in range(1, 41)]
    found = findings(read_run(folder_of(tmp_path, lines, finished("GRPOTrainer"))))
    (line,) = [line for line in found if line.startswith("judge/brevity/mean was best near step")]
    assert 17 <= int(re.search(r"step (\d+)", line)[1]) <= 23
    assert "the reward is gamed" in line
    for line in lines:
        line["judge/brevity/mean"] = line["reward"]
    found = findings(read_run(folder_of(tmp_path, lines, finished("GRPOTrainer"))))
    assert not [line for line in found if "gamed" in line]


def test_what_trivial_answers_would_earn_is_in_the_report(tmp_path):
    tried = [{"kind": "empty", "example": "", "rewards": {"a": 1.0, "b": None}, "total": 1.0}]
    check = {"tried": tried, "weaknesses": ["empty answers earn 1"], "notes": ["c was not tried: " + HOSTILE]}
    (tmp_path / "reward_check.json").write_text(json.dumps(check))
    seen = read_run(folder_of(tmp_path, losses(), finished("GRPOTrainer")))
    assert "before training: empty answers earn 1" in findings(seen)
    page = render(seen)
    assert "Rewards before training" in page
    assert is_self_contained(page)


def test_findings_of_the_data_are_there(tmp_path):
    data = {"train": {"name": "d", "rows": 3, "met": ["train data: 3 rows", "2 rows were truncated (9 tokens cut)"]}}
    seen = read_run(folder_of(tmp_path, losses(), finished(data=data)))
    assert findings(seen) == ["data: 2 rows were truncated (9 tokens cut)"]


@pytest.mark.parametrize(
    ("record", "saved", "expected"),
    [
        (
            finished(),
            [],
            ["trl sft --config", "trl inspect sft", "trl chat", "trl dpo --model", "trl grpo --model"],
        ),
        (finished(status="failed"), [20], ["trl sft --config", "trl sft --config", "trl inspect sft"]),
        (
            finished("RewardTrainer", command="trl reward -x"),
            [],
            ["trl reward", "trl inspect reward", "trl eval", "trl grpo --model MODEL"],
        ),
        (
            finished("PPOTrainer", command="trl ppo -x", model="a model"),
            [],
            ["trl ppo --config", "trl chat", "trl compare 'a model' '"],
        ),
        (finished(command="python train.py", status="stopped"), [3], [""]),
    ],
)
def test_what_next_are_commands_that_exist(record, saved, expected, tmp_path):
    place = tmp_path / "a run's folder"
    place.mkdir()
    folder_of(place, losses(), record, "seed: 1\n")
    for step in saved:
        (place / f"checkpoint-{step}").mkdir()
    steps = next_steps(read_run(place))
    assert [line[: len(start)] for (_, line), start in zip(steps, expected, strict=True)] == expected
    for _, line in steps:
        assert not line or line.split()[1] in COMMANDS
    if saved:
        assert f"from step {saved[-1]}" in steps[0][0]


def test_the_end_of_a_run_is_in_words(tmp_path):
    seen = read_run(folder_of(tmp_path, losses(), finished(status="failed", how="ValueError: no <b>")))
    page = render(seen)
    assert "Failed ValueError: no &lt;b&gt;" in page
    assert 'class="verdict no' in page


# -- the page ------------------------------------------------------------------------------------


def hostile(tmp_path):
    metric = {f"rewards/{HOSTILE}/mean": lambda i: i / 9, HOSTILE: lambda i: -i, "constant<b>": lambda i: 1}
    data = {HOSTILE: {"name": HOSTILE, "rows": 1, "fingerprint": HOSTILE, "files": {HOSTILE: 3}, "met": ["x", HOSTILE]}}
    record = finished(
        trainer=f"{HOSTILE}Trainer", how=HOSTILE, command=f"trl {HOSTILE}", model=HOSTILE, data=data, started=HOSTILE,
        settings={HOSTILE: HOSTILE, "b": [HOSTILE]}, versions={HOSTILE: HOSTILE},
        process={"id": HOSTILE, "host": HOSTILE},
        earlier=[{"status": HOSTILE, "how": HOSTILE, "started": HOSTILE, "step": HOSTILE}],
    )  # fmt: skip
    folder_of(tmp_path, losses(**metric), record, f"a: {HOSTILE}\n")
    rows = {
        "step": [1],
        "prompt": [HOSTILE],
        "completion": [HOSTILE * 100],
        "completion_ids": [[1]],
        HOSTILE: [HOSTILE],
    }
    write_parquet(tmp_path / "rollouts", 1, rows)
    return tmp_path


def test_hostile_texts_are_text(tmp_path):
    page = render(read_run(hostile(tmp_path)))
    assert is_self_contained(page.replace("&lt;script", ""))
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("</style>") == 1
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e]", page)
    assert "more characters)" in page
    assert "constant&lt;b&gt; 1" in page


@pytest.mark.parametrize("odd", [None, [], "x", 7, {"a": None}, [{"seconds": 3}], {"train": {"met": 3, "files": "x"}}])
def test_a_record_of_any_kind_is_read(odd, tmp_path):
    names = "status how trainer command started process versions data earlier step max_steps settings model parameters"
    record = dict.fromkeys([*names.split(), "trained", "seconds", "peak_memory", "device"], odd)
    assert "loss" in render(read_run(folder_of(tmp_path, losses(), record)))


def test_the_file_is_where_it_is_asked_for(tmp_path, capsys):
    folder_of(tmp_path, losses(), finished())
    assert run(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "SFT: a model: finished, 40 steps", f"wrote {tmp_path}/report.html"
    ]  # fmt: skip
    other = tmp_path / "new" / "page.html"
    assert run(["report", str(tmp_path), "--html", str(other)]) == 0
    assert other.read_text() == (tmp_path / "report.html").read_text()
    assert run(["report", str(tmp_path), "--html", str(tmp_path)]) == 2
    assert "name a file" in capsys.readouterr().err


def test_a_full_disk_leaves_the_older_report_whole(tmp_path, monkeypatch):
    path = write_report(folder_of(tmp_path, losses(), finished()))
    before, names = path.read_text(), sorted(p.name for p in tmp_path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match=r"cannot write .*report\.html: No space left"):
        write_report(tmp_path)
    assert path.read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == names


# -- charts --------------------------------------------------------------------------------------


def test_the_legend_says_what_is_there(tmp_path):
    few = render(read_run(folder_of(tmp_path, losses(3), finished(started="2026-11-27T15:54:33+00:00"))))
    assert "A dot is a log. Below a chart: the means" in few
    assert "2026-11-27 15:54:33 UTC" in few
    many = losses(40, reward=lambda i: i / 40, reward_std=lambda i: 0.1, kl=lambda i: i / 400)
    page = render(read_run(folder_of(tmp_path, [*many, {"step": 40, "eval_loss": 1.0}], finished())))
    assert (
        "Bold: the mean of it and those before it, 4 at most. Shaded: one standard deviation around it. "
        "Black dots: evaluations. Green is what should be gained, brown what is paid for it. Below"
    ) in page
    lone = render(read_run(folder_of(tmp_path, losses(3, kl=lambda i: i / 9), finished())))
    assert "A dot is a log. Brown what is paid" not in lone
    assert "Brown is what is paid for it." in lone


def test_a_heading_takes_the_room_of_its_charts(tmp_path):
    page = render(read_run(folder_of(tmp_path, losses(3, entropy=lambda i: i, grad_norm=lambda i: i), finished())))
    assert re.findall(r'class="of-(\d)"', page) == ["2", "1"]
    assert page.count('class="charts pairs"') == 1


def test_the_words_of_a_command_stay_whole(tmp_path):
    page = render(read_run(folder_of(tmp_path, losses(3), finished(), "a: 1\n")))
    assert "<span>--output_dir</span> <span>" in page


def test_the_last_number_of_an_axis_is_not_cut():
    drawn = Panel("x", (0, 1), (0, 1), width=100)
    drawn.x_axis([(0.5, "50 %"), (1, "1,000,000")])
    places = [float(x) for x in re.findall(r'<text x="([\d.]+)"', str(drawn.svg()))]
    assert places[1] == 68.0  # amid its axis, from 46 to 90
    assert places[2] == pytest.approx(100 - 2.9 * 9, abs=0.1)


def test_a_long_curve_keeps_its_ends_and_few_points():
    points = [(float(i), 0.0 if i != 777 else 9.0) for i in range(100_000)]
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert (777.0, 9.0) in kept
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


def test_means_pass_over_what_is_missing():
    assert moving_average([1.0, None, 3.0, None, None], 2) == [1.0, 1.0, 3.0, 3.0, None]


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.0, 5e-9, ["0", "1e-9", "2e-9", "3e-9", "4e-9", "5e-9"]),
        (-3.0, 2.0, ["-3", "-2", "-1", "0", "1", "2"]),
        (0.0, 12e6, ["0", "2.5e6", "5e6", "7.5e6", "1e7"]),
    ],
)
def test_ticks_are_round(low, high, texts):
    found = ticks(low, high)
    assert [tick_text(value, found[1] - found[0]) for value in found] == [t if t != "0.0" else "0" for t in texts]


@pytest.mark.parametrize("values", [[], [None], [1.0], [0.0, 0.0], [1e308, -1e308], [5e-324, 0.0], [None, 2.0, None]])
def test_any_numbers_can_be_drawn(values):
    drawn = curve(Curve("x", values, spread=[0.1] * len(values), others=[(1.0, 2.0)], mark=0.5, smooth=True))
    assert "nan" not in drawn
    assert "inf" not in drawn


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("reward", "gain"), ("rewards/x/mean", "gain"), ("eval_rewards/accuracies", "gain"), ("kl", "cost"),
        ("approx_kl", "cost"), ("policy_kl", "cost"), ("objective/kl", "cost"), ("loss", "plain"),
        ("frac_reward_zero_std", "cost"), ("completions/clipped_ratio", "cost"), ("rewards/rejected", "cost"),
    ],
)  # fmt: skip
def test_a_distance_is_no_gain(name, kind):
    assert colour_of(name) == {"gain": "#0f766e", "cost": "#b45309", "plain": "#3f5bd9"}[kind]
