"""Every field of `PPOConfig` has an effect or another test shows it, as `test_config_fields` has it for `Trainer`s."""

from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from ppo_cases import causal
from test_config_fields import HERE

from trl import PPOConfig, PPOTrainer
from trl.trainer.ppo_forms import ONLY_TODAY

BASE = {"batch_size": 4, "mini_batch_size": 2, "learning_rate": 1e-2, "ppo_epochs": 2, "steps": 12,
        "max_new_tokens": 4, "init_kl_coef": 0.2}  # fmt: skip
FAST = {"learning_rate": 0.05, "ppo_epochs": 4}
CHANGED = {
    # field: (settings of both runs, settings that change the second)
    "seed": ({}, {"seed": 1}),
    "steps": ({}, {"steps": 8}),
    "learning_rate": ({}, {"learning_rate": 1e-3}),
    "adap_kl_ctrl": ({"horizon": 10.0}, {"adap_kl_ctrl": False}),
    "init_kl_coef": ({}, {"init_kl_coef": 0.9}),
    "kl_penalty": ({}, {"kl_penalty": "mse"}),
    "target": ({"horizon": 10.0, "target": 100.0, "steps": 16}, {"target": 0.01}),
    "horizon": ({}, {"horizon": 10.0}),
    "gamma": ({}, {"gamma": 0.5}),
    "lam": ({}, {"lam": 0.2}),
    "cliprange": ({}, {"cliprange": 0.001}),
    "cliprange_value": ({}, {"cliprange_value": 0.001}),
    "vf_coef": ({}, {"vf_coef": 0.9}),
    "batch_size": ({"steps": 8}, {"batch_size": 8}),
    "mini_batch_size": ({}, {"mini_batch_size": 1}),
    "gradient_accumulation_steps": ({}, {"gradient_accumulation_steps": 2}),
    "ppo_epochs": ({}, {"ppo_epochs": 1}),
    "max_grad_norm": ({}, {"max_grad_norm": 0.01}),
    "early_stopping": ({**FAST, "target_kl": 1e-9}, {"early_stopping": True}),
    "target_kl": ({**FAST, "early_stopping": True, "target_kl": 9.0}, {"target_kl": 1e-9}),
    "ratio_threshold": ({}, {"ratio_threshold": 0.5}),
    "use_score_scaling": ({}, {"use_score_scaling": True}),
    "use_score_norm": ({"use_score_scaling": True}, {"use_score_norm": True}),
    "score_clip": ({}, {"score_clip": 0.1}),
    "whiten_rewards": ({}, {"whiten_rewards": True}),
    "temperature": ({}, {"temperature": 0.3}),
    "missing_eos_penalty": ({}, {"missing_eos_penalty": 3.0}),
    "stop_token": ({"max_new_tokens": 40}, {"stop_token": "a"}),
    "max_new_tokens": ({}, {"max_new_tokens": 2}),
    "generation_kwargs": ({}, {"generation_kwargs": {"top_k": 2}}),
    "adam_style": ({}, {"adam_style": "tf"}),
    "adam_epsilon": ({}, {"adam_epsilon": 1e-2}),
    "anneal_learning_rate": ({}, {"anneal_learning_rate": True}),
}
SHOWN = {
    "exp_name": ("test_ppo_fields", "test_the_tracker_is_told_every_field"),
    "task_name": ("test_ppo_fields", "test_the_tracker_is_told_every_field"),
    "model_name": ("test_ppo_fields", "test_the_tracker_is_told_every_field"),
    "query_dataset": ("test_ppo_fields", "test_the_tracker_is_told_every_field"),
    "reward_model": ("test_ppo_fields", "test_the_tracker_is_told_every_field"),
    "tracker_project_name": ("test_ppo_fields", "test_the_tracker_is_told_every_field"),
    "tracker_kwargs": ("test_ppo_fields", "test_the_tracker_is_told_every_field"),
    "log_with": ("test_ppo_reports", "test_log_stats"),
    "project_kwargs": ("test_ppo_reports", "test_log_stats"),
    "accelerator_kwargs": ("test_ppo_fields", "test_keywords_reach_the_accelerator"),
    "remove_unused_columns": ("test_ppo_reports", "test_dataloader_drops_what_nobody_takes"),
    "push_to_hub_if_best_kwargs": ("test_ppo_reports", "test_push_if_best"),
    "compare_steps": ("test_ppo_reports", "test_push_if_best"),
    "forward_batch_size": ("test_ppo_config", "test_older_names_are_taken_over"),
    "optimize_cuda_cache": ("test_ppo_config", "test_older_names_are_taken_over"),
    "optimize_device_cache": ("test_ppo_fields", "test_the_cache_is_emptied_after_each_step"),
    "on_non_finite": ("test_guard", "test_ppo_leaves_a_step_out"),
    "max_non_finite_skips": ("test_guard", "test_ppo_leaves_a_step_out"),
    "enable_jit_checkpoint": ("test_signals", "test_ppo_and_ddpo"),
    "overwrite_output_dir": ("test_run_folder", "test_ppo_and_ddpo"),
    "output_dir": ("test_ppo_run", "test_resume_is_exact"),
    "save_steps": ("test_ppo_run", "test_resume_is_exact"),
    **dict.fromkeys(
        (
            "vllm_importance_sampling_correction",
            "vllm_importance_sampling_mode",
            "vllm_importance_sampling_clip_max",
            "vllm_importance_sampling_clip_min",
        ),
        ("test_engine_mismatch", "test_ppo_weighs_what_an_engine_sampled"),
    ),
    "save_total_limit": ("test_ppo_fields", "test_the_newest_checkpoints_stay"),
    "world_size": ("test_ppo_reports", "test_runtime_config"),
    "is_encoder_decoder": ("test_ppo_reports", "test_runtime_config"),
    "is_peft_model": ("test_ppo_reports", "test_runtime_config"),
    "backward_batch_size": ("test_ppo_reports", "test_runtime_config"),
    "global_backward_batch_size": ("test_ppo_reports", "test_runtime_config"),
    "global_batch_size": ("test_ppo_reports", "test_runtime_config"),
}


