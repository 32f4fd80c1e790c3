"""The reference model of an offline trainer: how it is made, follows the policy, or is computed before training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, TrainerCallback

from trl.models.forward import eval_no_grad, rows_padded
from trl.models.peft_support import is_peft_model
from trl.models.precision import dtype_of
from trl.models.prepare import disable_dropout_in_model, load_model
from trl.models.reference import Reference, copy_with_adapter, needs_no_copy
from trl.models.sharded import in_step, prepare_frozen, shards_weights
from trl.models.unwrap import runs_in_step
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.configuration import OfflineConfig, refuse_unused, require
from trl.trainer.objective import ObjectiveTrainer


@dataclass
class ReferenceConfig(OfflineConfig):
    """The settings of the reference model."""

    precompute_ref_log_probs: bool = field(default=False)
    """compute the reference's log-probabilities once, before training; no second model is kept then"""
    precompute_ref_batch_size: int | None = field(default=None)
    """batch size for that; None: the larger one of training and evaluation"""
    ref_model_init_kwargs: dict[str, Any] | str | None = field(default=None)
    """keywords of `from_pretrained` for a reference given by name"""
    sync_ref_model: bool = field(default=False)
    """TR-DPO: move the reference towards the policy every `ref_model_sync_steps`"""
    ref_model_mixup_alpha: float = field(default=0.6)
    """TR-DPO: share of the policy in the new reference"""
    ref_model_sync_steps: int = field(default=512)
    """TR-DPO: optimizer steps between two moves"""
    model_adapter_name: str | None = field(default=None)
    """the adapter of a PeftModel that is trained, where it has several; None: its active one"""
    ref_adapter_name: str | None = field(default=None)
    """the adapter of the same PeftModel that is the reference; None: no adapter of the policy is"""

    def json_fields(self) -> tuple[str, ...]:
        return (*super().json_fields(), "ref_model_init_kwargs")

    @property
    def moves_reference(self) -> bool:
        return self.sync_ref_model

    def validate(self) -> None:
        super().validate()
        require(self, "ref_model_mixup_alpha", 0 < self.ref_model_mixup_alpha <= 1, "give a share in (0, 1]")
        require(self, "ref_model_sync_steps", self.ref_model_sync_steps > 0, "give a number of steps > 0")
        batch, precomputes = self.precompute_ref_batch_size, self.precompute_ref_log_probs
        require(self, "precompute_ref_batch_size", batch is None or batch > 0, "give a number of rows > 0, or None")
        refuse_unused(self, ("precompute_ref_batch_size",), precomputes, "precompute_ref_log_probs=True")
        require(
            self, "sync_ref_model", not (self.sync_ref_model and precomputes), "a precomputed reference cannot move"
        )

        way_out = "an adapter that is the reference stays as it is; give a ref_model to move one"
        require(self, "ref_adapter_name", not (self.ref_adapter_name and self.sync_ref_model), way_out)


def choose_adapters(config: ReferenceConfig, model: Any, ref_model: Any) -> Any:
    """Activate the adapter to train; the reference: that given, or a copy of the adapter that the config names.

    The copy shares all weights with the policy but those of the two adapters.
    """
    trained, kept = config.model_adapter_name, config.ref_adapter_name
    held = list(model.peft_config) if is_peft_model(model) else []
    for name in ("model_adapter_name", "ref_adapter_name"):
        way_out = f"the model has no such adapter (it has {', '.join(held) or 'none'}); load it by `load_adapter`"
        require(config, name, getattr(config, name) in (None, *held), way_out)
    if trained is not None:
        model.set_adapter(trained)
    if kept is None:
        return ref_model
    require(config, "ref_adapter_name", ref_model is None, "the reference is given as ref_model too; give one of them")
    trained = model.active_adapter
    require(config, "ref_adapter_name", kept != trained, "it is the adapter that is trained; name it for one of them")
    return copy_with_adapter(model, kept)


class SyncReference(TrainerCallback):
    """TR-DPO: moves the reference towards the policy every `steps` optimizer steps."""

    def __init__(self, reference: Reference, alpha: float, steps: int):
        self.reference, self.alpha, self.steps = reference, alpha, steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            self.reference.sync(self.alpha)


def follows(trainer: ObjectiveTrainer) -> bool:
    """Whether the reference moves, by the config or by a `SyncRefModelCallback`."""
    added = any(isinstance(callback, SyncRefModelCallback) for callback in trainer.callback_handler.callbacks)
    return bool(trainer.args.sync_ref_model) or added


def check_sync(trainer: ObjectiveTrainer) -> None:
    """ValueError where the config says how the reference moves, and nothing moves it; callbacks come late."""
    sync = ("ref_model_mixup_alpha", "ref_model_sync_steps")
    refuse_unused(trainer.args, sync, follows(trainer), "sync_ref_model=True or a SyncRefModelCallback")


