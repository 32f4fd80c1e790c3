"""Online DPO: the policy samples pairs, and rewards or a judge say which completion of a pair is better."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from trl.data.records import Rollout
from trl.losses.loss_sum import Aggregation, LossSum
from trl.losses.pairs import PairLogps, sum_pairs
from trl.losses.preference import PAIR_LOSSES, REFERENCE_FREE, WHOLE_BATCH, pair_options, preference_loss
from trl.models.scoring import score
from trl.rewards.named import Judge, pairwise
from trl.rollout.experience import Experience, PolicyBatch, RolloutShape, padded
from trl.rollout.report import record_objective
from trl.rollout.rewards import Rewards, without_end
from trl.trainer.configuration import Setting, choose, require
from trl.trainer.rollout_trainer import RewardedConfig, RolloutTrainer, divisors, limit_whole
from trl.trainer.settings import accepted, rename

logger = logging.getLogger(__name__)

ONLINE_LOSSES = [n for n in PAIR_LOSSES if n not in REFERENCE_FREE | WHOLE_BATCH and "delta" not in pair_options(n)]


@dataclass
class OnlineDPOConfig(RewardedConfig):
    """`TrainingArguments` and what online DPO adds; batch sizes count completions."""

    learning_rate: float = field(default=5e-7)
    """initial learning rate"""
    temperature: float = field(default=0.9)
    """sampling temperature; the policy is scored at the same"""
    max_completion_length: int = field(default=64)
    """longest completion in tokens"""
    max_new_tokens: int | None = accepted("max_new_tokens")
    max_length: int | None = field(default=None)
    """longest prompt + completion in tokens: the prompt loses its start; None: prompts are as long as they are"""
    missing_eos_penalty: float | None = field(default=None)
    """subtracted from the reward of a completion that was cut at the length limit; None: nothing"""
    reward_model_path: str | None = field(default=None)
    """name or folder of a reward model, where no reward is given as an object"""
    num_generations: int = field(default=2)
    """completions of each prompt; the best and the worst of them are a pair"""
    loss_type: str = field(default="sigmoid")
    """pairwise loss: any of DPO's that needs a reference and one pair at a time"""
    beta: float | str | list[float] = field(default=0.1)
    """scale of the log-ratios: the smaller, the further the policy may move; a list: one for each epoch, the last stays
    """

    def json_fields(self) -> tuple[str, ...]:
        return (*super().json_fields(), "beta")

    def beta_at(self, epoch: float | None) -> float:
        """The scale in an epoch."""
        scales = self._scales()
        return scales[min(int(epoch or 0), len(scales) - 1)]

    def _scales(self) -> list[float]:
        given: Any = self.beta
        return given if isinstance(given, list) else [given]

    def translate(self) -> None:
        super().translate()
        rename(self, "max_new_tokens", "max_completion_length")
        self.max_new_tokens = self.max_completion_length
        limit_whole(self)
        if isinstance(self.beta, list) and len(self.beta) == 1:
            self.beta = self.beta[0]
        if self.per_device_train_batch_size == 1:  # one prompt elsewhere
            self.__dict__["per_device_train_batch_size"] = self.num_generations
            logger.warning(
                "per_device_train_batch_size=1: batch sizes count completions, and %d of them are the one prompt",
                self.num_generations,
            )

    def validate(self) -> None:
        super().validate()
        choose(self, "loss_type", ONLINE_LOSSES)
        scales = self._scales()
        require(self, "beta", bool(scales) and min(scales) > 0, "give a scale > 0, or one for each epoch")
        require(self, "num_generations", self.num_generations >= 2, "a pair needs at least 2 completions")

    def rollout_shape(self) -> RolloutShape:
        shape = super().rollout_shape()
        step = self.rows_of_step(shape) * self.world_size
        if step % self.num_generations:
            raise ValueError(
                f"num_generations={self.num_generations}: must divide the completions of an optimizer step over all "
                f"processes, {step}, so that its pairs are whole; {divisors(step)} do"
            )
        return shape


