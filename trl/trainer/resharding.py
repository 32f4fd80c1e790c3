"""Checkpoints of transformers' `Trainer` for another number of processes, or for weights that are held otherwise.

`Trainer` reads what a run like itself has written. `readable` makes a folder of that kind from another checkpoint: its
files are links to the checkpoint's, but for random states, and for weights and optimizer where these are converted.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, TRAINER_STATE_NAME
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from trl.models.unwrap import below_accelerate
from trl.models.weight_files import WEIGHT_FILES, as_in_model, check_shards, tied_names
from trl.trainer.checkpoints import (
    MANIFEST,
    RESUMING,
    Checkpoint,
    derived_random_state,
    numpy_globals,
    processes_text,
    read_state,
)

logger = logging.getLogger(__name__)

PLAIN, FULL, SHARDED, DEEPSPEED = "whole weights", "FULL_STATE_DICT", "SHARDED_STATE_DICT", "DeepSpeed's shards"
"""how a checkpoint holds weights and optimizer: as one process does, FSDP's two ways, and DeepSpeed's"""
OF_FSDP = (FULL, SHARDED)
FULL_MODEL, FULL_OPTIMIZER = f"{FSDP_MODEL_NAME}.bin", OPTIMIZER_NAME_BIN
SHARDED_MODEL, SHARDED_OPTIMIZER = f"{FSDP_MODEL_NAME}_0", "optimizer_0"


@dataclass(frozen=True)
class Reader:
    """The run that reads a checkpoint."""

    form: str
    """how it holds its weights: one of the four above"""
    world_size: int
    seed: int
    model: nn.Module
    optimizer: Any
    """None where the run has none yet; then no optimizer is converted"""


def form_of(checkpoint: Checkpoint) -> str:
    """How a checkpoint holds its weights."""
    names = set(files_of(checkpoint))
    if "latest" in names:
        return DEEPSPEED
    if any(name.startswith(f"{SHARDED_MODEL}/") for name in names):
        return SHARDED
    return FULL if FULL_MODEL in names else PLAIN


def form_held(accelerator: Accelerator) -> str:
    """How a run holds its weights."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return DEEPSPEED
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return PLAIN
    return SHARDED if SHARDED in str(plugin.state_dict_type) else FULL


def files_of(checkpoint: Checkpoint) -> list[str]:
    """The files of a checkpoint but its manifest."""
    if checkpoint.manifest is not None:
        return list(checkpoint.manifest["files"])
    paths = (path.relative_to(checkpoint.folder).as_posix() for path in checkpoint.folder.rglob("*") if path.is_file())
    return [name for name in paths if name != MANIFEST]


def processes_of(checkpoint: Checkpoint) -> int:
    """How many processes wrote a checkpoint."""
    if checkpoint.manifest is not None:
        return int(checkpoint.manifest["world_size"])
    return max(1, sum(name.startswith("rng_state_") for name in files_of(checkpoint)))


def check_readable(checkpoint: Checkpoint, form: str, world_size: int) -> None:
    """ValueError for a checkpoint that only a run like the one that wrote it can read, or that would run code."""
    theirs, written = form_of(checkpoint), processes_of(checkpoint)
    if DEEPSPEED in (theirs, form) and (theirs, written) != (form, world_size):
        raise ValueError(
            f"the checkpoint {checkpoint.folder} holds {theirs} of {processes_text(written)}, this run has "
            f"{world_size} with {form}: resume as it was written, or start a new run from a model that `save_model` "
            "wrote"
        )
    if theirs == SHARDED:
        check_shards(checkpoint.folder / SHARDED_MODEL)
        if (checkpoint.folder / SHARDED_OPTIMIZER).is_dir():
            check_shards(checkpoint.folder / SHARDED_OPTIMIZER)


