"""PPOConfig: the seed's fields, errors and command line."""

import sys
import warnings

import numpy as np
import pytest
import torch
import tyro
from ppo_cases import batch, causal

from trl import PPOConfig, PPOTrainer
from trl.rollout.rewards import Rewards

SEED_DEFAULTS = {
    "seed": 0, "log_with": None, "task_name": None, "model_name": None, "query_dataset": None, "reward_model": None,
    "remove_unused_columns": True, "tracker_project_name": "trl", "steps": 20000, "learning_rate": 1e-5,
    "adap_kl_ctrl": True, "init_kl_coef": 0.2, "kl_penalty": "kl", "target": 6, "horizon": 10000, "gamma": 1,
    "lam": 0.95, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "batch_size": 256,
    "forward_batch_size": None, "mini_batch_size": 1, "gradient_accumulation_steps": 1, "world_size": None,
    "ppo_epochs": 4, "max_grad_norm": None, "optimize_cuda_cache": None, "optimize_device_cache": False,
    "early_stopping": False, "target_kl": 1, "compare_steps": 1, "ratio_threshold": 10.0, "use_score_scaling": False,
    "use_score_norm": False, "score_clip": None, "whiten_rewards": False, "is_encoder_decoder": None,
    "is_peft_model": None, "backward_batch_size": 1, "global_backward_batch_size": None, "global_batch_size": None,
    "total_ppo_epochs": 79,
}  # fmt: skip


def test_defaults_of_the_seed():
    numbers = PPOConfig().to_dict()
    assert "exp_name" in numbers
    assert {name: numbers[name] for name in SEED_DEFAULTS} == SEED_DEFAULTS


def test_to_dict_flattens_keyword_fields():
    config = PPOConfig(tracker_kwargs={"wandb": {"name": "run"}}, push_to_hub_if_best_kwargs={"repo_id": "me/it"})
    numbers = config.to_dict()
    assert numbers["tracker_kwargs/wandb/name"] == "run"
    assert numbers["push_to_hub_if_best_kwargs/repo_id"] == "me/it"


def test_derived_numbers():
    config = PPOConfig(batch_size=32, mini_batch_size=4, gradient_accumulation_steps=2, steps=100)
    assert config.backward_batch_size == 8
    assert config.total_ppo_epochs == 4


def test_indivisible_batch():
    with pytest.raises(ValueError, match=r"must be a multiple of .* inexact division: 2 / 4 = 0.5"):
        PPOConfig(batch_size=2, mini_batch_size=2, gradient_accumulation_steps=2)


def test_kl_penalty():
    with pytest.raises(AssertionError, match="kl_penalty='js'"):
        PPOConfig(kl_penalty="js")


def test_wandb_must_be_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="Please install wandb to use wandb logging"):
        PPOConfig(log_with="wandb")


def test_older_names_are_taken_over():
    with pytest.warns(UserWarning, match="`forward_batch_size` is deprecated"):
        assert PPOConfig(batch_size=8, forward_batch_size=4).mini_batch_size == 4
    with pytest.warns(UserWarning, match="`optimize_cuda_cache` is deprecated"):
        assert PPOConfig(optimize_cuda_cache=True).optimize_device_cache


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"gamma": 1.5}, "gamma=1.5"),
        ({"max_grad_norm": 0}, "max_grad_norm=0"),
        ({"adam_style": "jax"}, "adam_style='jax'"),
        ({"log_with": "mlflow"}, "log_with='mlflow'"),
        ({"use_score_norm": True}, "use_score_norm=True"),
        ({"save_steps": 5}, "save_steps=5"),
    ],
)
def test_wrong_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**fields)


def test_command_line():
    arguments = ["--batch-size", "8", "--log-with", "tensorboard", "--project-kwargs", '{"logging_dir": "x"}']
    config = tyro.cli(PPOConfig, args=arguments)
    assert (config.batch_size, config.log_with, config.project_kwargs) == (8, "tensorboard", {"logging_dir": "x"})
    with pytest.raises(SystemExit):
        tyro.cli(PPOConfig, args=["--world-size", "2"], console_outputs=False)


