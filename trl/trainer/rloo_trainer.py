"""REINFORCE leave-one-out."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from trl.losses.loss_sum import Aggregation, LossSum
from trl.losses.policy import batch_relative, clipped_surrogate, leave_one_out
from trl.models.scoring import score
from trl.rollout.experience import PolicyBatch
from trl.rollout.rewards import weighted_total
from trl.trainer.configuration import Setting, require
from trl.trainer.on_policy import OnPolicyConfig, OnPolicyTrainer


@dataclass
class RLOOConfig(OnPolicyConfig):
    """`TrainingArguments` and the settings of REINFORCE leave-one-out; the KL is part of the reward."""

    num_generations: int = field(default=2)
    """completions of each prompt"""
    beta: float = field(default=0.05)
    """weight of the KL to the reference, subtracted from the reward"""
    epsilon: float = field(default=0.2)
    """lower clip range of the ratio"""
    epsilon_high: float | None = field(default=None)
    """upper clip range; None: `epsilon`"""
    normalize_advantages: bool = field(default=False)
    """whiten the advantages over the batch"""
    reward_clip_range: tuple[float, float] | None = field(default=None)
    """bounds of each completion's reward, before the KL"""

    def validate(self) -> None:
        super().validate()
        require(self, "num_generations", self.num_generations >= 2, "leave-one-out needs at least 2 completions")
        require(self, "epsilon", self.epsilon > 0, "give a range > 0")
        require(self, "epsilon_high", self.epsilon_high is None or self.epsilon_high > 0, "give a range > 0, or None")
        bounds = self.reward_clip_range
        require(self, "reward_clip_range", bounds is None or bounds[0] < bounds[1], "give (low, high) with low < high")


class RLOOTrainer(OnPolicyTrainer):
    """Optimise a policy on groups of its own completions, each against the mean of the others (arXiv:2402.14740).

    A completion is one action: one ratio, the KL to the reference subtracted from its reward.
    """

    _tag_names = ("trl", "rloo")
    config_class = RLOOConfig
    epsilon_low, epsilon_high = Setting("epsilon"), Setting(unset="epsilon")
    normalize_advantages, reward_clip_range = Setting(), Setting()
    aggregation: Aggregation = "sequence"

    def zero_advantage_means_zero_gradient(self) -> bool:
        return True

    def advantages(self, scores_BF: Tensor, weights_F: Tensor, kl_B: Tensor | None) -> Tensor:
        rewards_B = weighted_total(scores_BF, weights_F)
        if self.args.reward_clip_range is not None:
            rewards_B = rewards_B.clamp(*self.args.reward_clip_range)
        if kl_B is not None:
            rewards_B = rewards_B - self.args.beta * kl_B
        advantages_B = leave_one_out(rewards_B, self.args.num_generations)
        return batch_relative(advantages_B) if self.args.normalize_advantages else advantages_B

    def policy_objective(self, model: nn.Module, batch: PolicyBatch) -> LossSum:
        logprobs_BT = score(model, batch.packed, temperature=self.args.temperature).logprobs_BT
        high = self.args.epsilon if self.args.epsilon_high is None else self.args.epsilon_high
        return clipped_surrogate(
            logprobs_BT,
            batch.old_logprobs_BT,
            batch.advantages_BT,
            batch.mask_BT,
            clip_low=self.args.epsilon,
            clip_high=high,
            level="trajectory",
            reference_BT=batch.reference_BT,
            how=self.aggregation,
        )
