"""Direct preference optimisation, its relatives with a reference, and those without: ORPO, CPO, SimPO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from trl.data.pairs import build_tokenized_answer, tokenize_row
from trl.import_utils import is_peft_available, is_wandb_available
from trl.losses.pairs import PairLogps
from trl.losses.preference import PAIR_LOSSES, pair_options
from trl.models.prepare import disable_dropout_in_model, load_model
from trl.models.reference import Reference
from trl.models.scoring import score
from trl.trainer.configuration import as_config, with_keywords
from trl.trainer.dpo_config import CPOConfig, DPOConfig, ORPOConfig, PairConfig, SimPOConfig
from trl.trainer.dpo_padded import concatenated_forward, concatenated_inputs, get_batch_logps
from trl.trainer.pair_trainer import PairTrainer
from trl.trainer.reference_columns import with_reference_columns

REFERENCE_COLUMNS = ("reference_chosen_logps", "reference_rejected_logps")


class SyncReference(TrainerCallback):
    """TR-DPO: every so many optimizer steps the reference moves towards the policy."""

    def __init__(self, reference: Reference, alpha: float, steps: int):
        self.reference, self.alpha, self.steps = reference, alpha, steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            self.reference.sync(self.alpha)


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
    ):
        older = not isinstance(args, DPOConfig)
        given = {
            "beta": beta, "label_smoothing": label_smoothing, "loss_type": loss_type, "max_length": max_length,
            "max_prompt_length": max_prompt_length, "max_completion_length": max_target_length,
            "disable_dropout": disable_dropout, "generate_during_eval": generate_during_eval,
            "precompute_ref_log_probs": precompute_ref_log_probs, "model_init_kwargs": model_init_kwargs,
            "ref_model_init_kwargs": ref_model_init_kwargs,
            "truncation_mode": "keep_end" if older and truncation_mode is None else truncation_mode,
        }  # fmt: skip
        config = with_keywords(as_config(args, DPOConfig), given)
        _check(config, model, ref_model, peft_config, is_encoder_decoder)
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
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            compute_metrics=compute_metrics,
        )
        self.ld_alpha, self.weighs = 1.0 if config.ld_alpha is None else config.ld_alpha, config.use_weighting
        self.reference = self._reference(ref_model, config)
        if config.sync_ref_model:
            if self.reference.frozen is None:
                raise ValueError(
                    "sync_ref_model=True: the reference is the policy without its adapter and cannot move: give one"
                )
            self.add_callback(SyncReference(self.reference, config.ref_model_mixup_alpha, config.ref_model_sync_steps))

    def _reference(self, ref_model: nn.Module | str | None, config: DPOConfig) -> Reference:
        precomputed = config.precompute_ref_log_probs and ref_model is None and self._has_reference()
        if config.reference_free or precomputed:
            return Reference(self.model, precomputed=True)
        if ref_model is not None:
            ref_model = load_model(
                ref_model, AutoModelForCausalLM, config.ref_model_init_kwargs, owner=type(self).__name__
            )
            if config.disable_dropout:
                disable_dropout_in_model(ref_model)
            if ref_model is not self.model:
                ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        return Reference(self.model, ref_model)

    def _has_reference(self) -> bool:
        columns = getattr(self.train_dataset, "column_names", None) or []
        return set(REFERENCE_COLUMNS) <= set(columns)

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference as a model of its own; None where it is the policy without its adapter."""
        return self.reference.frozen

    def extra_state(self) -> dict[str, Any]:
        moved = self.args.sync_ref_model and self.reference.frozen is not None
        return {**super().extra_state(), **({"reference": self.reference.frozen.state_dict()} if moved else {})}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        if "reference" in state:
            self.reference.frozen.load_state_dict(state["reference"])

    def reference_sums(self, batch: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        if self.args.reference_free:
            return None, None
        if REFERENCE_COLUMNS[0] in batch:
            return batch[REFERENCE_COLUMNS[0]], batch[REFERENCE_COLUMNS[1]]
        with self.reference.model() as reference:
            if reference is None:
                raise ValueError(f"the reference is precomputed, but the rows have no columns {REFERENCE_COLUMNS}")
            packed = batch["packed"]
            return self.sums(score(reference, packed, path=self._path).logprobs_BT, packed.mask_BT)

    def divergence(self) -> dict[str, Any]:
        return {"divergence": self.args.f_divergence_type, "divergence_alpha": self.args.f_alpha_divergence_coef}

    # -- precomputed reference -----------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        if self.args.precompute_ref_log_probs:
            self.train_dataset = self._with_reference(self.train_dataset, "train")
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if self.args.precompute_ref_log_probs:
            if isinstance(eval_dataset, str):
                self.eval_dataset[eval_dataset] = self._with_reference(self.eval_dataset[eval_dataset], "eval")
            elif eval_dataset is None:
                self.eval_dataset = self._with_reference(self.eval_dataset, "eval")
            else:
                eval_dataset = self._with_reference(eval_dataset, "eval")
        return super().get_eval_dataloader(eval_dataset)

    def _with_reference(self, dataset: Any, name: str) -> Any:
        default = {"train": self.args.per_device_train_batch_size, "eval": self.args.per_device_eval_batch_size}[name]
        return with_reference_columns(
            dataset,
            REFERENCE_COLUMNS,
            self.data_collator,
            self.reference_sums,
            batch_size=self.args.precompute_ref_batch_size or default,
            device=self.args.device,
        )

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
            is_encoder_decoder=getattr(self.model.config, "is_encoder_decoder", False),
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
        losses: Tensor | float = 0.0
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

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        if self.args.generate_during_eval:
            from trl.trainer.eval_samples import log_samples

            log_samples(self, args[0] if args else kwargs["dataloader"])
        return super().evaluation_loop(*args, **kwargs)


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
    if config.generate_during_eval and not is_wandb_available():
        raise ValueError(
            "`generate_during_eval=True` requires Weights and Biases to be installed. "
            "Please install `wandb` to resolve."
        )
    if model is None and encoder_decoder is None:
        raise ValueError("When no model is provided, you need to pass the parameter is_encoder_decoder.")
    actual = getattr(getattr(model, "config", None), "is_encoder_decoder", encoder_decoder)
    if encoder_decoder is not None and actual is not None and bool(actual) != encoder_decoder:
        raise ValueError(f"is_encoder_decoder={encoder_decoder}: the model says {bool(actual)}; leave the argument out")


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
