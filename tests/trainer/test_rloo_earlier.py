"""RLOO as releases 0.9-0.16 spelt it, in today's trainer."""

import pytest
import torch
import transformers as t
from datasets import Dataset
from ppo_cases import COMMON

from trl import RLOOConfig, RLOOTrainer
from trl.rollout.rewards import TokenRewards

EARLIER = {
    "rloo_k": 2, "num_mini_batches": 2, "num_ppo_epochs": 3, "total_episodes": 10, "kl_coef": 0.2, "cliprange": 0.1,
    "response_length": 4, "per_device_train_batch_size": 2,
}  # fmt: skip
QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "save_rollouts": False}


def language_model(seed):
    torch.manual_seed(seed)
    return t.AutoModelForCausalLM.from_config(t.LlamaConfig(**COMMON))


def trainer_of(tokenizer, folder, **fields):
    torch.manual_seed(5)
    scorer = t.AutoModelForSequenceClassification.from_config(t.LlamaConfig(**COMMON, num_labels=1))
    return RLOOTrainer(
        config=RLOOConfig(output_dir=str(folder), **{**EARLIER, **QUIET, **fields}), tokenizer=tokenizer,
        policy=language_model(0), ref_policy=language_model(1), reward_model=scorer,
        train_dataset=Dataset.from_list([{"input_ids": [4 + i, 5]} for i in range(5)]),
    )  # fmt: skip


def test_fields_become_todays(tmp_path):
    config = RLOOConfig(output_dir=str(tmp_path), exp_name="small", reward_clip_range=10.0, **EARLIER)
    assert (config.num_generations, config.num_iterations, config.beta, config.epsilon) == (2, 3, 0.2, 0.1)
    assert (config.max_completion_length, config.temperature, config.run_name) == (4, 0.7, "small")
    assert (config.steps_per_generation, config.reward_clip_range) == (2, (-10.0, 10.0))
    assert config.max_steps == 18  # 3 batches of 2 x 2 completions, 3 passes of 2 optimizer steps
    plain = RLOOConfig(output_dir=str(tmp_path))
    assert (plain.num_iterations, plain.max_completion_length, plain.temperature) == (1, 512, 1.0)
    one = RLOOConfig(output_dir=str(tmp_path), rloo_k=4)
    assert (one.num_iterations, one.max_completion_length, one.temperature) == (4, 53, 0.7)
    assert RLOOConfig(output_dir=str(tmp_path), rloo_k=4, temperature=1.0).temperature == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rloo_k": 4, "num_generations": 3}, "rloo_k=4, num_generations=3: two names of one setting"),
        ({"token_level_kl": True}, "token_level_kl=True: the KL of a completion is that of all its tokens"),
        ({"stop_token": "."}, r"stop_token='\.': give 'eos', or `stop_token_id`"),
        ({"stop_token": "eos", "stop_token_id": 3}, "stop_token_id=3: stop_token='eos' names one too"),
        ({"total_episodes": 8, "max_steps": 3}, "max_steps=3: total_episodes=8 says it"),
        ({"num_mini_batches": 2, "steps_per_generation": 5}, "num_mini_batches=2: steps_per_generation says it"),
    ],
)
def test_wrong_values_are_named(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        RLOOConfig(output_dir=str(tmp_path), **fields)


def test_a_run_by_the_earlier_names(tiny_tokenizer, tmp_path):
    trainer = trainer_of(tiny_tokenizer, tmp_path, stop_token_id=7, missing_eos_penalty=1.5)
    assert isinstance(trainer.rewards, TokenRewards)
    assert 7 in trainer.sampling_params(0).stop_token_ids
    seen = []
    inner = trainer.advantages
    trainer.advantages = lambda scores_BF, *rest: (seen.append(scores_BF), inner(scores_BF, *rest))[1]
    trainer.train()
    assert trainer.state.global_step == 18
    assert [scores_BF.shape for scores_BF in seen] == [(4, 2)] * 3
    assert {float(lost) for scores_BF in seen for lost in scores_BF[:, 1]} <= {0.0, -1.5}


def test_rewards_are_normalised_over_the_batch(tiny_tokenizer, tmp_path):
    """[0, 2, 4, 6] less 3, by 2.582; then each against the other of its pair."""
    trainer = trainer_of(tiny_tokenizer, tmp_path, normalize_reward=True)
    advantages_B = trainer.advantages(torch.tensor([[0.0], [2.0], [4.0], [6.0]]), torch.ones(1), None)
    assert advantages_B.tolist() == pytest.approx([-0.7746, 0.7746, -0.7746, 0.7746], abs=1e-4)


def test_models_by_the_paths_of_the_config(tiny_tokenizer, tmp_path):
    policy, reward = str(tmp_path / "policy"), str(tmp_path / "reward")
    language_model(0).save_pretrained(policy)
    t.AutoModelForSequenceClassification.from_config(t.LlamaConfig(**COMMON, num_labels=1)).save_pretrained(reward)
    for folder in (policy, reward):
        tiny_tokenizer.save_pretrained(folder)
    fields = {"sft_model_path": policy, "reward_model_path": reward}
    config = RLOOConfig(output_dir=str(tmp_path), **{**EARLIER, **QUIET, **fields})
    trainer = RLOOTrainer(config=config, train_dataset=Dataset.from_list([{"prompt": "a b"}] * 4))
    assert torch.equal(trainer.model.lm_head.weight, language_model(0).lm_head.weight)
    assert len(trainer.rewards.panel.names) == 1
    with pytest.raises(ValueError, match="model: none was given; pass a model, a folder or a Hub name"):
        RLOOTrainer(config=RLOOConfig(output_dir=str(tmp_path)), reward_funcs=len)
