"""Group-relative policy optimisation and its relatives."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from trl.data.records import Rollout
from trl.losses.loss_sum import Aggregation, LossSum
from trl.losses.policy import (
    ADVANTAGES,
    CLIP_RULES,
    REWARD_AGGREGATIONS,
    group_relative,
    off_policy_mask,
    policy_loss,
    top_entropy_mask,
)
from trl.models.scoring import score
from trl.rollout.loader import PolicyBatch, padded
from trl.trainer.adaptive_entropy import AdaptiveEntropy
from trl.trainer.grpo_config import LOSS_TYPES, GRPOConfig
from trl.trainer.on_policy import OnPolicyTrainer


class GRPOTrainer(OnPolicyTrainer):
    """Optimise a policy on groups of its own completions (arXiv:2402.03300), with the clip rules, averages, baselines
    and KL terms of its relatives: DAPO, Dr. GRPO, GSPO, CISPO, SAPO, REINFORCE++.

    `reward_funcs`: functions `f(prompts, completions, completion_ids, **columns) -> one float or None each`, async
    ones too, names of `REWARDS`, reward models or their folders. `train_dataset` has a column `prompt`; its other
    columns reach the reward functions.
    """

    _tag_names = ("trl", "grpo")
    config_class = GRPOConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config = self.args
        rule, aggregation = LOSS_TYPES[config.loss_type]
        self.aggregation = cast(Aggregation, aggregation)
        high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        options = {
            "clip": {"clip_low": config.epsilon, "clip_high": high, "delta": config.delta},
            "cispo": {} if config.epsilon_high is None else {"clip_high": config.epsilon_high - 1},
            "sapo": {"tau_pos": config.sapo_temperature_pos, "tau_neg": config.sapo_temperature_neg},
        }[rule]
        self._rule = partial(CLIP_RULES[rule], **options)
        scaled = partial(group_relative, scale=config.scale_rewards)
        self._baseline = scaled if config.advantage is None else ADVANTAGES[config.advantage]
        self.entropy: AdaptiveEntropy | None = None
        if config.use_adaptive_entropy:
            self.entropy = AdaptiveEntropy(self)
            self.add_callback(self.entropy)

    def extra_state(self) -> dict[str, Any]:
        return super().extra_state() | ({} if self.entropy is None else {"entropy": self.entropy.state_of()})

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        if self.entropy is not None and "entropy" in state:
            self.entropy.load(state["entropy"])

    def kl_in_loss(self) -> bool:
        return self.args.kl_placement == "loss"

    def kl_estimator(self) -> str:
        return self.args.kl_estimator or ("k3" if self.kl_in_loss() else "k1")

    def idle_rows_can_be_skipped(self) -> bool:
        return super().idle_rows_can_be_skipped() and not (self.args.entropy_coef or self.entropy)

    def advantages(self, scores_BF: Tensor, weights_F: Tensor, kl_B: Tensor | None) -> Tensor:
        if kl_B is not None and not self.kl_in_loss():
            unscored_B = scores_BF.isnan().all(-1)
            penalty_B = (-kl_B).masked_fill(unscored_B, torch.nan)
            scores_BF = torch.cat([scores_BF, penalty_B[:, None]], 1)
            weights_F = torch.cat([weights_F, weights_F.new_tensor([self.args.beta])])
        aggregate = REWARD_AGGREGATIONS[self.args.multi_objective_aggregation]
        return aggregate(scores_BF, weights_F, self.args.num_generations, self._baseline)

    def token_weights(self, rollout: Rollout, masks: list[list[int]]) -> list[list[float]] | None:
        """The tokens of high entropy under the policy that sampled, among those of all ranks."""
        if self.args.top_entropy_quantile == 1.0:
            return None
        entropy_BT = self.scored(self.model, rollout, entropy=True).entropy_BT
        assert entropy_BT is not None
        mask_BT = padded(masks, entropy_BT.shape[1])
        counted_N = entropy_BT[mask_BT > 0].tolist()
        if self.args.world_size > 1:
            counted_N = gather_object(counted_N)
        all_N = torch.tensor(counted_N)
        if not len(all_N):
            return [[0.0] * len(ids) for ids in rollout.completions]
        least = all_N[top_entropy_mask(all_N, torch.ones_like(all_N), self.args.top_entropy_quantile) > 0].min()
        kept_BT = (entropy_BT >= least) * mask_BT
        return [row[: len(ids)] for row, ids in zip(kept_BT.tolist(), rollout.completions, strict=True)]

    def policy_objective(self, model: nn.Module, batch: PolicyBatch) -> LossSum:
        config = self.args
        coef = config.entropy_coef if self.entropy is None else self.entropy.active
        scores = score(
            model,
            batch.packed,
            temperature=config.temperature,
            entropy=self.entropy is not None,
            entropy_gradient=coef != 0,
        )
        if self.entropy is not None and scores.entropy_BT is not None:
            self.entropy.add((scores.entropy_BT * batch.mask_BT).sum(), batch.mask_BT.sum())
            self.record("entropy_coef", coef)
        self.check_first(scores.logprobs_BT, batch)
        weight_BT = batch.weight_BT
        if config.off_policy_mask_threshold is not None:
            fresh = off_policy_mask(
                scores.logprobs_BT, batch.old_logprobs_BT, batch.advantages_BT, batch.mask_BT,
                config.off_policy_mask_threshold,
            )  # fmt: skip
            weight_BT = fresh if weight_BT is None else weight_BT * fresh
        return policy_loss(
            scores.logprobs_BT,
            batch.old_logprobs_BT,
            batch.advantages_BT,
            batch.mask_BT,
            rule=self._rule,
            level=config.importance_sampling_level,
            weight_BT=weight_BT,
            reference_BT=batch.reference_BT,
            beta=config.beta if self.kl_in_loss() else 0.0,
            kl=self.kl_estimator(),
            kl_importance=config.use_bias_correction_kl is not False,
            entropy_BT=scores.entropy_BT,
            entropy_coef=coef,
            how=self.aggregation,
            max_tokens=config.max_completion_length,
        )
