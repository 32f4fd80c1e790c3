"""The report: self-contained, escaped, whole on disk, and honest about a failure."""

import json
import random
import re

import pytest

from trl.quickstart import report as report_module
from trl.quickstart.recipe import SMALL
from trl.quickstart.report import Run, render, write_report
from trl.quickstart.results import Imitation, Preference, Reading, Reinforcement
from trl.reports.charts import moving_average, plain
from trl.reports.intervals import share_interval

PROMPTS = 40


def reading(judge: float, text: str) -> Reading:
    numbers = random.Random(0)
    rows = range(PROMPTS)
    return Reading(
        texts=[f"A film that {text}" for _ in rows],
        reward=[2 * judge + numbers.gauss(0, 1) for _ in rows],
        judge=[judge + numbers.gauss(0, 0.1) for _ in rows],
        variety=[0.9 for _ in rows],
        kl=[numbers.gauss(3 * judge, 1) for _ in rows],
    )


def run(gain: float = 0.5, steps: int = 3) -> Run:
    numbers = random.Random(1)
    after = reading(0.1 + gain, "delights")
    after.judge = [value + numbers.gauss(0, 0.1) for value in after.judge]
    history = {name: [0.1 * i for i in range(steps)] for name in ("reward", "judge", "KL", "variety")}
    return Run(
        model="a <b>model</b>", parameters=1_100_000, seed=7, tiny=True, recipe=SMALL,
        imitation=Imitation([5.0, 4.5, 4.2], 5.1, 4.3),
        preference=Preference([0.7, 0.6, 0.5], 24, share_interval(78, 100), share_interval(66, 100)),
        reinforcement=Reinforcement(["A film that"] * PROMPTS, reading(0.1, "<script>bores</script>"), after, history,
                                    "all steps"),
        seconds={"Imitate": 12.0, "Reward": 34.0, "Before": 1.0, "Reinforce": 100.0, "After": 1.0},
        threads=1,
        peak_mebibytes=2048.0, versions={"trl": "1"}, date="1 January 2026", sources=[("thing 1.0", "MIT")],
    )  # fmt: skip


def test_a_report_is_one_file_that_loads_nothing_else():
    page = render(run())
    assert page.count("<svg") == 10
    assert not re.search(r"(src|href)=\"(?!#)", re.sub(r"xlink:href=\"#", "", page))
    assert "@import" not in page
    assert "url(http" not in page


def test_a_report_says_what_was_measured():
    page = render(run())
    assert "It worked" in page
    assert "+0.5" in page
    assert "seed 7" in page
    assert "78 %" in page
    assert "thing 1.0: MIT" in page


def test_texts_are_escaped():
    page = render(run())
    assert "<script>" not in page
    assert "&lt;script&gt;bores" in page
    assert "a &lt;b&gt;model" in page


def test_a_gain_within_noise_is_no_success():
    without = run(gain=0.0)
    assert not without.succeeded
    page = render(without)
    assert "Not shown" in page
    assert "It worked" not in page


def test_a_run_that_was_stopped_at_once_can_be_drawn():
    assert "Reinforce" in render(run(steps=1))


def test_the_numbers_stand_beside_the_page(tmp_path):
    path = write_report(run(), tmp_path)
    assert path == tmp_path / "report.html"
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["succeeded"] is True
    assert record["figures"]["Judge"]["gain"]["n"] == PROMPTS
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


@pytest.mark.parametrize(("value", "text"), [(0.346, "+0.35"), (-0.346, "-0.35"), (-0.001, "0.00"), (0.0, "0.00")])
def test_signs(value, text):
    assert report_module._signed(value) == text


@pytest.mark.parametrize(("value", "text"), [(-0.001, "0.00"), (0.004, "0.00"), (-1.236, "-1.24")])
def test_a_rounded_zero_has_no_sign(value, text):
    assert plain(value) == text


def test_moving_average():
    assert moving_average([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
