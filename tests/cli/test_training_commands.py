"""`trl sft` and its like: a trainer on a file of rows."""

import json

import pytest
from tiny_models import word_model

from trl.cli.main import COMMANDS, Training, run
from trl.scripts.describe import field_docs

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning", "ignore:You passed a model_id")


@pytest.fixture
def model(tmp_path):
    word_model(tmp_path / "model", hidden_size=32, intermediate_size=48, num_attention_heads=4)
    return str(tmp_path / "model")


def rows(tmp_path, *examples):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in examples))
    return str(path)


COMMON = ["--max_steps", "1", "--per_device_train_batch_size", "4", "--report_to", "none", "--save_strategy", "no"]


def test_sft_from_yaml_and_the_line(tmp_path, model, capsys):
    data = rows(tmp_path, *[{"text": "a b c"}, {"text": "b c d e"}] * 4)
    config = tmp_path / "sft.yaml"
    config.write_text(
        f"model: {model}\ndata: {data}\nlearning_rate: 1e-3\nmax_length: 16\noutput_dir: {tmp_path}/out\n"
    )
    assert run(["sft", "--config", str(config), *COMMON, "--max_length", "8"]) == 0
    out = capsys.readouterr().out
    assert f"saved to {tmp_path}/out\nTalk to it: trl chat {tmp_path}/out\nSee whether it is better: trl com" in out
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_dpo_with_lora(tmp_path, model, capsys):
    data = rows(tmp_path, *[{"prompt": "a b ", "chosen": "c d", "rejected": "e"}] * 8)
    out = tmp_path / "out"
    words = ["dpo", "--model", model, "--data", data, "--lora-rank", "2", "--output_dir", str(out), *COMMON]
    assert run(words) == 0
    assert (out / "adapter_model.safetensors").exists()
    assert f": trl merge {out} --output {out}-merged\n" in capsys.readouterr().out


def test_the_same_line_makes_the_same_adapter(tmp_path, model):
    """Also one of another seed makes another; `torch` begins each process with a seed of its own."""
    import torch
    from safetensors.torch import load_file

    data = rows(tmp_path, *[{"text": "a b c"}, {"text": "b c d e"}] * 4)
    made = []
    for at, seed in enumerate((3, 3, 4)):
        torch.seed()
        words = ["sft", "--model", model, "--data", data, "--lora-rank", "2", "--seed", str(seed), *COMMON]
        assert run([*words, "--output_dir", str(tmp_path / str(at))]) == 0
        made.append(load_file(tmp_path / str(at) / "adapter_model.safetensors"))
    equal = [all(torch.equal(made[0][name], other[name]) for name in made[0]) for other in made[1:]]
    assert equal == [True, False]


@pytest.mark.parametrize(
    ("saves", "said"), [(1, "goes on from step 1"), (500, "no checkpoint was saved (--save_steps)")]
)
def test_an_interrupted_run_says_how_it_goes_on(saves, said, tmp_path, model, capsys):
    (tmp_path / "mine.py").write_text(
        "calls = []\ndef stop(completions, **columns):\n    calls.append(1)\n    if len(calls) > 1:\n"
        "        raise KeyboardInterrupt\n    return [1.0 for _ in completions]\n"
    )
    data = rows(tmp_path, *[{"prompt": "a b"}] * 8)
    words = ["grpo", "--model", model, "--data", data, "--reward", f"{tmp_path}/mine.py:stop", "--max_steps", "3"]
    more = ["--num_generations", "4", "--max_completion_length", "4", "--per_device_train_batch_size", "4"]
    out = ["--save_steps", str(saves), "--report_to", "none", "--output_dir", str(tmp_path / "out")]
    assert run([*words, *more, *out]) == 130
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == "interrupted"
    assert said in told[-2]


def test_grpo_with_a_function_of_a_file(tmp_path, model):
    data = rows(tmp_path, *[{"prompt": "a b"}] * 8)
    (tmp_path / "mine.py").write_text(
        "def count(prompts, completions, **columns):\n    return [len(c) for c in completions]\n"
    )
    words = ["grpo", "--model", model, "--data", data, "--reward", f"{tmp_path}/mine.py:count", *COMMON]
    more = ["--output_dir", str(tmp_path / "out"), "--num_generations", "4", "--max_completion_length", "4"]
    assert run([*words, *more]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sft", "--data", "x.jsonl"], "--model: say which"),
        (["sft", "--model", "m", "--data", "nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
        (["sft", "--model", "m", "--data", "x", "--max_length", "0"], "max_length=0"),
        (["sft", "--model", "m", "--data", "x", "--no_such_field", "0"], "no_such_field"),
        (["sft", "--config", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["grpo", "--model", "m", "--data", "x"], "--reward: say what to reward"),
        (["sft", "--model", "m", "--data", "x", "--reward", "length"], "learns from its data"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, message, capsys):
    assert run(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("words", [["sft"], ["plan", "sft"], ["sft", "--seeds", "2"]])
def test_a_folder_that_cannot_be_written_is_told_before_the_model_is_asked_for(words, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    data = rows(tmp_path, {"text": "a b"})
    out = ["--output_dir", str(tmp_path / "file" / "out"), "--report_to", "none"]
    assert run([*words, "--model", "./no-such-model", "--data", data, *out]) == 2
    error = capsys.readouterr().err
    assert "cannot be written (Not a directory): give a folder that can" in error
    assert "no-such-model" not in error


@pytest.mark.parametrize("name", [name for name, entry in COMMANDS.items() if isinstance(entry, Training)])
def test_fields_are_listed_with_their_meaning(name, capsys):
    assert run([name, "--fields"]) == 0
    assert "--learning_rate" in capsys.readouterr().out


def test_field_docs_reach_through_parents():
    import trl

    docs = field_docs(trl.GRPOConfig)
    assert "temperature" in docs
    assert "loss_type" in docs
    assert "bf16" in docs


def test_an_entry_in_the_table_is_all_that_a_command_needs(tmp_path, model, capsys, monkeypatch):
    monkeypatch.setitem(COMMANDS, "raft", Training("RAFTTrainer", "Imitate the best completions.", rewards=True))
    assert run(["--help"]) == 0
    assert "Imitate the best completions." in capsys.readouterr().out
    assert run(["raft", "--fields"]) == 0
    assert "--keep_best" in capsys.readouterr().out
    data = rows(tmp_path, *[{"prompt": "a b"}] * 8)
    words = ["raft", "--model", model, "--data", data, "--reward", "repetition", "--output_dir", str(tmp_path / "out")]
    assert run([*words, *COMMON, "--max_completion_length", "4", "--num_generations", "4"]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert run(["sft", "--fields"]) == 0