def readable(checkpoint: Checkpoint, output_dir: str | os.PathLike[str], run: Reader) -> Path:
    """The folder that `Trainer` is to read: the checkpoint's, or one made of it in `output_dir`. Collective."""
    theirs, written = form_of(checkpoint), processes_of(checkpoint)
    if (theirs, written) == (run.form, run.world_size):
        return checkpoint.folder
    folder = Path(output_dir) / f"{RESUMING}{checkpoint.folder.name}"
    answer: list[Any] = [None]
    if PartialState().is_main_process:
        differs = "; what is drawn at random, such as dropout, differs from a run that goes on as it was"
        logger.warning(
            "%s was written by %s with %s, this run has %d with %s and goes on%s", checkpoint.folder,
            processes_text(written), theirs, run.world_size, run.form, "" if written == run.world_size else differs,
        )  # fmt: skip
        try:
            _make(checkpoint, folder, run)
        except Exception as error:  # pickle, zip, safetensors and torch each have their own
            shutil.rmtree(folder, ignore_errors=True)
            answer[0] = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
    broadcast_object_list(answer)
    if answer[0] is not None:
        raise ValueError(answer[0])
    return folder


class Reading(TrainerCallback):
    """Lets FSDP read a checkpoint in the form that it has, and removes a folder that `readable` made.

    It is to be there while `Trainer` loads and makes its first step.
    """

    def __init__(self, folder: Path | None, plugin: Any, form: str) -> None:
        """plugin: FSDP's, if the run has one. form: of the checkpoint, which is one of FSDP's then."""
        self._folder, self._plugin, self._own = folder, plugin, None
        if plugin is not None and form in OF_FSDP and form not in str(plugin.state_dict_type):
            self._own = (plugin.state_dict_type, plugin.state_dict_config, plugin.optim_state_dict_config)
            plugin.state_dict_config = plugin.optim_state_dict_config = None
            plugin.set_state_dict_type(form)

    def end(self) -> None:
        """Everything is read."""
        self._give_back()
        if self._folder is not None and PartialState().is_main_process:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    def _give_back(self) -> None:
        if self._own is not None:
            plugin = self._plugin
            plugin.state_dict_type, plugin.state_dict_config, plugin.optim_state_dict_config = self._own
        self._own = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._give_back()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.end()  # random states are read after the beginning, by every process before its first step


# -- making a folder -----------------------------------------------------------------------------


def _make(checkpoint: Checkpoint, folder: Path, run: Reader) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    theirs, names = form_of(checkpoint), files_of(checkpoint)
    replaced = {"rng_state.pth", *(name for name in names if name.startswith("rng_state_"))}
    if theirs in OF_FSDP and run.form == PLAIN:
        replaced |= {
            n for n in names if n.split("/")[0] in (FULL_MODEL, FULL_OPTIMIZER, SHARDED_MODEL, SHARDED_OPTIMIZER)
        }
        replaced |= {name for name in names if any(fnmatch(name, pattern) for pattern in WEIGHT_FILES)}
    for name in names:
        if name not in replaced:
            _link(checkpoint.folder / name, folder / name)
    if not checkpoint.is_model_only:
        _random_states(checkpoint, folder, run)
    if theirs in OF_FSDP and run.form == PLAIN:
        _from_fsdp(checkpoint.folder, folder, theirs, run)
    elif theirs == PLAIN and run.form in OF_FSDP:
        _to_fsdp(checkpoint.folder, folder, run)
    if theirs != run.form:
        _forget_best(folder / TRAINER_STATE_NAME)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(source, target)