@pytest.fixture
def make(tiny_tokenizer):
    def build(**settings):
        rows = [{"prompt": text} for text in ("a b c", "d e", "f g h", "i j", "k", "l m n o", "p q", "r s")]
        reward = lambda completions, **columns: [float(len(set(text))) / 9 for text in completions]  # noqa: E731
        return PPOTrainer(
            PPOConfig(**{**BASE, **settings}), causal(), tokenizer=tiny_tokenizer, dataset=Dataset.from_list(rows),
            data_collator=list, reward_funcs=reward,
        )  # fmt: skip

    return build


def outcome(trainer):
    """The trained weights."""
    trainer.train()
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def test_every_field_is_in_a_table():
    own = {entry.name for entry in fields(PPOConfig)} - set(ONLY_TODAY)  # of which `test_ppo_forms` has a table
    assert own == CHANGED.keys() | SHOWN.keys()


@pytest.mark.filterwarnings("ignore:The average ratio:UserWarning", "ignore:KL divergence is starting:UserWarning")
@pytest.mark.parametrize("field", CHANGED)
def test_a_changed_field_changes_the_training(field, make):
    base, change = CHANGED[field]
    assert not torch.equal(outcome(make(**base)), outcome(make(**{**base, **change})))


def test_the_same_run_twice_is_no_change(make):
    """What the test above rests on."""
    assert torch.equal(outcome(make()), outcome(make()))


@pytest.mark.parametrize(("file", "test"), sorted(set(SHOWN.values())))
def test_the_tests_named_here_exist(file, test):
    assert f"def {test}(" in (HERE / f"{file}.py").read_text()


def test_the_tracker_is_told_every_field(make, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "accelerate.Accelerator.init_trackers", lambda self, *args, **kwargs: seen.append((args, kwargs))
    )
    named = {"task_name": "t", "model_name": "m", "query_dataset": "q", "reward_model": "r", "exp_name": "e"}
    make(tracker_project_name="mine", tracker_kwargs={"wandb": {"entity": "us"}}, **named)
    (project, *_), how = seen[0]
    assert project == "mine"
    assert how["init_kwargs"] == {"wandb": {"entity": "us"}}
    told = str(how["config"])
    assert all(f"'{name}': {value!r}" in told for name, value in named.items())


def test_keywords_reach_the_accelerator(make):
    assert make(accelerator_kwargs={"device_placement": False}).accelerator.device_placement is False


def test_the_cache_is_emptied_after_each_step(make, monkeypatch):
    emptied = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: emptied.append(True))
    outcome(make())
    assert not emptied
    outcome(make(optimize_device_cache=True))
    assert len(emptied) == 3
    make()  # the switch is one for all trainers of the process


def test_the_newest_checkpoints_stay(make, tmp_path):
    outcome(make(output_dir=str(tmp_path), save_steps=1, save_total_limit=1))
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1
    outcome(make(output_dir=str(tmp_path / "two"), save_steps=1, save_total_limit=2))
    assert len(list((tmp_path / "two").glob("checkpoint-*"))) == 2
