"""Every config of ours can be read by `HfArgumentParser`, and says the same as when it is constructed."""

import pytest
from transformers import HfArgumentParser, TrainingArguments

import trl

CONFIGS = [name for name in trl.__all__ if name.endswith("Config") and name not in ("ModelConfig",)]
TRAINING = [name for name in CONFIGS if issubclass(getattr(trl, name), TrainingArguments)]


def parsed(name, *words):
    (config,) = HfArgumentParser((getattr(trl, name),)).parse_args_into_dataclasses(
        list(words), look_for_args_file=False
    )
    return config


def settings_of(config):
    """All that a config holds, without what names one moment or process."""
    return {
        name: str(value) for name, value in vars(config).items() if name not in ("logging_dir", "_arguments", "_asked")
    }


def test_the_table_holds_all():
    assert {"SFTConfig", "DPOConfig", "GRPOConfig", "RLOOConfig", "OnlineDPOConfig", "RAFTConfig"} <= set(TRAINING)
    assert set(CONFIGS) - set(TRAINING) == {"PPOConfig", "PPOv2Config", "DDPOConfig", "DatasetMixtureConfig"}


@pytest.mark.parametrize("name", TRAINING)
def test_parsing_equals_constructing(name, tmp_path):
    where = str(tmp_path)
    assert settings_of(parsed(name, "--output_dir", where)) == settings_of(getattr(trl, name)(output_dir=where))


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(TRAINING)))
def test_parsing_equals_constructing_for_other_configs(name):
    assert settings_of(parsed(name)) == settings_of(getattr(trl, name)())


@pytest.mark.parametrize("name", TRAINING)
def test_the_columns_option_of_todays_documentation(name, tmp_path):
    config = parsed(name, "--output_dir", str(tmp_path), "--no_remove_unused_columns")
    assert config.remove_unused_columns is False
    assert getattr(trl, name)(output_dir=str(tmp_path), remove_unused_columns=True).remove_unused_columns is False


@pytest.mark.parametrize(
    ("name", "words", "field", "value"),
    [
        ("DPOConfig", ["--loss_type", "sigmoid", "sft", "--loss_weights", "1", "0.2"], "loss_type", ["sigmoid", "sft"]),
        ("DPOConfig", ["--loss_type", "hinge"], "loss_type", ["hinge"]),
        ("GRPOConfig", ["--scale_rewards", "group"], "scale_rewards", "group"),
        ("GRPOConfig", ["--scale_rewards", "False"], "scale_rewards", "none"),
        ("GRPOConfig", ["--scale_rewards", "True"], "scale_rewards", "group"),
        ("GRPOConfig", ["--reward_timeout", "2.5"], "reward_timeout", 2.5),
        ("GRPOConfig", ["--reward_timeout", "[1, null]"], "reward_timeout", [1, None]),
        ("OnlineDPOConfig", ["--beta", "0.2"], "beta", 0.2),
        ("SFTConfig", ["--model_init_kwargs", '{"dtype": "float32"}'], "model_init_kwargs", {"dtype": "float32"}),
        ("SFTConfig", ["--trust_remote_code"], "trust_remote_code", True),
    ],
)
def test_values_on_a_line(name, words, field, value, tmp_path):
    assert getattr(parsed(name, "--output_dir", str(tmp_path), *words), field) == value


def test_a_wrong_choice_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parsed("GRPOConfig", "--output_dir", str(tmp_path), "--scale_rewards", "sometimes")
    assert "scale_rewards" in capsys.readouterr().err


@pytest.mark.parametrize("name", TRAINING)
def test_the_group_of_todays_scripts_has_no_option_twice(name):
    groups = (trl.ScriptArguments, getattr(trl, name), trl.ModelConfig, trl.DatasetMixtureConfig)
    HfArgumentParser(groups)
    trl.TrlParser(groups)