@pytest.mark.filterwarnings("ignore:No dataset is provided:UserWarning")
def test_fields_that_change_before_the_trainer_is_built_have_their_effect(tiny_tokenizer):
    config = PPOConfig(batch_size=8, mini_batch_size=8, steps=16)
    config.mini_batch_size, config.batch_size, config.ppo_epochs = 1, 4, 1
    trainer = PPOTrainer(config, causal(), tokenizer=tiny_tokenizer)
    assert (config.backward_batch_size, config.total_ppo_epochs, config.global_backward_batch_size) == (1, 4, 1)
    steps = []
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    trainer.step(*batch())
    assert len(steps) == 4


@pytest.mark.filterwarnings("ignore:No dataset is provided:UserWarning")
@pytest.mark.parametrize("changes", [
    {"mini_batch_size": 1}, {"mini_batch_size": 4}, {"gradient_accumulation_steps": 2}, {"temperature": 0.5},
    {"init_kl_coef": 0.9},
])  # fmt: skip
def test_fields_that_change_after_the_trainer_is_built_reach_the_next_step(tiny_tokenizer, changes):
    """The step is that of a trainer that was built with them."""

    def make(**fields):
        return PPOTrainer(PPOConfig(**{**numbers, **fields}), causal(), tokenizer=tiny_tokenizer)

    def end(trainer):
        trainer.ref_model.pretrained_model.lm_head.weight.data *= 1.5  # so that the KL is not 0
        np.random.seed(0)
        trainer.step(*batch())
        return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])

    numbers = {"batch_size": 4, "mini_batch_size": 2, "learning_rate": 1e-3, "ppo_epochs": 1}
    changed, built = make(), make(**changes)
    for name, value in changes.items():
        setattr(changed.config, name, value)
    whole = end(changed)
    assert changed.accelerator.gradient_accumulation_steps == built.config.gradient_accumulation_steps
    assert torch.equal(whole, end(built))
    assert not torch.equal(whole, end(make()))
    assert changed.config.to_dict() == built.config.to_dict()


@pytest.mark.filterwarnings("ignore:No dataset is provided:UserWarning")
def test_changes_that_come_too_late_or_are_wrong(tiny_tokenizer):
    config = PPOConfig(batch_size=4, mini_batch_size=2, ppo_epochs=1)
    trainer = PPOTrainer(config, causal(), tokenizer=tiny_tokenizer)
    trainer.step(*batch())
    coefficient = trainer.kl_ctl.value
    config.init_kl_coef = 0.9
    with pytest.warns(UserWarning, match=r"init_kl_coef=0\.9: training has begun.*set `trainer\.kl_ctl\.value`"):
        trainer.step(*batch())
    assert trainer.kl_ctl.value == pytest.approx(coefficient, rel=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.step(*batch())  # said once
    config.temperature = 0.0
    with pytest.raises(ValueError, match=r"temperature=0\.0: give a number above 0"):
        trainer.step(*batch())
    config.temperature, config.mini_batch_size = 1.0, 3
    with pytest.raises(ValueError, match=r"must be a multiple of .* inexact division: 4 / 3"):
        trainer.step(*batch())


@pytest.mark.filterwarnings("ignore:No dataset is provided:UserWarning")
def test_sampling_follows_a_changed_temperature(tiny_tokenizer):
    trainer = PPOTrainer(PPOConfig(batch_size=1), causal(), tokenizer=tiny_tokenizer)
    assert trainer.source.params(None).temperature == 1.0
    trainer.config.temperature = 0.5
    trainer._rollout([{"prompt": "a b"}], lambda *_: Rewards(["one"], torch.zeros(1, 1), torch.ones(1), [False]))
    assert trainer.source.params(None).temperature == 0.5
    assert trainer.actor.temperature == 0.5


@pytest.mark.filterwarnings("ignore:No dataset is provided:UserWarning")
def test_a_field_that_is_changed_to_a_wrong_value_is_refused(tiny_tokenizer):
    config = PPOConfig(batch_size=4, mini_batch_size=2)
    config.mini_batch_size = 3
    with pytest.raises(ValueError, match=r"must be a multiple of .* inexact division: 4 / 3"):
        PPOTrainer(config, causal(), tokenizer=tiny_tokenizer)
