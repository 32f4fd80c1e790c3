from functools import partial
from math import e, exp, log

import pytest
import torch

from trl.losses.kl import k1, k3
from trl.losses.policy import (
    CLIP_RULES,
    RATIO_LEVELS,
    cispo,
    clip,
    clipped_surrogate,
    clipped_value,
    kl_in_loss,
    policy_loss,
    sapo,
    vespo,
)

ONE = torch.ones(1, 1)
UNCLIPPED = partial(clip, clip_low=9.0, clip_high=9.0)


def surrogate(rule, ratio: float, advantage: float, logprob: float = -1.0):
    return rule(torch.tensor([[log(ratio)]]), torch.tensor([[logprob]]), torch.tensor([[advantage]]))


SEED_OLD = torch.tensor([[-1.0, -2.0, -0.5, -3.0, -1.0], [-0.2, -0.4, -0.6, -0.8, -1.0]])
SEED_SHIFT = torch.tensor([[0.1, 0.3, -0.3, 0.05, 0.0], [0.0, 0.2, 0.4, -0.5, 0.1]])
SEED_MASK = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0, 1.0]])
SEED_ADVANTAGES = torch.tensor(
    [[0.956704, 0.932289, 1.033071, 0.759715, 0.21901], [-0.818901, -0.873528, -0.99427, -0.868406, -0.862398]]
)


def test_the_seeds_policy_loss():
    loss = clipped_surrogate(SEED_OLD + SEED_SHIFT, SEED_OLD, SEED_ADVANTAGES, SEED_MASK, clip_low=0.2, clip_high=0.2)
    assert loss.mean.item() == pytest.approx(0.074728, abs=1e-6)
    means = {name: (x[0] / x[1]).item() for name, x in loss.metrics.items() if isinstance(x, tuple)}
    assert means["clip_ratio/region_mean"] == pytest.approx(0.333333, abs=1e-6)
    assert means["approx_kl"] == pytest.approx(0.050208, abs=1e-6)
    assert means["policy_kl"] == pytest.approx(-0.008333, abs=1e-6)


def test_the_seeds_value_loss():
    values = torch.tensor([[0.5, 0.1, -0.2, 0.3, 0.9], [0.3, 0.2, 0.1, 0.0, -0.1]])
    returns = torch.tensor([[1.227888, 1.28725, 1.155, 1.2, 0.0], [-1.727599, -1.818525, -1.9195, -1.81, -1.9]])
    masked = values * SEED_MASK
    loss = clipped_value(values + SEED_SHIFT, masked, returns, SEED_MASK, 0.2)
    assert loss.mean.item() * 0.1 == pytest.approx(0.137436, abs=1e-6)


def test_value_clipping_by_hand():
    v, old, target = torch.tensor([[1.0]]), torch.tensor([[0.5]]), torch.tensor([[0.9]])
    assert clipped_value(v, old, target, ONE, 0.2).total.item() == pytest.approx(0.02)
    assert clipped_value(v, old, target, ONE, None).total.item() == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "low", "high"),
    [
        (1.5, 2.0, -2.56, False, True),  # clipped at 1 + .28
        (1.5, -2.0, 3.0, False, False),
        (0.5, 2.0, -1.0, False, False),
        (0.5, -2.0, 1.6, True, False),  # clipped at 1 - .2
        (9.0, -2.0, 8.0, False, True),  # bounded at delta 4
    ],
)
def test_clipping_by_hand(ratio, advantage, loss, low, high):
    got = surrogate(partial(clip, clip_low=0.2, clip_high=0.28, delta=4.0), ratio, advantage)
    assert [x.item() for x in got] == [pytest.approx(loss), low, high]


def test_delta_below_the_clip_is_refused():
    with pytest.raises(ValueError, match=r"delta=1\.1"):
        surrogate(partial(clip, delta=1.1), 1.0, 1.0)


