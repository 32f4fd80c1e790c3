"""`ModelConfig` and what follows from it."""

import sys

import pytest

from trl import ModelConfig, get_kbit_device_map, get_peft_config, get_quantization_config
from trl.scripts.model_config import loading_keywords


def test_no_adapter_unless_asked_for():
    assert get_peft_config(ModelConfig(lora_r=8)) is None


def test_an_adapter_as_the_settings_say():
    model = ModelConfig(
        use_peft=True, lora_r=8, lora_alpha=4, lora_dropout=0.1, lora_target_modules=["q_proj", "v_proj"],
        lora_modules_to_save=["lm_head"], lora_task_type="SEQ_CLS", use_rslora=True,
    )  # fmt: skip
    config = get_peft_config(model)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (8, 4, 0.1, "SEQ_CLS")
    assert config.target_modules == {"q_proj", "v_proj"}
    assert (config.modules_to_save, config.use_rslora, config.use_dora, config.bias) == (
        ["lm_head"],
        True,
        False,
        "none",
    )


def test_one_module_is_a_pattern():
    assert (
        get_peft_config(ModelConfig(use_peft=True, lora_target_modules=["all-linear"])).target_modules == "all-linear"
    )


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="use_peft=True: needs the package peft"):
        get_peft_config(ModelConfig(use_peft=True))


def test_quantisation():
    assert get_quantization_config(ModelConfig()) is None
    four = get_quantization_config(ModelConfig(load_in_4bit=True, dtype="bfloat16", use_bnb_nested_quant=True))
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert str(four.bnb_4bit_compute_dtype) == "torch.bfloat16"
    assert get_quantization_config(ModelConfig(load_in_8bit=True)).load_in_8bit
    with pytest.raises(ValueError, match="choose one of them"):
        ModelConfig(load_in_4bit=True, load_in_8bit=True)


def test_a_device_map_needs_an_accelerator():
    import torch

    assert get_kbit_device_map() == ({"": 0} if torch.accelerator.is_available() else None)


def test_names_of_older_releases():
    older = ModelConfig(torch_dtype="float16", trust_remote_code=True)
    assert (older.dtype, older.torch_dtype, older.trust_remote_code) == ("float16", "float16", True)
    assert (ModelConfig().torch_dtype, ModelConfig().trust_remote_code) == (None, False)
    with pytest.raises(ValueError, match="dtype='half': choose one of auto"):
        ModelConfig(dtype="half")


def test_what_from_pretrained_is_told():
    assert loading_keywords(ModelConfig()) == {}
    model = ModelConfig(model_revision="v1", attn_implementation="eager", dtype=None)
    assert loading_keywords(model) == {"revision": "v1", "attn_implementation": "eager"}
    keywords = loading_keywords(ModelConfig(load_in_4bit=True))
    assert keywords["quantization_config"]["load_in_4bit"] is True


@pytest.mark.parametrize("path", ["trl", "trl.trainer", "trl.trainer.model_config", "trl.trainer.utils", "trl.scripts"])
def test_windows_on_the_model(path):
    import importlib

    assert importlib.import_module(path).ModelConfig is ModelConfig
    assert importlib.import_module(path).get_peft_config is get_peft_config


@pytest.mark.parametrize("path", ["trl.commands.cli_utils", "trl.scripts.utils", "trl.scripts"])
def test_windows_on_the_parser(path):
    import importlib

    import trl

    module = importlib.import_module(path)
    assert module.TrlParser is trl.TrlParser
    for name in ("SFTScriptArguments", "DPOScriptArguments", "init_zero_verbose", "ScriptArguments"):
        assert getattr(module, name)


def test_import_statements_of_scripts():
    from trl.commands import cli_utils
    from trl.commands.cli_utils import DPOScriptArguments
    from trl.scripts.utils import DatasetMixtureConfig, ModelConfig, get_dataset  # noqa: F401

    assert cli_utils.DPOScriptArguments is DPOScriptArguments
