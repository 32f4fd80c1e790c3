"""Direct preference optimisation and its relatives: with a reference (DPO) and without one (ORPO, CPO, SimPO)."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from trl.data.batches import padded_pairs
from trl.data.formats import column_names
from trl.import_utils import is_peft_available, lazy_names
from trl.legacy import absent, dpo
from trl.losses.loss_sum import LossSum
from trl.losses.pairs import F_DIVERGENCES, PairLogps
from trl.losses.preference import (
    PAIR_LOSSES,
    WHOLE_BATCH,
    likelihood_metrics,
    losses_of_pairs,
    pair_metrics,
    pair_options,
    reported,
)
from trl.models.prepare import context_length
from trl.models.reference import Reference
from trl.trainer.configuration import Setting, as_config, choose, older_style, refuse_unused, require, with_keywords
from trl.trainer.overrides import check_own_losses, known_to, own_batch_loss
from trl.trainer.pair_trainer import PairBatch, PairConfig, PairTrainer
from trl.trainer.references import ReferenceColumns, ReferenceConfig, choose_adapters, follows, make_reference

WITHOUT_REFERENCE = ("orpo", "cpo", "simpo", "alphapo")
"""losses that have other trainers"""
DPO_LOSSES = tuple(name for name in PAIR_LOSSES if name not in WITHOUT_REFERENCE)
DISCOPOP_TAU: float = pair_options("discopop")["discopop_tau"]
SIDES = ("chosen", "rejected")
REFERENCE_COLUMNS = ("reference_chosen_logps", "reference_rejected_logps")


@dataclass
class DPOConfig(PairConfig, ReferenceConfig):
    """`TrainingArguments` with the settings of direct preference optimisation."""

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
    discopop_tau: float = field(default=DISCOPOP_TAU)
    """temperature of discopop's modulation"""
    ipo_average_log_prob: bool = field(default=False)
    """ipo on log-probabilities per token instead of their sum"""
    rpo_alpha: float | None = field(default=None)
    """RPO: weight of an added loss on the chosen completion's own likelihood"""
    tools: list[Any] | None = field(default=None)
    """tools of every conversation: not read, raises; each row has its own in a column `tools`"""

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
        tau = None if self.discopop_tau == DISCOPOP_TAU else self.discopop_tau
        return {**super().options(), "average": self.ipo_average_log_prob, "discopop_tau": tau}

    def excess_weight(self) -> float:
        return 1.0 if self.ld_alpha is None else self.ld_alpha

    def weighs_pairs(self) -> bool:
        return self.use_weighting

    def validate(self) -> None:
        require(self, "loss_type", bool(self.loss_type), f"choose among {list(DPO_LOSSES)}")
        for name in self.losses():
            if name not in DPO_LOSSES:
                raise ValueError(
                    f"Unknown loss type: {name}. Should be one of {list(DPO_LOSSES)} (set `loss_type`; ORPO, CPO and "
                    "SimPO have trainers of their own)"
                )
        super().validate()
        way_out = "each row has its own: leave it out and give a column `tools`"
        require(self, "tools", not self.tools, way_out)
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
        normed = "sigmoid_norm" not in self.losses() or self.f_divergence_type == "reverse_kl"
        require(
            self, "f_divergence_type", normed, "loss_type='sigmoid_norm' takes log-ratios per token: reverse_kl only"
        )
        if self.reference_free:
            with_one = "reference_free=False: there is no reference"
            names = ("f_divergence_type", "sync_ref_model", "precompute_ref_log_probs", "ref_model_init_kwargs")
            refuse_unused(self, names, False, with_one)


