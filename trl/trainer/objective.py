"""The one seam to `transformers.Trainer`: an objective returns a sum, and the loop divides once per optimizer step."""

from __future__ import annotations

import copy
import inspect
import logging
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import EvalLoopOutput

from trl.data.microbatches import BudgetCollator, row_tokens, unasked_budget
from trl.kernels.step_memory import in_place, kept_memory
from trl.losses.loss_sum import LossSum
from trl.models.forward import eval_no_grad, rows_padded, within_forward
from trl.models.router import balance_weight, with_balance
from trl.models.weight_files import WEIGHT_FILES, is_disk_error, writing
from trl.trainer.base import trl_sanitze_kwargs_for_tagging
from trl.trainer.checkpoints import (
    PREFIX,
    Checkpoint,
    Run,
    SealCheckpoints,
    check_identity,
    check_settings,
    clean_up,
    describe_run,
    find,
    is_old_trainer_checkpoint,
    read_state,
    write_state,
)
from trl.trainer.configuration import PostTrainingConfig, as_config
from trl.trainer.given_data import GivenData, Prepare
from trl.trainer.settings import NO_EFFECT
from trl.trainer.tally import Appended, Tally

logger = logging.getLogger(__name__)

EXTRA_STATE = "extra_state.pt"
DYNAMO = "ACCELERATE_DYNAMO_BACKEND"


def pieces_of(batches: Sequence[Any]) -> list[Any]:
    """The micro-batches of an optimizer step; a batch that a token budget has cut gives several."""
    return [piece for batch in batches for piece in _pieces(batch) or [batch]]


def _pieces(batch: Any) -> list[Any] | None:
    return batch.get("pieces") if isinstance(batch, Mapping) else None


