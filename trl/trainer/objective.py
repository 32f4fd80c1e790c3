"""The one seam to `transformers.Trainer`: an objective returns a sum, and the loop divides once per optimizer step."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import IterableDatasetShard
from accelerate.utils import recursively_apply, send_to_device
from datasets import Dataset
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput, HubStrategy

from trl.data.formats import column_names
from trl.data.microbatches import (
    BudgetCollator,
    lengths_of,
    loaded_ahead,
    may_be_ahead,
    row_tokens,
    unasked_budget,
)
from trl.data.pictures import processor_of, read_by
from trl.data.records import Batch
from trl.kernels.layers import compile_layers
from trl.kernels.step_memory import Offload, in_place, kept_memory
from trl.losses.loss_sum import Extreme, LossSum
from trl.models import zero
from trl.models.forward import eval_no_grad, rows_padded, within_forward
from trl.models.memory import Load, Open, Plan
from trl.models.precision import check_trainable, say_memory, warn_of_half
from trl.models.prepare import keep_some
from trl.models.router import balance_weight, with_balance
from trl.models.sharded import optimizers_without_state
from trl.models.unwrap import below_accelerate, below_peft, below_value_head
from trl.models.weight_files import WEIGHT_FILES, is_disk_error, on_host, tied_names, writing
from trl.trainer import overrides
from trl.trainer.base import trl_sanitze_kwargs_for_tagging
from trl.trainer.callbacks import NotebookColumns
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
    number_of,
    processes_text,
    read_state,
    write_state,
)
from trl.trainer.configuration import ROWS, PostTrainingConfig, as_config
from trl.trainer.context_parallel import SharedRows, share_rows
from trl.trainer.given_data import SHARE, GivenData, Numbered, Prepare, WithShare
from trl.trainer.guard import NonFiniteSteps, Piece, check_weights, sampler_errors
from trl.trainer.memory_plan import ZERO, facts_of, plan_of, said_of
from trl.trainer.model_card import WAYS, CardFacts, card_text, listed, write_card
from trl.trainer.pushing import files_in, remove_when_done, staged, upload_checkpoint
from trl.trainer.ranks import after_restart, check_agreement, say_unsharded, several, watched
from trl.trainer.resharding import (
    FULL,
    OF_FSDP,
    PLAIN,
    Reader,
    Reading,
    check_readable,
    form_held,
    form_of,
    processes_of,
    readable,
)
from trl.trainer.run_folder import RunFacts, RunFolder, RunListener, told
from trl.trainer.run_record import resolved
from trl.trainer.signals import TERMINATED, StopSignal
from trl.trainer.tally import Appended, StepWatch, Tally, write_metrics
from trl.trainer.trace import StepTrace

logger = logging.getLogger(__name__)

EXTRA_STATE = "extra_state.pt"
DYNAMO = "ACCELERATE_DYNAMO_BACKEND"


def pieces_of(batches: Sequence[Any]) -> list[Any]:
    """The micro-batches of an optimizer step; a batch that a token budget has cut gives several."""
    return [piece for batch in batches for piece in _pieces(batch) or [batch]]


def _packs(batches: Sequence[Any]) -> list[Any]:
    """The packed rows of micro-batches."""
    held = [piece.get("policy", piece.get("packed")) for piece in pieces_of(batches)]
    return [getattr(each, "packed", each) for each in held if each is not None]


def _places(batch: Any) -> Sequence[Any]:
    """Where the rows of each piece of a micro-batch stand in it; None where they are not cut or that is not known."""
    pieces = _pieces(batch) or [batch]
    return batch["places"] if isinstance(batch, Mapping) and "places" in batch else [None] * len(pieces)


def _pieces(batch: Any) -> list[Any] | None:
    return batch.get("pieces") if isinstance(batch, Mapping) else None


class StepEnd(TrainerCallback, ExportableState):
    """Calls before each optimizer step, and ends a run after one of them."""

    def __init__(
        self,
        begin: Callable[[int], None],
        before: Callable[[], None],
        steps: NonFiniteSteps,
        asked: Callable[[], bool],
    ):
        """asked: collective; whether a process of the run was asked to end since it began a step."""
        self._begin, self._before, self._steps, self._asked = begin, before, steps, asked
        self.ended: Callable[[], Any] | None = None
        """is told of each step that has ended"""
        self.stops = False
        """whether the run is to end"""
        self.saves = False
        """whether it is saved once more then, amid a step"""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: how many steps were left out."""
        return {"args": {}, "attributes": {"skipped": self._steps.skipped}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kept: Any = state.stateful_callbacks.get(type(self).__name__, {})
        self._steps.skipped = int(kept["attributes"]["skipped"]) if isinstance(kept, dict) and kept else 0
        self.stops = self.saves = False
        self._begin(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._before()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.ended is not None:
            self.ended()
        if self.stops:
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._asked():  # no further step is begun for that
            control.should_save = control.should_training_stop = self.stops = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stops:  # amid an epoch, after the checkpoint of its last step
            control.should_save, control.should_evaluate, control.should_log = self.saves, False, False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saves = False


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
    branches_per_row = 1
    """sequences that a row of a batch has"""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        overrides.remember(cls)

    @abstractmethod
    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossSum:
        """The loss of one micro-batch, summed."""

    @abstractmethod
    def count(self, batch: dict[str, Any]) -> Tensor | float:
        """What `objective` will sum over in this batch: learned tokens, sequences or pairs."""

    is_in_train = False  # before `Trainer` says so itself
    _train_rows: Any = None
    _eval_rows: Any = None
    _eval_batch = _eval_total = 0
    """number of the evaluation batch, and the rows of all processes; 0 where that is not known"""
    _eval_own: Tensor
    """which rows of the evaluation batch do not come again. [B]"""
    only_repeats = False
    """whether an evaluation batch is there only because other processes have one; it must not count"""

    def __init__(self, *args: Any, processing_class: Any = None, rows: Prepare | None = None, **kwargs: Any):
        """rows: prepares a data set for the collator; it is called for each one that the trainer is ever given."""
        self._own = overrides.own_methods(type(self), vars(self))
        """methods of `overrides.TABLE` that are the user's"""
        self._at_hand: Any = None
        """the micro-batch that a user's `compute_loss` is asked about"""
        own = kwargs["args"] = _own_settings(kwargs.get("args"))
        ranks = share_rows(own)
        self._model_files: list[str] = []
        """what `from_pretrained` reads of the last save"""
        self._is_staged, self._uploads = False, list[Any]()
        self._hub_strategy, own.hub_strategy = own.hub_strategy, HubStrategy.END  # checkpoints: see `_push_checkpoint`
        on_signal, own.enable_jit_checkpoint = own.enable_jit_checkpoint, False  # see docs/decisions/0010

        # rows may be prepared before `Trainer` takes it; a processor is what checkpoints hold
        processing_class = self.processing_class = processor_of(processing_class)
        self._make_rows: Prepare = rows or (lambda dataset, name: dataset)
        self.given = GivenData(lambda dataset, name: _with_lengths(self._prepared(dataset, name), own))
        super().__init__(*args, processing_class=processing_class, **kwargs)
        self.args.enable_jit_checkpoint = on_signal
        say_unsharded(self.accelerator)
        self._take_own_methods()
        check_trainable(self.model)
        warn_of_half(self.model, self.args.learning_rate)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process: start with `accelerate launch`, or show it one "
                "with CUDA_VISIBLE_DEVICES=0"
            )
        self.shared = SharedRows(self.accelerator, ranks, self.args.shares_rows, type(self).__name__)
        """the ranks that compute each row together with this one"""
        budget = self.args.token_budget
        if budget is not None and self.is_deepspeed_enabled:
            raise ValueError(
                f"max_tokens_per_microbatch={budget}: ranks would differ in their number of forward passes, which "
                "DeepSpeed does not allow; leave it out"
            )
        self._tallies = {mode: Tally(self.args.device) for mode in ("train", "eval")}
        self._memory_said = False
        self._new_tokens: Tensor | int = 0
        self._tokens = 0
        self._metrics: Any = {mode: Appended(partial(self._tallies.__getitem__, mode)) for mode in self._tallies}
        self._watch_steps()
        self._seal = SealCheckpoints(self._push_checkpoint)
        self.add_callback(self._seal)
        self.callback_handler.callbacks.insert(0, self._seal.limit)
        self.pads_rows = isinstance(self.args, PostTrainingConfig) and self.args.pads_rows
        self.balance_weight = balance_weight(self.model, self.args.router_aux_loss_coef)
        """of the balance loss of a mixture's routers"""
        if self.shared.size > 1:
            self.shared.check(self.model, self.not_with_shared_rows())
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(list(self._tag_names))
        folder = getattr(self.args, "logging_dir", None)
        for callback in self.callback_handler.callbacks if folder else ():
            if isinstance(callback, TensorBoardCallback):
                callback.logging_dir = folder
        for callback in list(self.callback_handler.callbacks):
            if type(callback).__name__ == "NotebookProgressCallback":
                self.add_callback(NotebookColumns(callback))

    def not_with_shared_rows(self) -> dict[str, bool]:
        """What ranks that share rows do not do, and whether it is asked for."""
        counts = self.args.include_num_input_tokens_seen not in (False, "no")
        return {
            "padded rows (padding_free=False, neftune_noise_alpha) are not cut": self.pads_rows,
            "include_num_input_tokens_seen counts the tokens of each rank; num_tokens is right": counts,
        }

    def _watch_steps(self) -> None:
        """Look at each optimizer step before it is made: see `_before_optimizer_step`."""
        self._folder, self._signal, self._watch = RunFolder(is_old=is_old_trainer_checkpoint), StopSignal(), StepWatch()
        self._non_finite = NonFiniteSteps(self.args.on_non_finite, self.args.max_non_finite_skips)
        self._batches: Sequence[Any] = ()
        self._step_loss = torch.zeros((), device=self.args.device)
        self._left_out: list[Tensor] = []
        """of each step that was left out in this call of `train`, what `Trainer` adds to its losses"""
        self._logged = self._began = (0, 0)
        """the step, and how many were left out, at the last log and at the beginning"""
        self._step_end = StepEnd(self._begin_steps, self._before_optimizer_step, self._non_finite, self._asked_to_end)
        self.add_callback(self._step_end)
        clip = self.accelerator.clip_grad_norm_

        def clip_and_keep(*args: Any, **kwargs: Any) -> Any:  # `Trainer` hands the norm to nobody
            self._watch.norm = clip(*args, **kwargs)
            return self._watch.norm

        self.accelerator.clip_grad_norm_ = clip_and_keep
        zero.fill_config(self.accelerator, self.args.per_device_train_batch_size, self.args.max_grad_norm)

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

    # -- a user's methods (see `overrides.TABLE`) -------------------------------------------------

    def owns(self, name: str) -> bool:
        """Whether a method of `overrides.TABLE` is the user's."""
        return name in self._own or name in vars(self)

    def _take_own_methods(self) -> None:
        """Look again at what is the user's; have a `compute_loss` of theirs called as `_of_own_loss` says."""
        self._own = overrides.own_methods(type(self), vars(self))
        current = vars(self).get("compute_loss")
        if "compute_loss" in self._own and getattr(current, "func", None) != self._of_own_loss:
            self.compute_loss = partial(self._of_own_loss, self.compute_loss)  # type: ignore[method-assign]
            self.model.register_forward_pre_hook(self._explain_packed, with_kwargs=True)

    def _of_own_loss(
        self,
        own: Callable[..., Any],
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """A user's `compute_loss`, which gives the mean loss of a micro-batch.

        It is told the micro-batch's own count as `num_items_in_batch`. Its share of the step is that of its count.
        """
        count = torch.as_tensor(self.count(inputs), dtype=torch.float32, device=self.args.device)
        self._at_hand = inputs
        try:
            given = {"return_outputs": return_outputs, "num_items_in_batch": count}
            result = own(model, self.handed(inputs), **overrides.known_to(own, given))
        finally:
            self._at_hand = None
        loss = result[0] if isinstance(result, tuple) else result
        if model.training:
            self._watch.losses.append((loss * count).detach())
        else:
            self.record("loss", (loss * count).detach(), count, mode="eval")
        if num_items_in_batch is not None:
            loss = loss * count * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)
        return (loss, result[1] if isinstance(result, tuple) else {}) if return_outputs else loss

    def handed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch as a user's `compute_loss` gets it."""
        return batch

    def taken_back(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The batch that a user's `compute_loss` passes on to ours."""
        return inputs if isinstance(inputs, dict) else {**inputs}

    packed_way_out = "read inputs['input_ids'], inputs['attention_mask'] and inputs['labels'], its rows padded"
    """how a user's `compute_loss` comes to what a model takes"""

    def _explain_packed(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._at_hand is not None and (kwargs.get("packed") is not None or kwargs.get("policy") is not None):
            raise ValueError(
                f"{type(self).__name__}.compute_loss: model(**inputs) got a packed batch, which no model takes; "
                f"{self.packed_way_out}"
            )

    def _prepare_dataset(self, dataset: Any, *args: Any, dataset_name: str = "train", **kwargs: Any) -> Any:
        """The rows that the collator takes; further arguments say what the trainer knows already."""
        return self._make_rows(dataset, dataset_name)

    def prepared_columns(self) -> frozenset[str]:
        """The columns of prepared rows; a user's `_prepare_dataset` may give these, or rows to go on with."""
        return frozenset()

    def _prepared(self, dataset: Any, name: str) -> Any:
        if not self.owns("_prepare_dataset"):
            return self._make_rows(dataset, name)
        given = {"args": self.args, "dataset_name": name, **self.preparing()}
        rows = self._prepare_dataset(dataset, **overrides.known_to(self._prepare_dataset, given))
        wanted = self.prepared_columns()
        return rows if wanted and wanted <= set(column_names(rows, name)) else self._make_rows(rows, name)

    def preparing(self) -> dict[str, Any]:
        """Further arguments of a user's `_prepare_dataset`."""
        return {"processing_class": self.processing_class, "tokenizer": self.tokenizer}

    def prepare_data(self) -> None:
        """Called before training data are read and before a checkpoint is loaded into the model."""
        self.train_dataset = self.given.renewed(self.train_dataset, "train")

    def frozen_models(self) -> list[nn.Module]:
        """Models beside the trained one that stay in memory: a reference, a teacher."""
        return []

    def say_memory(self) -> None:
        """Say once, before training, what weights, gradients and optimizer take."""
        frozen = [] if self._memory_said else self.frozen_models()  # which all ranks load and share out together
        if not self._memory_said and self.is_world_process_zero():
            chosen = self.optimizer_cls_and_kwargs[0].__name__ if self.optimizer_cls_and_kwargs else self.args.optim
            say_memory(self.model, frozen, self.optimizer or chosen)
        self._memory_said = True

    without_gradient: frozenset[str] = frozenset()
    """columns of token ids that are computed without gradient"""

    def largest_load(self) -> Load | None:
        """The most that is computed at a time, by the lengths of the rows; None where they are not known."""
        lengths = lengths_of(self.train_dataset, self.without_gradient)
        if lengths is None:
            return None
        rows = min(self.args.per_device_train_batch_size, len(lengths))
        longest = np.sort(np.partition(lengths, -rows)[-rows:])
        own, ranks = int(longest[-1]), self.shared.size
        tokens = own * rows if self.pads_rows else int(longest.sum())
        budget = self.args.token_budget or self._unasked_budget()
        tokens = tokens if budget is None else min(tokens, max(budget, own))
        return Load(-(-tokens // ranks), -(-own // ranks))

    def may_cut(self) -> bool:
        """Whether a micro-batch may be cut into passes where the settings say nothing of it."""
        alone = self.args.world_size == 1 and not self.is_deepspeed_enabled
        return alone and self.args.token_budget is None and self.args.cuts_unasked() and not self.balance_weight

    def plan_memory(self) -> Plan | None:
        """Collective: what this run needs, and what has to be chosen so that it fits; None where that is not known."""
        load = self.largest_load()
        if load is None:
            return None
        own, ranks = self.args, self.args.world_size
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        engine = "fsdp2" if self.is_fsdp_enabled else "ddp" if plugin is None else ZERO.get(plugin.zero_stage, "ddp")
        chosen = self.optimizer_cls_and_kwargs[0].__name__ if self.optimizer_cls_and_kwargs else own.optim
        able = bool(getattr(below_accelerate(self.model), "supports_gradient_checkpointing", False))
        open_ = own.leaves_checkpointing and able and self.shared.size == 1
        left = Open(open_, own.memory_plan and self.may_cut(), load.rows > 0, open_ and own.device.type == "cuda")
        return plan_of(
            self.model, self.frozen_models(), load, optimizer=self.optimizer or chosen, left=left,
            checkpointing=bool(own.gradient_checkpointing), mixed=self.accelerator.mixed_precision, device=own.device,
            engine=engine, ranks=ranks,
        )  # fmt: skip

    _planned_tokens: int | None = None
    """tokens of a pass that the memory plan has chosen"""

    def _fit(self) -> None:
        """Collective: predict the memory of this run, and choose what its settings left open so that it fits."""
        self._planned_tokens, load = None, self.largest_load()
        plan = self.plan_memory() if self.args.memory_plan else None
        if plan is None or load is None:
            return
        if plan.load.tokens < load.tokens:
            self._planned_tokens = plan.load.tokens
        if plan.checkpointing:
            kwargs = {"use_reentrant": False, **(self.args.gradient_checkpointing_kwargs or {})}
            kwargs |= {"offload": True} if plan.offload else {}
            self.args.gradient_checkpointing = self.args.activation_checkpointing = True
            self.args.gradient_checkpointing_kwargs = self.args.activation_checkpointing_kwargs = kwargs
        self.take_rows(plan.load.rows if plan.load.rows < load.rows else None)
        if self.is_world_process_zero():
            for line in said_of(plan, load):
                logger.warning(line)
            for each in self.callback_handler.callbacks:
                if isinstance(each, RunListener):
                    each.planned(facts_of(plan, load))

    def take_rows(self, most: int | None) -> None:
        """Sample at most so many completions at a time, where the settings say nothing of it; None: as usual."""

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
        budget = asked or self._planned_tokens or self._unasked_budget()
        if budget is not None:
            self.data_collator = BudgetCollator(whole, budget, asked=asked is not None)
        try:
            with self.shared.held():
                loader = super().get_train_dataloader()
        finally:
            self.data_collator = whole
        workers = self.args.dataloader_num_workers
        if may_be_ahead(self.train_dataset, whole, self.args.device.type, workers):
            loaded_ahead(loader)
        return loader

    def _unasked_budget(self) -> int | None:
        if self.balance_weight or not self.args.cuts_unasked():  # the balance is that of a whole batch
            return None
        if self.is_deepspeed_enabled:  # each backward pass would be a step
            return None
        return unasked_budget(self.args.device, self.args.world_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return self._with_shares(super().get_eval_dataloader, self.prepare_evaluation(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return self._with_shares(super().get_test_dataloader, self.prepare_evaluation(test_dataset, "test"))

    def _with_shares(self, load: Callable[[Any], DataLoader], rows: Any) -> DataLoader:
        """A loader for evaluation; that of several processes says which rows of its batches are the process's own."""
        rank, world = self.shared.data_rank, self.shared.data_world
        if self.args.world_size == 1:
            return load(rows)
        found = self.eval_dataset if rows is None else self.eval_dataset[rows] if isinstance(rows, str) else rows
        if isinstance(found, torch.utils.data.IterableDataset) and not isinstance(found, Numbered):
            rows = Numbered(found)
        whole: Any = self.data_collator
        self.data_collator = WithShare(whole, rank, world, self.eval_rows)
        try:
            with self.shared.held():
                return load(rows)
        finally:
            self.data_collator = whole

    @property
    def eval_rows(self) -> int:
        """Rows of an evaluation batch on each process."""
        size: int = self.args.eval_batch_size
        return size // self.shared.data_world if self.args.accelerator_config.split_batches else size

    @property
    def tokenizer(self) -> Any:
        """The tokenizer: `processing_class` by its older name, or that of the processor which it is."""
        return read_by(self.processing_class)

    def record(self, name: str, total: Tensor | float, count: Tensor | float = 1.0, mode: str = "train") -> None:
        """Add to a metric that the next log shows as its mean."""
        self._tallies[mode].add(name, total, count)

    def record_extreme(self, name: str, found: Extreme, mode: str = "train") -> None:
        """Add to a metric of which the next log shows the least or the most."""
        self._tallies[mode].add_extreme(name, found)

    def tokens(self, batch: dict[str, Any]) -> Tensor | int:
        """The tokens of a batch's rows, each with its prompt."""
        packed = batch["packed"]
        return (packed.position_N[packed.last_B] + 1).sum()

    def record_tokens(self, count: Tensor | int) -> None:
        """Add to the tokens that this run has learned from; nothing waits for the device."""
        self._new_tokens = self._new_tokens + count

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """Metrics that follow from the means of others."""
        return {}

    def _read(self, mode: str) -> dict[str, float]:
        """The metrics of a mode since they were last read."""
        means = self._tallies[mode].means(self.accelerator)
        return {**means, **self.derived(means)}

    def _tokens_so_far(self) -> int:
        """Collective: the tokens that all ranks have learned from since the run began, before it was resumed too."""
        mine = torch.as_tensor(self._new_tokens, dtype=torch.int64).to(self.args.device)
        self._new_tokens = 0
        count = int(self.accelerator.reduce(mine, "sum")) // self.shared.size
        if self.args.include_num_input_tokens_seen == "no":
            self.state.num_input_tokens_seen += count  # which checkpoints keep
            return self.state.num_input_tokens_seen
        self._tokens += count  # `Trainer` fills its own number
        return self._tokens

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint needs besides the model, optimizer, scheduler and RNGs; tensors and plain values."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `extra_state` gave."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what `from_pretrained` reads, whole or not at all."""
        if self._is_staged:  # `Trainer.push_to_hub` saves before it uploads
            return
        target = str(output_dir or self.args.output_dir)
        check_weights(self.accelerator, f"step {self.state.global_step}", self.model)
        named = output_dir is not None and Path(target).name == f"{PREFIX}{self.state.global_step}"
        if _internal_call and named:
            self._begin_checkpoint(Path(target))
        elif self.is_deepspeed_enabled:  # all ranks write together
            super().save_model(target, _internal_call=True)
            self.accelerator.wait_for_everyone()  # one process may write what another would look for
            self._model_files = files_in(Path(target), top=True) if self.args.should_save else []
        else:
            gathered = self._gathered_weights() if self.is_fsdp_enabled else None
            if self.args.should_save:
                with writing(target, replaces=WEIGHT_FILES) as beside:
                    self._write_model(beside, gathered)
                    self._model_files = files_in(beside)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _gathered_weights(self) -> dict[str, Tensor]:
        """Collective: all weights in the memory of the first process's host, those that are tied as one tensor.

        The other processes gather one weight after the other and keep none.
        """
        state: dict[str, Tensor] = self.accelerator.get_state_dict(self.model)
        return {
            **state,
            **{
                name: state[first] for name, first in tied_names(below_accelerate(self.model)).items() if first in state
            },
        }

    def _write_model(self, folder: Path, gathered: dict[str, Tensor] | None) -> None:
        """What `from_pretrained` reads; gathered: all weights, where this process holds a part of them."""
        if gathered is None:
            super().save_model(str(folder), _internal_call=True)
            return
        below_accelerate(self.model).save_pretrained(folder, state_dict=gathered)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _begin_checkpoint(self, folder: Path) -> None:
        """Write the first files of a checkpoint; `Trainer` writes the others, and calls `on_save` after the last."""
        state = on_host(self.extra_state(), self.args.should_save)
        self._tokens_so_far()
        self._seal.run = self._seal.run or self.describe_run()
        self._seal.begin(folder, self.args, self.state)
        pushed = self.args.push_to_hub and self._hub_strategy != HubStrategy.END
        if not self.is_fsdp_enabled:
            super().save_model(str(folder), _internal_call=True)
        elif form_held(self.accelerator) == FULL or pushed:  # else a checkpoint holds shards, and no model
            gathered = self._gathered_weights()
            if self.args.should_save:
                self._write_model(folder, gathered)
        elif self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            for part in (below_peft(self.model).config, self.processing_class):
                if part is not None:
                    part.save_pretrained(folder)
        self._model_files = files_in(folder) if self.args.should_save else []
        if state and self.args.should_save:
            write_state(folder / EXTRA_STATE, state)
        if self.is_in_train and self.control.should_save:
            self._seal.limit.hold(self.args)

    def describe_run(self) -> Run:
        """What a checkpoint of this run is compared with when a later run resumes from it."""
        args, name, place = self.args, type(self).__name__, self.args.place_in_data()
        if self.shared.size > 1 and ROWS in place:
            place = {**place, ROWS: place[ROWS] // self.shared.size}
        return describe_run(name, self.model, args.to_dict(), fixed=place, dataset=self.train_dataset)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; SystemExit(143) where SIGTERM asked for the end and the step is saved."""
        folder = str(self.args.output_dir)
        resume_from_checkpoint = after_restart(resume_from_checkpoint, folder)
        resumes, asked = self._folder.goes_on(resume_from_checkpoint, folder), bool(resume_from_checkpoint)
        with (
            watched(lambda: self.state.global_step, self.args.ddp_timeout),
            self._folder.held(folder, resumes=resumes, overwrite=self.args.overwrite_output_dir, asked=asked),
            self._signal.listening(self.args.enable_jit_checkpoint),
            told(self.callback_handler.callbacks, lambda: self._facts(resumes)),
        ):
            self._take_own_methods()
            self.prepare_data()
            self._check_agreement()
            self.say_memory()
            clean_up(folder)
            found = find(resume_from_checkpoint, folder, is_old=is_old_trainer_checkpoint)
            self._seal.run = None
            if found is not None or self.args.save_strategy != "no" or self.args.enable_jit_checkpoint:
                self._seal.run = self.describe_run()  # now, as wrappers that shard weights change their shapes
            if found is not None:
                self._resume(found, self._seal.run or self.describe_run())
            if self.is_world_process_zero():
                self._folder.begin_metrics(folder, number_of(found.folder) if found and resumes else None)
            self.remove_callback(self._seal)
            self.add_callback(self._seal)  # as the last one: what other callbacks add to a checkpoint is listed
            with self._reading(found) as checkpoint:
                self._fit()
                result = self._train(checkpoint, *args, **kwargs)
            check_weights(self.accelerator, f"after step {self.state.global_step}", self.model)
            self.check_end()
            if self.args.enable_jit_checkpoint and self._signal.on_any(self.accelerator):
                if not self._step_end.stops:  # it came after the last step: the run is over
                    self.save_model()
                raise SystemExit(TERMINATED)
        for job in self._uploads:
            job.result()
        return result

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether this run writes any."""
        return self._seal.run is not None

    def end_now(self, *, saves: bool) -> None:
        """End the run before its next step; saves: with a checkpoint, where it writes any."""
        self._step_end.stops, self._step_end.saves = True, saves and self.keeps_checkpoints
        self.control.should_training_stop = True
        self.control.should_save = self._step_end.saves

    def check_end(self) -> None:
        """Raise where a run has come to its end for a reason that its user must know."""

    @contextmanager
    def _reading(self, found: Checkpoint | None) -> Iterator[str | None]:
        """The folder that `Trainer` reads a checkpoint from, whatever processes wrote it."""
        if found is None:
            yield None
            return
        form, mine = form_of(found), form_held(self.accelerator)
        if form != mine and PLAIN in (form, mine):
            self.create_optimizer()  # its names are asked for
        run = Reader(mine, self.args.world_size, self.args.seed, self.model, self.optimizer)
        folder = readable(found, str(self.args.output_dir), run)
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        reading = Reading(folder if folder != found.folder else None, plugin, form if form in OF_FSDP else FULL)
        self.add_callback(reading)
        try:
            yield str(folder)
        finally:
            reading.end()
            self.remove_callback(reading)

    def _check_agreement(self) -> None:
        """Collective: see `ranks.check_agreement`."""
        if several():
            check_agreement(self.describe_run(), self.args, self.model, self.frozen_models(), self.eval_dataset)

    def _facts(self, resumes: bool) -> RunFacts:
        return RunFacts(type(self).__name__, self.args, resumes, self.given.facts())

    def _train(self, checkpoint: str | None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, with errors that say what was going on."""
        try:
            memory = kept_memory(self.args.device)
            gradients = in_place(self.args.device, self.args.world_size, hooked=self.is_deepspeed_enabled)
            sampling = sampler_errors(lambda: self.state.global_step + 1, self.model)
            loading = optimizers_without_state() if self.is_fsdp_enabled else nullcontext()
            moved = Offload(self.model.parameters()).on() if self.args.activation_offloading else nullcontext()
            with memory, gradients, rows_padded(self.pads_rows), sampling, self.shared.held(), loading, moved:
                return super().train(checkpoint, *args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not self._seal.is_open or (isinstance(error, RuntimeError) and not is_disk_error(error)):
                raise  # nothing was being saved: it is a reward function's own, say
            self._seal.undo(self.args)
            reason = str(error).splitlines()[0].removeprefix("could not save to ")
            raise OSError(
                f"could not save checkpoint-{self.state.global_step} to {str(self.args.output_dir)!r}: {reason}; "
                "earlier checkpoints are whole: free some space and go on with train(resume_from_checkpoint=True)"
            ) from error
        finally:
            self._seal.limit.give_back(self.args)
            self._watch.clear()
            self._batches = ()

    _trace: StepTrace | None = None
    """what writes a file for each step; None: nobody asked for it"""

    def _begin_steps(self, step: int) -> None:
        if self.args.trace_steps:
            trace = self._trace = StepTrace(Path(str(self.args.output_dir)), self.args.process_index)
            self._step_end.ended = lambda: trace.after(self.model)
        if self.args.gradient_checkpointing:
            keep_some(below_accelerate(self.model), self.args.gradient_checkpointing_kwargs)
        self._left_out, self._logged, self._began = [], (step, 0), (step, 0)
        self._step_loss = torch.zeros((), device=self.args.device)
        if self.args.compile_layers is not None:
            backend, _, mode = self.args.compile_layers.partition(":")
            try:
                self._compile_layers(backend, mode or None)
            except RuntimeError as error:  # torch knows no such backend, or mode
                raise ValueError(f"compile_layers={self.args.compile_layers!r}: {error}") from error

    def _compile_layers(self, backend: str, mode: str | None = None) -> None:
        """The layers of the policy, and of frozen models of its kind, are compiled from here on."""
        policy, *others = map(below_value_head, (self.model, *self.frozen_models()))
        if not compile_layers(policy, backend, mode):
            logger.warning(
                "compile_layers=%r: no layers were found in %s", self.args.compile_layers, type(policy).__name__
            )
        for other in others:
            if type(below_peft(other)) is type(below_peft(policy)):
                compile_layers(other, backend, mode)

    def _before_optimizer_step(self) -> None:
        """Stop, or leave the step out, unless all losses and the gradient are finite; one read of the device.

        With several ranks all come to the same answer, and learn whether one of them was asked to end.
        """
        if self.is_deepspeed_enabled:
            self._watch.norm = zero.step_norm(self.accelerator)
        finite, asked, _ = self._watch.read(self.accelerator, self._signal.asked)
        self._step_end.stops = asked
        if not finite:
            pieces = [
                Piece(piece, number, places, self.branches_per_row)
                for number, batch in enumerate(self._batches)
                for piece, places in zip(pieces_of([batch]), _places(batch), strict=False)
            ]
            self._non_finite.met(self.state.global_step + 1, self.accelerator, self._watch, [self.model], pieces)
            if self.accelerator.scaler is not None and self._watch.norm is None:  # it wants to have seen the gradient
                self.accelerator.unscale_gradients()
            for parameter in self.model.parameters():
                parameter.grad = None  # optimizers pass over those without a gradient
            self._left_out.append(self._step_loss)
        self._step_loss = torch.zeros((), device=self.args.device)
        if self._trace is not None:
            self._trace.before(self.state.global_step + 1, self.step_packs(), self.model, self._watch.norm)
        self._watch.clear()

    def step_packs(self) -> list[Any]:
        """The packed rows of the optimizer step at hand, a micro-batch each."""
        return _packs(self._batches)

    def _asked_to_end(self) -> bool:
        """Collective: whether a signal came while this run trains; False without listening to it."""
        return self.is_in_train and self.args.enable_jit_checkpoint and self._signal.on_any(self.accelerator)

    def _without_left_out(self, name: str, logs: dict[str, float]) -> None:
        """Make a logged mean over optimizer steps one over those that were made; nan if there were none."""
        since, before = self._logged if name == "loss" else self._began
        left_out, steps = self._left_out[before:], self.state.global_step - since
        if name not in logs:
            return
        if left_out:
            total = logs[name] * steps - self.accelerator.reduce(torch.stack(left_out).sum(), "mean").item()
            logs[name] = total / (steps - len(left_out)) if steps > len(left_out) else math.nan
        if name == "loss":
            self._logged = (self.state.global_step, len(self._left_out))

    def _resume(self, found: Checkpoint, run: Run) -> None:
        """Compare a checkpoint with this run, and take back what `extra_state` gave."""
        check_identity(found, run)
        check_readable(found, form_held(self.accelerator), self.args.world_size)
        file = found.folder / EXTRA_STATE
        state = read_state(file) if file.exists() else None
        way_out = "set ignore_data_skip=True to begin anew in the data, "
        rows, world = ((found.manifest or {}).get("run", {}).get("fixed", {})).get(ROWS), self.args.world_size
        if rows is not None and processes_of(found) != world:
            each = f"per_device_train_batch_size x gradient_accumulation_steps = {rows / world:g}"
            way_out = f"with {processes_text(world)} {each}, {way_out}"
        check_settings(found, run, has_place=not self.args.ignore_data_skip, way_out=way_out)
        if state is not None:  # may refuse it too, before anything changes
            self.load_extra_state(state)
        if found.is_model_only:
            logger.warning("%s was written with save_only_model=True: the optimizer starts anew", found.folder)

    def push_to_hub(self, commit_message: str | None = "End of training", blocking: bool = True, **kwargs: Any) -> Any:
        """Save the model, and upload it with its card; rollouts, metrics and states of the run stay here."""
        tagged = trl_sanitze_kwargs_for_tagging(self._tag_names, kwargs) or {}
        if self.hub_model_id is None:
            self.init_hf_repo(token=kwargs.get("token"), private=kwargs.get("private"))
        folder, name = str(self.args.output_dir), str(self.args.hub_model_id or Path(str(self.args.output_dir)).name)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tagged.setdefault("model_name", name.split("/")[-1])
        with staged(Path(folder), self._model_files) as beside:
            self.args.output_dir, self._is_staged = str(beside), True
            try:
                pushed = super().push_to_hub(commit_message=commit_message, blocking=blocking, **tagged)
            finally:
                self.args.output_dir, self._is_staged = folder, False
        remove_when_done(beside, pushed)
        return pushed

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        dataset_name: str | list[str] | None = None,
    ) -> None:
        """Write a README with data, settings, results and versions into `output_dir`, unless somebody's own is there.

        license: None: what the README of the base model says. dataset_name: as `dataset`, by the name of scripts.
        """
        if not self.is_world_process_zero():
            return
        folder, model = Path(str(self.args.output_dir)), below_accelerate(self.model)
        base = finetuned_from or str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
        history, named = self.state.log_history, listed(dataset_tags) or listed(dataset) or listed(dataset_name)
        last: list[dict[str, Any]] = [
            next((one for one in reversed(history) if name in one), {}) for name in ("loss", "eval_loss")
        ]
        trainer = next((each.__name__ for each in type(self).__mro__ if each.__name__ in WAYS), type(self).__name__)
        more = {"language": language, "dataset_args": dataset_args, **({"pipeline_tag": tasks} if tasks else {})}
        facts = CardFacts(
            trainer, model_name or folder.name, base, resolved([self.args]), license,
            [*dict.fromkeys([*self._tag_names, *listed(tags)])], hasattr(model, "peft_config"), self.state.global_step,
            self.given.facts(), named, last, {name: value for name, value in more.items() if value},
        )  # fmt: skip
        if not write_card(folder, card_text(facts)):
            logger.warning("%s: it is not of trl, and stays as it is", folder / "README.md")

    def _push_checkpoint(self, folder: Path) -> None:
        """Called with a whole checkpoint; as `Trainer` does while it trains, without what else lies in `output_dir`."""
        args, strategy = self.args, self._hub_strategy
        if not args.push_to_hub or strategy == HubStrategy.END or self.hub_model_id is None:
            return
        if args.hub_always_push or all(job.done() for job in self._uploads):
            message = f"Training in progress, step {self.state.global_step}"
            where = {"repo_id": self.hub_model_id, "token": args.hub_token, "revision": args.hub_revision}
            self._uploads += upload_checkpoint(folder, self._model_files, strategy, message, **where)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        if 0 < self.state.max_steps <= self.state.global_step:  # resumed at its end, where `Trainer` would make a step
            self.control.should_training_stop = True
            num_batches = 0
        batches = self._batches = list(islice(epoch_iterator, num_batches))
        if self.shared.size > 1:
            self.shared.check_same(_packs(batches), self.state.global_step + 1)
        counts = [self.count(piece) for piece in pieces_of(batches)]
        for piece in pieces_of(batches):
            self.record_tokens(self.tokens(piece))
        total = sum(counts)
        if isinstance(total, Tensor):
            local = total.to(device, torch.float32)
        else:  # made there, so that nothing waits for it
            local = torch.full((), float(total), device=device)
        return batches, self.accelerator.reduce(local, "sum") / self.shared.size

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """As `Trainer` estimates them, for the tokens that are really computed."""
        packs = _packs([inputs])
        if not packs or not hasattr(self.model, "num_parameters"):
            return 0
        tokens = sum(len(packed.ids_N) for packed in packs) // self.shared.size
        return 6 * tokens * int(self.model.num_parameters(exclude_embeddings=True))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        *first, last = _pieces(inputs) or [inputs]
        losses = []
        if self.is_fsdp_enabled and self.args.token_budget is not None:
            self._run_along(model, last, 1 + len(first))
        for piece in first:
            with self.accelerator.no_sync(model):
                losses.append(super().training_step(model, piece, num_items_in_batch))
        loss = sum(losses, super().training_step(model, last, num_items_in_batch)) / self.shared.size
        if self._trace is not None:
            self._trace.loss(loss)
        if self.args.on_non_finite == "skip":  # `Trainer` would add a nan to all the losses that it logs from here on
            loss = torch.where(loss.isfinite(), loss, 0.0)
            self._step_loss = self._step_loss + loss
        return loss

    def _run_along(self, model: nn.Module, piece: dict[str, Any], passes: int) -> None:
        """Collective: passes that count nothing, as many as another rank has more, as FSDP needs the same of all."""
        most = torch.tensor(passes, device=self.args.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        counting, self._tallies["train"] = self._tallies["train"], Tally(self.args.device)
        losses, self._watch.losses = self._watch.losses, []
        try:
            for _ in range(int(most) - passes):
                with self.accelerator.no_sync(model):  # divided by infinity, the loss and its gradient are zeros
                    super().training_step(model, piece, torch.tensor(math.inf, device=self.args.device))
        finally:
            self._tallies["train"], self._watch.losses = counting, losses

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        inside = self._at_hand is not None  # a user's `compute_loss` asks, which gives the loss that counts
        batch = self.taken_back(inputs) if inside else inputs
        with rows_padded(self.pads_rows):
            result = within_forward(model, lambda inner: self.learned(inner, batch))
        self.keep(result, "train" if model.training else "eval", loss=not inside)
        if model.training and not inside:
            self._watch.losses.append(result.total.detach())
        if num_items_in_batch is None:
            loss = result.mean
        elif inside:
            loss = result.total / num_items_in_batch.clamp(min=1)
        else:  # DDP averages over ranks, also over those that share rows, whose gradients add up; undo it
            loss = result.total * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)
        return (loss, self.outputs(model, inputs)) if return_outputs else loss

    def outputs(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """What `compute_loss` gives beside the loss where it is asked to."""
        return {}

    def keep(self, result: LossSum, mode: str, loss: bool = True) -> None:
        """Add a micro-batch's metrics, and its loss, to those that the next log shows."""
        self._tallies[mode].add_loss(result, loss=loss)

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
        share = inputs.pop(SHARE, None) if isinstance(inputs, MutableMapping) else None
        if share is None:
            return self._predicted(model, inputs, prediction_loss_only)
        rank, world = self.shared.data_rank, self.shared.data_world
        own = share.own_at(self._eval_batch, rank, world, self.eval_rows, self._eval_total)
        self._eval_batch += 1
        once = own if self.shared.rank == 0 else 0  # ranks that share rows predict the same
        self._eval_own = torch.arange(len(share.rows), device=self.args.device) < once
        if own == len(share.rows):
            return self._predicted(model, inputs, prediction_loss_only)
        if own:
            inputs = send_to_device(self.data_collator(share.rows[:own]), self.args.device)
            predicted = self._predicted(model, inputs, prediction_loss_only)
            loss, logits, labels = (_filled(part, own, len(share.rows)) for part in predicted)
            return loss, logits, labels
        counting, self._tallies["eval"] = self._tallies["eval"], Tally(self.args.device)
        self.only_repeats = True
        try:
            return self._predicted(model, inputs, prediction_loss_only)
        finally:
            self._tallies["eval"], self.only_repeats = counting, False

    def _predicted(
        self, model: nn.Module, inputs: Mapping[str, Any], prediction_loss_only: bool
    ) -> tuple[Tensor, Any, Any]:
        own = "compute_loss" in self._own
        with torch.no_grad(), self.compute_loss_context_manager(), rows_padded(self.pads_rows):
            loss: Any = self.compute_loss(model, Batch(inputs)) if own else None
            if own and prediction_loss_only:
                return loss.detach(), None, None
            result, logits, labels = self.predictions(model, {**inputs})
        if loss is None:
            self.keep(result, "eval")
            loss = result.mean
        return loss.detach(), *((None, None) if prediction_loss_only else (logits, labels))

    def _gather_own(self, values: Any) -> Any:
        """Collective: what belongs to rows of an evaluation batch, of all processes, without rows that come again."""
        own = self.accelerator.gather(self._eval_own)
        whole = self.accelerator.gather(values)
        return recursively_apply(lambda part: part[own] if len(part) == len(own) else part, whole)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        given = inspect.signature(super().evaluation_loop).bind(*args, **kwargs)
        given.apply_defaults()
        self._tallies["eval"] = Tally(self.args.device)
        rows = getattr(given.arguments["dataloader"], "dataset", None)
        stream = isinstance(rows, IterableDatasetShard)  # of which accelerate does not know what it has filled up
        self._eval_batch, self._eval_total = 0, len(rows) if isinstance(rows, Sized) and not stream else 0
        if stream or self.shared.size > 1:
            self.gather_function = self._gather_own
        flags = eval_no_grad(self.model) if self.is_in_train else nullcontext()  # the training flags come back
        with flags, rows_padded(self.pads_rows), self.shared.held():
            output = super().evaluation_loop(*args, **kwargs)
        found = {**self._read("eval"), "num_tokens": float(self._tokens_so_far())}
        for name, value in found.items():
            # what `compute_metrics` gave stays, but a mean of batch means is no loss
            key = f"{given.arguments['metric_key_prefix']}_{name}"
            output.metrics[key] = value if name == "loss" else output.metrics.get(key, value)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of what was recorded since the last log.

        While it trains, `Trainer` says by `control.should_log` which log is that of its training steps. Evaluation adds
        its own means. What is recorded outside of both comes with the next log of its kind.
        """
        ended = "train_loss" in logs  # with what came behind the last log
        training = ended or (self.control.should_log if self.is_in_train else "loss" in logs)
        means = self._read("train" if training else "eval")
        means.pop("loss", None)  # Trainer's own: the mean over optimizer steps
        if training and (means or not ended):
            means["num_tokens"] = float(self._tokens_so_far())
        logs.update({name if training else f"eval_{name}": value for name, value in means.items()})
        self._without_left_out("loss", logs)
        self._without_left_out("train_loss", logs)
        super().log(logs, start_time)
        if self.is_world_process_zero():
            folder = str(self.args.output_dir)
            if self._folder.own_metrics is None:
                self._folder.mark_metrics(folder)
            write_metrics(folder, {"step": self.state.global_step, "epoch": self.state.epoch, **logs})


overrides.remember(ObjectiveTrainer)


def _filled(part: Any, own: int, rows: int) -> Any:
    """Predictions of `own` rows for as many as other processes have; the loop leaves out what fills them up."""
    if isinstance(part, tuple | list):
        return type(part)(_filled(each, own, rows) for each in part)
    if not isinstance(part, Tensor) or not part.dim() or len(part) != own:
        return part
    return torch.cat([part, part[-1:].expand(rows - own, *part.shape[1:])])


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
    own.output_dir = os.path.abspath(str(own.output_dir))  # a reward function or a callback may change the directory
    own.accelerator_config = copy.deepcopy(own.accelerator_config)  # `Trainer` writes into it
    own.max_grad_norm = own.max_grad_norm or 0.0  # None says the same in other configs
    own.logging_nan_inf_filter = False  # it logs 0 for nan, and reads the device at every micro-batch
    own.dataloader_pin_memory &= torch.accelerator.is_available()  # else torch warns at every epoch
    own.accelerator_config.non_blocking |= own.dataloader_pin_memory
    if own.accelerator_config.dispatch_batches:
        logger.warning("dispatch_batches=True: has no effect: a packed batch cannot be cut, so each process reads rows")
    own.accelerator_config.dispatch_batches = False
    if os.environ.get(DYNAMO, "no").lower() != "no":  # of the launcher, or of TrainingArguments with torch_compile
        own.compile_layers = own.compile_layers or os.environ[DYNAMO].lower()
        own.torch_compile_backend = "no"
    return own
