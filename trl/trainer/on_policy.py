"""Policy gradients on the policy's own samples: a number for each token, and an objective that reads it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from trl.data.records import Rollout
from trl.losses.kl import KL_ESTIMATORS
from trl.models.reference import Reference
from trl.rollout.episodes import credit_turns
from trl.rollout.loader import Experience, PolicyBatch, padded
from trl.rollout.rewards import Rewards
from trl.trainer.grpo_config import OnPolicyConfig
from trl.trainer.rollout_trainer import RolloutTrainer


class OnPolicyTrainer(RolloutTrainer):
    """An algorithm fills in `advantages` (rewards to a number per completion) and `policy_objective`."""

    config_class: type[OnPolicyConfig]

    def __init__(self, *args: Any, ref_model: nn.Module | str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.turn_level_credit and (self.environment is None or self.rewards is None or self.rewards.panel):
            raise ValueError("turn_level_credit=True: needs an environment that gives the rewards, and no reward_funcs")
        self.reference = self._reference(ref_model)
        self._first_step: int | None = None

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

        kl_B: an estimate of each completion's KL to the reference, where there is one.
        """

    def kl_in_loss(self) -> bool:
        return False

    def kl_estimator(self) -> str:
        return "k1"

    def idle_rows_can_be_skipped(self) -> bool:
        return not (self.args.beta and self.kl_in_loss())

    def token_weights(self, rollout: Rollout, masks: list[list[int]]) -> list[list[float]] | None:
        """Factors of each token's surrogate that are known when the rollout is made."""
        return None

    # -- experience ------------------------------------------------------------------------------

    def experience(
        self, rollout: Rollout, rewards: Rewards | None, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[Experience, dict[str, list[float]]]:
        assert rewards is not None
        masks = rollout.masks
        if self.args.mask_truncated_completions:
            cut = rollout.metadata.get("truncated", [False] * len(rollout))
            masks = [[0] * len(mask) if over else mask for mask, over in zip(masks, cut, strict=True)]
        reference = None
        if self.reference is not None:
            with self.reference.model() as model:
                reference = self.measured(model, rollout)
        kl_B = self._kl_B(rollout, reference)
        advantages = self._over_all_ranks(rewards, kl_B).tolist()
        per_token = [[a] * len(ids) for a, ids in zip(advantages, rollout.completions, strict=True)]
        if self.args.turn_level_credit:
            per_token = credit_turns(
                rewards, rollout, lambda shifted: self._over_all_ranks(shifted, kl_B), self.args.world_size
            )
        experience = Experience(
            prompts=rollout.prompts,
            completions=rollout.completions,
            masks=masks,
            logprobs=rollout.logprobs,
            advantages=per_token,
            reference=reference,
            weights=self.token_weights(rollout, masks),
        )
        return experience, {"advantage": advantages}

    def _kl_B(self, rollout: Rollout, reference: list[list[float]] | None) -> Tensor | None:
        if reference is None:
            return None
        width = max(map(len, rollout.completions))
        sampled_BT, reference_BT, mask_BT = (padded(x, width) for x in (rollout.logprobs, reference, rollout.masks))
        return (KL_ESTIMATORS[self.kl_estimator()](sampled_BT, reference_BT) * mask_BT).sum(-1)

    def _over_all_ranks(self, rewards: Rewards, kl_B: Tensor | None) -> Tensor:
        """This rank's advantages; statistics over the batch see the completions of all ranks."""
        whole: list[tuple[Any, Any]] = [(rewards.scores_BF.tolist(), None if kl_B is None else kl_B.tolist())]
        if self.args.world_size > 1:
            whole = gather_object(whole)
        scores_BF = torch.tensor([row for scores, _ in whole for row in scores])
        all_kl_B = None if kl_B is None else torch.tensor([kl for _, kls in whole for kl in kls])
        start = sum(len(scores) for scores, _ in whole[: self.args.process_index])
        advantages_B = self.advantages(scores_BF, rewards.weights_F, all_kl_B)
        return advantages_B[start : start + len(rewards.scores_BF)]

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        rest = self.rollouts.state.experience
        if rest and rest["reference"] is None and self.reference is not None:
            raise ValueError(
                f"beta={self.args.beta}: the checkpoint stands in the midst of a rollout that was made with beta=0; "
                "resume with that, or from a checkpoint behind the end of a rollout"
            )

    # -- the assertion of the first update -------------------------------------------------------

    def check_first(self, logprobs_BT: Tensor, batch: PolicyBatch) -> None:
        """RuntimeError unless the run's first update starts at ratio 1 (within 1e-5) and approx_kl below 1e-8.

        Sampler and trainer are one model, so anything else is a mistake: dropout, or weights that changed in between.
        Not asked where they rightly differ: low precision, dropout by choice, another engine in `rollout_func`.
        """
        if self._first_step is None:
            fresh = self.rollouts.state.cursor <= self.args.gradient_accumulation_steps
            self._first_step = self.state.global_step if fresh and self._exact() else -1
        if self._first_step != self.state.global_step:
            return
        change_BT = (logprobs_BT.detach() - batch.old_logprobs_BT) * batch.mask_BT
        tokens = batch.mask_BT.sum().clamp(min=1)
        ratio = float(1 + ((change_BT.exp() - 1) * batch.mask_BT).sum() / tokens)
        approx_kl = float((0.5 * change_BT**2).sum() / tokens)
        if abs(ratio - 1) > 1e-5 or approx_kl > 1e-8:
            raise RuntimeError(
                f"at the first update the ratio is {ratio:.7f} and approx_kl {approx_kl:.1e}, where 1 and 0 are due: "
                "the model that is trained is not the one that sampled; did a callback change it, or is dropout on?"
            )

    def _exact(self) -> bool:
        types = {parameter.dtype for parameter in self.model.parameters()}
        exact = types <= {torch.float32, torch.float64} and not (self.args.bf16 or self.args.fp16)
        return exact and self.args.disable_dropout and self.rollout_func is None
