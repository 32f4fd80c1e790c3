"""`trl diff` finds what was changed between two runs, and `trl replay` computes a step again, bit for bit."""

import json
import re
import shutil

import pytest
from tiny_models import byte_model
from tokenizers_for_tests import byte_tokenizer

from trl.cli.main import run
from trl.scripts.diff_runs import step_apart
from trl.scripts.replay import told

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    byte_model(folder / "tiny")
    rows = [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}."} for n in range(10, 26)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows[5]["completion"] = " 31."
    (folder / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train(folder, "one")
    return folder


def train(folder, name, *words, job="sft", data="rows.jsonl"):
    line = [
        job, "--model", folder / "tiny", "--data", folder / data, "--output_dir", folder / name, "--max_steps", 4,
        "--per_device_train_batch_size", 4, "--save_steps", 2, "--logging_steps", 1, "--trace_steps", "True",
        "--learning_rate", 1e-2, *words,
    ]  # fmt: skip
    assert run(list(map(str, line))) == 0


def said(capsys, *words):
    capsys.readouterr()
    assert run(list(map(str, words))) == 0
    return capsys.readouterr().out


def test_two_equal_runs(place, capsys):
    train(place, "two")
    out = said(capsys, "diff", place / "one", place / "two")
    assert out == "the steps that both have traced (1 to 4) are the same bit for bit\n"


def test_a_setting_was_changed(place, capsys):
    train(place, "faster", "--weight_decay", 0.5)
    out = said(capsys, "diff", place / "one", place / "faster").splitlines()
    assert out[0] == "settings: weight_decay: 0.0 | 0.5"
    assert "step 1 is the first that differs" in out
    assert [line.split(":")[0] for line in out[-1:]] == ["  the same rows, but weights_after"]


def copied(place, name, **changes):
    """A copy of the run `one`, whose files the changes write anew; None takes one away."""
    shutil.copytree(place / "one", place / name)
    for file, change in changes.items():
        path = place / name / {"run": "run.json", "config": "config.yaml"}[file]
        path.write_text(change(path.read_text())) if change else path.unlink()
    return place / name


def test_runs_of_two_trainers_share_few_settings(place, capsys):
    other = copied(
        place, "grpo",
        run=lambda text: text.replace("SFTTrainer", "GRPOTrainer"),
        config=lambda text: re.sub(r"\npacking: .*", r"\nnum_generations: 8", text).replace("seed: 42", "seed: 43"),
    )  # fmt: skip
    lines = said(capsys, "diff", place / "one", other).splitlines()
    assert lines[:2] == [
        "trainers: SFT | GRPO",
        "settings: 2 are known to one of the trainers alone, and are not shown",
    ]
    assert "settings: seed: 42 | 43" in lines
    assert not any("packing:" in line or "num_generations" in line for line in lines)


def test_a_run_without_its_record_is_one_line(place, capsys):
    other = copied(place, "unrecorded", run=None)
    for pair in ([place / "one", other], [other, place / "one"]):
        lines = said(capsys, "diff", *pair).splitlines()
        assert lines == [
            f"record: no run.json in {other}: versions and data are not compared",
            "the steps that both have traced (1 to 4) are the same bit for bit",
        ]


@pytest.mark.parametrize(("ours", "theirs"), [([[1], [2]], [[1]]), ([], [[1]]), ([[1]], [])])
def test_steps_with_other_numbers_of_rows_are_not_called_the_same_rows(ours, theirs):
    lines = list(step_apart({"rows": ours, "losses": [1.0]}, {"rows": theirs, "losses": [2.0]}, None))
    said = [f"{len(rows)} row{'' if len(rows) == 1 else 's'}" for rows in (ours, theirs)]
    assert lines == [f"  it has {said[0]} | {said[1]}"]


def test_a_token_of_a_row_was_changed(place, capsys):
    train(place, "others", data="other.jsonl")
    out = said(capsys, "diff", place / "one", place / "others")
    assert "data: train: fingerprint" in out
    step = int(re.search(r"step (\d+) is the first that differs", out)[1])
    (line,) = [line for line in out.splitlines() if "differs from token" in line]
    assert re.search(r"row \d+ differs from token \d+ on: '0\.(<\|im_end\|>)?' \| '1\.(<\|im_end\|>)?'", line)
    rows = json.loads((place / "one" / "trace" / f"step-{step}.json").read_text())["rows"]
    number = int(re.search(r"row (\d+)", line)[1])
    assert "15 + 15 = 30." in byte_tokenizer().decode(rows[number])


def test_without_traces_the_logs_are_compared(place, capsys):
    train(place, "untraced", "--trace_steps", "False", "--seed", 1)
    out = said(capsys, "diff", place / "one", place / "untraced")
    assert "settings: seed: 42 | 1" in out
    assert "step 1 is the first whose log differs" in out
    assert "no step was traced by both runs" in out


@pytest.mark.parametrize("step", [1, 4])
def test_a_step_again(place, capsys, step):
    """From the beginning, and from the checkpoint of step 2."""
    out = said(capsys, "replay", place / "one", "--step", step, "--rows", 1)
    assert ("from the beginning" if step == 1 else "from the checkpoint of step 2") in out
    assert "the same as in the run, bit for bit" in out
    own = json.loads((place / "one" / "trace" / f"step-{step}.json").read_text())
    assert f"gradient {own['gradient']}" in out
    shown = [line for line in out.splitlines() if line.startswith("  '")]
    assert len(shown) == own["learned"][0]


def test_a_step_of_own_samples_again(place, capsys):
    words = ["--reward", "think_format", "--num_generations", 2, "--max_completion_length", 6]
    (place / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"{n} + {n} ="}) for n in range(8)))
    train(place, "sampled", *words, job="grpo", data="prompts.jsonl")
    out = said(capsys, "replay", place / "sampled", "--step", 3)
    assert "the same as in the run, bit for bit" in out


@pytest.mark.parametrize(("moved", "samples"), [(False, True), (True, True), (True, False)])
def test_a_step_in_which_nothing_was_learned_says_so(moved, samples):
    found = {
        "losses": [0.0], "rows": [[1]], "grad_norm": 0.0, "gradient": "0" * 16, "weights_before": "a",
        "weights_after": "b" if moved else "a",
    }  # fmt: skip
    lines = list(told(found, samples))
    assert lines[0] == "loss 0 of 1 micro-batch, 1 row"
    said = "nothing was learned in this step: its loss and gradient are 0"
    more = "; the optimizer moved the weights by what it remembers of earlier steps, or by decay"
    assert said + more * moved in lines
    assert ("  as where the rewards of each group are all alike" in "\n".join(lines)) == samples
    assert said not in "\n".join(told({**found, "losses": [0.0], "grad_norm": 0.1}))  # GRPO's first loss is 0


def test_another_run_is_told_from_it(place, capsys):
    """A trace that somebody has changed is not what is computed."""
    file = place / "one" / "trace" / "step-2.json"
    whole = file.read_text()
    file.write_text(json.dumps(json.loads(whole) | {"gradient": "0" * 16}))
    out = said(capsys, "replay", place / "one", "--step", 2, "--rows", 0)
    file.write_text(whole)
    assert "NOT as in the run: gradient" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--step", "9"], "--step 9: the last step of the run is 4"), (["--step", "0"], "--step")],
)
def test_wrong_steps(place, capsys, words, message):
    assert run(["replay", str(place / "one"), *words]) != 0
    assert message in capsys.readouterr().err
