"""REINFORCE leave-one-out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trl.data.records import Rollout
from trl.losses.loss_sum import Aggregation, LossSum, Measure
from trl.losses.policy import batch_relative, clipped_surrogate, leave_one_out
from trl.models.forward import introduce
from trl.models.scoring import score
from trl.rollout.experience import Experience, PolicyBatch
from trl.rollout.rewards import Rewards, RolloutRewards, TokenRewards, weighted_total, without_end
from trl.trainer.configuration import Setting, require
from trl.trainer.on_policy import OnPolicyConfig, OnPolicyTrainer
from trl.trainer.ppo_forms import EXAMPLE, one_of
from trl.trainer.ppo_today import print_samples, reads_tokens
from trl.trainer.rollout_trainer import with_prompt_ids
from trl.trainer.settings import OfForm, accepted, rename

RENAMED = {
    "rloo_k": "num_generations", "num_ppo_epochs": "num_iterations", "kl_coef": "beta", "cliprange": "epsilon",
    "response_length": "max_completion_length", "normalize_advantage": "normalize_advantages",
}  # fmt: skip
"""field of releases 0.9-0.16 -> today's"""
LOGGED = {
    "policy/approxkl_avg": "approx_kl", "policy/clipfrac_avg": "clip_ratio/region_mean",
    "policy/entropy_avg": "entropy", "loss/policy_avg": "policy_loss", "val/ratio": "ratio",
}  # fmt: skip
"""metric of these releases -> today's; a config of their form logs both"""


@dataclass(kw_only=True)
class EarlierSettings:
    """Fields of `RLOOConfig` in releases 0.9-0.16. One of them brings the defaults of that form."""

    exp_name: str | None = accepted("exp_name")
    rloo_k: int | None = accepted("rloo_k")
    num_ppo_epochs: int | None = accepted("num_ppo_epochs")
    kl_coef: float | None = accepted("kl_coef")
    cliprange: float | None = accepted("cliprange")
    response_length: int | None = accepted("response_length")
    normalize_advantage: bool | None = accepted("normalize_advantage")
    num_mini_batches: int | None = field(default=None)
    """0.9-0.16: optimizer steps of a pass over a batch of `per_device_train_batch_size * gradient_accumulation_steps *
    num_mini_batches` completions"""
    total_episodes: int | None = field(default=None)
    """0.9-0.16: completions to train on, over the whole run and all processes; None: `num_train_epochs` passes"""
    stop_token: str | None = field(default=None)
    """0.9-0.16: "eos", which ends a completion in any case"""
    stop_token_id: int | None = field(default=None)
    """0.9-0.16: a further token that ends a completion"""
    missing_eos_penalty: float | None = field(default=None)
    """subtracted from the reward of a completion that was cut at the length limit; None: nothing"""
    normalize_reward: bool = field(default=False)
    """scale the rewards of a batch to mean 0 and deviation 1, before `reward_clip_range`"""
    token_level_kl: bool = field(default=False)
    """0.13-0.16: refused; the KL of a completion is that of all its tokens"""
    reward_model_path: str = field(default=EXAMPLE)
    """for your script, and where no reward is given as an object, the reward model to load"""
    sft_model_path: str = field(default=EXAMPLE)
    """for your script, and where `model` is not given, the policy to load"""
    num_sample_generations: int | None = accepted("num_sample_generations")
    local_rollout_forward_batch_size: int = accepted("local_rollout_forward_batch_size", 64)


