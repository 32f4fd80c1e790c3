"""DDPOConfig: the release's defaults, and what it refuses."""

import pytest
import torch
from accelerate.state import AcceleratorState
from ddpo_cases import trainer

from trl.trainer.ddpo_config import DDPOConfig


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """accelerate keeps one precision for a process; every test here chooses its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_defaults_are_those_of_the_release():
    expected = {
        "run_name": "", "seed": 0, "log_with": None, "tracker_kwargs": {}, "accelerator_kwargs": {},
        "project_kwargs": {}, "tracker_project_name": "trl", "logdir": "logs", "num_epochs": 100, "save_freq": 1,
        "num_checkpoint_limit": 5, "mixed_precision": "fp16", "allow_tf32": True, "resume_from": "",
        "overwrite_output_dir": False, "enable_jit_checkpoint": False, "on_non_finite": "stop",
        "max_non_finite_skips": 10,
        "sample_num_steps": 50, "sample_eta": 1.0, "sample_guidance_scale": 5.0, "sample_batch_size": 1,
        "sample_num_batches_per_epoch": 2, "train_batch_size": 1, "train_use_8bit_adam": False,
        "train_learning_rate": 3e-4, "train_adam_beta1": 0.9, "train_adam_beta2": 0.999,
        "train_adam_weight_decay": 1e-4, "train_adam_epsilon": 1e-8, "train_gradient_accumulation_steps": 1,
        "train_max_grad_norm": 1.0, "train_num_inner_epochs": 1, "train_cfg": True, "train_adv_clip_max": 5,
        "train_clip_range": 1e-4, "train_timestep_fraction": 1.0, "per_prompt_stat_tracking": False,
        "per_prompt_stat_tracking_buffer_size": 16, "per_prompt_stat_tracking_min_count": 16,
        "async_reward_computation": False, "max_workers": 2, "negative_prompts": "",
    }  # fmt: skip
    assert DDPOConfig(exp_name="test").to_dict() == {"exp_name": "test", **expected}


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_epochs": 0}, {"sample_batch_size": 0}, {"max_workers": 0}, {"sample_eta": 0.0}, {"train_clip_range": 0.0},
        {"mixed_precision": "fp8"}, {"train_timestep_fraction": 1.5}, {"train_timestep_fraction": 0.01},
        {"negative_prompts": ["a", "b"]},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_name_themselves(wrong):
    (name, value) = next(iter(wrong.items()))
    with pytest.raises(ValueError) as error:
        DDPOConfig(**wrong)
    assert name in str(error.value)
    assert repr(value) in str(error.value)
    assert "\n" not in str(error.value)


def test_warnings_of_the_config():
    with pytest.warns(UserWarning, match="only supports image logging"):
        DDPOConfig(log_with="mlflow")
    with pytest.warns(UserWarning, match="ratios do not start at 1"):
        DDPOConfig(train_cfg=False)
    DDPOConfig(train_cfg=False, sample_guidance_scale=1.0)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("trl.trainer.ddpo_config.is_torchvision_available", lambda: False)
    monkeypatch.setattr("trl.trainer.ddpo_config.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match="bitsandbytes"):
        DDPOConfig(train_use_8bit_adam=True)
    with pytest.warns(UserWarning, match="torchvision"):
        DDPOConfig(log_with="wandb")
    monkeypatch.setattr("trl.trainer.ddpo_setup.get_available_trackers", list)
    with pytest.raises(ImportError, match="log_with='tensorboard'"):
        trainer(tmp_path, log_with="tensorboard")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_half_precision_on_a_cpu_says_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="mixed_precision='fp16': needs a GPU; on a CPU choose 'no'"):
        trainer(tmp_path, mixed_precision="fp16")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"sample_batch_size": 1, "train_batch_size": 2}, r"\(1\) must be greater than or equal to .* \(2\)"),
        ({"sample_batch_size": 3, "train_batch_size": 2}, r"\(3\) must be divisible by .* \(2\)"),
        ({"train_gradient_accumulation_steps": 3}, r"samples per epoch \(4\) must be divisible by .* \(3\)"),
    ],
)
def test_sizes_that_do_not_fit(tmp_path, sizes, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **sizes)


@pytest.mark.parametrize("allowed", [True, False])
def test_a_cpu_keeps_its_precision(tmp_path, allowed):
    trainer(tmp_path, allow_tf32=allowed)
    assert torch.get_float32_matmul_precision() == "highest"


def test_no_hook_is_said(tmp_path):
    with pytest.warns(UserWarning, match="No image_samples_hook provided"):
        trainer(tmp_path, hook=None)
