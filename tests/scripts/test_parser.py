"""`TrlParser` as its documentation has it."""

import logging
import os
import warnings
from argparse import Namespace
from dataclasses import dataclass

import pytest

from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser, init_zero_verbose
from trl.scripts.data_config import DatasetConfig, DatasetMixtureConfig, GRPOScriptArguments


@dataclass
class MyArguments:
    arg1: int
    arg2: str = "alpha"


@dataclass
class WithConfig:
    config: str = "x"


@pytest.fixture
def write(tmp_path):
    def yaml(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return yaml


def test_the_file_gives_defaults_and_the_environment(write, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    path = write("env:\n  VAR1: 1\narg1: 23\n")
    parser = TrlParser(dataclass_types=[MyArguments])
    assert parser.parse_args_and_config(["--config", path]) == (MyArguments(arg1=23, arg2="alpha"),)
    assert os.environ["VAR1"] == "1"


def test_the_line_wins(write):
    path = write("arg1: 23\narg2: gamma\n")
    for words in (["--config", path, "--arg1", "5"], ["--arg1=5", f"--config={path}"]):
        assert TrlParser(MyArguments).parse_args_and_config(words) == (MyArguments(arg1=5, arg2="gamma"),)


def test_without_a_file():
    assert TrlParser(MyArguments).parse_args_and_config(["--arg1", "5"]) == (MyArguments(arg1=5),)
    with pytest.raises(SystemExit):
        TrlParser(MyArguments).parse_args_and_config([])


def test_the_words_of_the_process(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "--arg1", "7"])
    assert TrlParser(MyArguments).parse_args_and_config() == (MyArguments(arg1=7),)


def test_unknown_settings(write):
    path = write("arg1: 1\nother: 2\n")
    with pytest.raises(ValueError, match="no field is called other"):
        TrlParser(MyArguments).parse_args_and_config(["--config", path])
    known = TrlParser(MyArguments).parse_args_and_config(["--config", path], fail_with_unknown_args=False)
    assert known == (MyArguments(arg1=1),)
    words = ["--config", path, "--more", "3"]
    parsed, rest = TrlParser(MyArguments).parse_args_and_config(words, return_remaining_strings=True)
    assert parsed == MyArguments(arg1=1)
    assert rest == ["--other", "2", "--more", "3"]
    with pytest.raises(ValueError, match=r"--config .*: no field is called args1; did you mean arg1\?"):
        TrlParser(MyArguments).parse_args_and_config(["--config", write("args1: 1")])
    with pytest.raises(ValueError, match=r"'--args2', '3'\]; did you mean --arg2\?"):
        TrlParser(MyArguments).parse_args_and_config(["--arg1", "1", "--args2", "3"])
    with pytest.raises(ValueError, match="'--more', '3'"):
        TrlParser(MyArguments).parse_args_and_config(["--arg1", "1", "--more", "3"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arg1: many\n", "arg1='many': give a whole number"),
        ("arg1: [1\n", "this is not YAML"),
        ("- arg1\n", "give one `setting: value` a line"),
        ("arg1: 1\nenv: X\n", "env='X': give a mapping"),
    ],
)
def test_a_wrong_file_is_named(write, text, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        TrlParser(MyArguments).parse_args_and_config(["--config", write(text)])


def test_a_file_that_is_not_there():
    with pytest.raises(ValueError, match=r"nowhere.yaml: there is no such file"):
        TrlParser(MyArguments).parse_args_and_config(["--config", "nowhere.yaml"])


def test_a_field_config_is_refused():
    with pytest.raises(ValueError, match="WithConfig has a field `config`"):
        TrlParser((MyArguments, WithConfig))


def test_arguments_beside_the_dataclasses(write):
    parser = TrlParser(MyArguments)
    parser.add_argument("--flag", type=int, default=0)
    path = write("arg1: 1\nflag: 3\n")
    assert parser.parse_args_and_config(["--config", path]) == (MyArguments(arg1=1), Namespace(flag=3))


def test_defaults_reach_sub_commands():
    parser = TrlParser()
    commands = parser.add_subparsers()
    one = commands.add_parser("one", dataclass_types=MyArguments)
    assert parser.set_defaults_with_config(arg1=4, other=1) == ["--other", "1"]
    assert one.parse_args_and_config([]) == (MyArguments(arg1=4),)


def test_the_group_of_todays_scripts(write, tmp_path):
    path = write(
        "learning_rate: 1e-5\nmodel-name-or-path: m\nlora_target_modules: all-linear\neval_strategy: no\n"
        "datasets:\n  - path: x\n    columns: [a]\n"
    )
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig))
    words = ["--config", path, "--output_dir", str(tmp_path), "--trust_remote_code", "--lora_r", "8"]
    script, training, model, mixture = parser.parse_args_and_config(words)
    assert script == ScriptArguments()
    assert (training.learning_rate, training.eval_strategy) == (1e-5, "no")
    assert (model.model_name_or_path, model.lora_r, model.lora_target_modules) == ("m", 8, "all-linear")
    assert model.trust_remote_code is training.trust_remote_code is True  # older scripts read it of the model
    assert mixture.datasets == [DatasetConfig("x", columns=["a"])]


def test_objects_are_json_on_the_line(tmp_path):
    from trl import GRPOConfig

    words = ["--output_dir", str(tmp_path), "--chat_template_kwargs", '{"enable_thinking": false}']
    (config,) = TrlParser(GRPOConfig).parse_args_and_config(words)
    assert config.chat_template_kwargs == {"enable_thinking": False}


def test_rewards_are_repeatable():
    words = ["--reward_funcs", "a", "b", "--reward_funcs", "c"]
    (script,) = TrlParser(GRPOScriptArguments).parse_args_into_dataclasses(words)
    assert script.reward_funcs == ["a", "b", "c"]


def test_warnings_become_short_lines(monkeypatch, caplog):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(logging.root, "handlers", list(logging.root.handlers))
    init_zero_verbose()
    with caplog.at_level(logging.WARNING):
        warnings.showwarning("attention", UserWarning, "file.py", 1)
    assert caplog.messages == ["UserWarning: attention"]