@dataclass
class RLOOConfig(OnPolicyConfig, EarlierSettings):
    """`TrainingArguments` and the settings of REINFORCE leave-one-out; the KL is part of the reward."""

    temperature: float = OfForm(1.0, other=0.7)
    """sampling temperature; a policy is scored at the same; with a field of 0.9-0.16: 0.7"""
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
    """bounds of each completion's reward, before the KL; a number alone: both bounds, one of them below 0"""

    def translate(self) -> None:
        super().translate()
        rename(self, "exp_name", "run_name")
        if isinstance(self.reward_clip_range, float | int):
            self.reward_clip_range = (-self.reward_clip_range, self.reward_clip_range)
        if not self.is_of_earlier_form:
            self.temperature = float(self.temperature)
            return
        self._take_earlier_defaults()
        for older, newer in RENAMED.items():
            rename(self, older, newer)
            self.__dict__[older] = getattr(self, newer)
        if self.num_mini_batches is not None and self.num_mini_batches > 1:
            steps = self.gradient_accumulation_steps * self.num_mini_batches
            require(
                self, "num_mini_batches", self.steps_per_generation in (None, steps), "steps_per_generation says it"
            )
            self.steps_per_generation = steps
        if self.stop_token_id is not None:
            kept = dict(self.generation_kwargs or {})
            self.generation_kwargs = {**kept, "stop_token_ids": [self.stop_token_id]}
        self.log_completions = self.log_completions or bool(self.num_sample_generations)

    @property
    def is_of_earlier_form(self) -> bool:
        """Whether a field has a value that only releases 0.9-0.16 have."""
        return any(getattr(self, name) is not None for name in EARLIER)

    def _take_earlier_defaults(self) -> None:
        """What that form samples and how often it learns, where nothing is said."""
        if isinstance(self.temperature, OfForm):
            self.temperature = self.temperature.other or 0.7
        if self.num_ppo_epochs is None and self.num_iterations == 1:
            self.num_ppo_epochs = 4
        if self.response_length is None and self.max_completion_length == 512:
            self.response_length = 53

    def _count_updates(self) -> None:
        """`max_steps` of `total_episodes`: each batch is learned from in all passes and optimizer steps."""
        if self.total_episodes is None:
            return
        require(self, "total_episodes", self.total_episodes >= 1, "give a whole number of at least 1, or None")
        batches = self.num_mini_batches or 1
        size = self.per_device_train_batch_size * self.gradient_accumulation_steps * batches * self.world_size
        updates = math.ceil(self.total_episodes / size) * self.num_iterations * batches
        require(self, "max_steps", self.max_steps in (-1, updates), f"total_episodes={self.total_episodes} says it")
        self.__dict__["max_steps"] = updates

    def validate(self) -> None:
        super().validate()
        require(self, "stop_token", self.stop_token in (None, "eos"), "give 'eos', or `stop_token_id`")
        both = self.stop_token is not None and self.stop_token_id is not None
        require(self, "stop_token_id", not both, f"stop_token={self.stop_token!r} names one too; give one of them")
        way_out = "the KL of a completion is that of all its tokens, subtracted from its reward; leave it False"
        require(self, "token_level_kl", not self.token_level_kl, way_out)
        mini_batches = self.num_mini_batches
        require(self, "num_mini_batches", mini_batches is None or mini_batches >= 1, "give a whole number >= 1")
        self._count_updates()
        require(self, "num_generations", self.num_generations >= 2, "leave-one-out needs at least 2 completions")
        require(self, "epsilon", self.epsilon > 0, "give a range > 0")
        require(self, "epsilon_high", self.epsilon_high is None or self.epsilon_high > 0, "give a range > 0, or None")
        bounds = self.reward_clip_range
        require(self, "reward_clip_range", bounds is None or bounds[0] < bounds[1], "give (low, high) with low < high")


EARLIER = tuple(
    name
    for name, entry in EarlierSettings.__dataclass_fields__.items()
    if entry.default is None and name not in ("missing_eos_penalty", "exp_name")
)
"""fields that only releases 0.9-0.16 have, and whose value there says which form a config has"""


