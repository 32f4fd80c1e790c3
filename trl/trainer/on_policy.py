"""Policy gradients: rewards become an advantage for each token of the policy's own samples."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from trl.data.records import Rollout
from trl.losses.kl import KL_ESTIMATORS
from trl.losses.policy import mask_truncated
from trl.models.reference import Reference
from trl.rollout.experience import Experience, padded
from trl.rollout.rewards import Rewards, credit_turns
from trl.trainer.configuration import Setting, require
from trl.trainer.guard import NonFiniteError, non_finite_weights
from trl.trainer.rollout_trainer import RewardedConfig, RolloutTrainer


@dataclass(frozen=True)
class KLTerm:
    """The KL to the reference: its weight, its estimator, and where it acts."""

    beta: float
    estimator: str = "k1"
    in_loss: bool = False
    """in the loss of each token; else each completion's reward is reduced by beta times its KL"""

    @property
    def loss_weight(self) -> float:
        return self.beta if self.in_loss else 0.0


@dataclass
class OnPolicyConfig(RewardedConfig):
    """`RewardedConfig` and what the policy-gradient trainers share."""

    beta: float = field(default=0.0)
    """weight of the KL to the reference; 0: no reference is kept"""
    mask_truncated_completions: bool = field(default=False)
    """do not learn from completions that were cut at the length limit"""
    turn_level_credit: bool = field(default=False)
    """environments: credit each turn with the rewards from it on, compared with the same turn of its group"""
    sync_ref_model: bool = field(default=False)
    """move the reference towards the policy every `ref_model_sync_steps`"""
    ref_model_mixup_alpha: float = field(default=0.6)
    """share of the policy in the new reference"""
    ref_model_sync_steps: int = field(default=512)
    """optimizer steps between two moves"""

    def validate(self) -> None:
        super().validate()
        require(self, "beta", self.beta >= 0, "give a weight >= 0")
        noise = "noise would make another policy of the one that sampled; leave it out"
        require(self, "neftune_noise_alpha", self.neftune_noise_alpha is None, noise)
        require(self, "sync_ref_model", not self.sync_ref_model or self.beta > 0, "beta=0 keeps no reference to move")
        require(self, "ref_model_mixup_alpha", 0 < self.ref_model_mixup_alpha <= 1, "give a share in (0, 1]")
        require(self, "ref_model_sync_steps", self.ref_model_sync_steps >= 1, "give a number of steps >= 1")
        for name, default in (("ref_model_mixup_alpha", 0.6), ("ref_model_sync_steps", 512)):
            used = self.sync_ref_model or getattr(self, name) == default
            require(self, name, used, "no effect without sync_ref_model=True")

    @property
    def moves_reference(self) -> bool:
        return self.sync_ref_model

    def kl_term(self) -> KLTerm:
        """How the KL to the reference acts: here it is part of the reward."""
        return KLTerm(self.beta)


