"""`--seeds` of the training commands and its report; `trl serve`."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from tiny_models import byte_model, lora
from transformers import AutoModelForCausalLM

from trl.cli.main import run
from trl.reports.spread import Figure, read_spread, render, spread_lines
from trl.scripts import serve

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning", "ignore:You passed a model_id")
SHORT = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--report_to", "none", "--save_strategy", "no"]


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    byte_model("base")
    rows = [{"text": text} for text in ("one two", "three", "four five six", "seven", "eight", "nine ten")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


# -- several seeds -------------------------------------------------------------------------------


def test_three_seeds_are_three_runs_and_a_report(base, capsys):
    words = ["sft", "--model", "base", "--data", "rows.jsonl", "--logging_steps", "1", *SHORT]
    assert run([*words, "--seeds", "3", "--seed", "5", "--output_dir", "out"]) == 0
    out = capsys.readouterr().out
    found = read_spread(Path("out"))
    assert list(found.runs) == [5, 6, 7]
    assert [one.record["settings"]["seed"] for one in found.runs.values()] == [5, 6, 7]
    (loss,) = (figure for figure in found.figures if figure.name == "loss")
    last = [one.series["loss"].known[-1] for one in found.runs.values()]
    assert loss.values == last
    assert len(set(last)) == 3
    assert "3 seeds (5, 6, 7), mean ± standard deviation between them:" in out
    assert f"  loss {loss} (" in out
    assert "Talk to it: trl chat out/seed-7" in out
    assert "wrote out/report.html" in out
    alone = ["--seed", "6", "--output_dir", "alone"]
    assert run([*words, *alone]) == 0
    weights = [AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("alone", "out/seed-6")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert read_spread(Path("out")).runs[6].record["command"].endswith("--seeds 1 --seed 6 --output_dir out/seed-6")
    (base / "out" / "report.html").unlink()
    assert run(["report", "out"]) == 0
    page = (base / "out" / "report.html").read_text()
    assert "3 seeds, 2 steps each" in page
    assert not re.search(r"""(src|href)\s*=|url\(|@import|<script|<link|https?://""", page)


def test_a_figure_of_seeds_by_hand():
    figure = Figure("loss", [1.0, 2.0, 4.0], "")
    assert figure.mean == pytest.approx(7 / 3)
    assert figure.deviation == pytest.approx((((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2) ** 0.5)
    assert str(figure) == "2.33 ± 1.53"
    assert str(Figure("loss", [1.0], "")) == "1"


def seed_folder(place, seed, losses, status="finished"):
    folder = place / f"seed-{seed}"
    folder.mkdir(parents=True)
    record = {"status": status, "trainer": "SFTTrainer", "command": "trl sft <b>", "step": len(losses)}
    (folder / "run.json").write_text(json.dumps(record))
    lines = [{"step": step, "loss": loss, "eval_loss": loss + 1} for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_the_spread_of_runs_that_differ(tmp_path):
    seed_folder(tmp_path, 10, [3.0, 2.0, 1.0, 1.0])
    seed_folder(tmp_path, 9, [3.0, 2.0, 2.0, 2.0], "failed")
    found = read_spread(tmp_path)
    assert [(figure.name, figure.values) for figure in found.figures] == [
        ("eval_loss", [3.0, 2.0]), ("loss", [2.0, 1.0]),
    ]  # fmt: skip
    assert spread_lines(found)[-1] == "  not finished: seed 9 failed"
    page = render(found)
    assert "Not finished: seed 9 failed" in page
    assert "<b>" not in page.replace("<b>1.5</b>", "").replace("<b>2.5</b>", "")


@pytest.mark.parametrize("words", [["diff", "three", "three"], ["replay", "three", "--step", "1"], ["chat", "three"],
                                   ["eval", "three", "--data", "rows.jsonl"]])  # fmt: skip
def test_a_folder_of_seeds_where_one_run_is_wanted(words, base, capsys):
    for seed in (10, 9):
        seed_folder(base / "three", seed, [1.0])
    assert run(words) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: three: a run of each of 2 seeds lies there: choose one, three/seed-9 or three/seed-10 (`trl report` "
        "shows all)"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "seeds=0: give 1 or more"),
        (["--seeds", "2", "--push_to_hub"], "one model is pushed; push the folder that you choose"),
        (["--seeds", "2", "--resume_from_checkpoint", "out/checkpoint-1"], "each goes on with its own newest one"),
    ],
)
def test_seeds_that_cannot_be(words, message, base, capsys):
    assert run(["sft", "--model", "base", "--data", "rows.jsonl", *words, *SHORT]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_seed_that_fails_ends_the_line_and_what_is_there_is_reported(base, monkeypatch, capsys):
    from trl.trainer.sft_trainer import SFTTrainer

    real, calls = SFTTrainer.train, []

    def train(self, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("the second one")
        return real(self, **keywords)

    monkeypatch.setattr(SFTTrainer, "train", train)
    words = ["sft", "--model", "base", "--data", "rows.jsonl", "--logging_steps", "1", *SHORT]
    assert run([*words, "--seeds", "3", "--output_dir", "out"]) == 2
    out, error = capsys.readouterr()
    assert "error: the second one" in error
    assert "1 seed (42), which has no spread:" in out
    assert len(calls) == 2


# -- trl serve -----------------------------------------------------------------------------------

SERVER = """#!{python}
import json, os, signal, sys, time
place = sys.argv[2]
found = {{"words": sys.argv[1:], "files": sorted(os.listdir(place)), "place": os.path.abspath(place)}}
open({seen!r}, "w").write(json.dumps(found))
if "--wait" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    open("ready", "w").write("")
    time.sleep(60)
sys.exit(3 if "--fail" in sys.argv else 0)
"""


@pytest.fixture
def server(base, monkeypatch):
    """Programs that write down how they were called."""
    for name in ("vllm", "transformers"):
        path = base / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(SERVER.format(python=sys.executable, seen=str(base / "seen.json")))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(serve, "program", lambda engine: str(base / "bin" / engine))
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: True)
    return base


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def test_a_model_is_served_by_transformers(server, capsys):
    port = free_port()
    assert run(["serve", "base", "--port", port, "--", "--dtype", "float32"]) == 0
    seen = json.loads((server / "seen.json").read_text())
    assert seen["words"] == ["serve", "base", "--host", "127.0.0.1", "--port", port, "--dtype", "float32"]
    out = capsys.readouterr().out
    assert f"running: transformers serve base --host 127.0.0.1 --port {port} --dtype float32" in out
    assert run(["serve", "base", "--port", port, "--", "--api-key", "k-1"]) == 0
    assert json.loads((server / "seen.json").read_text())["words"][-2:] == ["--api-key", "k-1"]
    assert f"--port {port} --api-key '***'" in capsys.readouterr().out


def test_an_adapter_is_merged_for_as_long_as_it_is_served(server, capsys):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained("base")
    peft.get_peft_model(model, lora()).save_pretrained("run")
    assert run(["serve", "run", "--engine", "transformers", "--port", free_port(), "--", "--fail"]) == 3
    seen = json.loads((server / "seen.json").read_text())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(seen["files"])
    assert "adapter_config.json" not in seen["files"]
    assert seen["words"][:2] == ["serve", "run"]  # the name that clients ask for
    assert Path(seen["place"]).parent.name.startswith("trl-serve-")
    assert not Path(seen["place"]).exists()
    assert "run is an adapter: it is merged into base for the server" in capsys.readouterr().err
    assert run(["serve", "run", "--engine", "transformers", "--print"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "trl merge run --output run-merged", "transformers serve run-merged --host 127.0.0.1 --port 8000",
    ]  # fmt: skip


def test_vllm_is_taken_where_it_is_installed(server, monkeypatch, capsys):
    monkeypatch.setattr(serve, "is_installed", lambda name: name == "vllm")
    assert run(["serve", "base", "--print", "--host", "0.0.0.0"]) == 0
    out = capsys.readouterr().out.strip()
    assert out == "vllm serve base --host 0.0.0.0 --port 8000 --served-model-name base"


def test_sigterm_reaches_the_server(server):
    code = (
        "import sys; from trl.scripts import serve; from trl.cli.main import run\n"
        f"serve.program = lambda engine: {str(server / 'bin')!r} + '/' + engine\n"
        "serve.engine_of = lambda asked: 'vllm'\n"
        f"sys.exit(run(['serve', 'base', '--port', '{free_port()}', '--', '--wait']))"
    )
    place = {"PYTHONPATH": str(Path(serve.__file__).parents[2])}
    child = subprocess.Popen([sys.executable, "-c", code], env=os.environ | place)
    while not (server / "ready").exists():
        assert child.poll() is None
        signal.sigtimedwait([], 0.05)
    child.send_signal(signal.SIGTERM)
    assert child.wait() == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], 'no program to serve with is installed: pip install vllm or pip install "transformers[serving]"'),
        (["--engine", "vllm"], "no program to serve with is installed: pip install vllm"),
        (["--engine", "other"], "'other' is not one of"),
    ],
)
def test_what_lacks_to_serve_is_one_line(words, message, base, monkeypatch, capsys):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    monkeypatch.setattr(serve, "is_installed", lambda name: False)
    assert run(["serve", "base", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(server, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert run(["serve", "base", "--port", port]) == 2
    assert f"--host 127.0.0.1 --port {port}: cannot listen there" in capsys.readouterr().err
    assert not (server / "seen.json").exists()
