"""Every estimator against the enumerated truth; the tables of docs/estimators.md stand on the same functions."""

import importlib.util
import sys
from functools import partial
from math import log
from pathlib import Path
from types import ModuleType

import pytest
import torch

from trl.losses.kl import KL_ESTIMATORS
from trl.losses.policy import cispo, kl_in_loss, policy_loss

ROOT = Path(__file__).parents[2]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("estimators", ROOT / "benchmarks" / "estimators.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["estimators"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


exact = load()
REWARD = exact.gradient(exact.expected_reward)


def test_the_truth_is_the_truth():
    """Probabilities add to 1, the gradient is that of finite differences, the mean of 2 draws has half the variance."""
    assert exact.logprobs(exact.LOGITS).sum(-1).exp().sum().item() == pytest.approx(1.0)
    step = torch.zeros(exact.LOGITS.numel()).double()
    for i in range(len(step)):
        step.zero_()[i] = 1e-5
        up, down = (exact.expected_reward(exact.LOGITS + sign * step.view_as(exact.LOGITS)) for sign in (1, -1))
        assert ((up - down) / 2e-5).item() == pytest.approx(REWARD[i].item(), abs=1e-8)
    one, two = (exact.moments(exact.critic_free("none"), group).variance.item() for group in (1, 2))
    assert two == pytest.approx(one / 2)
    assert exact.kl_of_completions(exact.LOGITS).item() == pytest.approx(exact.kl_of_tokens(exact.LOGITS).item())


FIRST_STEP = {
    "REINFORCE": "yes",
    "REINFORCE, batch mean as baseline": "up to a constant",
    "RLOO": "yes",
    "Dr. GRPO": "up to a constant",
    "GRPO without the std": "no",
    "GRPO without the length": "no",
    "GRPO": "no",
    "GRPO, token mean (DAPO)": "no",
    "Dr. GRPO, token mean": "no",
    "GSPO": "no",
    "REINFORCE++": "no",
    "PPO, lambda 1, V = 0": "yes",
    "PPO, lambda 1, V true": "yes",
    "PPO, lambda .95, V true": "yes",
    "PPO, lambda .95, V = 0": "no",
    "PPO, lambda 1, V true, whitened": "no",
}


def test_which_first_steps_are_unbiased():
    reports = {
        name: exact.compare(exact.moments(estimator, 3), REWARD) for name, estimator in exact.first_step().items()
    }
    assert {name: report.verdict for name, report in reports.items()} == FIRST_STEP
    assert all(report.angle < 25 for report in reports.values())
    assert reports["GSPO"] == reports["GRPO"]
    assert reports["RLOO"].noise < reports["REINFORCE"].noise
    assert reports["PPO, lambda 1, V true"].noise < reports["PPO, lambda 1, V = 0"].noise


@pytest.mark.parametrize("group", [2, 3, 5])
def test_a_baseline_that_holds_the_sample_keeps_g_minus_1_of_g(group):
    scale = exact.compare(exact.moments(exact.critic_free("group_mean"), group), REWARD).scale
    assert scale == pytest.approx((group - 1) / group)


def test_the_length_turns_the_gradient_for_good_and_the_std_less_and_less():
    def angle(advantage: str, how: str, group: int) -> float:
        return exact.compare(exact.moments(exact.critic_free(advantage, how), group), REWARD).angle

    assert angle("group_mean", "sequence", 6) == pytest.approx(angle("group_mean", "sequence", 2))
    assert angle("group", "constant", 6) < 0.7 * angle("group", "constant", 2)
    assert angle("group_mean", "token", 6) < 0.5 * angle("group_mean", "token", 2)


def test_the_std_weighs_hard_prompts_up():
    assert exact.difficulty_scale("group", 0.05, 8) > 1.3 * exact.difficulty_scale("group", 0.5, 8)
    assert exact.difficulty_scale("group_mean", 0.05, 8) == pytest.approx(7 / 8)
    assert exact.difficulty_scale("leave_one_out", 0.05, 8) == pytest.approx(1.0)


KL_TERMS = {  # against the KL of completions, and against that of tokens
    "k1 in the reward, to go": ("yes", "no"),
    "k2 in the reward, to go": ("no", "no"),
    "k3 in the reward, to go": ("no", "no"),
    "k1 in the reward, whole completion": ("yes", "no"),
    "k2 in the reward, whole completion": ("no", "no"),
    "k3 in the reward, whole completion": ("no", "no"),
    "k1 in the loss": ("no: zero", "no: zero"),
    "k2 in the loss": ("no", "yes"),
    "k3 in the loss": ("no", "no"),
    "k1 in the loss, times the ratio": ("no", "yes"),
    "k2 in the loss, times the ratio": ("no", "no"),
    "k3 in the loss, times the ratio": ("no", "yes"),
    "k2 of the whole completion in the loss": ("yes", "no"),
}


def test_which_kl_terms_are_unbiased():
    truths = exact.gradient(exact.kl_of_completions), exact.gradient(exact.kl_of_tokens)
    got = {name: exact.moments(estimator, 1) for name, estimator in exact.kl_estimators().items()}
    verdicts = {name: tuple(exact.compare(m, truth).verdict for truth in truths) for name, m in got.items()}
    assert verdicts == KL_TERMS
    assert got["k3 in the loss, times the ratio"].variance < got["k1 in the loss, times the ratio"].variance
    assert got["k1 in the reward, to go"].variance < got["k1 in the reward, whole completion"].variance


def test_only_the_trajectory_ratio_is_exact_later():
    for distance in (exact.NEAR, exact.FAR):
        old = exact.moved(distance)
        reports = {
            name: exact.compare(exact.moments(estimator, 1, sampler=old), REWARD)
            for name, estimator in exact.later_steps(old).items()
        }
        unclipped = {name for name, report in reports.items() if report.verdict == "yes"}
        assert unclipped - {"trajectory ratio, clipped at .2"} == {"trajectory ratio"}
    assert "trajectory ratio, clipped at .2" not in unclipped


REFERENCE = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
GAINS = torch.tensor([0.0, 0.5, 1.0, 2.0]).double()


def optimum(beta: float) -> tuple[torch.Tensor, float]:
    """The policy that maximises E[r] - beta KL, reference times exp(r / beta), and that maximum, beta log Z."""
    weights = REFERENCE * (GAINS / beta).exp()
    return weights / weights.sum(), beta * log(weights.sum().item())


@pytest.mark.parametrize(("beta", "maximum", "kl"), [(1.0, 0.778030, 0.264042), (0.5, 1.049200, None)])
def test_the_kl_regularised_optimum(beta, maximum, kl):
    policy, got = optimum(beta)
    assert got == pytest.approx(maximum, abs=1e-6)
    divergence = (policy * (policy / REFERENCE).log()).sum().item()
    assert (policy @ GAINS).item() - beta * divergence == pytest.approx(maximum, abs=1e-6)
    if kl is not None:
        assert divergence == pytest.approx(kl, abs=1e-6)
        assert policy.tolist() == pytest.approx([0.183724, 0.227182, 0.249707, 0.339387], abs=1e-6)
        assert (policy @ GAINS).item() == pytest.approx(1.042072, abs=1e-6)


def expected_step(kl: str | None, importance: bool, beta: float = 1.0) -> torch.Tensor:
    """The expected gradient of our loss at that optimum: the KL as a term of the loss, or (None) as k1 in the reward.

    One action, four of them: a batch of all four, each weighed by its probability.
    """
    policy, _ = optimum(beta)
    logits = policy.log().clone().requires_grad_()
    logprobs = logits.log_softmax(-1)[:, None]
    old, reference = policy.log()[:, None], REFERENCE.log()[:, None]
    advantages = GAINS[:, None] - (beta * KL_ESTIMATORS["k1"](old, reference) if kl is None else 0.0)
    losses = [
        policy_loss(
            logprobs[a : a + 1], old[a : a + 1], advantages[a : a + 1], torch.ones(1, 1), rule=cispo,
            reference_BT=reference[a : a + 1], beta=0.0 if kl is None else beta, kl=kl or "k1",
            kl_importance=importance,
        ).total
        for a in range(4)
    ]  # fmt: skip
    return torch.autograd.grad((policy * torch.stack(losses)).sum(), logits)[0]


@pytest.mark.parametrize(("kl", "importance"), [(None, False), ("k2", False), ("k1", True), ("k3", True)])
def test_the_optimum_is_at_rest(kl, importance):
    assert expected_step(kl, importance).abs().max().item() < 1e-12


@pytest.mark.parametrize(("kl", "importance"), [("k1", False), ("k3", False), ("k2", True)])
def test_biased_terms_push_the_optimum_away(kl, importance):
    assert expected_step(kl, importance).abs().max().item() > 1e-2


def test_off_policy_the_ratio_keeps_the_kl_right():
    """Sampled from the uniform policy: the weighed k3's expected gradient is that of the exact KL; k2's is not."""
    logits = torch.tensor([0.3, -0.2, 0.5, 0.1]).double().requires_grad_()
    uniform = torch.full((4,), log(0.25)).double()
    logprobs = logits.log_softmax(-1)
    (truth,) = torch.autograd.grad((logprobs.exp() * (logprobs - REFERENCE.log())).sum(), logits, retain_graph=True)
    slope = partial(torch.autograd.grad, inputs=logits, retain_graph=True)
    (weighed,) = slope((0.25 * kl_in_loss(logprobs, REFERENCE.log(), uniform, "k3")).sum())
    (plain,) = slope((0.25 * kl_in_loss(logprobs, REFERENCE.log(), None, "k2")).sum())
    torch.testing.assert_close(weighed, truth)
    assert (plain - truth).abs().max().item() > 1e-2


def reports(sampler, estimators):
    moments = {name: exact.moments(each, 1, sampler=sampler) for name, each in estimators.items()}
    return {name: exact.compare(each, REWARD) for name, each in moments.items()}


def test_corrections_of_an_engine_against_the_truth():
    """Only the whole completion's ratio is exact; each bound trades angle for noise, a mask more than a cut."""
    wrong = exact.engine(exact.WRONG)
    found = reports(wrong, {name: exact.mismatched(wrong, each) for name, each in exact.CORRECTIONS.items()})
    assert [name for name, report in found.items() if report.verdict == "yes"] == ["sequence ratio, not bounded"]
    cut, masked = found["sequence, cut at 2"], found["sequence, masked above 3 (MIS, the default)"]
    assert 10 < cut.angle < masked.angle
    assert masked.noise < cut.noise < found["sequence ratio, not bounded"].noise
    assert found["token, cut at 2 (TIS)"].noise < found["token ratio, not bounded"].noise
    near = exact.engine(exact.ROUNDING)
    small = reports(near, {name: exact.mismatched(near, each) for name, each in exact.CORRECTIONS.items()})
    assert all(report.angle < 1 for report in small.values())
    assert small["no correction"].angle == max(report.angle for report in small.values())


def test_an_engine_that_agrees_needs_no_correction_in_expectation_either():
    plain = exact.moments(exact.mismatched(exact.LOGITS), 1)
    for each in exact.CORRECTIONS.values():
        weighed = exact.moments(exact.mismatched(exact.LOGITS, each), 1)
        assert torch.equal(weighed.mean, plain.mean)
        assert torch.equal(weighed.variance, plain.variance)


def test_decoupled_clipping_keeps_stale_rollouts_useful():
    sampler = exact.moved(exact.STALE[1])
    found = reports(sampler, exact.stale_rollouts(sampler))
    assert found["clipped around the sampler (PPO)"].angle > 90
    assert found["decoupled, token ratio"].angle < 11
    assert found["decoupled, sequence ratio"].angle < 1
    assert found["decoupled, token ratio"].angle < found["clipped around the proximal policy, not weighed"].angle


def test_the_document_is_what_the_script_writes():
    assert (ROOT / "docs" / "estimators.md").read_text() == exact.document()
