"""Policy gradients: rewards become an advantage for each token of the policy's own samples."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from trl.data.records import Batch, Rollout
from trl.generation.sampler import is_exact
from trl.losses.kl import KL_ESTIMATORS
from trl.losses.loss_sum import Measure
from trl.losses.policy import Correction, mask_truncated, sampling_metrics
from trl.losses.token_weights import IMPORTANCE_MODES
from trl.models.forward import computes_in
from trl.models.precision import EXACT
from trl.models.reference import Reference
from trl.models.router import is_mixture
from trl.rollout.collector import tell_alike
from trl.rollout.experience import Experience, PolicyBatch, padded
from trl.rollout.report import record_objective
from trl.rollout.rewards import Rewards, credit_turns
from trl.trainer.configuration import Setting, choose, require
from trl.trainer.guard import NonFiniteError, non_finite_weights
from trl.trainer.rollout_trainer import RewardedConfig, RolloutTrainer
from trl.trainer.settings import CORRECTION, rename

logger = logging.getLogger(__name__)


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
    vllm_importance_sampling_correction: bool = field(default=True)
    """where an engine outside of the trainer samples, or weights older than those of the update: weigh each token by
    the ratio of the trainer's probability to the sampler's. The local sampler needs no weights and gets none"""
    vllm_importance_sampling_mode: str = field(default="sequence_mask")
    """whose ratio, of a token, of the sequence or the geometric mean of its tokens', and how it is bounded, truncate
    (TIS) or mask: token_truncate, token_mask (IcePop), sequence_truncate, sequence_mask (MIS), geometric_truncate,
    geometric_mask"""
    vllm_importance_sampling_clip_max: float | None = field(default=3.0)
    """upper bound of that ratio; None: none"""
    vllm_importance_sampling_clip_min: float | None = field(default=None)
    """lower bound; None: none"""
    vllm_importance_sampling_cap: float | None = field(default=None)
    """older name of `vllm_importance_sampling_clip_max`"""
    staleness_correction: str = field(default="decoupled")
    """where an engine or older weights sampled: decoupled clips the ratio to the weights at the start of the update and
    weighs by these over the sampler (decoupled PPO); none clips the ratio to the sampler itself and weighs nothing"""
    rollout_logprobs: str = field(default="policy")
    """whose log-probabilities `rollout_func` gives: those of the policy, which are the old ones; or those of an engine,
    from which they may differ: corrected as vLLM's"""
    keep_sampling_mask: bool | None = field(default=None)
    """top-p, top-k, min-p: learn each token as chosen from the words that the filters left, over which its probability
    is then taken. None: where an engine says which these were; True: with the local sampler too"""
    routing_replay: bool = field(default=True)
    """mixtures of experts: where an engine says which experts each token went to, send it to these in training too"""

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
        self._validate_correction()

    def _validate_correction(self) -> None:
        choose(self, "staleness_correction", ("decoupled", "none"))
        choose(self, "rollout_logprobs", ("policy", "engine"))
        choose(self, "vllm_importance_sampling_mode", IMPORTANCE_MODES)
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        require(self, "vllm_importance_sampling_clip_max", high is None or high >= 1, "give a ratio >= 1, or None")
        require(
            self, "vllm_importance_sampling_clip_min", low is None or 0 <= low <= 1, "give a ratio in [0, 1], or None"
        )
        way_out = "a penalty changes the odds of the words that are left, which no mask says; set it to 1"
        require(self, "repetition_penalty", not self.keep_sampling_mask or self.repetition_penalty == 1, way_out)
        filtered = bool(self.top_k or self.top_p < 1 or self.min_p)
        way_out = "no effect without top_p, top_k or min_p: all words are left"
        require(self, "keep_sampling_mask", not self.keep_sampling_mask or filtered, way_out)

    def translate(self) -> None:
        super().translate()
        rename(self, "vllm_importance_sampling_cap", "vllm_importance_sampling_clip_max")
        self.__dict__["vllm_importance_sampling_cap"] = None

    @classmethod
    def exceptions(cls) -> dict[str, str]:
        return {name: text for name, text in super().exceptions().items() if name not in CORRECTION}

    def correction(self) -> Correction | None:
        """How what another computation of the policy sampled is weighed; None: not at all."""
        if not self.vllm_importance_sampling_correction or self.staleness_correction == "none":
            return None
        return Correction(
            self.vllm_importance_sampling_mode,
            self.vllm_importance_sampling_clip_max,
            self.vllm_importance_sampling_clip_min,
        )

    def measures_function(self) -> bool:
        return self.rollout_logprobs == "policy"

    def keeps_words(self, exact: bool) -> bool:
        filtered = bool(self.top_k or self.top_p < 1 or self.min_p) and self.repetition_penalty == 1
        return filtered and (not exact if self.keep_sampling_mask is None else self.keep_sampling_mask)

    def keeps_experts(self) -> bool:
        return self.routing_replay

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
        if self.args.rollout_logprobs == "engine" and self.rollout_func is None:
            raise ValueError("rollout_logprobs='engine': no effect without a rollout_func; leave it out")
        if self.args.keep_sampling_mask and self.environment is not None:
            raise ValueError("keep_sampling_mask=True: the turns of an environment do not say which words were left")
        replays = self.engine_samples and self.args.keeps_experts() and is_mixture(self.model)
        if replays and self.environment is not None:
            logger.warning(
                "routing_replay=True: the turns of an environment do not say which experts the engine took: training "
                "chooses them anew"
            )
        self._say_unused()
        self.reference = self._reference(ref_model)
        self._sampled_at = -1
        """number of the optimizer step before which the rollout at hand was made; -1: none was"""
        self._said_passes = self._said_filters = False

    def _say_unused(self) -> None:
        """One line for settings that act only where an engine or older weights sample."""
        config = self.args
        if self.engine_samples or config.max_staleness or config.rollout_logprobs == "engine":
            return
        known = type(config).__dataclass_fields__
        names = [name for name in (*CORRECTION, "staleness_correction") if getattr(config, name) != known[name].default]
        if names:
            logger.warning(
                "%s: no effect, for sampler and policy are one model: there is no mismatch to correct",
                ", ".join(f"{name}={getattr(config, name)!r}" for name in names),
            )

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
        if self.args.world_size > 1 and self.engine_samples:
            tell_alike([rollout], self.collector.gather)
        experience = self._before_updates(self._known(Experience.of(rollout)))
        if self.args.mask_truncated_completions:
            cut_B = torch.tensor(rollout.metadata.get("truncated", [False] * len(rollout)))
            experience = replace(experience, mask_BT=mask_truncated(experience.mask_BT, cut_B))
        reference_BT = None
        if self.reference is not None:
            with self.reference.model() as model:
                assert model is not None
                reference_BT = self.scored(model, replace(experience, experts=None)).logprobs_BT
            of_policy_BT, beta = padded(rollout.masks), self.args.beta
            record_objective(self.record, experience, reference_BT, of_policy_BT, rewards.total_B(), beta)
        kl_B = self._kl_B(experience, rollout, reference_BT)
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

    def _kl_B(self, rows: Experience, rollout: Rollout, reference_BT: Tensor | None) -> Tensor | None:
        if reference_BT is None:
            return None
        policy_BT, mask_BT = rows.old_logprobs_BT, padded(rollout.masks)
        assert policy_BT is not None
        return (KL_ESTIMATORS[self.kl.estimator](policy_BT, reference_BT) * mask_BT).sum(-1)

    # -- the old log-probabilities ---------------------------------------------------------------

    def reads_own_pass(self) -> bool:
        """Whether the objective asks `old_logprobs` for them.

        Before the first update they are then those of the update's own pass, where the sampler's are too coarse.
        """
        return False

    def has_objective_of(self, owner: type) -> bool:
        """Whether no subclass of `owner` nor the trainer itself has another `policy_objective`."""
        ours: Any = owner
        return type(self).policy_objective is ours.policy_objective and "policy_objective" not in vars(self)

    def _before_updates(self, rows: Experience) -> Experience:
        """The rows with old log-probabilities that are good enough to learn from.

        Those of the sampler are where it computes what training computes. Else those of training are: the first
        update's own, and what one pass more measures of the rows that are read before it or learned later.
        """
        self._sampled_at = self._steps_begun
        apart = self._samples_apart()
        if apart and self.args.staleness_correction == "none" and self._same_words(rows):
            return rows
        if not (apart or self._sampler_is_coarse()) or rows.old_logprobs_BT is None:
            return rows
        weighs = apart and self.args.correction() is not None and self._same_words(rows)
        rows = replace(rows, sampled_BT=rows.old_logprobs_BT, behaviour_BT=rows.old_logprobs_BT if weighs else None)
        later = self._measured_rows(len(rows))
        if not len(later):
            return rows
        self._say_passes(len(later), len(rows), apart)
        part = rows.select(later)
        measured_BT = self.scored(self.model, part).logprobs_BT
        assert rows.old_logprobs_BT is not None
        old_BT = rows.old_logprobs_BT.clone()
        old_BT[later.start : later.stop, : measured_BT.shape[1]] = measured_BT
        return replace(rows, old_logprobs_BT=old_BT)

    def _samples_apart(self) -> bool:
        """Whether another computation of the policy sampled the rollout at hand, or older weights."""
        told = self.rollout_func is not None and self.args.rollout_logprobs == "engine"
        return told or self.engine_samples or self._is_stale

    def starts_at_ratio_one(self) -> bool:
        plain = self.engine_samples and self.args.staleness_correction == "none"
        return super().starts_at_ratio_one() and not plain

    def _known(self, rows: Experience) -> Experience:
        """The rows; where an engine sampled another distribution than is learned, that is said, once."""
        if rows.old_logprobs_BT is None and len(rows) and self.args.rollout_logprobs == "engine":
            raise ValueError("rollout_logprobs='engine': rollout_func gave no logprobs; return them, or leave it out")
        if not self._same_words(rows) and not self._said_filters:
            who, way_out = "it does", " (vLLM says them with --return-sampling-mask and top_k > 0)"
            if self.environment is not None:
                who, way_out = "the turns of an environment do", ""
            logger.warning(
                "top_p, top_k, min_p, repetition_penalty or min_new_tokens change what the engine draws from, and %s "
                "not say which words they leave: its log-probabilities are of another distribution than the policy's, "
                "and are not used to weigh tokens%s", who, way_out,
            )  # fmt: skip
            self._said_filters = True
        return rows

    def _same_words(self, rows: Experience) -> bool:
        """Whether the sampler's log-probabilities are of the distribution that is learned."""
        filtered = self.engine_samples and self.args.reshapes
        return not filtered or (rows.kept is not None and self.args.repetition_penalty == 1)

    def _sampler_is_coarse(self) -> bool:
        """Whether log-probabilities are a sampler's, whose computation gives other ones than that of training.

        It does so in a precision that rounds more than float32, and where the sampler has weights of its own.
        """
        measured = self.rollout_func is not None or getattr(self.source, "measure", None) is not None
        return not measured and not (is_exact(self.sampler) and self._sampling_precision() in EXACT)

    def _sampling_precision(self) -> str:
        with self.accelerator.autocast():
            return computes_in(self.model)

    def _uses_own_pass(self) -> bool:
        return self.args.disable_dropout and self.reads_own_pass()

    def _measured_rows(self, rows: int) -> range:
        """The rows of a rollout, its last ones, that a pass of their own must measure."""
        in_reward = self.reference is not None and not self.kl.in_loss
        if in_reward or not self._uses_own_pass():
            return range(rows)
        shape = self.rollouts.shape
        later = shape.learned_later(self.args.gradient_accumulation_steps)
        if self.args.world_size > 1 and self._deals(shape):  # any of them may be learned later, by another rank
            return range(0 if len(later) else rows, rows)
        return range(min(later.start, rows), rows)

    def _say_passes(self, rows: int, of: int, apart: bool) -> None:
        if not self._said_passes:
            how = f"computes in {self._sampling_precision()}, in which"
            if apart:
                how = "draws by older weights, so that" if self._is_stale else "computes by code of its own, so that"
            logger.warning(
                "the sampler %s its log-probabilities are not quite those of training: one forward pass more measures "
                "%d of the %d completions of each rollout", how, rows, of,
            )  # fmt: skip
        self._said_passes = True

    def _collate(self, rows: Experience) -> dict[str, PolicyBatch]:
        batch = super()._collate(rows)["policy"]
        first = self._sampled_at == self._steps_begun
        if rows.sampled_BT is None:
            return Batch(policy=replace(batch, sampled_BT=batch.sampled_BT if first else None))
        own = first and self._uses_own_pass()
        sampled_BT = batch.sampled_BT if first and self._same_words(rows) else None
        if batch.behaviour_BT is None:
            return Batch(policy=replace(batch, own_pass=own, sampled_BT=sampled_BT))
        if self.reads_own_pass():
            return Batch(policy=replace(batch, own_pass=own, sampled_BT=None))
        correction = self.args.correction()  # a stranger's objective reads the weights that are known
        assert correction is not None
        weight_BT, _ = correction.weigh(batch.old_logprobs_BT, batch.behaviour_BT, batch.mask_BT)
        weight_BT = weight_BT.expand_as(batch.mask_BT) if batch.weight_BT is None else weight_BT * batch.weight_BT
        return Batch(policy=replace(batch, sampled_BT=sampled_BT, behaviour_BT=None, weight_BT=weight_BT))

    def weighed(
        self, batch: PolicyBatch, old_BT: Tensor, level: str, clip_range: tuple[float, float]
    ) -> tuple[Tensor | None, dict[str, Measure]]:
        """The weight of each token's surrogate where `behaviour_BT` is known, and how far trainer and sampler differ.

        old_BT: of the policy around which the ratio is clipped. level, clip_range: see `sampling_metrics`.
        """
        correction = self.args.correction()
        if batch.behaviour_BT is None or correction is None:
            return batch.weight_BT, {}
        weight_BT, metrics = correction.weigh(old_BT, batch.behaviour_BT, batch.mask_BT)
        if batch.weight_BT is not None:
            weight_BT = weight_BT * batch.weight_BT
        apart = sampling_metrics(old_BT, batch.behaviour_BT, batch.mask_BT, level, clip_range)
        return weight_BT, metrics | apart

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
        before, self._sampled_at = self.rollouts.state, -1
        super().load_extra_state(state)
        rest = self.rollouts.state.experience
        if rest is not None and rest.reference_BT is None and self.reference is not None:
            self.rollouts.state = before
            raise ValueError(
                f"beta={self.args.beta}: the checkpoint stands in the midst of a rollout that was made with beta=0; "
                "resume with that, or from a checkpoint after the end of a rollout"
            )
