"""Metrics under today's names, by hand: rollouts that a function gives, and a policy to which all words are alike."""

import math
from collections.abc import Sequence

import pytest
import torch
from conformity import causal_lm, history, prompts, tokenizer
from test_ppo_forms import todays

import trl
from trl.trainer.metrics import METRICS, named

V = len(tokenizer())
EVEN = math.log(V)
"""minus the log-probability of each token under the policy; its entropy too"""
COMPLETIONS = [[5, 6, 7, 2], [5, 2], [8, 9, 10], [11]]
"""of one prompt: two end by themselves"""
RATIOS = [[1.5, 1.0, 1.0, 1.0], [0.5, 0.9], [1.3, 1.0, 0.6], [2.0]]
"""of the policy to the function that sampled"""
REWARDS = [3.0, 1.0, 0.0, 0.0]


def even_model():
    model = causal_lm()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


def rollout_func(rows, trainer):
    times = len(rows) // len(COMPLETIONS)
    return {
        "prompt_ids": [row["prompt_ids"] for row in rows],
        "completion_ids": COMPLETIONS * times,
        "logprobs": [[-EVEN - math.log(ratio) for ratio in row] for row in RATIOS] * times,
        "truncated": [False, False, True, True] * times,
    }


def rewarded(completions: Sequence[str], **columns) -> list[float]:
    return REWARDS * (len(completions) // 4)


def logs(folder, kind, model=None, arguments=None, **settings):
    base = {
        "output_dir": str(folder), "use_cpu": True, "per_device_train_batch_size": 4, "num_generations": 4,
        "max_completion_length": 8, "max_steps": 1, "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "save_rollouts": False, "shuffle_dataset": False, "learning_rate": 0.0,
    }  # fmt: skip
    trainer = getattr(trl, f"{kind}Trainer")(
        model or even_model(), rewarded, getattr(trl, f"{kind}Config")(**{**base, **settings}), prompts(),
        processing_class=tokenizer(), rollout_func=rollout_func, **(arguments or {}),
    )  # fmt: skip
    trainer.train()
    return {name: values[0] for row in trainer.state.log_history for name in row if (values := history(trainer, name))}


def clipped(ratio, advantage, low=0.8, high=1.2):
    return -min(ratio * advantage, min(max(ratio, low), high) * advantage)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def check(found, expected):
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


LENGTHS = {
    "completions/mean_length": 2.5, "completions/min_length": 1.0, "completions/max_length": 4.0,
    "completions/clipped_ratio": 0.5, "completions/mean_terminated_length": 3.0,
    "completions/min_terminated_length": 2.0, "completions/max_terminated_length": 4.0, "reward": 1.0,
    "reward_std": math.sqrt(2.0), "frac_reward_zero_std": 0.0, "num_tokens": 2 * 4 + 10,
}  # fmt: skip


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo(beta, tmp_path):
    """The reference is the policy: a KL of 0 changes no loss."""
    found = logs(tmp_path, "GRPO", scale_rewards="none", beta=beta)
    advantages = [reward - 1.0 for reward in REWARDS]
    pairs = [(r, a) for row, a in zip(RATIOS, advantages, strict=True) for r in row]
    assert found.keys() >= {"step_time", "grad_norm"}
    loss = sum(clipped(r, a) for r, a in pairs if a) / len(pairs)
    learned = [(r, a) for r, a in pairs if a or beta]  # what has no advantage is not computed without a KL term
    check(found, LENGTHS)
    check(found, {"policy_loss": loss, "loss": loss, "entropy": EVEN, "ratio": mean(r for r, _ in learned)})
    low = [r < 0.8 and a < 0 for r, a in learned]
    high = [r > 1.2 and a > 0 for r, a in learned]
    check(
        found,
        {
            "clip_ratio/low_mean": mean(low), "clip_ratio/high_mean": mean(high), "clip_ratio/low_min": 0.0,
            "clip_ratio/region_mean": mean(low) + mean(high), "clip_ratio/high_max": 0.25,
            "approx_kl": mean(0.5 * math.log(r) ** 2 for r, _ in learned),
            "sampling/sampling_logp_difference/mean": mean(abs(math.log(r)) for r, _ in learned),
            "sampling/sampling_logp_difference/max": max(abs(math.log(r)) for r, _ in learned),
            "sampling/importance_sampling_ratio/min": min(r for r, _ in learned),
            "sampling/importance_sampling_ratio/max": max(r for r, _ in learned),
            "sampling/outside_clip_range": mean(not 0.8 <= r <= 1.2 for r, _ in learned),
        },
    )  # fmt: skip
    assert ("objective/kl" in found) == (beta > 0)


def test_grpo_with_a_kl_and_an_entropy_bonus(tmp_path):
    """Neither is in `policy_loss`."""
    model = causal_lm(seed=4)
    plain = logs(tmp_path, "GRPO", model)
    more = logs(tmp_path, "GRPO", causal_lm(seed=4), {"ref_model": even_model()}, beta=0.5, entropy_coef=0.3)
    assert more["policy_loss"] == pytest.approx(plain["policy_loss"], rel=1e-4)
    assert more["loss"] - more["policy_loss"] != pytest.approx(0, abs=1e-3)


def test_rloo(tmp_path):
    """A completion is one action; its KL to a reference that is even too is that of the function which sampled."""
    found = logs(tmp_path, "RLOO", beta=0.1)
    kls = [sum(-math.log(r) for r in row) for row in RATIOS]
    totals = [reward - 0.1 * kl for reward, kl in zip(REWARDS, kls, strict=True)]
    advantages = [total - mean(totals[:i] + totals[i + 1 :]) for i, total in enumerate(totals)]
    ratios = [math.prod(row) for row in RATIOS]
    entropies = [-sum(-EVEN - math.log(r) for r in row) for row in RATIOS]
    loss = mean(clipped(r, a) for r, a in zip(ratios, advantages, strict=True))
    check(found, LENGTHS)
    check(
        found,
        {
            "policy_loss": loss, "loss": loss, "objective/kl": mean(kls), "objective/scores": 1.0,
            "objective/non_score_reward": -0.1 * mean(kls), "objective/rlhf_reward": mean(totals),
            "objective/entropy": mean(entropies), "entropy": EVEN, "kl": 0.0,
            "sampling/importance_sampling_ratio/mean": mean(ratios),
            "sampling/outside_clip_range": mean(not 0.8 <= r <= 1.2 for r in ratios),
        },
    )  # fmt: skip


def test_rloo_of_the_earlier_form_has_the_earlier_names_too(tmp_path):
    settings = {"num_generations": 4, "kl_coef": 0.1, "num_ppo_epochs": 1, "cliprange": 0.3, "response_length": 8}
    found = logs(tmp_path, "RLOO", temperature=1.0, **settings)
    same = {"policy/approxkl_avg": "approx_kl", "policy/clipfrac_avg": "clip_ratio/region_mean", "val/ratio": "ratio",
            "policy/entropy_avg": "entropy", "loss/policy_avg": "policy_loss"}  # fmt: skip
    for earlier, name in same.items():
        assert found[earlier] == found[name]
        assert named("RLOO", earlier) is not None
    assert not set(same) & logs(tmp_path, "RLOO").keys()


@pytest.mark.parametrize("reference", [even_model, causal_lm])
def test_online_dpo(reference, tmp_path):
    """The best and the worst of the group; the reference's numbers by a plain forward."""
    model = reference()
    found = logs(tmp_path, "OnlineDPO", None, {"ref_model": model}, temperature=1.0, beta=0.2)
    sampled = [sum(-EVEN - math.log(r) for r in row) for row in RATIOS]
    kls = [ours - logprob(model, ids) for ours, ids in zip(sampled, COMPLETIONS, strict=True)]
    check(
        found,
        {
            "objective/kl": mean(kls), "objective/scores": 1.0, "objective/scores_margin": 3.0, "beta": 0.2,
            "objective/entropy": -mean(sampled),
            "objective/non_score_reward": -0.2 * mean(kls), "objective/rlhf_reward": 1.0 - 0.2 * mean(kls),
            "val/contain_eos_token": 0.5, "completions/mean_length": 2.5, "num_tokens": 2 * 4 + 10,
        },
    )  # fmt: skip


def logprob(model, completion):
    """Of a completion of the first prompt."""
    prompt = tokenizer()(prompts()[0]["prompt"])["input_ids"]
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return float(sum(logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(completion)))


def test_ppo_logs_the_names_of_the_table(tiny_tokenizer, tmp_path):
    trainer = todays(tiny_tokenizer, tmp_path, total_episodes=4)
    trainer.train()
    logged = trainer.state.log_history[0].keys() - {"step"}
    assert logged == {
        metric.name for metric in METRICS if "PPO" in metric.trainers and metric.when != "an engine or older weights"
    }
