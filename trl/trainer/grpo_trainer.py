"""Group-relative policy optimisation and its relatives."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback

from trl.losses.loss_sum import Aggregation, LossSum, Measure
from trl.losses.policy import (
    ADVANTAGES,
    REWARD_AGGREGATIONS,
    ClipRule,
    adaptive_entropy_coef,
    cispo,
    clip,
    group_relative,
    off_policy_mask,
    policy_loss,
    sapo,
    top_entropy_mask,
    vespo,
)
from trl.models.scoring import score
from trl.rollout.experience import Experience, PolicyBatch
from trl.trainer.configuration import Setting, choose, refuse_unused, require
from trl.trainer.objective import pieces_of
from trl.trainer.on_policy import KLTerm, OnPolicyConfig, OnPolicyTrainer

logger = logging.getLogger(__name__)

LOSS_TYPES: dict[str, tuple[str, Aggregation]] = {
    "grpo": ("clip", "sequence"),
    "dapo": ("clip", "token"),
    "bnpo": ("clip", "token"),
    "dr_grpo": ("clip", "constant"),
    "cispo": ("cispo", "token"),
    "sapo": ("sapo", "sequence"),
    "luspo": ("clip", "sequence_sum"),
    "vespo": ("vespo", "token"),
}
"""name -> (clip rule, aggregation)"""


@dataclass
class GRPOConfig(OnPolicyConfig):
    """`TrainingArguments` and the settings of group-relative policy optimisation."""

    loss_type: str = field(default="dapo")
    """how tokens are averaged and clipped: grpo, dapo, bnpo, dr_grpo, cispo, sapo, luspo, vespo"""
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
    vespo_k_pos: float = field(default=2.0)
    """vespo: how fast the weight falls below ratio 1 where the advantage is positive"""
    vespo_lambda_pos: float = field(default=3.0)
    """vespo: how fast it falls above ratio 1 there"""
    vespo_k_neg: float = field(default=3.0)
    """vespo: as `vespo_k_pos`, where the advantage is negative"""
    vespo_lambda_neg: float = field(default=2.0)
    """vespo: as `vespo_lambda_pos`, where the advantage is negative"""
    top_entropy_quantile: float = field(default=1.0)
    """learn from this share of the tokens only: those with the highest entropy"""
    entropy_coef: float = field(default=0.0)
    """weight of the entropy bonus: the mean entropy of a token, with every `loss_type`"""
    use_adaptive_entropy: bool = field(default=False)
    """let that weight follow the entropy, from `entropy_coef` on"""
    entropy_target: float = field(default=0.2)
    """adaptive: entropy in nats a token; the bonus is off above it"""
    entropy_coef_delta: float = field(default=0.005)
    """adaptive: step of the weight"""
    entropy_coef_min: float = field(default=0.0)
    """adaptive: least weight"""
    entropy_coef_max: float = field(default=1.0)
    """adaptive: largest weight"""
    off_policy_mask_threshold: float | None = field(default=None)
    """leave out completions of negative advantage from which the policy has moved by more than this KL"""

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
        require(self, "epsilon_high", high is None or rule not in ("sapo", "vespo"), no_effect)
        require(self, "delta", self.delta is None or rule == "clip", no_effect)
        bound = 1 + (self.epsilon if high is None else high)
        require(self, "delta", self.delta is None or self.delta > bound, f"must exceed 1 + epsilon_high = {bound}")
        for name, default in (("sapo_temperature_neg", 1.05), ("sapo_temperature_pos", 1.0)):
            value = getattr(self, name)
            require(self, name, rule == "sapo" or value == default, no_effect)
            require(self, name, value > 0, "give a steepness > 0")
        shapes = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
        refuse_unused(self, shapes, rule == "vespo", "loss_type='vespo'")
        for name in shapes:
            require(self, name, getattr(self, name) >= 0, "give a number >= 0")
        if self.loss_type == "luspo" and self.importance_sampling_level == "token":
            logger.warning("loss_type='luspo': its paper takes the ratio of sequences (importance_sampling_level)")
        if rule == "vespo" and self.importance_sampling_level != "token":
            logger.warning(
                "importance_sampling_level=%r: no effect with loss_type='vespo', whose ratio is that of the whole "
                "completion",
                self.importance_sampling_level,
            )

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

    def kl_term(self) -> KLTerm:
        in_loss = self.kl_placement == "loss"
        return KLTerm(self.beta, self.kl_estimator or ("k3" if in_loss else "k1"), in_loss)

    def clip_rule(self) -> ClipRule:
        """The rule of `loss_type` with its numbers."""
        rule = LOSS_TYPES[self.loss_type][0]
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if rule == "clip":
            return partial(clip, clip_low=self.epsilon, clip_high=high, delta=self.delta)
        if rule == "sapo":
            return partial(sapo, tau_pos=self.sapo_temperature_pos, tau_neg=self.sapo_temperature_neg)
        if rule == "vespo":
            return partial(
                vespo, k_pos=self.vespo_k_pos, lambda_pos=self.vespo_lambda_pos, k_neg=self.vespo_k_neg,
                lambda_neg=self.vespo_lambda_neg,
            )  # fmt: skip
        return cispo if self.epsilon_high is None else partial(cispo, clip_high=self.epsilon_high - 1)

    def clip_range(self) -> tuple[float, float]:
        """The ratios that the rule leaves as they are, whatever the advantage."""
        rule, high = LOSS_TYPES[self.loss_type][0], self.epsilon_high
        if rule == "clip":
            return 1 - self.epsilon, 1 + (self.epsilon if high is None else high)
        return 0.0, (5.0 if high is None else high) if rule == "cispo" else torch.inf

    def ratio_level(self) -> str:
        """Whose ratio the rule reads, of `RATIO_LEVELS`."""
        return "trajectory" if LOSS_TYPES[self.loss_type][0] == "vespo" else self.importance_sampling_level


class AdaptiveEntropy(TrainerCallback):
    """The weight of an entropy bonus, which follows the policy's entropy: it rises after each optimizer step while the
    entropy is below its target, and falls above it.

    Skywork OR1 (arXiv:2505.22312); as there, the bonus counts only while the entropy is at most the target.
    """

    def __init__(self, config: GRPOConfig, reduce: Callable[[Tensor], Tensor]):
        """reduce: the sum of a tensor over all ranks."""
        self.config, self.reduce, self.coef = config, reduce, float(config.entropy_coef)
        self.entropy: float | None = None
        """of the last optimizer step, in nats a token"""
        self._seen: list[Tensor] = []

    @property
    def active(self) -> float:
        """The coefficient of the next step."""
        return self.coef if self.entropy is None or self.entropy <= self.config.entropy_target else 0.0

    def add(self, total: Tensor, tokens: Tensor) -> None:
        """Count the entropies of a micro-batch: their sum, and the number of tokens."""
        self._seen.append(torch.stack([total.detach(), tokens.to(total)]))

    def state_of(self) -> dict[str, float | None]:
        """What a checkpoint keeps."""
        return {"coef": self.coef, "entropy": self.entropy}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state_of` gave."""
        self.coef, self.entropy = state["coef"], state["entropy"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        mine = sum(self._seen, torch.zeros(2, device=args.device))
        self._seen = []
        total, tokens = self.reduce(mine).tolist()
        if not tokens:
            return
        self.entropy = total / tokens
        self.coef = adaptive_entropy_coef(
            self.coef,
            self.entropy,
            target=self.config.entropy_target,
            delta=self.config.entropy_coef_delta,
            least=self.config.entropy_coef_min,
            most=self.config.entropy_coef_max,
        )


class GRPOTrainer(OnPolicyTrainer):
    """Optimise a policy on groups of its own completions (arXiv:2402.03300), with the clip rules, averages, baselines
    and KL terms of its relatives: DAPO, Dr. GRPO, GSPO, CISPO, SAPO, LUSPO, VESPO, REINFORCE++.

    `reward_funcs`: functions `f(prompts, completions, completion_ids, **columns) -> one float or None each`, async
    ones too, names of `REWARDS`, reward models or their folders. `train_dataset` has a column `prompt`; its other
    columns reach the reward functions.
    """

    _tag_names = ("trl", "grpo")
    config_class = GRPOConfig
    epsilon_low, epsilon_high = Setting("epsilon"), Setting(unset="epsilon")
    entropy_coef, importance_sampling_level = Setting(), Setting()
    scale_rewards, loss_type = (Setting(fixed="the trainer is made for it") for _ in range(2))

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config = self.args
        self.aggregation = LOSS_TYPES[config.loss_type][1]
        scaled = partial(group_relative, scale=config.scale_rewards)
        self._baseline = scaled if config.advantage is None else ADVANTAGES[config.advantage]
        self._entropy_share: Tensor | float = 1.0
        """what the loss counts over what counts as a token, in the optimizer step at hand"""
        self.entropy: AdaptiveEntropy | None = None
        if config.use_adaptive_entropy:
            self.entropy = AdaptiveEntropy(config, lambda mine: self.accelerator.reduce(mine, "sum"))
            self.add_callback(self.entropy)

    def extra_state(self) -> dict[str, Any]:
        return super().extra_state() | ({} if self.entropy is None else {"entropy": self.entropy.state_of()})

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        if self.entropy is not None and "entropy" in state:
            self.entropy.load(state["entropy"])

    def zero_advantage_means_zero_gradient(self) -> bool:
        return not (self.kl.loss_weight or self.args.entropy_coef or self.entropy)

    def advantages(self, scores_BF: Tensor, weights_F: Tensor, kl_B: Tensor | None) -> Tensor:
        if kl_B is not None and not self.kl.in_loss:
            unscored_B = scores_BF.isnan().all(-1)
            penalty_B = (-kl_B).masked_fill(unscored_B, torch.nan)
            scores_BF = torch.cat([scores_BF, penalty_B[:, None]], 1)
            weights_F = torch.cat([weights_F, weights_F.new_tensor([self.args.beta])])
        aggregate = REWARD_AGGREGATIONS[self.args.multi_objective_aggregation]
        return aggregate(scores_BF, weights_F, self.args.num_generations, self._baseline)

    def token_weights(self, rows: Experience) -> Tensor | None:
        """1 for the tokens of high entropy under the policy that sampled, among those of all ranks. [B, T]"""
        if self.args.top_entropy_quantile == 1.0:
            return None
        entropy_BT = self.scored(self.model, rows, entropy=True).entropy_BT
        assert entropy_BT is not None
        counted_N = entropy_BT[rows.mask_BT > 0].tolist()
        if self.args.world_size > 1:
            counted_N = gather_object(counted_N)
        all_N = torch.tensor(counted_N)
        if not len(all_N):
            return torch.zeros_like(entropy_BT)
        least = all_N[top_entropy_mask(all_N, torch.ones_like(all_N), self.args.top_entropy_quantile) > 0].min()
        return (entropy_BT >= least) * rows.mask_BT

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Tensor]:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.aggregation != "token" and (self.args.entropy_coef or self.entropy):
            masks = [piece["policy"].mask_BT.sum() for piece in pieces_of(batches)]
            tokens = self.accelerator.reduce(sum(masks, torch.zeros((), device=device)), "sum")
            self._entropy_share = count / tokens.clamp(min=1)
        return batches, count

    def reads_own_pass(self) -> bool:
        return self.has_objective_of(GRPOTrainer)

    def policy_objective(self, model: nn.Module, batch: PolicyBatch) -> LossSum:
        config = self.args
        coef = config.entropy_coef if self.entropy is None else self.entropy.active
        scores = score(
            model,
            batch.packed,
            temperature=config.temperature,
            entropy=True,
            entropy_gradient=coef != 0,
        )
        if self.entropy is not None and scores.entropy_BT is not None:
            self.entropy.add((scores.entropy_BT * batch.mask_BT).sum(), batch.mask_BT.sum())
            self.record("entropy_coef", coef)
        old_BT = self.old_logprobs(batch, scores.logprobs_BT)
        weight_BT, apart = batch.weight_BT, dict[str, Measure]()
        if batch.behaviour_BT is not None:
            weight_BT, apart = self.weighed(batch, old_BT, config.ratio_level(), config.clip_range())
        if config.off_policy_mask_threshold is not None:
            fresh = off_policy_mask(
                scores.logprobs_BT, old_BT, batch.advantages_BT, batch.mask_BT,
                config.off_policy_mask_threshold,
            )  # fmt: skip
            weight_BT = fresh if weight_BT is None else weight_BT * fresh
        loss = policy_loss(
            scores.logprobs_BT,
            old_BT,
            batch.advantages_BT,
            batch.mask_BT,
            rule=config.clip_rule(),
            level=config.ratio_level(),
            weight_BT=weight_BT,
            reference_BT=batch.reference_BT,
            beta=self.kl.loss_weight,
            kl=self.kl.estimator,
            kl_importance=config.use_bias_correction_kl is not False,
            entropy_BT=scores.entropy_BT,
            entropy_coef=coef,
            entropy_share=self._entropy_share,
            how=self.aggregation,
            max_tokens=config.max_completion_length,
            sampled_BT=batch.sampled_BT,
            clip_range=config.clip_range(),
        )
        return loss.noting(apart)