class ObjectiveTrainer(Trainer):
    """A `Trainer` whose loss is a `LossSum`. Overrides public methods only.

    A subclass says what it learns (`objective`) and what one batch counts for (`count`); this class divides by the
    count of the whole optimizer step, over all ranks, exactly once: the split into micro-batches changes nothing.
    """

    _tag_names: tuple[str, ...] | list[str] = ("trl",)
    model: Any
    optimizer: Any
    lr_scheduler: Any
    data_collator: Any
    loss_is_scaled_for_ga = True  # `compute_loss` has divided, `Trainer` must not

    @abstractmethod
    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossSum:
        """The loss of one micro-batch, summed."""

    @abstractmethod
    def count(self, batch: dict[str, Any]) -> Tensor | float:
        """What `objective` will sum over in this batch: learned tokens, sequences or pairs."""

    is_in_train = False  # before `Trainer` says so itself
    _train_rows: Any = None
    _eval_rows: Any = None

    def __init__(self, *args: Any, processing_class: Any = None, rows: Prepare | None = None, **kwargs: Any):
        """rows: prepares a data set for the collator; it is called for each one that the trainer is ever given."""
        kwargs["args"] = own = _own_settings(kwargs.get("args"))

        def prepared(dataset: Any, name: str) -> Any:
            return _with_lengths(dataset if rows is None else rows(dataset, name), own)

        self.given = GivenData(prepared)
        super().__init__(*args, processing_class=processing_class, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process: start with `accelerate launch`, or show it one "
                "with CUDA_VISIBLE_DEVICES=0"
            )
        budget = self.args.token_budget
        if budget is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"max_tokens_per_microbatch={budget}: ranks would differ in their number of forward passes, which FSDP "
                "and DeepSpeed do not allow; leave it out"
            )
        self._tallies = {mode: Tally(self.args.device) for mode in ("train", "eval")}
        self._metrics: Any = {mode: Appended(partial(self._tallies.__getitem__, mode)) for mode in self._tallies}
        self._seal = SealCheckpoints()
        self.add_callback(self._seal)
        self.callback_handler.callbacks.insert(0, self._seal.limit)
        self.pads_rows = isinstance(self.args, PostTrainingConfig) and self.args.pads_rows
        self.balance_weight = balance_weight(self.model, self.args.router_aux_loss_coef)
        """of the balance loss of a mixture's routers"""
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(list(self._tag_names))
        folder = getattr(self.args, "logging_dir", None)
        for callback in self.callback_handler.callbacks if folder else ():
            if isinstance(callback, TensorBoardCallback):
                callback.logging_dir = folder

    @property
    def train_dataset(self) -> Any:
        """The prepared training rows. Another data set is prepared when it is set, and used by the next `train()`."""
        return self._train_rows

    @train_dataset.setter
    def train_dataset(self, dataset: Any) -> None:
        if self.is_in_train and dataset is not self._train_rows:
            raise ValueError(
                "train_dataset: a run reads the data set that it began with; set another one between two calls of "
                "train() (control.should_training_stop=True ends a run early)"
            )
        before, self._train_rows = self._train_rows, self.given.of(dataset, "train")
        if self._train_rows is not before:
            self.other_train_rows()

    @property
    def eval_dataset(self) -> Any:
        """The prepared evaluation rows, or a dict of them. Others are prepared when they are set."""
        return self._eval_rows

    @eval_dataset.setter
    def eval_dataset(self, dataset: Any) -> None:
        self._eval_rows = self.given.of(dataset, "eval")

    def other_train_rows(self) -> None:
        """Called when the training rows are others than before."""

    def changed(self, name: str) -> None:
        """Called after a `Setting` got a new value; ValueError where it can have no effect any more."""

    def prepare_data(self) -> None:
        """Called before training data are read and before a checkpoint is loaded into the model."""
        self.train_dataset = self.given.renewed(self.train_dataset, "train")

    def prepare_evaluation(self, eval_dataset: Any, name: str = "eval") -> Any:
        """Evaluation rows in the form that the collator takes; a name or None means the trainer's own data set."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            self.eval_dataset = self.given.renewed(self.eval_dataset, "eval")
            return eval_dataset
        return self.given.of(eval_dataset, name)

    def get_train_dataloader(self) -> DataLoader:
        self.prepare_data()
        whole: Any = self.data_collator
        asked = self.args.token_budget
        budget = asked or self._unasked_budget()
        if budget is None:
            return super().get_train_dataloader()
        self.data_collator = BudgetCollator(whole, budget, asked=asked is not None)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = whole

    def _unasked_budget(self) -> int | None:
        if self.balance_weight or not self.args.cuts_unasked():  # the balance is that of a whole batch
            return None
        return unasked_budget(self.args.device, self.args.world_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return super().get_eval_dataloader(self.prepare_evaluation(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return super().get_test_dataloader(self.prepare_evaluation(test_dataset, "test"))

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, by its older name."""
        return self.processing_class

    def record(self, name: str, total: Tensor | float, count: Tensor | float = 1.0, mode: str = "train") -> None:
        """Add to a metric that the next log shows as its mean."""
        self._tallies[mode].add(name, total, count)

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint needs besides the model, optimizer, scheduler and RNGs; tensors and plain values."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `extra_state` gave."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what `from_pretrained` reads, whole or not at all."""
        target = str(output_dir or self.args.output_dir)
        named = output_dir is not None and Path(target).name == f"{PREFIX}{self.state.global_step}"
        if _internal_call and named:
            self._begin_checkpoint(Path(target))
        elif self.is_fsdp_enabled or self.is_deepspeed_enabled:  # all ranks write together
            super().save_model(target, _internal_call=True)
        elif self.args.should_save:
            with writing(target, replaces=WEIGHT_FILES) as beside:
                super().save_model(str(beside), _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _begin_checkpoint(self, folder: Path) -> None:
        """Write the first files of a checkpoint; `Trainer` writes the others, and calls `on_save` after the last."""
        state = self.extra_state()
        self._seal.run = self._seal.run or self.describe_run()
        self._seal.begin(folder, self.args, self.state)
        super().save_model(str(folder), _internal_call=True)
        if state and self.args.should_save:
            write_state(folder / EXTRA_STATE, state)
        if self.is_in_train and (self.control.should_save or self.args.enable_jit_checkpoint):
            self._seal.limit.hold(self.args)

    def describe_run(self) -> Run:
        """What a checkpoint of this run is compared with when a later run resumes from it."""
        args, name = self.args, type(self).__name__
        return describe_run(name, self.model, args.to_dict(), fixed=args.place_in_data(), dataset=self.train_dataset)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self.prepare_data()
        folder = str(self.args.output_dir)
        clean_up(folder)
        found = find(resume_from_checkpoint, folder, is_old=is_old_trainer_checkpoint)
        self._seal.run = None
        if found is not None or self.args.save_strategy != "no":
            self._seal.run = self.describe_run()  # now, as wrappers that shard weights change their shapes
        if found is not None:
            self._resume(found, self._seal.run or self.describe_run())
        self.remove_callback(self._seal)
        self.add_callback(self._seal)  # as the last one: what other callbacks add to a checkpoint is listed
        try:
            memory, gradients = kept_memory(self.args.device), in_place(self.args.device, self.args.world_size)
            with memory, gradients, rows_padded(self.pads_rows):
                return super().train(None if found is None else str(found.folder), *args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not isinstance(error, SafetensorError) and not is_disk_error(error):
                raise
            self._seal.undo(self.args)
            reason = str(error).splitlines()[0].removeprefix("could not save to ")
            raise OSError(
                f"could not save checkpoint-{self.state.global_step} to {folder!r}: {reason}; earlier checkpoints are "
                "whole: free some space and go on with train(resume_from_checkpoint=True)"
            ) from error
        finally:
            self._seal.limit.give_back(self.args)

    def _resume(self, found: Checkpoint, run: Run) -> None:
        """Compare a checkpoint with this run, and take back what `extra_state` gave."""
        check_identity(found, run, self.args.world_size)
        file = found.folder / EXTRA_STATE
        state = read_state(file) if file.exists() else None
        way_out = "set ignore_data_skip=True to begin anew in the data, "
        check_settings(found, run, has_place=not self.args.ignore_data_skip, way_out=way_out)
        if state is not None:  # may refuse it too, before anything changes
            self.load_extra_state(state)
        if found.is_model_only:
            logger.warning("%s was written with save_only_model=True: the optimizer starts anew", found.folder)

    def push_to_hub(self, commit_message: str | None = "End of training", blocking: bool = True, **kwargs: Any) -> str:
        tagged = trl_sanitze_kwargs_for_tagging(self._tag_names, kwargs)
        return super().push_to_hub(commit_message=commit_message, blocking=blocking, **(tagged or {}))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        if 0 < self.state.max_steps <= self.state.global_step:  # resumed at its end, where `Trainer` would make a step
            self.control.should_training_stop = True
            num_batches = 0
        batches = list(islice(epoch_iterator, num_batches))
        counts = [self.count(piece) for piece in pieces_of(batches)]
        local = torch.as_tensor(sum(counts), dtype=torch.float32, device=device)
        return batches, self.accelerator.reduce(local, "sum")

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """As `Trainer` estimates them, for the tokens that are really computed."""
        held = [piece.get("policy", piece.get("packed")) for piece in pieces_of([inputs])]
        packs = [getattr(each, "packed", each) for each in held if each is not None]
        if not packs or not hasattr(self.model, "num_parameters"):
            return 0
        return 6 * sum(len(packed.ids_N) for packed in packs) * int(self.model.num_parameters(exclude_embeddings=True))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        *first, last = _pieces(inputs) or [inputs]
        losses = []
        for piece in first:
            with self.accelerator.no_sync(model):
                losses.append(super().training_step(model, piece, num_items_in_batch))
        return sum(losses, super().training_step(model, last, num_items_in_batch))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        with rows_padded(self.pads_rows):
            result = within_forward(model, lambda inner: self.learned(inner, inputs))
        self._tallies["train" if model.training else "eval"].add_loss(result)
        if num_items_in_batch is None:
            loss = result.mean
        else:  # DDP averages over ranks; undo it
            loss = result.total * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)
        return (loss, {}) if return_outputs else loss

    def learned(self, model: nn.Module, batch: dict[str, Any]) -> LossSum:
        """The objective, and for a mixture of experts the balance loss of its routers if it is asked for."""
        if not self.balance_weight:
            return self.objective(model, batch)
        return with_balance(model, self.balance_weight, lambda: self.objective(model, batch))

    def predictions(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[LossSum, Tensor | None, Tensor | None]:
        """Loss, predictions and labels of an evaluation batch, for `compute_metrics`."""
        return self.objective(model, inputs), None, None

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        with torch.no_grad(), self.compute_loss_context_manager(), rows_padded(self.pads_rows):
            result, logits, labels = self.predictions(model, {**inputs})
        self._tallies["eval"].add_loss(result)
        return result.mean.detach(), *((None, None) if prediction_loss_only else (logits, labels))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        given = inspect.signature(super().evaluation_loop).bind(*args, **kwargs)
        given.apply_defaults()
        tally = self._tallies["eval"] = Tally(self.args.device)
        flags = eval_no_grad(self.model) if self.is_in_train else nullcontext()  # the training flags come back
        with flags, rows_padded(self.pads_rows):
            output = super().evaluation_loop(*args, **kwargs)
        for name, value in tally.means(self.accelerator).items():
            # what `compute_metrics` gave stays, but a mean of batch means is no loss
            key = f"{given.arguments['metric_key_prefix']}_{name}"
            output.metrics[key] = value if name == "loss" else output.metrics.get(key, value)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of what was recorded since the last log.

        While it trains, `Trainer` says by `control.should_log` which log is that of its training steps. Evaluation adds
        its own means. What is recorded outside of both comes with the next log of its kind.
        """
        training = self.control.should_log if self.is_in_train else "loss" in logs
        means = self._tallies["train" if training else "eval"].means(self.accelerator)
        means.pop("loss", None)  # Trainer's own: the mean over optimizer steps
        logs.update({name if training else f"eval_{name}": value for name, value in means.items()})
        super().log(logs, start_time)