def _random_states(checkpoint: Checkpoint, folder: Path, run: Reader) -> None:
    """A file of random states for each process; of those that were not there, derived from the seed and the step."""
    written, step = processes_of(checkpoint), checkpoint.folder.name
    for rank in range(run.world_size):
        if rank < written:
            name = "rng_state.pth" if written == 1 else f"rng_state_{rank}.pth"
            state = read_state(checkpoint.folder / name, allowed=numpy_globals())
        else:
            fresh = derived_random_state(run.seed, step, rank)
            kind, keys, *rest = fresh.pop("numpy")
            state = {"cpu": fresh.pop("torch"), "numpy": (kind, keys.numpy().astype("uint32"), *rest), **fresh}
        for kind in state.keys() - {"python", "numpy", "cpu"}:  # one process keeps one state, several those of all
            count = max(1, torch.accelerator.device_count())
            every = state[kind] if isinstance(state[kind], list) else [state[kind]] * count
            state[kind] = every if run.world_size > 1 else every[0]
        torch.save(state, folder / ("rng_state.pth" if run.world_size == 1 else f"rng_state_{rank}.pth"))


def _forget_best(file: Path) -> None:
    """A best checkpoint in another form could not be loaded at the end of the run."""
    state = json.loads(file.read_text(encoding="utf-8"))
    if state.get("best_model_checkpoint"):
        logger.warning(
            "%s, the best checkpoint so far, holds weights in another form than this run: load_best_model_at_end takes "
            "the best of those that come now", state["best_model_checkpoint"],
        )  # fmt: skip
        state.update(best_model_checkpoint=None, best_metric=None, best_global_step=None)
        file.unlink()  # it may be a link to the checkpoint's own
        file.write_text(json.dumps(state, indent=2), encoding="utf-8")


# -- weights and optimizer -----------------------------------------------------------------------


def _from_fsdp(source: Path, folder: Path, form: str, run: Reader) -> None:
    """Write what a run with whole weights reads."""
    adapter = _adapter(run.model)
    if adapter is None:
        save_file(
            {name: value.contiguous() for name, value in _fsdp_state(source, form, "model").items()},
            folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"},
        )  # fmt: skip
    elif not any(
        (folder / name).exists() for name in (ADAPTER_SAFE_WEIGHTS_NAME, f"{adapter}/{ADAPTER_SAFE_WEIGHTS_NAME}")
    ):
        state = _fsdp_state(source, form, "model")
        save_file({name: value.contiguous() for name, value in state.items()}, folder / ADAPTER_SAFE_WEIGHTS_NAME)
        below_accelerate(run.model).peft_config[adapter].save_pretrained(folder)
    has = (source / FULL_OPTIMIZER).exists() or (source / SHARDED_OPTIMIZER).exists()
    if has and run.optimizer is not None:
        state = _fsdp_state(source, form, "optimizer")
        torch.save(by_number(state, names_in(run.optimizer, run.model), source), folder / OPTIMIZER_NAME)


def _fsdp_state(source: Path, form: str, of: str) -> dict[str, Any]:
    """A state that FSDP has saved, with whole tensors."""
    whole, shards = (FULL_MODEL, SHARDED_MODEL) if of == "model" else (FULL_OPTIMIZER, SHARDED_OPTIMIZER)
    if form == FULL:
        return read_state(source / whole)  # type: ignore[no-any-return]
    return read_shards(source / shards)[of]  # type: ignore[no-any-return]


