"""Online DPO: the policy samples pairs, and rewards or a judge say which completion of a pair is better."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from trl.data.records import Rollout
from trl.losses.loss_sum import Aggregation, LossSum
from trl.losses.pairs import PairLogps, sum_pairs
from trl.losses.preference import PAIR_LOSSES, REFERENCE_FREE, WHOLE_BATCH, pair_options, preference_loss
from trl.models.scoring import score
from trl.models.unwrap import below_peft
from trl.rewards.named import Judge, judge_named, pairwise
from trl.rollout.experience import Experience, PolicyBatch, RolloutShape, padded
from trl.rollout.report import record_objective
from trl.rollout.rewards import Rewards, without_end
from trl.trainer.configuration import Setting, as_config, choose, require
from trl.trainer.rollout_trainer import (
    RewardedConfig,
    RolloutTrainer,
    divisors,
    limit_whole,
    with_prompt_ids,
    without_unread,
)
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
    """subtracted from the reward of a completion without an end token, before pairs are made; None: nothing"""
    reward_model_path: str | None = field(default=None)
    """name or folder of a reward model, where no reward is given as an object"""
    judge: str | None = field(default=None)
    """`package.module:name` of a judge of pairs (a function, or a class), where none is given as an object"""
    gpu_memory_utilization: float | None = accepted("gpu_memory_utilization")
    num_generations: int = field(default=2)
    """completions of each prompt; the best and the worst of them are a pair"""
    loss_type: str = field(default="sigmoid")
    """pairwise loss: any of DPO's that needs a reference and one pair at a time"""
    beta: list[float] | str | float = field(default_factory=lambda: [0.1])
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
        rename(self, "gpu_memory_utilization", "vllm_gpu_memory_utilization")
        self.gpu_memory_utilization = None
        self.max_new_tokens = self.max_completion_length
        limit_whole(self)
        if isinstance(self.beta, list) and len(self.beta) == 1:
            self.beta = self.beta[0]
        if isinstance(self.beta, list) and self.max_steps <= 0 and len(self.beta) > self.num_train_epochs:
            logger.warning(
                "beta=%r: a run of num_train_epochs=%s uses the first of them", self.beta, self.num_train_epochs
            )
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
        self._validate_judges()

    def rollout_shape(self) -> RolloutShape:
        shape = super().rollout_shape()
        step = self.rows_of_step(shape) * self.world_size
        if step % self.num_generations:
            raise ValueError(
                f"num_generations={self.num_generations}: must divide the completions of an optimizer step over all "
                f"processes, {step}, so that its pairs are whole; {divisors(step)} do"
            )
        return shape

    def _validate_judges(self) -> None:
        """Of what says which completion is better."""
        penalty = self.missing_eos_penalty
        positive = penalty is None or 0 <= penalty < float("inf")
        require(self, "missing_eos_penalty", positive, "it is subtracted: give a number >= 0, or None")
        way_out = "no judge of that name is here; give `package.module:name`, or an object as the trainer's `judge`"
        require(self, "judge", self.judge is None or ":" in self.judge, way_out)
        if self.judge is not None:
            self.refuse_beside_judge()

    def refuse_beside_judge(self) -> None:
        """ValueError where a setting makes no sense with a judge."""
        for name in ("num_generations", "num_generations_eval"):
            require(self, name, getattr(self, name) in (None, 2), "a judge compares 2 completions")
        way_out = "a judge gives no rewards to subtract from; leave it out"
        require(self, "missing_eos_penalty", not self.missing_eos_penalty, way_out)
        way_out = "a judge orders the completions already; give one of them"
        require(self, "reward_model_path", self.reward_model_path is None, way_out)


