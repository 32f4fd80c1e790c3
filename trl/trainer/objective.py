"""The one seam to `transformers.Trainer`: objectives are sums, and the loop divides once per optimizer step."""

from __future__ import annotations

import json
import os
import shutil
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from trl.data.microbatches import BudgetCollator, unasked_budget
from trl.kernels.step_memory import in_place, kept_memory
from trl.losses.loss_sum import LossSum
from trl.models.checkpoints import WEIGHT_FILES, is_disk_error, writing
from trl.models.forward import rows_padded, within_forward
from trl.trainer.base import trl_sanitze_kwargs_for_tagging
from trl.trainer.configuration import PostTrainingConfig

EXTRA_STATE = "extra_state.pt"


def last_complete_checkpoint(directory: str) -> str:
    """The newest checkpoint that was written to its end; a run that was killed while it wrote one leaves a torn folder.

    `trainer_state.json` is written last, so a folder whose file of that name parses is whole.
    """
    found = []
    for path in Path(directory).glob("checkpoint-*"):
        try:
            found.append((int(json.loads((path / "trainer_state.json").read_text())["global_step"]), str(path)))
        except (OSError, ValueError, KeyError):
            continue
    if not found:
        raise ValueError(f"resume_from_checkpoint=True: no complete checkpoint in {directory}")
    return max(found)[1]


def remove_torn_checkpoint(directory: str, step: int) -> None:
    """Take away the checkpoint of this step unless it was written to its end."""
    folder = Path(directory) / f"checkpoint-{step}"
    try:
        json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        shutil.rmtree(folder, ignore_errors=True)


def pieces_of(batches: Sequence[Any]) -> list[Any]:
    """The micro-batches of an optimizer step, those of a token budget one by one."""
    return [piece for batch in batches for piece in _pieces(batch) or [batch]]


def _pieces(batch: Any) -> list[Any] | None:
    return batch.get("pieces") if isinstance(batch, Mapping) else None