def test_cispo_by_hand():
    """Weight 6 cut to 5: -5 * 2 * -1.5 = 15. The gradient is the cut weight's, never 0."""
    logprob = torch.tensor([[-1.5]], requires_grad=True)
    got = cispo(torch.tensor([[log(6.0)]]), logprob, torch.tensor([[2.0]]))
    assert (got.loss_BT.item(), got.high_BT.item()) == (pytest.approx(15.0), True)
    got.loss_BT.sum().backward()
    assert logprob.grad is not None
    assert logprob.grad.item() == pytest.approx(-10.0)
    assert surrogate(partial(cispo, clip_low=0.2), 0.5, 1.0).loss_BT.item() == pytest.approx(0.8)


def test_sapo_by_hand():
    """-4 sigma(1) and 4 / 1.05 sigma(1.05) at ratio 2"""
    assert surrogate(sapo, 2.0, 1.0).loss_BT.item() == pytest.approx(-2.9242343)
    assert surrogate(sapo, 2.0, -1.0).loss_BT.item() == pytest.approx(2.8219996)
    with pytest.raises(ValueError, match="tau_neg=0"):
        surrogate(partial(sapo, tau_neg=0.0), 1.0, 1.0)


@pytest.mark.parametrize("level", [name for name in RATIO_LEVELS if name != "sequence"])
@pytest.mark.parametrize("rule", sorted(CLIP_RULES))
def test_at_the_first_step_every_rule_is_the_policy_gradient(rule, level):
    """Up to GSPO's 1 / length on the sequence level, see below."""
    old, mask = torch.randn(3, 4), torch.tensor([[1.0] * 4, [1, 1, 1, 0], [1, 0, 0, 0]])
    advantages, logprobs = torch.tensor([[1.0], [-2.0], [0.5]]), old.clone().requires_grad_()
    loss = policy_loss(
        logprobs, old, advantages, mask, rule=CLIP_RULES[rule], level=level, how="constant", max_tokens=4
    )
    (gradient,) = torch.autograd.grad(loss.total, logprobs)
    spread = mask.sum(-1, keepdim=True) if level == "trajectory" and rule not in ("cispo", "vespo") else 1.0
    torch.testing.assert_close(gradient, -advantages * mask * spread)
    assert loss.metrics["ratio"][0].item() == pytest.approx(8.0)
    assert loss.metrics["approx_kl"][0].item() == loss.metrics["clip_ratio/region_mean"][0].item() == 0.0


def test_gspo_by_hand():
    """Log-ratios .2 and .4 over 2 tokens: the sequence's ratio is exp(.3), GSPO-token's gradient is its tokens' own."""
    logprobs, old = torch.tensor([[0.2, 0.4, 9.0]], requires_grad=True), torch.zeros(1, 3)
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    for level, gradient in (("sequence", exp(0.3) / 2), ("sequence_token", exp(0.3) / 2)):
        loss = policy_loss(logprobs, old, ONE, mask, rule=UNCLIPPED, level=level, how="sequence")
        assert loss.total.item() == pytest.approx(-exp(0.3))
        (got,) = torch.autograd.grad(loss.total, logprobs)
        assert got[0].tolist() == pytest.approx([-gradient, -gradient, 0.0])
    per_token = torch.tensor([[1.0, 3.0, 0.0]])
    loss = policy_loss(logprobs, old, per_token, mask, rule=UNCLIPPED, level="sequence_token", how="sequence")
    (got,) = torch.autograd.grad(loss.total, logprobs)
    assert got[0].tolist() == pytest.approx([-exp(0.3) / 2, -3 * exp(0.3) / 2, 0.0])
    with pytest.raises(ValueError, match="importance_sampling_level='word'"):
        policy_loss(logprobs, old, ONE, mask, rule=UNCLIPPED, level="word")


