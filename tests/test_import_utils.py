import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest
import torch

from trl import import_utils

QUESTIONS = {
    "peft": import_utils.is_peft_available,
    "diffusers": import_utils.is_diffusers_available,
    "bitsandbytes": import_utils.is_bitsandbytes_available,
    "torchvision": import_utils.is_torchvision_available,
    "rich": import_utils.is_rich_available,
    "wandb": import_utils.is_wandb_available,
    "deepspeed": import_utils.is_deepspeed_available,
    "liger_kernel": import_utils.is_liger_kernel_available,
    "vllm": import_utils.is_vllm_available,
}


@pytest.mark.parametrize("module", QUESTIONS)
def test_answers_at_the_time_of_the_call(module, monkeypatch):
    assert QUESTIONS[module]() is (importlib.util.find_spec(module) is not None)
    monkeypatch.setitem(sys.modules, module, None)
    assert QUESTIONS[module]() is False
    monkeypatch.setitem(sys.modules, module, torch)
    assert QUESTIONS[module]() is True


def test_a_folder_is_not_an_installed_package(tmp_path, monkeypatch):
    (tmp_path / "surely_not_installed").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("surely_not_installed") is not None
    assert not import_utils.is_installed("surely_not_installed")


@pytest.mark.parametrize(
    ("question", "installed", "answer"),
    [
        (import_utils.is_accelerate_greater_20_0, "0.20.0", True),
        (import_utils.is_accelerate_greater_20_0, "0.9.1", False),
        (import_utils.is_accelerate_greater_20_0, "0.100.0", True),
        (import_utils.is_torch_greater_2_0, "2.0.0+cpu", True),
        (import_utils.is_torch_greater_2_0, "10.1", True),
        (import_utils.is_torch_greater_2_0, "1.13.1", False),
        (lambda: import_utils.is_transformers_greater_than("4.9.0"), "4.31.0", True),
        (lambda: import_utils.is_transformers_greater_than("4.31.0"), "4.31.0", False),
        (lambda: import_utils.is_transformers_greater_than("4.31.0"), "4.9.0", False),
    ],
)
def test_versions_are_compared_as_versions(question, installed, answer, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: installed)
    assert question() is answer


def test_accelerators():
    assert import_utils.is_xpu_available() is torch.xpu.is_available()
    assert import_utils.is_npu_available() is False


def test_asking_loads_nothing_heavy():
    program = (
        "import sys; from trl import import_utils as u; u.is_peft_available(); u.is_torch_greater_2_0();"
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"


def test_trainers_do_not_load_what_only_shows_something():
    program = "import sys, trl; trl.DPOTrainer, trl.GRPOTrainer, trl.RichProgressCallback; print('rich' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_an_unknown_name_of_a_namespace():
    import trl

    with pytest.raises(AttributeError, match="module 'trl' has no attribute 'nothing'"):
        _ = trl.nothing


def test_ppo_step_by_step_needs_no_data_sets():
    """`datasets` and what comes with it take 80 MB."""
    import subprocess
    import sys

    code = "import sys; from trl import PPOConfig, PPOTrainer; print('datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