class Tally:
    """Sums and counts of metrics, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor | float, Tensor | float]] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        old_total, old_count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (old_total + total, old_count + count)

    def add_loss(self, result: LossSum) -> None:
        self.add("loss", result.total.detach(), result.count)
        for name, value in result.metrics.items():
            total, count = value if isinstance(value, tuple) else (value, result.count)
            self.add(name, total, count)

    def means(self, trainer: Trainer) -> dict[str, float]:
        """Every metric's mean over all ranks, with one reduce and one sync; the tally is empty afterwards.

        A rank may lack metrics that others have: those of a reward function that had no opinion of its completions.
        """
        sums, self._sums = self._sums, {}
        everywhere = gather_object(list(sums)) if trainer.args.world_size > 1 else list(sums)
        names = sorted(set(everywhere))
        if not names:
            return {}
        pairs = [torch.as_tensor(x, dtype=torch.float64).cpu() for name in names for x in sums.get(name, (0.0, 0.0))]
        stacked = torch.stack(pairs).to(torch.float32).to(trainer.args.device)
        totals, counts = trainer.accelerator.reduce(stacked, "sum").view(-1, 2).cpu().unbind(1)
        return {
            name: total / count
            for name, total, count in zip(names, totals.tolist(), counts.tolist(), strict=True)
            if count
        }


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

    def __init__(self, *args: Any, processing_class: Any = None, **kwargs: Any):
        settings = kwargs.get("args")
        if settings is not None:
            settings.dataloader_pin_memory &= torch.accelerator.is_available()  # else torch warns at every epoch
            if settings.accelerator_config.dispatch_batches is None:
                settings.accelerator_config.dispatch_batches = False  # a packed batch cannot be cut apart again
        super().__init__(*args, processing_class=processing_class, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process: start with `accelerate launch`, or show it one "
                "with CUDA_VISIBLE_DEVICES=0"
            )
        budget = getattr(self.args, "max_tokens_per_microbatch", None)
        if budget is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"max_tokens_per_microbatch={budget}: ranks would differ in their number of forward passes, which FSDP "
                "and DeepSpeed do not allow; leave it out"
            )
        self._tallies = {"train": Tally(), "eval": Tally()}
        self.pads_rows = isinstance(self.args, PostTrainingConfig) and self.args.pads_rows

    def prepare_data(self) -> None:
        """Called before training data are read, and before a checkpoint replaces the policy."""

    def prepare_evaluation(self, eval_dataset: Any) -> Any:
        """The evaluation rows as the collator wants them; a name or None stands for the trainer's own."""
        return eval_dataset

    def get_train_dataloader(self) -> DataLoader:
        self.prepare_data()
        whole: Any = self.data_collator
        asked = getattr(self.args, "max_tokens_per_microbatch", None)
        budget = asked or self._unasked_budget()
        if budget is None:
            return super().get_train_dataloader()
        self.data_collator = BudgetCollator(whole, budget, asked=asked is not None)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = whole

    def _unasked_budget(self) -> int | None:
        may = getattr(self.args, "cuts_unasked", None)
        return unasked_budget(self.args.device, self.args.world_size) if may is not None and may() else None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return super().get_eval_dataloader(self.prepare_evaluation(eval_dataset))

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
        """Save what `from_pretrained` reads: written beside, then renamed, so nothing is ever half there."""
        target = str(output_dir or self.args.output_dir)
        state = self.extra_state() if _internal_call else {}
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # all ranks write together
            super().save_model(target, _internal_call=True)
            if state and self.args.should_save:
                torch.save(state, os.path.join(target, EXTRA_STATE))
        elif self.args.should_save:
            with writing(target, replaces=WEIGHT_FILES) as beside:
                super().save_model(str(beside), _internal_call=True)
                if state:
                    torch.save(state, beside / EXTRA_STATE)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self.prepare_data()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir))
        if resume_from_checkpoint:
            path = os.path.join(str(resume_from_checkpoint), EXTRA_STATE)
            if os.path.exists(path):
                self.load_extra_state(torch.load(path, map_location="cpu", weights_only=True))
        try:
            memory, gradients = kept_memory(self.args.device), in_place(self.args.device, self.args.world_size)
            with memory, gradients, rows_padded(self.pads_rows):
                return super().train(resume_from_checkpoint, *args, **kwargs)
        except (OSError, RuntimeError) as error:
            if not is_disk_error(error):
                raise
            folder, step = str(self.args.output_dir), self.state.global_step
            if self.args.should_save:
                remove_torn_checkpoint(folder, step)
            reason = str(error).splitlines()[0].removeprefix("could not save to ")
            raise OSError(
                f"could not save checkpoint-{step} to {folder!r}: {reason}; earlier checkpoints are whole: free some "
                "space and go on with train(resume_from_checkpoint=True)"
            ) from error

    def push_to_hub(self, commit_message: str | None = "End of training", blocking: bool = True, **kwargs: Any) -> str:
        tagged = trl_sanitze_kwargs_for_tagging(self._tag_names, kwargs)
        return super().push_to_hub(commit_message=commit_message, blocking=blocking, **(tagged or {}))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [self.count(piece) for piece in pieces_of(batches)]
        local = torch.as_tensor(sum(counts), dtype=torch.float32, device=device)
        return batches, self.accelerator.reduce(local, "sum")

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
            result = within_forward(model, lambda inner: self.objective(inner, inputs))
        self._tallies["train" if model.training else "eval"].add_loss(result)
        if num_items_in_batch is None:
            loss = result.mean
        else:  # DDP averages over ranks; undo it
            loss = result.total * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)
        return (loss, {}) if return_outputs else loss

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
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        self._tallies["eval"] = Tally()
        with rows_padded(self.pads_rows):
            output = super().evaluation_loop(*args, **kwargs)
        means = self._tallies["eval"].means(self)
        for name, value in means.items():  # what `compute_metrics` gave stays, but a mean of batch means is no loss
            key = f"{prefix}_{name}"
            output.metrics[key] = value if name == "loss" else output.metrics.get(key, value)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode, prefix = ("train", "") if "loss" in logs else ("eval", "eval_")
        means = self._tallies[mode].means(self)
        means.pop("loss", None)  # Trainer's own: the mean over optimizer steps
        logs.update({f"{prefix}{name}": value for name, value in means.items()})
        super().log(logs, start_time)