class RLOOTrainer(OnPolicyTrainer):
    """Optimise a policy on groups of its own completions, each against the mean of the others (arXiv:2402.14740).

    A completion is one action: one ratio, the KL to the reference subtracted from its reward. `config`, `policy`,
    `ref_policy` and `reward_model` are arguments of releases 0.9-0.16: a reward model there reads the policy's tokens.
    """

    _tag_names = ("trl", "rloo")
    config_class = RLOOConfig
    epsilon_low, epsilon_high = Setting("epsilon"), Setting(unset="epsilon")
    normalize_advantages, reward_clip_range = Setting(), Setting()
    aggregation: Aggregation = "sequence"

    def __init__(
        self,
        model: nn.Module | str | None = None,
        reward_funcs: Any = None,
        args: Any = None,
        *more: Any,
        config: Any = None,
        policy: nn.Module | str | None = None,
        ref_policy: nn.Module | str | None = None,
        reward_model: Any = None,
        ref_model: nn.Module | str | None = None,
        **kwargs: Any,
    ):
        args = one_of("args", args, "config", config)
        model = one_of("model", model, "policy", policy)
        model = _path(args, "sft_model_path") if model is None else model
        if model is None:
            raise ValueError("model: none was given; pass a model, a folder or a Hub name")
        source = one_of("reward_funcs", reward_funcs, "reward_model", reward_model)
        others = ("rollout_func", "environment", "tools", "environment_factory")
        if source is None and not any(kwargs.get(name) for name in others):
            source = _path(args, "reward_model_path")
        self._token_model = None
        if reward_model is not None and kwargs.get("reward_processing_classes") is None and reads_tokens(reward_model):
            self._token_model = reward_model
        kwargs |= {name: with_prompt_ids(kwargs[name]) for name in ("train_dataset", "eval_dataset") if name in kwargs}
        reference = one_of("ref_model", ref_model, "ref_policy", ref_policy)
        super().__init__(model, source, args, *more, ref_model=reference, **kwargs)

    def _rewards(self, functions: Any, tokenizers: Any) -> RolloutRewards:
        if self._token_model is not None:
            introduce(self._token_model, self.tokenizer)
            return TokenRewards(self._token_model, self.args.device)
        return super()._rewards(functions, tokenizers)

    def experience(
        self, rollout: Rollout, rewards: Rewards, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[Experience, dict[str, list[float]]]:
        penalty = self.args.missing_eos_penalty
        return super().experience(rollout, without_end(rewards, rollout, penalty, self._ends()), rows)

    def generate_completions(self, sampling: bool = False) -> dict[str, list[Any]]:
        """A completion of each prompt of `eval_dataset` and its reward, as a table on the console; the table's columns.

        sampling: of the first `per_device_eval_batch_size` prompts only.
        """
        if self.eval_dataset is None:
            raise ValueError("eval_dataset=None: give the trainer a data set of prompts to complete")
        most = self.args.per_device_eval_batch_size if sampling else len(self.eval_dataset)
        rows = [self.eval_dataset[place] for place in range(min(most, len(self.eval_dataset)))]
        self.model.eval()
        with torch.no_grad():
            rollout = self.collector.draw(rows, 1, self.collector.seed(-1))
            scores_B = self.collector.judge(rollout, rows, 1, self.state).total_B()
        prompts = self.collector.prompt_texts(rows, 1)
        columns = {"query": prompts, "model response": rollout.texts, "score": scores_B.tolist()}
        if self.is_world_process_zero():
            print_samples(columns)
        return columns

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        if not self.args.is_of_earlier_form:
            return {}
        return {earlier: means[name] for earlier, name in LOGGED.items() if name in means}

    def zero_advantage_means_zero_gradient(self) -> bool:
        return True

    def advantages(self, scores_BF: Tensor, weights_F: Tensor, kl_B: Tensor | None) -> Tensor:
        rewards_B = weighted_total(scores_BF, weights_F)
        if self.args.normalize_reward:
            rewards_B = (rewards_B - rewards_B.mean()) / (rewards_B.std() + 1e-8)
        if self.args.reward_clip_range is not None:
            rewards_B = rewards_B.clamp(*self.args.reward_clip_range)
        if kl_B is not None:
            rewards_B = rewards_B - self.args.beta * kl_B
        advantages_B = leave_one_out(rewards_B, self.args.num_generations)
        return batch_relative(advantages_B) if self.args.normalize_advantages else advantages_B

    def reads_own_pass(self) -> bool:
        return self.has_objective_of(RLOOTrainer)

    def policy_objective(self, model: nn.Module, batch: PolicyBatch) -> LossSum:
        scores = score(model, batch.packed, temperature=self.args.temperature, entropy=True)
        high = self.args.epsilon if self.args.epsilon_high is None else self.args.epsilon_high
        old_BT = self.old_logprobs(batch, scores.logprobs_BT)
        weight_BT, apart = batch.weight_BT, dict[str, Measure]()
        if batch.behaviour_BT is not None:
            weight_BT, apart = self.weighed(batch, old_BT, "trajectory", (1 - self.args.epsilon, 1 + high))
        loss = clipped_surrogate(
            scores.logprobs_BT,
            old_BT,
            batch.advantages_BT,
            batch.mask_BT,
            clip_low=self.args.epsilon,
            clip_high=high,
            level="trajectory",
            weight_BT=weight_BT,
            sampled_BT=batch.sampled_BT,
            reference_BT=batch.reference_BT,
            entropy_BT=scores.entropy_BT,
            how=self.aggregation,
        )
        return loss.noting(apart)


def _path(args: Any, name: str) -> str | None:
    """The folder or name that a field was given; None for its default."""
    given = getattr(args, name, None)
    return None if given == EXAMPLE else given