class OnlineDPOTrainer(RolloutTrainer):
    """Optimise a policy on pairs of its own completions (arXiv:2402.04792): the best and the worst of each group.

    A group without two completions of different reward teaches nothing. `judge`: instead of reward functions, a
    function `(prompts, pairs) -> 0, 1 or -1 each`, or an object with such a method `judge`, which reads conversations
    as texts. `reward_model` and `reward_processing_class` are older names of `reward_funcs` and
    `reward_processing_classes`.

    Arguments by position are in the order of all trainers that sample (model, reward_funcs, args, train_dataset, ...),
    or in that of other releases (model, ref_model, reward_funcs, judge, args, data_collator, train_dataset, ...): which
    of them is seen by the place of `args`, or by a language model in the second place.
    """

    _tag_names = ("trl", "online-dpo")
    config_class = OnlineDPOConfig
    beta, loss_type, missing_eos_penalty = Setting(), Setting(), Setting()
    aggregation: Aggregation = "sequence"
    rows_together = 2

    def __init__(
        self,
        *given: Any,
        judge: Judge | Any = None,
        ref_model: nn.Module | str | None = None,
        reward_model: nn.Module | str | None = None,
        reward_processing_class: Any = None,
        **named: Any,
    ):
        more = {
            "judge": judge, "ref_model": ref_model, "reward_model": reward_model,
            "reward_processing_classes": reward_processing_class,
        }  # fmt: skip
        named = by_name(given, {**named, **{name: value for name, value in more.items() if value is not None}})
        config = as_config(named.pop("args", None), self.config_class)
        judge, ref_model, model = (named.pop(name, None) for name in ("judge", "ref_model", "model"))
        if model is None:
            raise ValueError("model: none was given; pass a model, a folder or a Hub name")
        order = ordering(config, named.pop("reward_funcs", None), named.pop("reward_model", None), judge)
        super().__init__(model, order, config, **without_unread(named))
        if isinstance(config.beta, list) and not hasattr(self.train_dataset, "__len__"):
            raise ValueError(f"beta={config.beta!r}: one for each epoch, and a stream has none; give one number")
        self.reference = self.make_reference(ref_model)

    def with_prompt(self, dataset: Any, name: str) -> Any:
        return with_prompt_ids(dataset)

    def epoch(self) -> int:
        """How often the data have been gone through; told by the steps, which go on where a resumed run stopped."""
        if not isinstance(self.args.beta, list):
            return 0
        steps = -(-len(self.rollouts) // self.args.gradient_accumulation_steps)
        return self.state.global_step // max(steps, 1)

    def experience(
        self, rollout: Rollout, rewards: Rewards, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[Experience, dict[str, list[float]]]:
        assert self.reference is not None
        rewards = without_end(rewards, rollout, self.args.missing_eos_penalty, self._ends())
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
        beta = self.args.beta_at(self.epoch())
        result = preference_loss(pair, {self.args.loss_type: 1.0}, {"beta": beta}, weight_B=decided_B)
        return LossSum(result.total, batch.counted, result.metrics)


ORDER = (
    "model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class", "reward_processing_classes",
    "callbacks", "optimizers", "peft_config",
)  # fmt: skip
"""arguments by position, as in all trainers that sample"""
ORDER_ELSEWHERE = (
    "model", "ref_model", "reward_funcs", "judge", "args", "data_collator", "train_dataset", "eval_dataset",
    "processing_class", "reward_processing_classes", "peft_config", "compute_metrics", "callbacks", "optimizers",
    "preprocess_logits_for_metrics",
)  # fmt: skip
"""and in other releases"""


def by_name(given: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name, those by position in either order; TypeError for one that is given twice."""
    place = next((i for i, value in enumerate(given) if isinstance(value, TrainingArguments)), None)
    second = given[1] if len(given) > 1 else None
    elsewhere = place == ORDER_ELSEWHERE.index("args") or (place is None and is_language_model(second))
    order = ("args",) if place == 0 else ORDER_ELSEWHERE if elsewhere else ORDER
    if len(given) > len(order):
        raise TypeError(
            f"OnlineDPOTrainer takes {len(order)} arguments by position, got {len(given)}: give their names"
        )
    positional = dict(zip(order, given, strict=False))
    twice = [name for name in positional if name in named]
    if twice:
        raise TypeError(f"OnlineDPOTrainer got {twice[0]} by position and by name: give it once")
    return {**positional, **named}


def is_language_model(model: Any) -> bool:
    """Whether it has a head over the vocabulary, which no reward model has."""
    inner = below_peft(model) if isinstance(model, nn.Module) else None
    return inner is not None and hasattr(inner, "get_output_embeddings") and inner.get_output_embeddings() is not None


def ordering(config: OnlineDPOConfig, reward_funcs: Any, reward_model: Any, judge: Judge | Any) -> Any:
    """What says which completion is better, as reward functions: those given, a judge, or the config's."""
    if reward_funcs is not None and reward_model is not None:
        raise ValueError("reward_model: an older name of reward_funcs; give one of them")
    name, source = ("reward_funcs", reward_funcs) if reward_model is None else ("reward_model", reward_model)
    if judge is not None and config.judge is not None:
        raise ValueError(f"judge: the config has judge={config.judge!r}; give one of them")
    judge = judge_named(config.judge) if config.judge is not None else judge
    if judge is not None:
        if source is not None:
            raise ValueError(f"judge: {name} orders the completions already; give one of them")
        config.refuse_beside_judge()
        return pairwise(judge)
    listed = source if isinstance(source, list | tuple) else [source]
    speaker = next(filter(is_language_model, listed), None)
    if speaker is not None:
        raise ValueError(
            f"{name}: {type(speaker).__name__} is a language model and gives no rewards; load it with "
            "AutoModelForSequenceClassification, or give it as ref_model"
        )
    path = config.reward_model_path
    if source is None and path is not None:
        known = Path(path).exists() or ("/" in path and ":" not in path)
        way_out = "there is no such folder; give that of a reward model, or a Hub name"
        require(config, "reward_model_path", known, way_out)
    if source is None or path is None:
        return path if source is None else source
    if not any(path in (each, getattr(getattr(each, "config", None), "_name_or_path", None)) for each in listed):
        logger.warning("reward_model_path=%r: has no effect, as %s are given", path, name)
    return source


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