def make_reference(
    trainer: ObjectiveTrainer,
    ref_model: nn.Module | str | None,
    columns: Sequence[str],
    *,
    absent: bool = False,
    encoder_decoder: bool = False,
) -> Reference:
    """The reference: the model given; else none if the rows bring its numbers or if they are computed before training;
    else the policy without its new adapter, or a frozen copy of the policy.

    absent: the objective uses no reference.
    """
    config, autocast = trainer.args, trainer.accelerator.autocast
    if absent:
        if ref_model is not None:
            raise ValueError("ref_model: the objective has no reference (reference_free=True); leave it out")
        return Reference(trainer.model, precomputed=True)
    if ref_model is None:
        ahead = config.precompute_ref_log_probs and not needs_no_copy(trainer.model)
        known, share = ahead or _all_have(trainer, columns), not shards_weights(trainer.accelerator)
        reference = Reference(trainer.model, precomputed=known, autocast=autocast, share=share)
        reference.prepare(trainer.accelerator)
    else:
        auto_class = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
        owner, like = type(trainer).__name__, dtype_of(trainer.model)
        given = load_model(ref_model, auto_class, config.ref_model_init_kwargs, owner=owner, frozen=True, like=like)
        if config.disable_dropout:
            disable_dropout_in_model(given)
        if given is not trainer.model:  # else `Reference` says what is wrong with that
            given = prepare_frozen(trainer.accelerator, given)
        reference = Reference(trainer.model, given, autocast=autocast)
    if config.sync_ref_model:
        if reference.frozen is None:
            raise ValueError("sync_ref_model=True: the reference is no model of its own and cannot move: give one")
        trainer.add_callback(SyncReference(reference, config.ref_model_mixup_alpha, config.ref_model_sync_steps))
    return reference


def _datasets(trainer: ObjectiveTrainer) -> Iterable[Any]:
    evaluation = trainer.eval_dataset
    evaluation = evaluation.values() if isinstance(evaluation, dict) else [evaluation]
    return (dataset for dataset in (trainer.train_dataset, *evaluation) if dataset is not None)


def _all_have(trainer: ObjectiveTrainer, columns: Sequence[str]) -> bool:
    names = [set(getattr(dataset, "column_names", None) or ()) for dataset in _datasets(trainer)]
    return bool(names) and all(set(columns) <= own for own in names)


class ReferenceColumns:
    """Computes the reference's numbers as columns of the data: each row once, without gradient, on all ranks.

    If there is no separate reference model, the policy before the first optimizer step is the reference.
    """

    def __init__(
        self,
        trainer: ObjectiveTrainer,
        reference: Reference,
        names: Sequence[str],
        sums: Callable[[nn.Module, Mapping[str, Any]], Sequence[Tensor]],
    ):
        self.trainer, self.reference, self.names, self.sums = trainer, reference, tuple(names), sums
        for dataset in _datasets(trainer) if trainer.args.precompute_ref_log_probs else ():
            self._refuse_stream(dataset, "given")

    def fill(self) -> None:
        """Give every data set of the trainer its columns."""
        check_sync(self.trainer)
        if not self.trainer.args.precompute_ref_log_probs:
            return
        trainer = self.trainer
        if trainer.train_dataset is not None:
            trainer.train_dataset = trainer.given.ready(self.of(trainer.train_dataset, "train"), "train")
        if isinstance(trainer.eval_dataset, dict):
            named = {
                key: trainer.given.ready(self.of(dataset, f"eval ({key})"), f"eval ({key})")
                for key, dataset in trainer.eval_dataset.items()
            }
            trainer.eval_dataset = trainer.given.ready(named, "eval")
        elif trainer.eval_dataset is not None:
            trainer.eval_dataset = trainer.given.ready(self.of(trainer.eval_dataset, "eval"), "eval")

    def evaluation(self, eval_dataset: Any) -> Any:
        """The rows to evaluate with their columns; a name or None: the trainer's own."""
        self.fill()
        own = eval_dataset is None or isinstance(eval_dataset, str)
        return eval_dataset if own or not self.trainer.args.precompute_ref_log_probs else self.of(eval_dataset, "eval")

    @torch.no_grad()
    def of(self, dataset: Any, name: str) -> Dataset:
        """The rows with the reference's columns; those that have them stay as they are."""
        if self._has_columns(dataset):
            return dataset
        self._refuse_stream(dataset, name)
        with self.reference.model() as reference:
            if reference is None and self.trainer.state.global_step > 0:
                raise ValueError(
                    f"precompute_ref_log_probs=True: the {name} data came after training had moved the policy, and no "
                    "reference is kept: give them to the constructor, or a `ref_model`"
                )
            model = self.trainer.model if reference is None else reference
            with eval_no_grad(model), rows_padded(self.trainer.pads_rows):
                columns = self._scored(model, dataset)
        for column, values in zip(self.names, columns, strict=True):
            dataset = dataset.add_column(column, values)
        return dataset

    def _refuse_stream(self, dataset: Any, name: str) -> None:
        if not isinstance(dataset, Dataset) and not self._has_columns(dataset):
            raise ValueError(
                f"precompute_ref_log_probs=True: the {name} data are a {type(dataset).__name__} without length; leave "
                "it False, or load them whole"
            )

    def _has_columns(self, dataset: Any) -> bool:
        return set(self.names) <= set(getattr(dataset, "column_names", None) or ())

    def _scored(self, model: nn.Module, dataset: Dataset) -> list[list[float]]:
        args = self.trainer.args
        size = args.precompute_ref_batch_size or max(args.per_device_train_batch_size, args.per_device_eval_batch_size)
        lengths = [sum(len(v) for v in row.values() if isinstance(v, list)) for row in dataset]
        order = sorted(range(len(dataset)), key=lengths.__getitem__)
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        mine = []
        with in_step(model) if runs_in_step(model) else nullcontext():  # ranks may have one batch more or less
            for batch in batches[args.process_index :: args.world_size]:
                collated = self.trainer.data_collator([dataset[i] for i in batch])
                moved = {name: value.to(args.device) for name, value in collated.items()}
                values = [sums.tolist() for sums in self.sums(model, moved)]
                mine += [(index, *row) for index, row in zip(batch, zip(*values, strict=True), strict=True)]
        rows = sorted(gather_object(mine))
        return [list(column) for column in list(zip(*rows, strict=True))[1:]]
