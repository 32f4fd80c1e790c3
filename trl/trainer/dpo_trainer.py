"""Direct preference optimisation, its relatives with a reference, and those without: ORPO, CPO, SimPO."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from trl.import_utils import is_peft_available
from trl.legacy.dpo_padded import concatenated_forward, concatenated_inputs, get_batch_logps
from trl.legacy.joint_pairs import build_tokenized_answer, tokenize_row
from trl.losses.pairs import PairLogps
from trl.losses.preference import PAIR_LOSSES, pair_options
from trl.models.prepare import context_length
from trl.models.scoring import score
from trl.trainer.configuration import as_config, older_style, with_keywords
from trl.trainer.dpo_config import CPOConfig, DPOConfig, ORPOConfig, PairConfig, SimPOConfig
from trl.trainer.pair_trainer import PairTrainer
from trl.trainer.references import ReferenceColumns, SyncReference, make_reference

__all__ = ["CPOTrainer", "DPOTrainer", "ORPOTrainer", "SimPOTrainer", "SyncReference"]

REFERENCE_COLUMNS = ("reference_chosen_logps", "reference_rejected_logps")


class DPOTrainer(PairTrainer):
    """Optimise a policy on preference pairs against a reference (arXiv:2305.18290), with the losses of `PAIR_LOSSES`.

    Rows: `chosen` and `rejected` (text or conversations), with or without `prompt`; optionally the reference's
    log-probabilities as `reference_chosen_logps` and `reference_rejected_logps`. Takes the keywords of older releases
    and a `DPOConfig` in `args`; a keyword that contradicts the config is a ValueError. Without `ref_model` the
    reference is the policy with its adapter switched off, or else a frozen copy.
    """

    _tag_names = ("trl", "dpo")

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
        self.ld_alpha, self.weighs = 1.0 if config.ld_alpha is None else config.ld_alpha, config.use_weighting
        self.reference = make_reference(
            self, ref_model, REFERENCE_COLUMNS, absent=config.reference_free, encoder_decoder=self._encoder_decoder
        )
        self._ahead = ReferenceColumns(self, self.reference, REFERENCE_COLUMNS, self._scored)

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference as a model of its own; None where it is the policy without its adapter."""
        return self.reference.frozen

    def extra_state(self) -> dict[str, Any]:
        moved = {"reference": self.reference.state()} if self.args.sync_ref_model else {}
        return {**super().extra_state(), **moved}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        if "reference" in state:
            self.reference.load(state["reference"])

    def _scored(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        packed = batch["packed"]
        return self.sums(score(model, packed).logprobs_BT, packed.mask_BT)

    def reference_sums(self, batch: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        if self.args.reference_free:
            return None, None
        if REFERENCE_COLUMNS[0] in batch:
            return batch[REFERENCE_COLUMNS[0]], batch[REFERENCE_COLUMNS[1]]
        with self.reference.model() as reference:
            if reference is None:
                raise ValueError(f"the reference is precomputed, but the rows have no columns {REFERENCE_COLUMNS}")
            return self._scored(reference, batch)

    def divergence(self) -> dict[str, Any]:
        return {"divergence": self.args.f_divergence_type, "divergence_alpha": self.args.f_alpha_divergence_coef}

    def prepare_data(self) -> None:
        self._ahead.fill()

    def prepare_evaluation(self, eval_dataset: Any) -> Any:
        return self._ahead.evaluation(eval_dataset)

    @torch.no_grad()
    def compute_reference_log_probs(self, padded_batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The reference's log-probabilities of a padded batch's chosen and rejected. [pairs] each"""
        with self.reference.model() as reference:
            if reference is None:
                raise ValueError(
                    "No reference model and model is not a Peft model. Try setting `precompute_ref_log_probs=True`"
                )
            return self.concatenated_forward(reference, padded_batch)[:2]

    # -- the older methods, on padded batches and plain numbers -------------------------------

    concatenated_inputs = staticmethod(concatenated_inputs)
    get_batch_logps = staticmethod(get_batch_logps)

    def build_tokenized_answer(self, prompt: str, answer: str) -> dict[str, list[int]]:
        """Tokenise prompt + answer as one text, and split it."""
        return build_tokenized_answer(self.processing_class, prompt, answer)

    def tokenize_row(self, feature: Mapping[str, Any], model: nn.Module | None = None) -> dict[str, Any]:
        """One pair as the padded columns `chosen_*`, `rejected_*`, `prompt_*`."""
        return tokenize_row(
            feature,
            self.processing_class,
            max_length=self.args.max_length or 512,
            max_prompt_length=self.args.max_prompt_length or 128,
            max_target_length=self.args.max_completion_length or 128,
            truncation_mode=self.args.truncation_mode,
            label_pad_token_id=self.label_pad_token_id,
            is_encoder_decoder=self._encoder_decoder,
            model=model,
        )

    def concatenated_forward(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`(chosen_logps, rejected_logps, chosen_logits, rejected_logits)` of a padded batch, whole logits included."""
        padding = self.processing_class.pad_token_id if self.padding_value is None else self.padding_value
        return concatenated_forward(model, batch, self.label_pad_token_id, padding)

    def dpo_loss(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        reference_free: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(losses, chosen_rewards, rejected_rewards)` of summed log-probabilities."""
        references = (None, None) if reference_free else (reference_chosen_logps, reference_rejected_logps)
        pair = PairLogps(policy_chosen_logps, policy_rejected_logps, *references)
        options = self.loss_options({})
        losses = policy_chosen_logps.new_zeros(())
        for name, weight in self.losses.items():
            own = {key: value for key, value in options.items() if key in pair_options(name)}
            losses = losses + weight * PAIR_LOSSES[name](pair, **own)
        chosen = self.args.beta * (policy_chosen_logps - reference_chosen_logps).detach()
        rejected = self.args.beta * (policy_rejected_logps - reference_rejected_logps).detach()
        return losses, chosen, rejected

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's mean loss and metrics; `batch` is one of the trainer's own."""
        result = self.objective(model, batch)
        prefix = "eval_" if train_eval == "eval" else ""
        means = {}
        for name, value in result.metrics.items():
            total, count = value if isinstance(value, tuple) else (value, result.count)
            means[prefix + name] = total / count
        return result.mean, means

    def store_metrics(self, metrics: Mapping[str, float], train_eval: str = "train") -> None:
        """Add to the metrics that the next log shows as their mean."""
        for name, value in metrics.items():
            self.record(name.removeprefix("eval_"), value, mode=train_eval)


def _encoder_decoder(model: Any, given: bool | None) -> bool | None:
    """What the model says of itself, else what was given; a contradiction is a ValueError."""
    actual = getattr(getattr(model, "config", None), "is_encoder_decoder", None)
    if given is not None and actual is not None and bool(actual) != given:
        raise ValueError(f"is_encoder_decoder={given}: the model says {bool(actual)}; leave the argument out")
    return given if actual is None else bool(actual)


def _older_defaults(given: Mapping[str, Any], model: Any, encoder_decoder: bool, warns: bool) -> dict[str, Any]:
    """The lengths and the truncation of a trainer that is given no `DPOConfig`.

    A prompt is cut only where prompt and answer together are too long, so it has no length of its own by default.
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
    """The refusals of older releases, in their order and words."""
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


class ORPOTrainer(_ReferenceFreeTrainer):
    """Odds-ratio preference optimisation (arXiv:2403.07691)."""

    _tag_names = ("trl", "orpo")
    config_class = ORPOConfig


class CPOTrainer(_ReferenceFreeTrainer):
    """Contrastive preference optimisation (arXiv:2401.08417)."""

    _tag_names = ("trl", "cpo")
    config_class = CPOConfig


class SimPOTrainer(_ReferenceFreeTrainer):
    """SimPO (arXiv:2405.14734), and AlphaPO's reward shape (arXiv:2501.03884)."""

    _tag_names = ("trl", "simpo")
    config_class = SimPOConfig
