"""REINFORCE leave-one-out."""

from __future__ import annotations

from torch import Tensor, nn

from trl.losses.loss_sum import Aggregation, LossSum
from trl.losses.policy import batch_relative, clipped_surrogate, leave_one_out
from trl.models.scoring import score
from trl.rollout.loader import PolicyBatch
from trl.rollout.rewards import weighted_total
from trl.trainer.grpo_config import RLOOConfig
from trl.trainer.on_policy import OnPolicyTrainer


class RLOOTrainer(OnPolicyTrainer):
    """Optimise a policy on groups of its own completions, each against the mean of the others (arXiv:2402.14740).

    A completion is one action: one ratio, the KL to the reference subtracted from its reward.
    """

    _tag_names = ("trl", "rloo")
    config_class = RLOOConfig
    aggregation: Aggregation = "sequence"

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
        self.check_first(logprobs_BT, batch)
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
