"""Settings of preference optimisation on pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl.losses.pairs import F_DIVERGENCES
from trl.losses.preference import PAIR_LOSSES, WHOLE_BATCH, check_pair_options
from trl.trainer.configuration import choose, refuse_unused, require
from trl.trainer.preference_config import PreferenceConfig, ReferenceConfig

WITHOUT_REFERENCE = ("orpo", "cpo", "simpo", "alphapo")
"""losses that have trainers of their own"""
DPO_LOSSES = tuple(name for name in PAIR_LOSSES if name not in WITHOUT_REFERENCE)


@dataclass
class PairConfig(PreferenceConfig):
    """What every trainer on chosen/rejected pairs shares."""

    label_smoothing: float = field(default=0.0)
    """probability that a label is flipped"""
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
        require(self, "label_smoothing", 0 <= self.label_smoothing <= 0.5, "a probability of at most 0.5")
        given = [name for name, value in self.options().items() if value]
        check_pair_options(self.losses(), given)


@dataclass
class DPOConfig(PairConfig, ReferenceConfig):
    """`TrainingArguments` and what direct preference optimisation adds."""

    loss_type: str | list[str] = field(default_factory=lambda: ["sigmoid"])
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

    def losses(self) -> dict[str, float]:
        names = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        weights = self.loss_weights or [1.0] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"loss_weights={weights}: give one weight for each of loss_type={names}")
        losses: dict[str, float] = {}
        for name, weight in [*zip(names, weights, strict=True), *([("sft", self.rpo_alpha)] if self.rpo_alpha else [])]:
            losses[name] = losses.get(name, 0.0) + weight
        return losses

    def options(self) -> dict[str, Any]:
        tau = self.discopop_tau if self.discopop_tau != 0.05 else None
        return {**super().options(), "average": self.ipo_average_log_prob, "discopop_tau": tau}

    def validate(self) -> None:
        require(self, "loss_type", bool(self.loss_type), f"choose among {list(DPO_LOSSES)}")
        for name in self.losses():
            if name not in DPO_LOSSES:
                raise ValueError(
                    f"Unknown loss type: {name}. Should be one of {list(DPO_LOSSES)} (set `loss_type`; ORPO, CPO and "
                    "SimPO have trainers of their own)"
                )
        super().validate()
        require(self, "ld_alpha", self.ld_alpha is None or 0 <= self.ld_alpha <= 1, "give a weight in [0, 1], or None")
        require(self, "rpo_alpha", self.rpo_alpha is None or self.rpo_alpha >= 0, "give a weight >= 0, or None")
        require(self, "discopop_tau", self.discopop_tau > 0, "give a temperature > 0")
        mixing = self.use_weighting and sorted(WHOLE_BATCH.intersection(self.losses()))
        require(self, "use_weighting", not mixing, f"{mixing} mix the pairs of a batch: no pair has a weight there")
        sorting = self._sorting()
        whole = self.max_tokens_per_microbatch is None or not sorting
        require(self, "max_tokens_per_microbatch", whole, f"{sorting} compare the pairs of a batch: it cannot be cut")
        self._validate_reference()

    def _sorting(self) -> list[str]:
        return sorted({"aot", "aot_unpaired"}.intersection(self.losses()))

    def cuts_unasked(self) -> bool:
        return super().cuts_unasked() and not self._sorting()

    def _validate_reference(self) -> None:
        choose(self, "f_divergence_type", F_DIVERGENCES)
        alpha = self.f_divergence_type == "alpha_divergence"
        refuse_unused(self, ("f_alpha_divergence_coef",), alpha, "f_divergence_type='alpha_divergence'")
        require(self, "f_alpha_divergence_coef", 0 < self.f_alpha_divergence_coef <= 1, "give an order in (0, 1]")
        if self.reference_free:
            with_one = "reference_free=False: there is no reference"
            names = ("f_divergence_type", "sync_ref_model", "precompute_ref_log_probs", "ref_model_init_kwargs")
            refuse_unused(self, names, False, with_one)


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