def _with_lengths(dataset: Any, config: PostTrainingConfig) -> Any:
    """The rows with a column of their lengths, where they are to be ordered by it and no column says it."""
    if isinstance(dataset, dict):
        return {name: _with_lengths(rows, config) for name, rows in dataset.items()}
    wanted = config.train_sampling_strategy in ("group_by_length", "batch_rebalance")
    known = {"input_ids", config.length_column_name}
    if not wanted or not isinstance(dataset, Dataset) or known.intersection(dataset.column_names):
        return dataset
    return dataset.add_column(config.length_column_name, [row_tokens(row) for row in dataset])


def _own_settings(args: TrainingArguments | None) -> PostTrainingConfig:
    """A copy of the caller's settings, with what these trainers need."""
    own = copy.copy(as_config(args, PostTrainingConfig))
    own.accelerator_config = copy.deepcopy(own.accelerator_config)  # `Trainer` writes into it
    own.dataloader_pin_memory &= torch.accelerator.is_available()  # else torch warns at every epoch
    if own.accelerator_config.dispatch_batches:
        logger.warning("dispatch_batches=True: has no effect: a packed batch cannot be cut, so each process reads rows")
    own.accelerator_config.dispatch_batches = False
    if os.environ.get(DYNAMO, "no").lower() != "no":  # of the launcher, or of TrainingArguments with torch_compile
        logger.warning("%s=%s: %s", DYNAMO, os.environ[DYNAMO], NO_EFFECT["torch_compile"])
        own.torch_compile_backend = "no"
    return own
