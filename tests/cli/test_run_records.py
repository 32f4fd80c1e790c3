"""What a training command leaves in its folder: what the run was, on what, how it went and how it ended."""

import json
import math
import os
import re
import signal

import pytest
import yaml
from tiny_models import word_model
from transformers import TrainerCallback

import trl
from trl.cli.main import COMMANDS, Training, run
from trl.scripts.parser import read_yaml
from trl.scripts.training import JobParser, merged
from trl.trainer.run_record import OURS, RunFolderCallback, command_line, config_text, resolved

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning", "ignore:You passed a model_id")
ROWS = {
    "sft": [{"prompt": "a b ", "completion": "c d"}, {"prompt": "b ", "completion": "e"}],
    "dpo": [{"prompt": "a b ", "chosen": "c d", "rejected": "e"}],
    "grpo": [{"prompt": "a b"}],
    "ppo": [{"prompt": "a b"}],
}
COMMON = ["--logging_steps", "1", "--per_device_train_batch_size", "4", "--report_to", "none", "--use_cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    word_model(folder / "model", num_hidden_layers=1)
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows * (8 // len(rows)))))
    (folder / "mine.py").write_text(
        "def one(completions, **columns):\n    return [float(i % 2) for i in range(len(completions))]\n"
    )
    return folder


def words(name, place, out, *more):
    line = [name, "--model", f"{place}/model", "--data", f"{place}/{name}.jsonl", "--output_dir", str(out), *COMMON]
    if name == "grpo":
        line += ["--reward", f"{place}/mine.py:one", "--num_generations", "4", "--max_completion_length", "4"]
    return [*line, *more]


def record_of(folder):
    return json.loads((folder / "run.json").read_text(), parse_constant=pytest.fail)


def lines_of(folder):
    return [
        json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


# -- the files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_the_folder_of_a_command_says_what_it_was(name, place, tmp_path):
    out = tmp_path / "out"
    assert run(words(name, place, out, "--max_steps", "3", "--learning_rate", "1e-3", "--save_strategy", "no")) == 0
    record, logged = record_of(out), lines_of(out)
    assert [line["step"] for line in logged] == [1, 2, 3, 3]
    assert all(math.isfinite(value) for line in logged for value in line.values() if isinstance(value, float))
    assert (record["status"], record["how"], record["step"], record["max_steps"]) == ("finished", "", 3, 3)
    assert record["trainer"] == COMMANDS[name].trainer
    assert record["command"].startswith(f"trl {name} --model {place}/model")
    assert record["versions"]["trl"] == trl.__version__
    assert {"python", "platform", "torch", "transformers", "accelerate"} <= set(record["versions"])
    data, file = record["data"]["train"], f"{place}/{name}.jsonl"
    assert (data["name"], data["rows"], data["files"][file]) == (file, 8, os.path.getsize(file))
    assert data["fingerprint"]
    assert data["met"][0].startswith("train data: 8 rows")
    assert record["seconds"]["wall"] > 0 < record["seconds"]["cpu"]
    assert record["peak_memory"]["bytes"] > 1e7
    assert record["settings"]["learning_rate"] == 1e-3
    assert "weight_decay" not in record["settings"]
    assert record["parameters"] == record["trained"] > 0
    card = (out / "README.md").read_text()
    assert f"| source | {name}.jsonl |" in card
    assert f"(`{COMMANDS[name].trainer}` of trl), 3 steps." in card
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 4
    assert ("Samples over time" in page) == (name == "grpo")
    text = (out / "config.yaml").read_text()
    assert text.startswith(OURS)
    assert text.index("\nlearning_rate: 0.001") < text.index("# at the default") < text.index("\nweight_decay:")


def test_a_run_with_a_critic_does_too(place, tmp_path, capsys):
    line = words("ppo", place, tmp_path, "--max_steps", "2", "--save_strategy", "no", "--response_length", "4")
    assert run([*line, "--reward", f"{place}/mine.py:one"]) == 0
    record = record_of(tmp_path)
    assert (record["status"], record["trainer"], record["step"]) == ("finished", "PPOTrainer", 2)
    assert record["data"]["train"]["rows"] == 8
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]
    assert "(`PPOTrainer` of trl), 2 steps." in (tmp_path / "README.md").read_text()
    assert "objective" not in (tmp_path / "config.yaml").read_text()
    shown = capsys.readouterr().out.splitlines()
    assert [line.partition(" · ")[0] for line in shown if line.startswith("step")] == ["step 1/2", "step 2/2"]


@pytest.mark.parametrize("name", [name for name, entry in COMMANDS.items() if isinstance(entry, Training)])
def test_the_settings_are_read_back(name, tmp_path, capsys):
    """Of every command: the file that a run writes gives the same run again."""
    job, line = (
        COMMANDS[name],
        ["--model", "m", "--data", "d", "--output_dir", str(tmp_path), "--learning_rate", "2e-6"],
    )
    line += ["--lora-rank", "4", "--logging_steps", "0.25", "--hub_token", "hf_secret", "--lr_scheduler_type", "cosine"]
    parser = JobParser(job)
    first = parser.parse_dict(merged(job, {}, parser.settings_of_words(line)))
    text = config_text(first, parser.reads)
    assert "hf_secret" not in text
    (tmp_path / "config.yaml").write_text(text)
    again = JobParser(job)
    given = again.settings_of_file(read_yaml(tmp_path / "config.yaml"))
    second = again.parse_dict(merged(job, given, {}))
    assert {x.name: x.now for x in resolved(first)} == {x.name: x.now for x in resolved(second)}
    assert yaml.safe_load(config_text(second, again.reads)) == yaml.safe_load(text)
    assert {"lora_r": 4, "lora_alpha": 8, "logging_steps": 0.25}.items() <= given.items()


def test_a_run_by_its_own_settings(place, tmp_path, capsys):
    """And what stands at its default is no setting without effect."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(words("sft", place, first, "--max_steps", "2", "--save_strategy", "no", "--seed", "3")) == 0
    assert run(["sft", "--config", str(first / "config.yaml"), "--output_dir", str(second)]) == 0
    assert "note:" not in capsys.readouterr().err
    one, two = ([line.get("loss") for line in lines_of(folder)] for folder in (first, second))
    assert one == two
    assert record_of(second)["settings"] == record_of(first)["settings"] | {"output_dir": str(second)}


def test_a_config_of_the_users_stays(place, tmp_path):
    mine = f"model: {place}/model\ndata: {place}/sft.jsonl\n"
    (tmp_path / "config.yaml").write_text(mine)
    line = ["sft", "--config", str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path), *COMMON]
    assert run([*line, "--max_steps", "1", "--save_strategy", "no"]) == 0
    assert (tmp_path / "config.yaml").read_text() == mine
    assert yaml.safe_load((tmp_path / "config-of-run.yaml").read_text())["max_steps"] == 1
    page = re.sub("</?span>", "", (tmp_path / "report.html").read_text())
    assert f"trl sft --config {tmp_path}/config-of-run.yaml" in page


def test_a_new_run_puts_the_record_of_another_aside(place, tmp_path):
    line = words("sft", place, tmp_path, "--max_steps", "1", "--save_strategy", "no")
    assert run(line) == run([*line, "--seed", "7"]) == 0
    aside = tmp_path / "earlier-1"
    assert {path.name for path in aside.iterdir()} == {"metrics.jsonl", "run.json", "report.html"}
    assert "seed" not in record_of(aside)["settings"]
    assert (record_of(tmp_path)["settings"]["seed"], record_of(tmp_path)["earlier"]) == (7, [])


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["--hub_token", "hf_a", "--seed", "1"], "--hub_token ... --seed 1"),
        (["--hub-token=hf_a", "-x"], "--hub-token=... -x"),
        (["--push_to_hub_token", "hf a", "--run_name", "it's"], "--push_to_hub_token ... --run_name 'it'\"'\"'s'"),
        (["--pad_token", "<pad>", "--hub_token", "--bf16"], "--pad_token '<pad>' --hub_token --bf16"),
    ],
)
def test_secrets_of_the_line_are_not_written(given, shown):
    assert command_line(given) == shown


# -- how a run ends ------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_with_them(place, tmp_path):
    out, save = tmp_path / "out", ["--save_strategy", "steps", "--save_steps", "2", "--lr_scheduler_type", "constant"]
    assert run(words("sft", place, out, "--max_steps", "2", *save)) == 0
    assert run(words("sft", place, out, "--max_steps", "4", *save, "--resume_from_checkpoint", "True")) == 0
    record = record_of(out)
    assert (record["status"], record["step"], record["resumed_from"]) == ("finished", 4, 2)
    assert [(part["status"], part["step"]) for part in record["earlier"]] == [("finished", 2)]
    assert "earlier" not in record["earlier"][0]
    assert [line["step"] for line in lines_of(out) if "loss" in line] == [1, 2, 3, 4]


class Ends(TrainerCallback):
    def __init__(self, how):
        self.how = how

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            if isinstance(self.how, BaseException):
                raise self.how
            if self.how == "term":
                os.kill(os.getpid(), signal.SIGTERM)
            control.should_training_stop = self.how == "early"


@pytest.mark.parametrize(
    ("how", "status", "line", "code"),
    [
        (RuntimeError("the disk\nis on fire"), "failed", "RuntimeError: the disk is on fire", 2),
        (KeyError("x"), "failed", "KeyError: 'x'", 2),
        (KeyboardInterrupt(), "stopped", "by an interruption (Ctrl-C) after step 2", 130),
        ("early", "stopped", "by a callback after step 2 of 5", 0),
        ("term", "stopped", "by SIGTERM after step 3, which is saved", 143),
    ],
)
def test_the_end_is_told(how, status, line, code, place, tmp_path, monkeypatch):
    begin, seen = RunFolderCallback.on_train_begin, []

    def with_another(self, *given, model, **named):
        begin(self, *given, model=model, **named)
        seen.append(record_of(tmp_path)["status"])

    monkeypatch.setattr(RunFolderCallback, "on_train_begin", with_another)
    monkeypatch.setattr(RunFolderCallback, "on_step_end", lambda self, *given, **_: Ends(how).on_step_end(*given))
    try:
        ended = run(words("sft", place, tmp_path, "--max_steps", "5", "--save_strategy", "no"))
    except SystemExit as end:
        ended = end.code
    assert ended == code
    record = record_of(tmp_path)
    assert (seen, record["status"], record["how"]) == (["running"], status, line)
    assert f"{status.capitalize()} {line}".replace("'", "&#39;") in (tmp_path / "report.html").read_text()


def test_what_fails_after_training_is_told(place, tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError("no space")

    monkeypatch.setattr(trl.SFTTrainer, "save_model", full)
    assert run(words("sft", place, tmp_path, "--max_steps", "1", "--save_strategy", "no")) == 2
    assert (record_of(tmp_path)["status"], record_of(tmp_path)["how"]) == ("failed", "OSError: no space")


def test_a_refused_run_leaves_the_record(place, tmp_path):
    """Another run's folder: nothing of it is touched."""
    out = tmp_path / "out"
    assert run(words("sft", place, out, "--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1")) == 0
    before = (out / "run.json").read_text(), (out / "config.yaml").read_text()
    assert run(words("sft", place, out, "--max_steps", "2")) == 2
    assert ((out / "run.json").read_text(), (out / "config.yaml").read_text()) == before


def test_a_report_that_fails_ends_no_run(place, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise OSError("no space for it")

    monkeypatch.setattr("trl.reports.run_report.write_report", broken)
    assert run(words("sft", place, tmp_path, "--max_steps", "1", "--save_strategy", "no")) == 0
    assert "note: report.html is not written: no space for it" in capsys.readouterr().err.splitlines()


# -- library runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["given", "added"])
def test_a_run_of_the_library(name, place, tmp_path, tiny_tokenizer):
    from transformers import AutoModelForCausalLM

    callback = trl.RunFolderCallback()
    args = trl.DPOConfig(
        str(tmp_path), max_steps=1, report_to="none", save_strategy="no", beta=0.3, use_cpu=True, logging_steps=1
    )
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(place / "model"), args=args, processing_class=tiny_tokenizer,
        train_dataset=ROWS["dpo"] * 4, callbacks=[callback] if name == "given" else None,
    )  # fmt: skip
    if name == "added":
        trainer.add_callback(callback)
    trainer.train()
    record = record_of(tmp_path)
    assert (record["status"], record["trainer"], record["step"]) == ("finished", "DPOTrainer", 1)
    assert record["data"]["train"]["rows"] == 4
    assert record["settings"]["beta"] == 0.3
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["beta"] == 0.3
    assert (record["model"], record["earlier"]) == (str(place / "model"), [])
    trainer.train()
    assert len(record_of(tmp_path)["earlier"]) == 1
