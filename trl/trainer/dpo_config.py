"""Settings of preference optimisation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl.losses.pairs import F_DIVERGENCES
from trl.losses.preference import PAIR_LOSSES, check_pair_options
from trl.trainer.configuration import PostTrainingConfig, choose, require


@dataclass
class PairConfig(PostTrainingConfig):
    """What every trainer on chosen/rejected pairs shares."""

    learning_rate: float = field(default=1e-6)
    """initial learning rate"""
    beta: float = field(default=0.1)
    """scale of the log-ratios: the smaller, the further the policy may move"""
    label_smoothing: float = field(default=0.0)
    """probability that a label is flipped"""
    max_length: int | None = field(default=1024)
    """longest prompt + completion in tokens; None: never cut"""
    max_prompt_length: int | None = field(default=None)
    """longest prompt in tokens"""
    max_completion_length: int | None = field(default=None)
    """longest completion in tokens"""
    truncation_mode: str = field(default="keep_start")
    """which end of a long prompt stays: keep_start or keep_end"""
    disable_dropout: bool = field(default=True)
    """train without dropout"""
    padding_free: bool = field(default=True)
    """no padding, shared prompts computed once; False forces padded rows (same results, slower)"""
    pad_token: str | None = field(default=None)
    """padding token, where it is not the tokenizer's own"""
    generate_during_eval: bool = field(default=False)
    """sample completions of a random evaluation batch and log them as a table to Weights & Biases"""

    def losses(self) -> dict[str, float]:
        """Pairwise losses by name, with their weights."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The losses' own options, by their names in `losses.preference`."""
        return {"label_smoothing": self.label_smoothing or None}

    def validate(self) -> None:
        super().validate()
        choose(self, "truncation_mode", ("keep_start", "keep_end"))
        require(self, "beta", self.beta >= 0, "give a scale >= 0")
        require(self, "label_smoothing", 0 <= self.label_smoothing <= 0.5, "a probability of at most 0.5")
        for name in ("max_length", "max_prompt_length", "max_completion_length"):
            value = getattr(self, name)
            require(self, name, value is None or value > 0, "give a length > 0, or None")
        given = [name for name, value in self.options().items() if value]
        check_pair_options(self.losses(), given)