def read_shards(folder: Path) -> dict[str, Any]:
    """All that a folder of torch.distributed.checkpoint holds, with whole tensors."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save  # takes .3 s, and few runs shard

    check_shards(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        dcp_to_torch_save(folder, Path(beside, "whole.pt"))
        return read_state(Path(beside, "whole.pt"))  # type: ignore[no-any-return]


def _to_fsdp(source: Path, folder: Path, run: Reader) -> None:
    """Write what FSDP reads as FULL_STATE_DICT."""
    torch.save(_model_state(source, run.model), folder / FULL_MODEL)
    if (source / OPTIMIZER_NAME).exists() and run.optimizer is not None:
        state = by_name(read_state(source / OPTIMIZER_NAME), names_in(run.optimizer, run.model), source)
        torch.save(state, folder / FULL_OPTIMIZER)


def _model_state(source: Path, model: nn.Module) -> dict[str, Tensor]:
    """The weights of a checkpoint by the names that they have in the model, of an adapter alone if it has one."""
    inner, adapter = below_accelerate(model), _adapter(model)
    if adapter is not None:
        place = source / adapter if (source / adapter).is_dir() else source
        found = _read_weights(place, (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME))
        trained = [name for name, parameter in inner.named_parameters() if parameter.requires_grad]
        own = {name: _peft_name(name, adapter) for name in trained}
    else:
        names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
        found, tied = as_in_model(inner, _read_weights(source, names)), tied_names(inner)
        own = {name: name if name in found else tied.get(name, name) for name in inner.state_dict()}
    if lacking := sorted(own[name] for name in own if own[name] not in found):
        raise ValueError(
            f"the checkpoint {source} has no weight {lacking[0]!r}, which FSDP would load: resume without FSDP, or "
            "start a new run from its weights"
        )
    return {name: found[own[name]] for name in own}


def _read_weights(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    name = next((name for name in names if (folder / name).is_file()), None)
    if name is None:
        raise ValueError(f"the checkpoint {folder} holds none of {', '.join(names)}")
    files = [name]
    if name.endswith(".index.json"):
        files = sorted(set(json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values()))
    found: dict[str, Tensor] = {}
    for file in files:
        found |= load_file(folder / file) if file.endswith(".safetensors") else read_state(folder / file)
    return found


def _adapter(model: nn.Module) -> str | None:
    """The name of the adapter that is trained; None for a model without one."""
    inner = below_accelerate(model)
    return str(inner.active_adapters[0]) if hasattr(inner, "peft_config") else None


def _peft_name(name: str, adapter: str) -> str:
    """The name under which PEFT saves a parameter."""
    return name.replace(f".modules_to_save.{adapter}.", ".").replace(f".{adapter}.", ".").removesuffix(f".{adapter}")


def names_in(optimizer: Any, model: nn.Module) -> list[list[str]]:
    """The names of the parameters in each group of an optimizer."""
    names = {id(parameter): name for name, parameter in below_accelerate(model).named_parameters()}
    return [[names.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups]


def by_number(state: Mapping[str, Any], names: Sequence[Sequence[str]], source: Path) -> dict[str, Any]:
    """An optimizer's state by names as torch keeps it: by the parameters' numbers, in the order of `names`."""
    theirs = [group["params"] for group in state["param_groups"]]
    if list(map(sorted, theirs)) != list(map(sorted, names)):
        raise _other_weights(source, theirs, names)
    numbers = {name: number for number, name in enumerate(name for group in names for name in group)}
    groups = [
        {**group, "params": [numbers[name] for name in own]}
        for group, own in zip(state["param_groups"], names, strict=True)
    ]
    return {"state": {numbers[name]: value for name, value in state["state"].items()}, "param_groups": groups}


def by_name(state: Mapping[str, Any], names: Sequence[Sequence[str]], source: Path) -> dict[str, Any]:
    """An optimizer's state by the parameters' numbers as FSDP keeps it: by their names."""
    theirs = [group["params"] for group in state["param_groups"]]
    if list(map(len, theirs)) != list(map(len, names)):
        raise _other_weights(source, theirs, names)
    name_of = {
        number: name for group, own in zip(theirs, names, strict=True) for number, name in zip(group, own, strict=True)
    }
    groups = [{**group, "params": list(own)} for group, own in zip(state["param_groups"], names, strict=True)]
    return {"state": {name_of[number]: value for number, value in state["state"].items()}, "param_groups": groups}


def _other_weights(source: Path, theirs: Iterable[Sequence[Any]], ours: Iterable[Sequence[Any]]) -> ValueError:
    counts = [list(map(len, each)) for each in (theirs, ours)]
    return ValueError(
        f"optimizer: that of the checkpoint {source} has groups of {counts[0]} weights, this run's of {counts[1]}, or "
        "others: resume with the same trained weights and an optimizer that was built in the same way"
    )
