"""What a training command prints, whole: lines for its user, and none that libraries say of themselves."""

import io
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny

from trl.scripts.exit_codes import exit_code, fail, pointing
from trl.scripts.quiet import quiet, say, weights_line

RUNS = """
import logging, warnings
import datasets, transformers
from trl.cli.main import run

def state():
    filters = logging.getLogger("transformers").handlers[0].filters
    bars = transformers.utils.logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    return bars, list(filters), warnings.showwarning

before = state()
for line in open("lines"):
    print("=====", line.split()[0], flush=True)
    print("=====", run(line.split()), flush=True)
assert state() == before and before[0] == (True, True)
"""
COMMON = "--max_steps 2 --logging_steps 1 --per_device_train_batch_size 4 --report_to none"
LORA = "--lora_rank 2 --gradient_checkpointing true"
REWARD = "--reward mine.py:one"
LINES = {
    "sft": f"sft --model long --data texts.jsonl {COMMON} --output_dir sft",
    "dpo": f"dpo --model model --data pairs.jsonl {COMMON} {LORA} --eval_data pairs.jsonl --eval_strategy steps",
    "reward": f"reward --model model --data pairs.jsonl {COMMON} {LORA} --output_dir reward",
    "grpo": f"grpo --model model --data chats.jsonl {COMMON} {REWARD} --num_generations 4 --max_completion_length 4",
    "ppo": f"ppo --model model --data chats.jsonl {COMMON} {REWARD} --response_length 4 --output_dir ppo",
}
EXPECTED = [
    r"note: learning_rate=\S+, as an adapter takes a higher one than whole weights \(--learning_rate\)",
    r"note: weights of model: missing, so made anew: score\.weight",
    r"note: completions/clipped_ratio \S+: .*",
    r"(train|eval) data: \d+ rows, [\d,]+ tokens(, [\d,]+ learned)?(, [\d,]+ cut)?",
    r"memory: trained weights .*",
    r"What answers earn before training:",
    r"  (empty|constant|echoed prompt|very long|repeated word|own samples) +reward \S+",
    r"reward: .* answers earn .*",
    r"step [12]/2 · .*",
    r"evaluation after step \d+ · .*",
    r"trained 2 steps in .*",
    r"saved to \S+",
    r"[A-Z][a-z ]+: trl (chat|merge|compare|eval) .*",
]
WANTED = {"step 1/2", "step 2/2", "saved to"}


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What each command printed on both streams, in one process without a terminal; with its exit code."""
    folder = tmp_path_factory.mktemp("quiet")
    for name in ("model", "long"):
        tiny.folder(str(folder / name))
    settings = json.loads((folder / "long" / "tokenizer_config.json").read_text())
    (folder / "long" / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 16}))
    for name, rows in (("texts", tiny.TEXTS), ("pairs", tiny.PAIRS), ("chats", tiny.CHAT_PROMPTS)):
        tiny.jsonl(str(folder / f"{name}.jsonl"), rows)
    (folder / "mine.py").write_text(
        "def one(completions, **columns):\n    return [i % 2 for i, _ in enumerate(completions)]\n"
    )
    (folder / "lines").write_text(
        "\n".join(line if "--output_dir" in line else f"{line} --output_dir {name}" for name, line in LINES.items())
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "PYTHONWARNINGS")}
    paths = os.pathsep.join([str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", RUNS], cwd=folder, env=environment | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return dict(re.findall(r"^===== (\w+)\n(.*?)^===== 0$", done.stdout, re.MULTILINE | re.DOTALL)), done.stdout


@pytest.mark.parametrize("name", LINES)
def test_a_command_prints_lines_for_its_user_alone(name, printed):
    shown, whole = printed
    assert name in shown, whole
    lines = shown[name].splitlines()
    assert [line for line in lines if not any(re.fullmatch(each, line) for each in EXPECTED)] == []
    assert {start for start in WANTED for line in lines if line.startswith(start)} == WANTED
    assert "\r" not in shown[name]
    assert "\x1b" not in shown[name]


# -- warnings and notices ------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
def test_a_warning_is_a_line_and_deprecated_names_of_libraries_are_none(capsys):
    shown = warnings.showwarning
    with quiet():
        warnings.warn("You passed a model_id to the SFTTrainer. This will ...")
        warnings.warn("two\nlines")
        warnings.warn_explicit("old name", FutureWarning, "/x/site-packages/peft/y.py", 1, module="peft.y")
        warnings.warn_explicit("too slow", UserWarning, "/x/site-packages/torch/y.py", 1, module="torch.y")
        warnings.warn_explicit("mine is old", FutureWarning, "rewards.py", 1, module="rewards")
    assert capsys.readouterr().err.splitlines() == ["note: two lines", "note: torch: too slow", "note: mine is old"]
    assert warnings.showwarning is shown
    with pytest.warns(UserWarning, match="You passed a model_id"):
        warnings.warn("You passed a model_id to the SFTTrainer. This will ...")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_are_broken_between_words_on_a_terminal(monkeypatch):
    """Notes, errors, and what our own modules log; a file gets whole lines."""
    for stream, broken in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setenv("COLUMNS", "30")
        monkeypatch.setattr(logging.getLogger("trl"), "handlers", [])
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        with quiet():
            say("learning_rate=1e-05, as an adapter takes one")
            logging.getLogger("trl.x").warning("memory: trained weights 19.5 MB float32")
        fail("row 3 of the train data set: no text, a-very-long-name-that-stays-whole")
        wanted = [
            "note: learning_rate=1e-05, as", "  an adapter takes one", "memory: trained weights 19.5", "  MB float32",
            "error: row 3 of the train data", "  set: no text,", "  a-very-long-name-that-stays-whole",
        ]  # fmt: skip
        found = stream.getvalue().splitlines()
        assert found == wanted if broken else len(found) == 3


def test_a_run_without_a_further_row_says_so(capsys):
    import transformers

    text = "There seems not to be a single sample in your epoch_iterator, stopping training at step 6! This is ..."
    with quiet():
        transformers.utils.logging.get_logger("transformers.trainer").warning(text)
    assert capsys.readouterr().err == "note: no row is left to train on: the run ends at step 6\n"


HEAD = "\x1b[1m{} LOAD REPORT\x1b[0m from: some/model\nKey | Status | \n----+-----+-\n"


@pytest.mark.parametrize(
    ("model", "rows", "line"),
    [
        ("LlamaForSequenceClassification", ["lm_head.weight | UNEXPECTED | ", "score.weight   | MISSING    | "],
         "weights of some/model: missing, so made anew: score.weight"),
        ("Qwen2ForCausalLM", ["model.layers.{0, 1}.mlp.up_proj.weight | \x1b[31mMISSING\x1b[0m | ",
                              "v_head.weight | UNEXPECTED | "],
         "weights of some/model: missing, so made anew: model.layers.{0, 1}.mlp.up_proj.weight; not used: "
         "v_head.weight"),
        ("LlamaForCausalLM", [f"a.{name} | MISSING | " for name in "bcdefg"],
         "weights of some/model: missing, so made anew: a.b, a.c, a.d, a.e and 2 more"),
        ("LlamaForTokenClassification", ["lm_head.weight | UNEXPECTED | "], ""),
        ("LlamaForCausalLM", ["lm_head.weight | MISMATCH | Reinit due to size mismatch"], None),
    ],
)  # fmt: skip
def test_a_report_on_weights_is_one_line(model, rows, line):
    assert weights_line(HEAD.format(model) + "\n".join(rows) + "\n\nNotes:\n- MISSING:\tthose params ...") == line
    assert weights_line("another text") is None


def test_what_transformers_says_is_sifted(capsys, monkeypatch):
    import io

    from transformers.utils import logging as theirs

    logger, stream = theirs.get_logger("transformers.x"), io.StringIO()
    handler = logging.getLogger("transformers").handlers[0]
    monkeypatch.setattr(handler, "stream", stream)
    monkeypatch.setattr(logger, "level", logging.WARNING)
    with quiet():
        logger.warning("Token indices sequence length is longer than the specified maximum (40 > 16).")
        logger.warning(HEAD.format("LlamaForCausalLM") + "v_head.weight | UNEXPECTED | ")
        logger.warning("You are resuming training from a checkpoint trained with 1.0")
    assert stream.getvalue().splitlines() == [
        "[transformers] You are resuming training from a checkpoint trained with 1.0"
    ]
    assert capsys.readouterr().err == "note: weights of some/model: not used: v_head.weight\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_for_terminals_and_go_when_they_are_done(terminal, monkeypatch, capsys):
    import datasets
    from transformers.utils import logging as theirs

    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    bars = datasets.utils.tqdm, theirs.tqdm
    datasets.enable_progress_bars()
    theirs.enable_progress_bar()
    for bar in bars:
        with quiet():
            assert list(bar(range(3), desc="each")) == [0, 1, 2]
        shown = capsys.readouterr().err
        assert ("each" in shown) == terminal
        assert shown.split("\r")[-1] == ""
    for bar in bars:
        assert list(bar(range(3), desc="each")) == [0, 1, 2]
        assert "3/3" in capsys.readouterr().err.split("\r")[-1]


# -- errors --------------------------------------------------------------------------------------


def fails(error):
    with pointing("sft", "--max_length"):
        raise error


TIGHT = ("a smaller --max_length takes less, and so does --per_device_train_batch_size with more "
         "--gradient_accumulation_steps, which changes no number")  # fmt: skip


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("row 3 of the train data set: column 'text' should be a text, got 3"),
         "row 3 of the train data set: column 'text' should be a text, got 3 (`trl sft --help` shows a row)"),
        (ValueError("the eval data set lacks the column 'rejected' of a preference row; columns found: a"),
         "the eval data set lacks the column 'rejected' of a preference row; columns found: a (`trl sft --help` shows "
         "a row)"),
        (ValueError("all 8 rows of the train data set are without a learned token: why"),
         "all 8 rows of the train data set are without a learned token: why (`trl inspect sft` with these settings "
         "shows them)"),
        (RuntimeError("reward function 'one' failed: ZeroDivisionError()"),
         "reward function 'one' failed: ZeroDivisionError() (--debug shows where)"),
        (RuntimeError("reward function 'judge' failed: OutOfMemoryError('CUDA out of memory')"),
         "reward function 'judge' failed: OutOfMemoryError('CUDA out of memory') (--debug shows where)"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB of which"),
         f"out of memory, as 20.00 MiB more were asked for ({TIGHT})"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to "
                      "allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)"),
         f"out of memory, as 4.0 GiB more were asked for ({TIGHT})"),
        (MemoryError(), f"out of memory ({TIGHT})"),
        (ValueError("max_length=0: give a number >= 1"), "max_length=0: give a number >= 1"),
        (FileNotFoundError(2, "No such file or directory", "/no/where"), "/no/where: No such file or directory"),
        (PermissionError(13, "Permission denied", b"runs/x"), "runs/x: Permission denied"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (KeyError("x"), "KeyError: 'x' (an unforeseen error; --debug shows where)"),
    ],
)  # fmt: skip
def test_an_errors_line_ends_with_where_more_is_said(error, line, capsys):
    assert exit_code(lambda: fails(error)) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_the_texts_of_errors_are_those_that_are_pointed_from(tmp_path, capsys):
    """The data errors of a command itself, with real settings of the job."""
    from trl.cli.main import run

    model = tiny.folder(str(tmp_path / "model"))
    words = ["--model", model, "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    pair = {"prompt": "a", "chosen": "b"}
    capsys.readouterr()
    for job, row, length, end in (
        ("sft", {"text": 3}, 64, "(`trl sft --help` shows a row)"),
        ("dpo", pair, 64, "(`trl dpo --help` shows a row)"),
        ("dpo", pair | {"rejected": "b"}, 64, "(`trl inspect dpo` with these settings shows them)"),
        ("sft", {"prompt": "abcdefgh", "completion": "c"}, 4, "(`trl inspect sft` with these settings shows them)"),
    ):
        data = tiny.jsonl(str(tmp_path / "rows.jsonl"), [row])
        assert run([job, "--data", data, *words, "--max_length", str(length)]) == 2
        error = capsys.readouterr().err
        assert error.rstrip().endswith(end)
        assert error.count("\n") == 1


@pytest.mark.parametrize(("name", "package"), [("trackio", "trackio"), ("wandb", "wandb"), ("comet_ml", "comet-ml")])
def test_a_tracker_that_is_not_installed_is_told_before_anything_is_loaded(
    name, package, tmp_path, monkeypatch, capsys
):
    from trl.cli.main import run

    monkeypatch.setitem(sys.modules, name, None)
    words = ["sft", "--model", "nowhere", "--data", "no.jsonl", "--output_dir", str(tmp_path), "--report_to", name]
    assert run(words) == 2
    assert capsys.readouterr().err == f"error: report_to={name!r}: it is not installed; pip install {package}\n"