class OnPolicyTrainer(RolloutTrainer):
    """An algorithm fills in `advantages` (rewards to a number per completion) and `policy_objective`."""

    config_class: type[OnPolicyConfig]
    beta, mask_truncated_completions = Setting(), Setting()

    def __init__(self, *args: Any, ref_model: nn.Module | str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.turn_level_credit and (self.environment is None or self.rewards is None or self.rewards.panel):
            raise ValueError("turn_level_credit=True: needs an environment that gives the rewards, and no reward_funcs")
        self.reference = self._reference(ref_model)

    @property
    def kl(self) -> KLTerm:
        """The KL to the reference, as the config says it now."""
        return self.args.kl_term()  # type: ignore[no-any-return]

    def changed(self, name: str) -> None:
        super().changed(name)
        self._check_reference()

    def _check_reference(self) -> None:
        if self.args.beta and self.reference is None:
            raise ValueError(f"beta={self.args.beta!r}: the trainer was made with beta=0, which keeps no reference")

    def _reference(self, ref_model: nn.Module | str | None) -> Reference | None:
        if self.args.beta:
            return self.make_reference(ref_model)
        if ref_model is not None:
            raise ValueError("ref_model: beta=0 uses no reference; set beta > 0 or leave it out")
        return None

    # -- the verbs of an algorithm ---------------------------------------------------------------

    @abstractmethod
    def advantages(self, scores_BF: Tensor, weights_F: Tensor, kl_B: Tensor | None) -> Tensor:
        """Rewards of all ranks' completions by each reward function (NaN: no opinion) to advantages. [B]

        kl_B: an estimate of each completion's KL to the reference; None without a reference.
        """

    def token_weights(self, rows: Experience) -> Tensor | None:
        """Factors of each token's surrogate that are known when the rollout is made. [B, T]"""
        return None

    # -- experience ------------------------------------------------------------------------------

    def experience(
        self, rollout: Rollout, rewards: Rewards, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[Experience, dict[str, list[float]]]:
        self._check_reference()
        experience = Experience.of(rollout)
        if self.args.mask_truncated_completions:
            cut_B = torch.tensor(rollout.metadata.get("truncated", [False] * len(rollout)))
            experience = replace(experience, mask_BT=mask_truncated(experience.mask_BT, cut_B))
        reference_BT = None
        if self.reference is not None:
            with self.reference.model() as model:
                assert model is not None
                reference_BT = self.scored(model, experience).logprobs_BT
        kl_B = self._kl_B(rollout, reference_BT)
        advantages_B = self._over_all_ranks(rewards, kl_B)
        advantages_BT = experience.per_token(advantages_B)
        if self.args.turn_level_credit:
            world = self.args.world_size
            credited = credit_turns(rewards, rollout, lambda shifted: self._over_all_ranks(shifted, kl_B), world)
            advantages_BT = padded(credited)
        experience = replace(
            experience,
            advantages_BT=advantages_BT,
            reference_BT=reference_BT,
            weight_BT=self.token_weights(experience),
        )
        return experience, {"advantage": advantages_B.tolist()}

    def _kl_B(self, rollout: Rollout, reference_BT: Tensor | None) -> Tensor | None:
        if reference_BT is None:
            return None
        sampled_BT, mask_BT = padded(rollout.logprobs), padded(rollout.masks)
        return (KL_ESTIMATORS[self.kl.estimator](sampled_BT, reference_BT) * mask_BT).sum(-1)

    def _over_all_ranks(self, rewards: Rewards, kl_B: Tensor | None) -> Tensor:
        """This rank's advantages; statistics over the batch see the completions of all ranks."""
        whole: list[tuple[Any, Any]] = [(rewards.scores_BF.tolist(), None if kl_B is None else kl_B.tolist())]
        if self.args.world_size > 1:
            whole = gather_object(whole)
        scores_BF = torch.tensor([row for scores, _ in whole for row in scores])
        all_kl_B = None if kl_B is None else torch.tensor([kl for _, kls in whole for kl in kls])
        if all_kl_B is not None and not self.kl.in_loss:  # in a reward, nan would mean that nobody has an opinion
            self._check_kl(all_kl_B)
        start = sum(len(scores) for scores, _ in whole[: self.args.process_index])
        advantages_B = self.advantages(scores_BF, rewards.weights_F, all_kl_B)
        return advantages_B[start : start + len(rewards.scores_BF)]

    def _check_kl(self, kl_B: Tensor) -> None:
        """NonFiniteError for a completion, of any rank, whose KL to the reference is not finite."""
        wrong = (~kl_B.isfinite()).nonzero().flatten().tolist()
        if wrong:
            names = [] if self.ref_model is None else non_finite_weights(self.ref_model)
            weights = f": its weights that are not finite: {', '.join(names)}" if names else ""
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: the KL of completion {wrong[0]} to the reference is "
                f"{kl_B[wrong[0]].item()}{weights}; the weights of the policy are as before this step"
            )

    def load_extra_state(self, state: dict[str, Any]) -> None:
        before = self.rollouts.state
        super().load_extra_state(state)
        rest = self.rollouts.state.experience
        if rest is not None and rest.reference_BT is None and self.reference is not None:
            self.rollouts.state = before
            raise ValueError(
                f"beta={self.args.beta}: the checkpoint stands in the midst of a rollout that was made with beta=0; "
                "resume with that, or from a checkpoint after the end of a rollout"
            )