class DPOTrainer(PairTrainer):
    """Optimise a policy on preference pairs against a reference (arXiv:2305.18290), with the losses of `PAIR_LOSSES`.

    Rows: `chosen` and `rejected` (text or conversations), with or without `prompt`; optionally the reference's
    log-probabilities as `reference_chosen_logps` and `reference_rejected_logps`. Takes the keywords of older releases
    and a `DPOConfig` in `args`; a keyword that contradicts the config is a ValueError. Without `ref_model` the
    reference is the policy with its adapter switched off, or else a frozen copy.
    """

    _tag_names = ("trl", "dpo")
    reference: Reference
    loss_type, loss_weights, ld_alpha, f_divergence_type, rpo_alpha = (Setting() for _ in range(5))
    reference_free = Setting(fixed="the reference is made with the trainer")
    precompute_ref_log_probs = Setting(fixed="the reference is made with the trainer")
    truncation_mode = Setting(fixed="the rows are tokenised already")

    def __init__(
        self,
        model: nn.Module | str | None = None,
        ref_model: nn.Module | str | None = None,
        beta: float | None = None,
        label_smoothing: float | None = None,
        loss_type: str | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[Any], Mapping[str, Any]] | None = None,
        label_pad_token_id: int = -100,
        padding_value: int | None = None,
        truncation_mode: str | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        tokenizer: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        max_target_length: int | None = None,
        peft_config: Any = None,
        is_encoder_decoder: bool | None = None,
        disable_dropout: bool | None = None,
        generate_during_eval: bool | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        precompute_ref_log_probs: bool | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
        ref_model_init_kwargs: dict[str, Any] | None = None,
        *,
        processing_class: Any = None,
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        quantization_config: Any = None,
    ):
        if isinstance(beta, TrainingArguments):  # today's third argument
            args, beta = beta, None
        given = {
            "beta": beta, "label_smoothing": label_smoothing, "loss_type": loss_type, "max_length": max_length,
            "max_prompt_length": max_prompt_length, "max_completion_length": max_target_length,
            "disable_dropout": disable_dropout, "generate_during_eval": generate_during_eval,
            "precompute_ref_log_probs": precompute_ref_log_probs, "model_init_kwargs": model_init_kwargs,
            "ref_model_init_kwargs": ref_model_init_kwargs, "truncation_mode": truncation_mode,
        }  # fmt: skip
        encoder_decoder = _encoder_decoder(model, is_encoder_decoder)
        older = older_style(args, DPOConfig, given)
        if older:
            given |= _older_defaults(given, model, bool(encoder_decoder), warns=data_collator is None)
        config = with_keywords(as_config(args, DPOConfig), given)
        _check(config, model, ref_model, peft_config, encoder_decoder)
        ref_model = choose_adapters(config, model, ref_model)
        self.label_pad_token_id, self.padding_value = label_pad_token_id, padding_value
        super().__init__(
            model,
            config,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            tokenizer=tokenizer,
            processing_class=processing_class,
            peft_config=peft_config,
            model_init=model_init,
            add_bos=True if older else None,
            encoder_decoder=bool(encoder_decoder),
            quantization_config=quantization_config,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            compute_metrics=compute_metrics,
        )
        self._check_padded_road()
        self.reference = make_reference(
            self, ref_model, REFERENCE_COLUMNS, absent=config.reference_free, encoder_decoder=self._encoder_decoder
        )
        self._ahead = ReferenceColumns(self, self.reference, REFERENCE_COLUMNS, self._scored_ahead)

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference, if it is a separate model; None if it is the policy without its adapter."""
        return self.reference.frozen

    def extra_state(self) -> dict[str, Any]:
        moved = {"reference": self.reference.state()} if follows(self) else {}
        return {**super().extra_state(), **moved}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        if "reference" in state:
            self.reference.load(state["reference"])

    def policy_sums(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        if self._is_padded_road:
            chosen, rejected, *_ = self._own_forward(model, batch)
            return chosen, rejected
        return super().policy_sums(model, batch)

    def _scored_ahead(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The reference's numbers before training; `model` may be the policy, which has not moved yet."""
        if not self.owns("compute_reference_log_probs"):
            return self.policy_sums(model, batch)
        self._standing_in = model
        try:
            return self.compute_reference_log_probs(PairBatch(batch))
        finally:
            self._standing_in = None

    def reference_sums(self, batch: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        if self.args.reference_free:
            return None, None
        if REFERENCE_COLUMNS[0] in batch:
            return batch[REFERENCE_COLUMNS[0]], batch[REFERENCE_COLUMNS[1]]
        if self.owns("compute_reference_log_probs"):
            with torch.no_grad():
                return self.compute_reference_log_probs(batch)
        with self.reference.model() as reference:
            if reference is None:
                raise ValueError(f"the reference is precomputed, but the rows have no columns {REFERENCE_COLUMNS}")
            return self.policy_sums(reference, batch)

    def divergence(self) -> dict[str, Any]:
        return {"divergence": self.args.f_divergence_type, "divergence_alpha": self.args.f_alpha_divergence_coef}

    # -- where a subclass overrides a method of release 0.7.7 (see `overrides.TABLE`) ---------------

    _standing_in: nn.Module | None = None
    """the policy, while the reference's numbers are computed before training and no reference is kept"""
    _dealt_with: tuple[PairLogps, Mapping[str, Any], Tensor | None] | None = None
    """what `dpo_loss` is asked about in training: the pairs, their batch and their weights"""

    def not_with_shared_rows(self) -> dict[str, bool]:
        own = "a method of other releases that is overridden reads whole rows (concatenated_forward, get_batch_logps)"
        return {**super().not_with_shared_rows(), own: self._is_padded_road}

    @property
    def _is_padded_road(self) -> bool:
        """Whether the models read padded rows by a method of the user's."""
        return any(self.owns(name) for name in ("concatenated_forward", "concatenated_inputs", "get_batch_logps"))

    def _check_padded_road(self) -> None:
        """ValueError for what a method of the user's on padded rows would leave out."""
        if not self._is_padded_road:
            return
        if self._encoder_decoder:
            raise ValueError("concatenated_forward: an encoder-decoder reads no padded pairs here; override dpo_loss")
        for name, used in (("ld_alpha", self.args.excess_weight() != 1.0), ("use_weighting", self.args.use_weighting)):
            if used:
                raise ValueError(
                    f"{name}={getattr(self.args, name)!r}: weighs single tokens, and an overridden "
                    "concatenated_forward gives only their sums; leave one of them out"
                )

    def own_rows(self, dataset: Any) -> Any:
        if not self.owns("tokenize_row") and not self.owns("build_tokenized_answer"):
            return dataset
        given = {"processing_class": self.processing_class, "tokenizer": self.tokenizer}
        for name in ("max_length", "max_prompt_length"):
            given[name] = getattr(self.args, name)
        given |= {"max_completion_length": self.args.max_completion_length, "add_special_tokens": False}

        def tokenize_row(row: Mapping[str, Any]) -> dict[str, Any]:
            return self.tokenize_row(row, **known_to(self.tokenize_row, given, passes_on=False))

        if isinstance(dataset, Dataset):
            key = Hasher.hash([dataset._fingerprint, id(self), uuid4().hex])  # a method's code is not known to be pure
            return dataset.map(tokenize_row, remove_columns=self._texts(dataset), new_fingerprint=key)
        if isinstance(dataset, list):
            return [tokenize_row(row) for row in dataset]
        return dataset.map(tokenize_row, remove_columns=self._texts(dataset))

    @staticmethod
    def _texts(dataset: Any) -> list[str]:
        return [name for name in column_names(dataset) if name in ("prompt", "chosen", "rejected")]

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossSum:
        if not self.owns("get_batch_loss_metrics"):
            return super().objective(model, batch)
        return own_batch_loss(self.get_batch_loss_metrics, model, batch, self.count(batch))

    def _loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[LossSum, PairLogps]:
        if not self._is_padded_road:
            return super()._loss(model, batch)
        if "kto_pair" in self.losses and "kl_chosen" not in batch:
            self._whole_step_kl([batch])
        chosen, rejected, *logits = self._own_forward(model, batch)
        mask_BT = batch["packed"].mask_BT
        pair = PairLogps(chosen, rejected, *self.reference_sums(batch), mask_BT[0::2].sum(-1), mask_BT[1::2].sum(-1))
        if self.shift is not None and model.training:
            self.shift.add(self.args.beta * torch.cat([pair.chosen_ratio_B, pair.rejected_ratio_B]))
        result = self.pair_loss(pair, batch, None)
        means = {
            f"logits/{side}": each.detach().mean() * len(chosen) for side, each in zip(SIDES, logits, strict=False)
        }
        return LossSum(result.total, result.count, result.metrics | means), pair

    def _own_forward(self, model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
        """Log-probabilities of chosen and rejected, and logits if there are any, of padded rows."""
        given = self.concatenated_forward(model, batch)
        if isinstance(given, Mapping):
            names = ("chosen_logps", "rejected_logps", "mean_chosen_logits", "mean_rejected_logits")
            given = tuple(given[name] for name in names if name in given)
        pairs = batch["packed"].rows // 2
        for side, logps in zip(SIDES, given, strict=False):
            if logps.shape != (pairs,):
                raise ValueError(
                    f"concatenated_forward: the {side} log-probabilities have shape {tuple(logps.shape)}; give one sum "
                    f"for each of the {pairs} pairs"
                )
        return list(given[:4])

    def pair_loss(self, pair: PairLogps, batch: Mapping[str, Any], weight_B: Tensor | None) -> LossSum:
        if not self.owns("dpo_loss"):
            return super().pair_loss(pair, batch, weight_B)
        ours = (pair.chosen_B, pair.rejected_B)
        none = torch.zeros_like(ours[0])
        theirs = [none if each is None else each for each in (pair.ref_chosen_B, pair.ref_rejected_B)]
        self._dealt_with = (pair, batch, weight_B)
        try:
            total, chosen_B, rejected_B = self._own_losses((*ours, theirs[0], theirs[1]))
        finally:
            self._dealt_with = None
        metrics = pair_metrics(PairLogps(chosen_B.detach(), rejected_B.detach()), 1.0)
        metrics |= {"logps/chosen": ours[0].detach().sum(), "logps/rejected": ours[1].detach().sum()}
        return LossSum(total, len(ours[0]), metrics | likelihood_metrics(pair, self.losses))

    def _own_losses(self, logps: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of the losses of a `dpo_loss` of the user's, and its rewards. One that asks is told each loss."""
        asks = "loss_type" in inspect.signature(self.dpo_loss).parameters
        total, rewards = logps[0].new_zeros(()), (logps[0], logps[1])
        for name, weight in self.losses.items() if asks else [("", 1.0)]:
            named: dict[str, Any] = {"loss_type": name} if asks else {}
            given = self.dpo_loss(*logps, **named)
            losses, *rewards = check_own_losses("dpo_loss", given, len(logps[0]))  # type: ignore[assignment]
            total = total + weight * losses
        return total, rewards[0], rewards[1]

    def keep(self, result: LossSum, mode: str, loss: bool = True) -> None:
        if not self.owns("store_metrics"):
            return super().keep(result, mode, loss)
        prefix = "eval_" if mode == "eval" else ""
        self.store_metrics(dpo.mean_metrics(result, prefix)[1], train_eval=mode)
        if loss:
            self.record("loss", result.total.detach(), result.count, mode=mode)

    def prepare_data(self) -> None:
        super().prepare_data()
        self._ahead.fill()

    def prepare_evaluation(self, eval_dataset: Any, name: str = "eval") -> Any:
        return self._ahead.evaluation(super().prepare_evaluation(eval_dataset, name))

    # -- methods of release 0.7.7, on padded batches and plain numbers -----------------------------

    concatenated_inputs = staticmethod(dpo.concatenated_inputs)
    get_batch_logps = staticmethod(dpo.get_batch_logps)

    def build_tokenized_answer(self, prompt: str, answer: str) -> dict[str, list[int]]:
        """Tokenise prompt + answer as one text, and split it."""
        return dpo.build_tokenized_answer(self.tokenizer, prompt, answer)

    def tokenize_row(self, feature: Mapping[str, Any], model: nn.Module | None = None) -> dict[str, Any]:
        """One pair as the padded columns `chosen_*`, `rejected_*`, `prompt_*`."""
        return dpo.tokenize_row(
            feature,
            self.tokenizer,
            max_length=self.args.max_length or 512,
            max_prompt_length=self.args.max_prompt_length or 128,
            max_target_length=self.args.max_completion_length or 128,
            truncation_mode=self.args.truncation_mode,
            label_pad_token_id=self.label_pad_token_id,
            is_encoder_decoder=self._encoder_decoder,
            model=model,
            split_of=self.build_tokenized_answer,
        )

    def concatenated_forward(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`(chosen_logps, rejected_logps, chosen_logits, rejected_logits)` of a padded batch, whole logits included."""
        padding = self.tokenizer.pad_token_id if self.padding_value is None else self.padding_value
        if batch.get("packed") is not None:  # one of the trainer's own
            batch = padded_pairs(batch["packed"], self.label_pad_token_id, padding)
        return dpo.concatenated_forward(
            model, batch, self.label_pad_token_id, padding, self.concatenated_inputs, self.get_batch_logps
        )

    @torch.no_grad()
    def compute_reference_log_probs(self, padded_batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The reference's log-probabilities of a padded batch's chosen and rejected. [pairs] each

        `padded_batch` may be one of the trainer's own.
        """
        with self.reference.model() as reference:
            reference = self._standing_in if reference is None else reference
            if reference is not None and padded_batch.get("packed") is not None:
                return self.policy_sums(reference, padded_batch)
            if reference is None:
                raise ValueError(
                    "No reference model and model is not a Peft model. Try setting `precompute_ref_log_probs=True`"
                )
            return self.concatenated_forward(reference, padded_batch)[:2]

    def dpo_loss(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        reference_free: bool | str = False,
        model_output: Any = None,
        *,
        loss_type: str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(losses, chosen_rewards, rejected_rewards)` of summed log-probabilities.

        loss_type: that one alone, with weight 1; it may stand in `reference_free`'s place, as in later releases.
        """
        if isinstance(reference_free, str):
            loss_type, reference_free = reference_free, False
        losses = self.losses if loss_type is None else {loss_type: 1.0}
        policy, reference = (
            (policy_chosen_logps, policy_rejected_logps),
            (reference_chosen_logps, reference_rejected_logps),
        )
        if self._dealt_with is not None:  # in training, where lengths, weights and the divergence are known too
            pair, batch, weight_B = self._dealt_with
            free = reference_free or self.args.reference_free
            ref_chosen, ref_rejected = (None, None) if free else reference
            pair = replace(
                pair, chosen_B=policy[0], rejected_B=policy[1], ref_chosen_B=ref_chosen, ref_rejected_B=ref_rejected
            )
            options = self.loss_options(batch)
            losses_B = losses_of_pairs(pair, losses, options, weight_B=weight_B, **self.divergence())
            shown = reported(pair, losses)
            rewards = (self.args.beta * ratio_B.detach() for ratio_B in (shown.chosen_ratio_B, shown.rejected_ratio_B))
            return losses_B, *rewards
        return dpo.pair_losses(policy, reference, losses, self.loss_options({}), bool(reference_free))

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's mean loss and metrics; `batch` is one of the trainer's own."""
        return dpo.mean_metrics(self._loss(model, batch)[0], "eval_" if train_eval == "eval" else "")

    def store_metrics(self, metrics: Mapping[str, Tensor | float], train_eval: str = "train") -> None:
        """Add to the metrics that the next log shows as their mean."""
        for name, value in metrics.items():
            self.record(name.removeprefix("eval_"), value, mode=train_eval)


def _encoder_decoder(model: Any, given: bool | None) -> bool | None:
    """Whether the model is an encoder-decoder: by its config, else as given; a contradiction is a ValueError."""
    actual = getattr(getattr(model, "config", None), "is_encoder_decoder", None)
    if given is not None and actual is not None and bool(actual) != given:
        raise ValueError(f"is_encoder_decoder={given}: the model says {bool(actual)}; leave the argument out")
    return given if actual is None else bool(actual)


def _older_defaults(given: Mapping[str, Any], model: Any, encoder_decoder: bool, warns: bool) -> dict[str, Any]:
    """The lengths and the truncation of a trainer that is given no `DPOConfig`.

    A prompt is cut only where prompt and answer together are too long, so by default the prompt has no limit.
    """
    limit = context_length(model) if isinstance(model, nn.Module) else None
    defaults = {"max_length": min(512, limit or 512)}
    if encoder_decoder:
        defaults = {"max_prompt_length": 128, "max_completion_length": 128}
    unset = {name: value for name, value in defaults.items() if given[name] is None}
    for name, value in unset.items() if warns else ():
        keyword = "max_target_length" if name == "max_completion_length" else name
        warnings.warn(
            f"`{keyword}` is not set in the DPOTrainer's init: it defaults to {value}; set it, or pass a `DPOConfig`",
            UserWarning,
            stacklevel=3,
        )
    return {**unset, "truncation_mode": given["truncation_mode"] or "keep_end"}


def _check(config: DPOConfig, model: Any, ref_model: Any, peft_config: Any, encoder_decoder: bool | None) -> None:
    """Raise the errors of older releases, in their order and with their texts."""
    kwargs = {"model": (model, config.model_init_kwargs), "ref_model": (ref_model, config.ref_model_init_kwargs)}
    for which, (given, init_kwargs) in kwargs.items():
        if init_kwargs is not None and not isinstance(given, str):
            what = which.removeprefix("ref_")
            raise ValueError(f"You passed {which}_kwargs to the DPOTrainer. But your {what} is already instantiated.")
    if peft_config is not None and not is_peft_available():
        raise ValueError(
            "PEFT is not installed and you passed a `peft_config` in the trainer's kwargs, please install it to use "
            "the PEFT models"
        )
    if model is None and encoder_decoder is None:
        raise ValueError("When no model is provided, you need to pass the parameter is_encoder_decoder.")


class _ReferenceFreeTrainer(PairTrainer):
    """A pair trainer whose losses need no reference."""

    config_class: type[PairConfig]

    def __init__(
        self,
        model: nn.Module | str | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[Any], Mapping[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        *,
        tokenizer: Any = None,
        **kwargs: Any,
    ):
        super().__init__(
            model,
            as_config(args, self.config_class),
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            tokenizer=tokenizer,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )


@dataclass
class ORPOConfig(PairConfig):
    """`TrainingArguments` and what odds-ratio preference optimisation adds; `beta` weighs the odds ratio."""

    def losses(self) -> dict[str, float]:
        return {"orpo": 1.0}


class ORPOTrainer(_ReferenceFreeTrainer):
    """Odds-ratio preference optimisation (arXiv:2403.07691)."""

    _tag_names = ("trl", "orpo")
    config_class = ORPOConfig


CPO_ALPHA = 1.0


@dataclass
class CPOConfig(PairConfig):
    """`TrainingArguments` and what contrastive preference optimisation adds."""

    loss_type: str = field(default="sigmoid")
    """pairwise loss of the log-probabilities: sigmoid, hinge, ipo; per token: simpo, alphapo"""
    cpo_alpha: float = field(default=CPO_ALPHA)
    """weight of the chosen completion's own likelihood, which alphapo does without; simpo with it is CPO-SimPO"""
    simpo_gamma: float = field(default=0.5)
    """simpo, alphapo: target margin"""
    alpha: float = field(default=0.0)
    """simpo, alphapo: AlphaPO's exponent of the reward; 0: its limit, SimPO"""

    def translate(self) -> None:
        super().translate()
        if self.loss_type == "alphapo" and self.cpo_alpha == CPO_ALPHA:
            self.cpo_alpha = 0.0

    def losses(self) -> dict[str, float]:
        shaped = "alphapo" if self.alpha else "simpo"
        name = shaped if self._per_token else self.loss_type
        return {name: 1.0, **({"sft": self.cpo_alpha} if self.cpo_alpha else {})}

    @property
    def _per_token(self) -> bool:
        return self.loss_type in ("simpo", "alphapo")

    def options(self) -> dict[str, Any]:
        margin = {"gamma": self.simpo_gamma} if self._per_token else {}
        return {**super().options(), **margin, **({"alpha": self.alpha} if self.alpha else {})}

    def validate(self) -> None:
        choose(self, "loss_type", ("sigmoid", "hinge", "ipo", "simpo", "alphapo"))
        refuse_unused(self, ("simpo_gamma", "alpha"), self._per_token, "loss_type='simpo' or 'alphapo'")
        super().validate()
        require(self, "cpo_alpha", self.cpo_alpha >= 0, "give a weight >= 0")
        require(self, "simpo_gamma", self.simpo_gamma >= 0, "give a margin >= 0")
        likelihood = "alphapo has no likelihood term; choose loss_type='simpo' with `alpha`"
        require(self, "cpo_alpha", self.loss_type != "alphapo" or not self.cpo_alpha, likelihood)


class CPOTrainer(_ReferenceFreeTrainer):
    """Contrastive preference optimisation (arXiv:2401.08417)."""

    _tag_names = ("trl", "cpo")
    config_class = CPOConfig


@dataclass
class SimPOConfig(PairConfig):
    """`TrainingArguments` and what SimPO adds: log-probabilities per token and a target margin."""

    beta: float = field(default=2.0)
    """scale of the log-probabilities per token"""
    gamma: float = field(default=0.5)
    """target margin"""
    alpha: float | None = field(default=None)
    """AlphaPO's exponent of the reward; None: SimPO, which is the limit at 0"""

    def losses(self) -> dict[str, float]:
        return {"simpo" if self.alpha is None else "alphapo": 1.0}

    def options(self) -> dict[str, Any]:
        options = {**super().options(), "gamma": self.gamma}
        return options if self.alpha is None else {**options, "alpha": self.alpha}

    def validate(self) -> None:
        super().validate()
        require(self, "gamma", self.gamma >= 0, "give a margin >= 0")


class SimPOTrainer(_ReferenceFreeTrainer):
    """SimPO (arXiv:2405.14734), and AlphaPO's reward shape (arXiv:2501.03884)."""

    _tag_names = ("trl", "simpo")
    config_class = SimPOConfig


__getattr__ = lazy_names(__name__, {}, absent.refuse)[0]