class OnlineDPOTrainer(RolloutTrainer):
    """Optimise a policy on pairs of its own completions (arXiv:2402.04792): the best and the worst of each group.

    A group without two completions of different reward teaches nothing. `judge`: instead of reward functions, a
    function `(prompts, pairs) -> 0, 1 or -1 each`, or an object with such a method `judge`. `reward_model` and
    `reward_processing_class` are older names of `reward_funcs` and `reward_processing_classes`.
    """

    _tag_names = ("trl", "online-dpo")
    config_class = OnlineDPOConfig
    beta, loss_type, missing_eos_penalty = Setting(), Setting(), Setting()
    aggregation: Aggregation = "sequence"
    rows_together = 2

    def __init__(
        self,
        model: nn.Module | str,
        reward_funcs: Any = None,
        args: Any = None,
        *more: Any,
        judge: Judge | Any = None,
        ref_model: nn.Module | str | None = None,
        reward_model: nn.Module | str | None = None,
        reward_processing_class: Any = None,
        **kwargs: Any,
    ):
        if reward_model is not None:
            if reward_funcs is not None:
                raise ValueError("reward_model: an older name of reward_funcs; give one of them")
            reward_funcs = reward_model
        if reward_funcs is None and judge is None:
            reward_funcs = getattr(args, "reward_model_path", None)
        if reward_processing_class is not None:
            kwargs["reward_processing_classes"] = reward_processing_class
        if judge is not None:
            if reward_funcs is not None:
                raise ValueError("judge: reward_funcs order the completions already; give one of them")
            for name in ("num_generations", "num_generations_eval"):
                if getattr(args, name, None) not in (None, 2):
                    raise ValueError(f"{name}={getattr(args, name)}: a judge compares 2 completions")
            reward_funcs = pairwise(judge)
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        self.reference = self.make_reference(ref_model)

    def experience(
        self, rollout: Rollout, rewards: Rewards, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[Experience, dict[str, list[float]]]:
        assert self.reference is not None
        rewards = without_end(rewards, rollout, self.args.missing_eos_penalty)
        best, worst, decided = ordered(rewards, self.args.num_generations)
        chosen = [row for pair in zip(best, worst, strict=True) for row in pair]
        preference_B = torch.zeros(len(rollout))
        for first, second, certain in zip(best, worst, decided, strict=True):
            preference_B[first], preference_B[second] = (1.0, -1.0) if certain else (0.0, 0.0)
        whole = Experience.of(rollout, advantages=preference_B)
        with self.reference.model() as model:
            assert model is not None
            reference_BT = self.scored(model, whole).logprobs_BT
        self._record(whole, rollout, reference_BT, rewards.total_B(), chosen)
        mask_BT = whole.mask_BT * (preference_B != 0)[:, None]
        whole = replace(whole, mask_BT=mask_BT, reference_BT=reference_BT)
        return whole.select(chosen), {"preference": preference_B.tolist()}

    def _record(
        self, rows: Experience, rollout: Rollout, reference_BT: Tensor, total_B: Tensor, chosen: Sequence[int]
    ) -> None:
        """The rollout's metrics under today's names. chosen: the best and the worst of each group, in turn."""
        beta = self.args.beta_at(self.state.epoch)
        record_objective(self.record, rows, reference_BT, padded(rollout.masks), total_B, beta)
        best, worst = total_B[chosen[0::2]], total_B[chosen[1::2]]
        known = (best - worst)[~(best - worst).isnan()]
        self.record("objective/scores_margin", float(known.sum()), len(known))
        ends = set(self._ends())
        ended = sum(not ends.isdisjoint(ids) for ids in rollout.completions)
        self.record("val/contain_eos_token", float(ended), len(rollout))
        self.record("beta", beta)

    def _collate(self, rows: Experience) -> dict[str, PolicyBatch]:
        batch = super()._collate(rows)["policy"]
        return {"policy": replace(batch, counted=batch.counted / 2)}

    def policy_objective(self, model: nn.Module, batch: PolicyBatch) -> LossSum:
        assert batch.reference_BT is not None
        logprobs_BT = score(model, batch.packed, temperature=self.args.temperature).logprobs_BT
        mask_BT = batch.mask_BT
        sums = [sum_pairs(x[0::2], x[1::2], mask_BT[0::2], mask_BT[1::2]) for x in (logprobs_BT, batch.reference_BT)]
        lengths_B = mask_BT.sum(-1)
        pair = PairLogps(*sums[0], *sums[1], lengths_B[0::2], lengths_B[1::2])
        decided_B = (lengths_B[0::2] > 0).float()
        beta = self.args.beta_at(self.state.epoch)
        result = preference_loss(pair, {self.args.loss_type: 1.0}, {"beta": beta}, weight_B=decided_B)
        return LossSum(result.total, batch.counted, result.metrics)


def ordered(rewards: Rewards, group: int) -> tuple[list[int], list[int], list[bool]]:
    """The best and the worst completion of each group, and whether their rewards differ."""
    total = rewards.total_B().unflatten(0, (-1, group))
    first = torch.arange(len(total)) * group
    best = total.nan_to_num(nan=-torch.inf).argmax(1)
    worst = total.nan_to_num(nan=torch.inf).argmin(1)
    worst = torch.where(best == worst, (best + 1) % group, worst)  # undecided: any two will do

    def listed(places: Tensor) -> list[int]:
        return [int(place) for place in first + places]

    return listed(best), listed(worst), rewards.informative_groups(group).tolist()
