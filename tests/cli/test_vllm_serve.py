"""`trl vllm-serve`: what is started, what is said of it, and who may reach it."""

import json
import os

import pytest

from trl.cli.main import run
from trl.scripts import vllm_serve


@pytest.fixture
def started(monkeypatch):
    """Words and environment of what would take the place of this process."""
    made = []
    monkeypatch.setattr(vllm_serve, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_serve, "is_gpu_available", lambda: False)
    monkeypatch.setattr(os, "execvpe", lambda file, words, variables: made.append((words, variables)))
    return made


@pytest.mark.parametrize(
    "words",
    [["folder", "--seed", "3"], ["--port", "8123", "folder", "--seed", "3"], ["--model", "folder", "--seed", "3"]],
)
def test_the_model_may_stand_first_as_with_other_commands(words, started):
    assert run(["vllm-serve", *words]) == 0
    ((line, _),) = started
    assert after(line, "--model") == "folder"
    assert line.count("folder") == 1
    assert line[-2:] == ["--seed", "3"]


def test_without_a_model_it_is_asked_for(started, capsys):
    for words in ([], ["--seed=3"]):
        assert run(["vllm-serve", *words]) == 2
        assert "--model: say what is served" in capsys.readouterr().err
    assert not started


def after(words, flag):
    return words[words.index(flag) + 1]


def test_a_server_for_training(started, capsys):
    assert run(["vllm-serve", "--model", "folder", "--port", "8123", "--max-num-seqs", "64", "--seed=3"]) == 0
    ((words, variables),) = started
    assert words[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert (after(words, "--host"), after(words, "--port"), after(words, "--model")) == ("127.0.0.1", "8123", "folder")
    assert after(words, "--logprobs-mode") == "processed_logprobs"
    assert after(words, "--dtype") == "float32"
    assert "--enable-scale-out" in words
    assert words[-3:] == ["--max-num-seqs", "64", "--seed=3"]
    assert variables["VLLM_SERVER_DEV_MODE"] == "1"
    assert variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    said = capsys.readouterr().out
    assert "--enable-scale-out                     tokens in, tokens out" in said
    assert "--max-num-seqs 64 --seed=3             as you said" in said
    assert "private network" not in said


def test_a_key_reaches_the_server_and_nobody_reads_it(started, capsys):
    line = ["vllm-serve", "--model", "folder", "--api-key", "k-1", "k-2", "--seed", "3", "--hf_token=k-3"]
    assert run(line) == 0
    assert started[0][0][-6:] == line[3:]
    said = capsys.readouterr().out
    assert "k-" not in said.replace("--no-enable-chunked-prefill", "").replace("--scale", "")
    assert "--api-key *** *** --seed 3 --hf_token=***" in said


def test_on_a_gpu(started, monkeypatch):
    monkeypatch.setattr(vllm_serve, "is_gpu_available", lambda: True)
    line = "vllm-serve --model a/b --max-lora-rank 0 --tensor-parallel-size 2 --python /else/python"
    assert run(line.split()) == 0
    ((words, variables),) = started
    assert words[0] == "/else/python"
    assert json.loads(after(words, "--weight-transfer-config")) == {"backend": "nccl"}
    assert after(words, "--tensor-parallel-size") == "2"
    assert "--enable-lora" not in words
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in variables
    assert "--enforce-eager" not in words


def test_another_host_is_warned_of(started, capsys):
    assert run(["vllm-serve", "--model", "a", "--host", "0.0.0.0", "--dry-run"]) == 0
    assert not started
    assert "--host 0.0.0.0: whoever reaches this port can replace the weights" in capsys.readouterr().out


def test_an_adapter_is_served_by_its_base(started, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "its/base"}')
    assert run(["vllm-serve", "--model", str(tmp_path)]) == 0
    assert after(started[0][0], "--model") == "its/base"
    assert "is an adapter: its base its/base is served" in capsys.readouterr().out


def test_a_copy_whose_head_is_its_own(started, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        "trl.generation.vllm.sync.write_untied", lambda source, folder: made.append((source, str(folder)))
    )
    monkeypatch.setenv("TRL_CACHE", str(tmp_path))
    (tmp_path / "some" / "model").mkdir(parents=True)
    names = ["some/model", "other/model", str(tmp_path / "some" / "model")]
    for name in names:
        assert run(["vllm-serve", "--model", name, "--untie-embeddings"]) == 0
    folders = [folder for _, folder in made]
    assert [source for source, _ in made] == names
    assert len(set(folders)) == 3  # all have one last name
    assert all(folder.startswith(str(tmp_path / "untied" / "model-")) for folder in folders)
    assert after(started[0][0], "--model") == folders[0]


@pytest.mark.parametrize("content", ['{"base_model_name_or_path": ', "7"])
def test_an_adapter_that_cannot_be_read_is_one_line(content, started, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text(content)
    assert run(["vllm-serve", "--model", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "adapter_config.json: it " in line
    assert "mend it, or fetch or save the model again" in line


def test_vllm_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(vllm_serve, "is_vllm_available", lambda: False)
    assert run(["vllm-serve", "--model", "a"]) == 2
    assert 'vLLM is not installed here: pip install "vllm>=0.32,<0.33", or name the python' in capsys.readouterr().err
