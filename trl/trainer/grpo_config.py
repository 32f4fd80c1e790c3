"""Settings of the critic-free on-policy trainers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trl.losses.policy import ADVANTAGES, REWARD_AGGREGATIONS
from trl.trainer.configuration import choose, refuse_unused, require
from trl.trainer.rollout_config import RewardedConfig


@dataclass
class OnPolicyConfig(RewardedConfig):
    """What the policy-gradient trainers share."""

    beta: float = field(default=0.0)
    """weight of the KL to the reference; 0: no reference is kept"""
    mask_truncated_completions: bool = field(default=False)
    """completions cut at the length limit teach nothing"""
    turn_level_credit: bool = field(default=False)
    """environments: credit each turn with the rewards from it on, compared with the same turn of its group"""
    sync_ref_model: bool = field(default=False)
    """move the reference towards the policy every `ref_model_sync_steps`"""
    ref_model_mixup_alpha: float = field(default=0.6)
    """share of the policy in the new reference"""
    ref_model_sync_steps: int = field(default=512)
    """optimizer steps between two moves"""

    @property
    def moves_reference(self) -> bool:
        return self.sync_ref_model

    def validate(self) -> None:
        super().validate()
        require(self, "beta", self.beta >= 0, "give a weight >= 0")
        require(self, "sync_ref_model", not self.sync_ref_model or self.beta > 0, "beta=0 keeps no reference to move")
        require(self, "ref_model_mixup_alpha", 0 < self.ref_model_mixup_alpha <= 1, "give a share in (0, 1]")
        require(self, "ref_model_sync_steps", self.ref_model_sync_steps >= 1, "give a number of steps >= 1")
        for name, default in (("ref_model_mixup_alpha", 0.6), ("ref_model_sync_steps", 512)):
            used = self.sync_ref_model or getattr(self, name) == default
            require(self, name, used, "no effect without sync_ref_model=True")


@dataclass
class GRPOConfig(OnPolicyConfig):
    """`TrainingArguments` and what group-relative policy optimisation adds."""

    loss_type: str = field(default="dapo")
    """how tokens are averaged and clipped: grpo, dapo, bnpo, dr_grpo, cispo, sapo"""
    epsilon: float = field(default=0.2)
    """lower clip range of the ratio"""
    epsilon_high: float | None = field(default=None)
    """upper clip range; None: `epsilon`. For cispo: the largest weight itself"""
    delta: float | None = field(default=None)
    """two-sided clipping: upper bound of the ratio where the advantage is negative"""
    importance_sampling_level: str = field(default="token")
    """ratio of each token, or of the sequence (GSPO)"""
    scale_rewards: Literal["group", "batch", "none", True, False] = field(default="group")
    """divide advantages by the std of their group or of the batch, or not (none)"""
    advantage: str | None = field(default=None)
    """baseline by name, in place of the group's mean: leave_one_out, batch, group_then_batch, none, ..."""
    multi_objective_aggregation: str = field(default="sum_then_normalize")
    """several reward functions: sum_then_normalize, or normalize_then_sum (GDPO)"""
    kl_estimator: str | None = field(default=None)
    """estimate of the KL to the reference: k1, k2, k3; None: k3 in the loss, k1 in the reward"""
    kl_placement: str = field(default="loss")
    """where the KL acts: loss, or reward (each completion's reward minus beta times its KL)"""
    use_bias_correction_kl: bool | None = field(default=None)
    """weigh the KL term by the importance ratio, which makes its gradient unbiased; None: where it is in the loss"""
    sapo_temperature_neg: float = field(default=1.05)
    """sapo: steepness of the gate where the advantage is negative"""
    sapo_temperature_pos: float = field(default=1.0)
    """sapo: steepness of the gate where it is positive"""
    top_entropy_quantile: float = field(default=1.0)
    """learn from this share of the tokens, those of the highest entropy"""
    entropy_coef: float = field(default=0.0)
    """weight of the entropy bonus"""
    use_adaptive_entropy: bool = field(default=False)
    """let that weight follow the entropy, from `entropy_coef` on"""
    entropy_target: float = field(default=0.2)
    """adaptive: entropy in nats a token above which there is no bonus"""
    entropy_coef_delta: float = field(default=0.005)
    """adaptive: step of the weight"""
    entropy_coef_min: float = field(default=0.0)
    """adaptive: least weight"""
    entropy_coef_max: float = field(default=1.0)
    """adaptive: largest weight"""
    off_policy_mask_threshold: float | None = field(default=None)
    """leave out bad completions that the policy has moved away from by more than this"""

    def validate(self) -> None:
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        super().validate()
        choose(self, "loss_type", LOSS_TYPES)
        choose(self, "importance_sampling_level", ("token", "sequence", "sequence_token"))
        choose(self, "scale_rewards", ("group", "batch", "none"))
        choose(self, "advantage", (None, *ADVANTAGES))
        choose(self, "multi_objective_aggregation", REWARD_AGGREGATIONS)
        self._validate_clipping()
        self._validate_kl()
        if self.advantage is not None:
            way_out = f"advantage={self.advantage!r} says how rewards are scaled; leave it out"
            require(self, "scale_rewards", self.scale_rewards == "group", way_out)
        alone = self.advantage in ("batch", "batch_mean", "none")
        require(self, "num_generations", alone or self.num_generations >= 2, "a group needs at least 2 completions")
        require(self, "top_entropy_quantile", 0 < self.top_entropy_quantile <= 1, "give a share in (0, 1]")
        fields = ("entropy_target", "entropy_coef_delta", "entropy_coef_min", "entropy_coef_max")
        refuse_unused(self, fields, self.use_adaptive_entropy, "use_adaptive_entropy=True")
        for name in fields:
            require(self, name, getattr(self, name) >= 0, "give a number >= 0")
        least, most = self.entropy_coef_min, self.entropy_coef_max
        fits = not self.use_adaptive_entropy or least <= self.entropy_coef <= most
        require(self, "entropy_coef", fits, f"must lie in [entropy_coef_min, entropy_coef_max] = [{least}, {most}]")
        threshold = self.off_policy_mask_threshold
        require(self, "off_policy_mask_threshold", threshold is None or threshold > 0, "give a KL > 0, or None")

    def _validate_clipping(self) -> None:
        rule, high = LOSS_TYPES[self.loss_type][0], self.epsilon_high
        no_effect = f"no effect with loss_type={self.loss_type!r}"
        require(self, "epsilon", self.epsilon > 0, "give a range > 0")
        require(self, "epsilon", rule == "clip" or self.epsilon == 0.2, no_effect)
        least = 1 if rule == "cispo" else 0
        require(self, "epsilon_high", high is None or high > least, "give a number > 0 (cispo: > 1)")
        require(self, "epsilon_high", high is None or rule != "sapo", no_effect)
        require(self, "delta", self.delta is None or rule == "clip", no_effect)
        bound = 1 + (self.epsilon if high is None else high)
        require(self, "delta", self.delta is None or self.delta > bound, f"must exceed 1 + epsilon_high = {bound}")
        for name, default in (("sapo_temperature_neg", 1.05), ("sapo_temperature_pos", 1.0)):
            value = getattr(self, name)
            require(self, name, rule == "sapo" or value == default, no_effect)
            require(self, name, value > 0, "give a steepness > 0")

    def _validate_kl(self) -> None:
        choose(self, "kl_estimator", (None, "k1", "k2", "k3"))
        choose(self, "kl_placement", ("loss", "reward"))
        in_loss, corrected = self.beta > 0 and self.kl_placement == "loss", self.use_bias_correction_kl
        require(self, "use_bias_correction_kl", in_loss or not corrected, "needs beta > 0 and kl_placement='loss'")
        flat = in_loss and self.kl_estimator == "k1" and corrected is False
        require(self, "kl_estimator", not flat, "k1 in the loss needs use_bias_correction_kl: it has no gradient else")
        for name, default in (("kl_estimator", None), ("kl_placement", "loss")):
            used = self.beta > 0 or getattr(self, name) == default
            require(self, name, used, "no effect with beta=0, which keeps no reference")
        apart = self.multi_objective_aggregation == "normalize_then_sum"
        way_out = "multi_objective_aggregation='normalize_then_sum' would rescale the KL; place it in the loss"
        require(self, "kl_placement", in_loss or not (apart and self.beta), way_out)


LOSS_TYPES = {
    "grpo": ("clip", "sequence"),
    "dapo": ("clip", "token"),
    "bnpo": ("clip", "token"),
    "dr_grpo": ("clip", "constant"),
    "cispo": ("cispo", "token"),
    "sapo": ("sapo", "sequence"),
}
"""name -> (clip rule, aggregation)"""


@dataclass
class RLOOConfig(OnPolicyConfig):
    """`TrainingArguments` and what REINFORCE leave-one-out adds; the KL acts in the reward."""

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