@dataclass
class DPOConfig(PairConfig):
    """`TrainingArguments` and what direct preference optimisation adds."""

    loss_type: str | list[str] = field(default="sigmoid")
    """one pairwise loss, or several to be added"""
    loss_weights: list[float] | None = field(default=None)
    """weight of each of several losses; None: 1 each"""
    reference_free: bool = field(default=False)
    """ignore the reference: its log-probabilities count as 0"""
    f_divergence_type: str = field(default="reverse_kl")
    """divergence from the reference: reverse_kl, forward_kl, js_divergence, alpha_divergence"""
    f_alpha_divergence_coef: float = field(default=0.5)
    """order of alpha_divergence"""
    ld_alpha: float | None = field(default=None)
    """LD-DPO: weight in [0, 1] of the tokens beyond the shorter completion's length"""
    use_weighting: bool = field(default=False)
    """WPO: weigh each pair by how likely the policy is to have sampled it"""
    discopop_tau: float = field(default=0.05)
    """temperature of discopop's modulation"""
    ipo_average_log_prob: bool = field(default=False)
    """ipo on log-probabilities per token instead of their sum"""
    rpo_alpha: float | None = field(default=None)
    """RPO: weight of an added loss on the chosen completion's own likelihood"""
    precompute_ref_log_probs: bool = field(default=False)
    """compute the reference's log-probabilities once, before training"""
    precompute_ref_batch_size: int | None = field(default=None)
    """batch size for that; None: the training batch size"""
    ref_model_init_kwargs: dict[str, Any] | str | None = field(default=None)
    """keywords of `from_pretrained` for a reference given by name"""
    sync_ref_model: bool = field(default=False)
    """TR-DPO: move the reference towards the policy every `ref_model_sync_steps`"""
    ref_model_mixup_alpha: float = field(default=0.6)
    """TR-DPO: share of the policy in the new reference"""
    ref_model_sync_steps: int = field(default=512)
    """TR-DPO: optimizer steps between two moves"""

    def losses(self) -> dict[str, float]:
        names = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        weights = self.loss_weights or [1.0] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"loss_weights={weights}: give one weight for each of loss_type={names}")
        losses = dict(zip(names, weights, strict=True))
        if self.rpo_alpha:
            losses["sft"] = losses.get("sft", 0.0) + self.rpo_alpha
        return losses

    def options(self) -> dict[str, Any]:
        tau = self.discopop_tau if self.discopop_tau != 0.05 else None
        return {**super().options(), "average": self.ipo_average_log_prob, "discopop_tau": tau}

    def validate(self) -> None:
        for name in self.losses():
            if name not in PAIR_LOSSES or name in ("orpo", "cpo", "simpo", "alphapo"):
                known = [n for n in PAIR_LOSSES if n not in ("orpo", "cpo", "simpo", "alphapo")]
                raise ValueError(f"Unknown loss type: {name}. Should be one of {known} (set `loss_type`)")
        super().validate()
        choose(self, "f_divergence_type", F_DIVERGENCES)
        coefficient = self.f_alpha_divergence_coef
        used = self.f_divergence_type == "alpha_divergence"
        require(self, "f_alpha_divergence_coef", used or coefficient == 0.5, "it belongs to alpha_divergence only")
        require(self, "f_alpha_divergence_coef", 0 < coefficient <= 1, "give an order in (0, 1]")
        require(self, "ld_alpha", self.ld_alpha is None or 0 <= self.ld_alpha <= 1, "give a weight in [0, 1], or None")
        require(self, "rpo_alpha", self.rpo_alpha is None or self.rpo_alpha >= 0, "give a weight >= 0, or None")
        require(self, "ref_model_mixup_alpha", 0 < self.ref_model_mixup_alpha <= 1, "give a share in (0, 1]")
        require(self, "ref_model_sync_steps", self.ref_model_sync_steps > 0, "give a number of steps > 0")
        batch = self.precompute_ref_batch_size
        require(self, "precompute_ref_batch_size", batch is None or batch > 0, "give a number of rows > 0, or None")
        require(
            self, "precompute_ref_batch_size", batch is None or self.precompute_ref_log_probs,
            "it has no effect without precompute_ref_log_probs=True",
        )  # fmt: skip
        conflict = self.sync_ref_model and (self.precompute_ref_log_probs or self.reference_free)
        require(self, "sync_ref_model", not conflict, "a precomputed or absent reference cannot move")


@dataclass
class ORPOConfig(PairConfig):
    """`TrainingArguments` and what odds-ratio preference optimisation adds; `beta` weighs the odds ratio."""

    def losses(self) -> dict[str, float]:
        return {"orpo": 1.0}


@dataclass
class CPOConfig(PairConfig):
    """`TrainingArguments` and what contrastive preference optimisation adds."""

    loss_type: str = field(default="sigmoid")
    """pairwise loss of the log-probabilities: sigmoid, hinge, ipo"""
    cpo_alpha: float = field(default=1.0)
    """weight of the chosen completion's own likelihood"""

    def losses(self) -> dict[str, float]:
        return {self.loss_type: 1.0, **({"sft": self.cpo_alpha} if self.cpo_alpha else {})}

    def validate(self) -> None:
        choose(self, "loss_type", ("sigmoid", "hinge", "ipo"))
        super().validate()
        require(self, "cpo_alpha", self.cpo_alpha >= 0, "give a weight >= 0")


@dataclass
class SimPOConfig(PairConfig):
    """`TrainingArguments` and what SimPO adds: log-probabilities per token and a target margin."""

    beta: float = field(default=2.0)
    """scale of the log-probabilities per token"""
    gamma: float = field(default=0.5)
    """target margin"""
    alpha: float | None = field(default=None)
    """AlphaPO's reward shape; None: SimPO's own, its limit at 0"""

    def losses(self) -> dict[str, float]:
        return {"simpo" if self.alpha is None else "alphapo": 1.0}

    def options(self) -> dict[str, Any]:
        options = {**super().options(), "gamma": self.gamma}
        return options if self.alpha is None else {**options, "alpha": self.alpha}

    def validate(self) -> None:
        super().validate()
        require(self, "gamma", self.gamma >= 0, "give a margin >= 0")
