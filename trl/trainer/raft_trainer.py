"""Fine-tuning on the best samples of the policy: best-of-n, rejection sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from trl.data.records import Rollout
from trl.losses.loss_sum import LossSum
from trl.losses.supervised import nll
from trl.models.scoring import score
from trl.rollout.experience import Experience, PolicyBatch
from trl.rollout.rewards import Rewards
from trl.trainer.configuration import require
from trl.trainer.rollout_trainer import RewardedConfig, RolloutTrainer


@dataclass
class RAFTConfig(RewardedConfig):
    """`TrainingArguments` and what reward-ranked fine-tuning adds."""

    learning_rate: float = field(default=2e-5)
    """initial learning rate"""
    keep_best: int = field(default=1)
    """completions of each prompt that are learned"""
    min_reward: float | None = field(default=None)
    """completions with a lower reward are not learned (rejection sampling); None: no bound"""

    def validate(self) -> None:
        super().validate()
        fits = 1 <= self.keep_best <= self.num_generations
        require(self, "keep_best", fits, f"give a whole number from 1 to num_generations={self.num_generations}")


class RAFTTrainer(RolloutTrainer):
    """Sample n completions of each prompt, keep the best, learn them by their likelihood (arXiv:2304.06767)."""

    _tag_names = ("trl", "raft")
    config_class = RAFTConfig

    def experience(
        self, rollout: Rollout, rewards: Rewards, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[Experience, dict[str, list[float]]]:
        kept = best_rows(rewards.total_B(), self.args.num_generations, self.args.keep_best, self.args.min_reward)
        experience = Experience.of(rollout, advantages=kept)
        experience = replace(experience, mask_BT=experience.mask_BT * kept[:, None])
        self.record("kept_ratio", kept.float().sum(), len(kept))
        return experience, {"kept": kept.float().tolist()}

    def policy_objective(self, model: nn.Module, batch: PolicyBatch) -> LossSum:
        return nll(score(model, batch.packed).logprobs_BT, batch.mask_BT)


def best_rows(rewards_B: Tensor, group: int, keep: int, least: float | None) -> Tensor:
    """Which completions are learned: scored, not below `least`, and among the `keep` best of their group. [B]"""
    total = rewards_B.unflatten(0, (-1, group)).nan_to_num(nan=-torch.inf)
    places = total.argsort(dim=1, descending=True, stable=True)[:, :keep]
    among_best = torch.zeros_like(total, dtype=torch.bool).scatter(1, places, True)
    good = total > -torch.inf if least is None else total >= least
    return (among_best & good).flatten()