def test_the_trajectory_ratio_is_the_product():
    logprobs, mask = torch.tensor([[0.2, 0.4, 9.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    assert RATIO_LEVELS["trajectory"](logprobs, torch.zeros(1, 3), mask).item() == pytest.approx(0.6)


def test_denoising_steps_are_tokens():
    """DDPO: one advantage an image, T steps; advantage -1 at ratio 1 costs 1."""
    old = torch.randn(2, 5)
    loss = clipped_surrogate(old, old, torch.full((2, 1), -1.0), torch.ones(2, 5), clip_low=1e-4, clip_high=1e-4)
    assert loss.mean.item() == pytest.approx(1.0)
    per_step = clipped_surrogate(old, old, torch.full((2, 5), -1.0), torch.ones(2, 5), clip_low=1e-4, clip_high=1e-4)
    assert per_step.total.item() == pytest.approx(loss.total.item())


@pytest.mark.parametrize("level", sorted(RATIO_LEVELS))
@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_padding_changes_nothing(how, level):
    rows = torch.randn(4, 2, 3) * 0.3
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])

    def loss(rows, mask):
        logprobs, old, reference, advantages = rows
        return clipped_surrogate(
            logprobs, old, advantages, mask, level=level, how=how, max_tokens=7, reference_BT=reference, beta=0.1
        )

    padded = loss(torch.nn.functional.pad(rows, (0, 4)), torch.nn.functional.pad(mask, (0, 4)))
    torch.testing.assert_close(padded.mean, loss(rows, mask).mean)


def test_the_terms_add_up_by_hand():
    """A 1 at ratio 1 weighed .5; d = -1 to the reference: k3 e - 2, times beta .1; entropy 2 at coefficient .05."""
    zero = torch.zeros(1, 1)
    terms = {"weight_BT": torch.tensor([[0.5]]), "reference_BT": ONE, "entropy_BT": torch.tensor([[2.0]])}
    loss = clipped_surrogate(zero, zero, ONE, ONE, beta=0.1, entropy_coef=0.05, **terms)
    assert loss.total.item() == pytest.approx(-0.5 + 0.1 * (e - 2) - 0.1)
    assert loss.metrics["kl"][0].item() == pytest.approx(e - 2)
    assert loss.metrics["entropy"][0].item() == 2.0
    recorded = clipped_surrogate(zero, zero, ONE, ONE, **terms)
    assert recorded.total.item() == pytest.approx(-0.5)
    assert recorded.metrics["entropy"][0].item() == 2.0


@pytest.mark.parametrize("how", ["token", "sequence", "constant", "sequence_sum"])
def test_the_entropy_bonus_is_the_mean_of_a_token_whatever_the_aggregation(how):
    """Entropies 3, 1, 1 and 5 of four tokens: 2.5, at coefficient .2 a half off the loss."""
    rows, mask = torch.full((2, 3), -1.0), torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    entropies = torch.tensor([[3.0, 1.0, 1.0], [5.0, 7.0, 7.0]])
    numbers = (rows, rows - 0.1, torch.ones(2, 1), mask)
    plain = clipped_surrogate(*numbers, how=how, max_tokens=3)
    whole = clipped_surrogate(*numbers, how=how, max_tokens=3, entropy_BT=entropies, entropy_coef=0.2)
    assert (plain.mean - whole.mean).item() == pytest.approx(0.5)
    share = plain.count / mask.sum()
    total = torch.zeros(())
    for row in (slice(0, 1), slice(1, 2)):  # micro-batches, told the share of the step
        part = [x[row] for x in numbers]
        terms = {"entropy_BT": entropies[row], "entropy_coef": 0.2, "entropy_share": share}
        total = total + clipped_surrogate(*part, how=how, max_tokens=3, **terms).total
    torch.testing.assert_close(total, whole.total)


def test_the_shares_that_are_clipped_by_hand():
    """Ratios 2, 1, 1 | .5 | 2 and A = 1, -1, 1: above in rows 1 (1 of 3) and 3 (all), below in row 2 (all)."""
    ratios = torch.tensor([[2.0, 1.0, 1.0], [0.5, 9.0, 9.0], [2.0, 2.0, 9.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    advantages = torch.tensor([[1.0], [-1.0], [1.0]])
    metrics = clipped_surrogate(ratios.log(), torch.zeros(3, 3), advantages, mask).metrics
    assert metrics["clip_ratio/high_mean"][0].item() == 3
    assert metrics["clip_ratio/low_mean"][0].item() == 1
    assert metrics["clip_ratio/region_mean"] == (4, 6)
    assert metrics["clip_ratio/low_min"].value.item() == 0
    assert metrics["clip_ratio/high_max"].value.item() == 1
    one = clipped_surrogate(ratios[:1].log(), torch.zeros(1, 3), advantages[:1], mask[:1]).metrics
    assert one["clip_ratio/high_max"].value.item() == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"),
    [
        (1.0, 2.0, 1.0), (1.0, -2.0, 1.0),
        (2.0, 1.0, 4 * exp(-3)), (0.5, 1.0, 0.25 * exp(1.5)),  # w^2 e^(3 (1 - w))
        (2.0, -1.0, 8 * exp(-2)), (0.5, -1.0, 0.125 * exp(1)),  # w^3 e^(2 (1 - w))
    ],
)  # fmt: skip
def test_vespo_by_hand(ratio, advantage, weight):
    logprob = torch.tensor([[-0.5]], requires_grad=True)
    got = vespo(torch.tensor([[log(ratio)]]), logprob, torch.tensor([[advantage]]))
    assert got.loss_BT.item() == pytest.approx(0.5 * weight * advantage)
    got.loss_BT.sum().backward()
    assert logprob.grad.item() == pytest.approx(-weight * advantage)
    assert not torch.stack([got.low_BT, got.high_BT]).any()


def test_vespo_weighs_all_tokens_by_the_ratio_of_their_completion():
    """Log-ratios log 2 and 0: w = 2 for both tokens, 4 e^-3 of each log-probability; of ratios per token only one."""
    logprobs = torch.tensor([[-1.0, -3.0]])
    old = logprobs - torch.tensor([[log(2), 0.0]])
    loss = policy_loss(logprobs, old, ONE, torch.ones(1, 2), rule=vespo, level="trajectory")
    assert loss.total.item() == pytest.approx(4 * 4 * exp(-3))
    assert loss.count == 2


def test_luspo_by_hand():
    """Sequence ratio sqrt 2 clipped to 1.2, A = 1 and -1; lengths 2 and 1: (-1.2 * 2 + 1 * 1) / 2."""
    logprobs = torch.tensor([[-1.0, -3.0], [-1.0, 0.0]])
    old = logprobs - torch.tensor([[log(2), 0.0], [0.0, 0.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    terms = {"level": "sequence", "how": "sequence_sum"}
    loss = clipped_surrogate(logprobs, old, torch.tensor([[1.0], [-1.0]]), mask, **terms)
    assert loss.mean.item() == pytest.approx(-0.7)


def test_terms_without_their_tensor_are_refused():
    zero = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"beta=0\.1"):
        clipped_surrogate(zero, zero, ONE, ONE, beta=0.1)
    with pytest.raises(ValueError, match=r"entropy_coef=0\.1"):
        clipped_surrogate(zero, zero, ONE, ONE, entropy_coef=0.1)
    with pytest.raises(ValueError, match="kl='k4'"):
        kl_in_loss(zero, zero, kl="k4")


def test_the_importance_weight_makes_the_kl_the_current_policys():
    """Sampled from old, weighed: expectation over (.5, .3, .2) against (.4, .4, .2) is .02526715 for k1 and k3."""
    policy, reference = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    old = torch.tensor([0.2, 0.2, 0.6]).double()
    for name in ("k1", "k3"):
        estimate = kl_in_loss(policy.log(), reference.log(), old.log(), name)
        assert (old * estimate).sum().item() == pytest.approx(0.02526715, abs=1e-8)
    assert torch.equal(kl_in_loss(policy.log(), reference.log(), None, "k1"), k1(policy.log(), reference.log()))
    assert torch.equal(kl_in_loss(policy.log(), reference.log()), k3(policy.log(), reference.log()))


def test_a_runaway_ratio_stays_finite():
    logprobs = torch.full((1, 300), -0.1, requires_grad=True)
    loss = clipped_surrogate(logprobs, torch.full((1, 300), -9.0), -ONE, torch.ones(1, 300), level="trajectory")
    loss.total.backward()
    assert loss.total.isfinite()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()
