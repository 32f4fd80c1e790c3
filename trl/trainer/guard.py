"""What happens where a loss, a gradient or a weight is not finite: what is named, what goes on, what is never saved."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from trl.models.unwrap import below_accelerate, is_encoder_decoder, is_sharded
from trl.trainer.tally import StepWatch

logger = logging.getLogger(__name__)

MOST_NAMES = 3
"""parameters that a message names"""
GO_BACK = (
    "nothing is saved, and earlier checkpoints are as they were: go on from one of them (resume_from_checkpoint=True, "
    "for DDPO resume_from) with a lower learning_rate"
)
WAY_OUT = "look at the rows and at learning_rate, or set on_non_finite='skip' to leave such steps out"


@dataclass(frozen=True)
class Piece:
    """What one forward pass of a step was given."""

    batch: Any
    number: int
    """which micro-batch of the step it is, or is cut from"""
    places: Sequence[int] | None = None
    """where its rows stand in the micro-batch; None: in this order, from 0"""
    branches: int = 1
    """sequences of a row: two of a pair"""


class NonFiniteError(RuntimeError):
    """A loss, a gradient or a weight is nan or infinite."""


class NonFiniteSteps:
    """What is done about optimizer steps whose loss or gradient is not finite: stop, or leave out at most `most`."""

    def __init__(self, action: str, most: int):
        self.action, self.most = action, most
        self.skipped = 0
        """steps that were left out, over the whole run"""

    def met(
        self,
        step: int,
        accelerator: Accelerator,
        watch: StepWatch,
        models: Sequence[nn.Module],
        pieces: Sequence[Piece],
    ) -> None:
        """NonFiniteError on all ranks, or a warning if this step may be left out. Every rank calls it.

        models: those that are trained, the one that is given the rows first. pieces: the micro-batches of the step on
        this rank, in the order of `watch.losses`.
        """
        text, wrong = self._found(accelerator, watch, models, pieces)
        if wrong:
            raise NonFiniteError(f"step {step}: {text}; weights that are not finite: {', '.join(wrong)}; {GO_BACK}")
        if self.action == "stop":
            raise NonFiniteError(f"step {step}: {text}; the weights are as before this step: {WAY_OUT}")
        if self.skipped >= self.most:
            raise NonFiniteError(
                f"step {step}: {text}; max_non_finite_skips={self.most} steps were left out already: {WAY_OUT}"
            )
        self.skipped += 1
        if accelerator.is_main_process:
            logger.warning("step %d is left out (%d of at most %d): %s", step, self.skipped, self.most, text)

    def _found(
        self, accelerator: Accelerator, watch: StepWatch, models: Sequence[nn.Module], pieces: Sequence[Piece]
    ) -> tuple[str, list[str]]:
        """What is not finite, on any rank; and names of weights that are not."""
        mine = [(", ".join(_places(watch, models[0], pieces)), non_finite_weights(*models))]
        ranks = gather_object(mine) if accelerator.num_processes > 1 else mine
        named = [f"rank {rank}: {text}" if len(ranks) > 1 else text for rank, (text, _) in enumerate(ranks) if text]
        weights = list(dict.fromkeys(name for _, wrong in ranks for name in wrong))
        norm = None if watch.norm is None else float(_whole(watch.norm))
        place = f"the loss is not finite in {'; '.join(named)}" if named else f"the norm of the gradient is {norm}"
        return place, weights[: MOST_NAMES + 1]


def _whole(norm: Any) -> Any:
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


@contextmanager
def sampler_errors(step: Callable[[], int], *models: nn.Module) -> Iterator[None]:
    """NonFiniteError, with the step and the weights, where a sampler meets logits that are not finite."""
    try:
        yield
    except FloatingPointError as error:
        wrong = ", ".join(non_finite_weights(*models))
        weights = f"; weights that are not finite: {wrong}; {GO_BACK}" if wrong else ""
        raise NonFiniteError(f"step {step()}: {error}{weights}") from error


# -- where it is ---------------------------------------------------------------------------------


def _places(watch: StepWatch, model: nn.Module, pieces: Sequence[Piece]) -> Iterator[str]:
    """The micro-batches whose loss is not finite, with their rows."""
    for number, loss in enumerate(watch.losses):
        if bool(torch.isfinite(loss.detach().float()).all()):
            continue
        piece = pieces[number] if number < len(pieces) else Piece(None, number)
        yield f"micro-batch {piece.number} (loss {loss.float().item()}){_rows_of(model, piece)}"


def _rows_of(model: nn.Module, piece: Piece) -> str:
    """The rows of a micro-batch that are not finite, with what tells: a column of the batch, or the model's output."""
    if columns := list(_columns(piece)):
        return f", {', '.join(columns)}"
    packed = _packed(piece.batch)
    if packed is None or (wrong := _wrong_outputs(model, packed)) is None:
        return ""
    rows = [_named(piece, row) for row in sorted({branch // piece.branches for branch in wrong})]
    return f", output of the model in row {', '.join(rows)}" if rows else ""


def _named(piece: Piece, row: int) -> str:
    places = piece.places
    return str(row if places is None or row >= len(places) else places[row])


def _items(record: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(record, Mapping):
        yield from record.items()
    elif is_dataclass(record):
        yield from ((entry.name, getattr(record, entry.name)) for entry in fields(record))


def _packed(record: Any) -> Any:
    """The packed rows of a micro-batch, wherever they lie in it."""
    if hasattr(record, "row_segment"):
        return record
    found = (_packed(value) for _, value in _items(record))
    return next((each for each in found if each is not None), None)


def _columns(piece: Piece, record: Any = None) -> Iterator[str]:
    """The columns of numbers that are not finite, with their rows."""
    for name, value in _items(piece.batch if record is None else record):
        if not isinstance(value, Tensor):
            yield from _columns(piece, value) if value is not None else ()
        elif value.is_floating_point() and value.ndim:
            bad_B = ~torch.isfinite(value.detach().reshape(len(value), -1)).all(1)
            if bool(bad_B.any()):
                rows = ", ".join(_named(piece, row) for row in bad_B.nonzero().flatten().tolist())
                yield f"{name} of row {rows}"


@torch.no_grad()
def _wrong_outputs(model: nn.Module, packed: Any) -> list[int] | None:
    """The rows for which the model, given each alone, has an output that is not finite; None where that is not known.

    Alone, since in one pass a number that is not finite may reach the rows beside it.
    """
    if is_sharded(model) or is_encoder_decoder(below_accelerate(model)):
        return None
    inner, wrong = below_accelerate(model), []
    try:
        for row in range(packed.rows):
            ids = packed.ids_N[torch.tensor(packed.row_indices(row), device=packed.ids_N.device)]
            output = inner(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None])
            logits = output.logits if hasattr(output, "logits") else output[0]
            if not bool(torch.isfinite(logits).all()):
                wrong.append(row)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):  # a model that is called in another way
        return None
    return wrong


# -- weights -------------------------------------------------------------------------------------


@torch.no_grad()
def non_finite_weights(*models: nn.Module) -> list[str]:
    """Names of the first parameters that hold a nan or an infinity, of this rank's part; reads each weight once."""
    named = [
        (name, parameter)
        for model in models
        for name, parameter in below_accelerate(model).named_parameters()
        if parameter.is_floating_point() and parameter.element_size() > 1 and parameter.numel()
    ]
    local = [(name, p.to_local() if hasattr(p, "to_local") else p.detach()) for name, p in named]
    real = [(name, value) for name, value in local if value.device.type != "meta" and value.numel()]
    if not real:
        return []
    largest = torch.stack(
        [torch.linalg.vector_norm(value, torch.inf).float().to(real[0][1].device) for _, value in real]
    )
    wrong = (~torch.isfinite(largest)).nonzero().flatten().tolist()
    names = [real[place][0] for place in wrong[:MOST_NAMES]]
    return names if len(wrong) <= MOST_NAMES else [*names, f"and {len(wrong) - MOST_NAMES} more"]


def check_weights(accelerator: Accelerator, where: str, *models: nn.Module) -> None:
    """NonFiniteError, before anything is written, unless all weights are finite.

    Ranks that hold parts of a model answer together; then every rank must call it.
    """
    wrong = non_finite_weights(*models)
    if any(is_sharded(model) for model in models) and accelerator.num_processes > 1:
        wrong = sorted({name for names in gather_object([wrong]) for name in names})[:MOST_NAMES]
    if wrong:
        raise NonFiniteError(f"{where}: weights that are not finite: {', '.join(wrong)}; {GO_BACK}")
