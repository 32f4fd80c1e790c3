"""Checkpoints of every trainer: written whole or not at all, verified before they are read, and never unpickled.

A checkpoint is a folder with a manifest, which lists all files with sizes and checksums and says what the run was made
of. The manifest is written last, when all ranks have written their files: a folder without it is not whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl.models.unwrap import below_accelerate
from trl.models.weight_files import (
    FORMER,
    METADATA,
    SAVING,
    flush,
    flush_folder,
    hidden,
    is_disk_error,
    put_in_place,
    shard_files,
    spread_like,
    undo_rename,
)
from trl.models.zero import elements, whole_shape

logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"
MANIFEST = "manifest.json"
RANDOM_STATE = "rng_state-{rank}.pt"
REMOVING = ".removing-"
RESUMING = ".resuming-"
"""prefix of the hidden name of a folder that a run on another number of processes reads a checkpoint from"""
PACKAGES = ("trl", "torch", "transformers", "accelerate", "peft", "diffusers")
ROWS_READ = 1000
"""rows of a data set that its fingerprint is made of"""
UNRELATED = (
    "output_dir", "logging_", "log_", "logdir", "save_", "eval_", "do_", "report_to", "run_name", "disable_tqdm",
    "hub_", "push_to_hub", "resume_", "per_device_eval", "batch_eval", "prediction_loss", "include_", "load_best",
    "metric_for", "greater_is", "dataloader_num_workers", "dataloader_pin", "dataloader_persistent", "debug", "ddp_",
    "dataloader_prefetch", "dataset_num_proc", "skip_memory", "restore_callback", "enable_jit", "local_rank",
    "tracker_", "project_", "exp_name", "num_checkpoint_limit", "num_completions_to_print", "ignore_data_skip",
    "accelerator_kwargs", "auto_find", "overwrite_output",
)  # fmt: skip
"""beginnings of the names of settings that change no trained weight"""


class Torn(ValueError):
    """A checkpoint that is not whole; the text names the file."""


@dataclass(frozen=True)
class Run:
    """What a run is made of, in values that JSON can hold."""

    identity: dict[str, Any]
    """trainer and shape of the model: a checkpoint of others cannot be read"""
    fixed: dict[str, Any]
    """what must be equal, or the place in the data would mean something else"""
    settings: dict[str, Any]
    """what may differ; the differences are said in one line"""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole."""

    folder: Path
    manifest: dict[str, Any] | None
    """None for one of release 1.0.0, which has none and cannot be verified"""

    @property
    def is_model_only(self) -> bool:
        """Whether it holds no optimizer and no random states."""
        return self.manifest is not None and not any("rng_state" in name for name in self.manifest["files"])


# -- what a run is made of -----------------------------------------------------------------------


def describe_run(
    trainer: str,
    model: nn.Module,
    config: Mapping[str, Any],
    *,
    fixed: Mapping[str, Any] | None = None,
    dataset: Any = None,
) -> Run:
    """What a checkpoint is compared with. `fixed`: what must be equal, by the names that an error shows."""
    given = {key: value for key, value in config.items() if key not in (fixed or {}) and not key.startswith(UNRELATED)}
    settings = {**given, "data": data_fingerprint(dataset), "model_name": _name_of(model)}
    return Run({"trainer": trainer, "model": shape_of(model)}, _in_json(fixed or {}), _in_json(settings))


def shape_of(model: nn.Module) -> str:
    """The class of a model, its number of parameters, and a code for their names and shapes."""
    inner = below_accelerate(model)
    shapes = sorted((name, tuple(whole_shape(parameter))) for name, parameter in inner.named_parameters())
    count = sum(map(elements, inner.parameters()))
    name, code = type(inner).__name__.removeprefix("FSDP"), hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]
    return f"{name} of {count:,} parameters ({code})"


def data_fingerprint(dataset: Any) -> str | None:
    """The length of a data set and a code for its rows, of which at most `ROWS_READ` are read; None for a stream.

    Only tables of `datasets` are read: in others, to read a row may draw random numbers.
    """
    if not hasattr(dataset, "__len__"):
        return None
    size = len(dataset)
    if not hasattr(dataset, "with_format") or not size:
        return f"{size} rows"
    places = sorted({place * (size - 1) // max(1, min(size, ROWS_READ) - 1) for place in range(min(size, ROWS_READ))})
    rows = dataset.with_format("arrow")[places].to_pylist()
    return f"{size} rows ({hashlib.sha256(repr(rows).encode()).hexdigest()[:8]})"


def _name_of(model: nn.Module) -> str:
    return str(getattr(getattr(below_accelerate(model), "config", None), "_name_or_path", "") or "")


def _in_json(values: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(values), default=lambda value: type(value).__name__))


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def check_identity(checkpoint: Checkpoint, run: Run) -> None:
    """ValueError for a checkpoint of another trainer or another model."""
    if checkpoint.manifest is not None:
        _check_equal(checkpoint, checkpoint.manifest["run"]["identity"], run.identity)


def check_settings(checkpoint: Checkpoint, run: Run, *, has_place: bool = True, way_out: str = "") -> None:
    """ValueError for what must be equal and is not; one line in the log for everything else that differs.

    has_place: whether the run goes on at a place in the data; if not, nothing must be equal. way_out: what an error
    names besides the settings of the checkpoint and a new run.
    """
    if checkpoint.manifest is None:
        return
    theirs = checkpoint.manifest["run"]
    if has_place:
        _check_equal(checkpoint, theirs["fixed"], run.fixed, way_out)
    before = {**theirs["fixed"], **theirs["settings"], **checkpoint.manifest["versions"]}
    now = {**run.fixed, **run.settings, **_versions()}
    different = [
        f"{name} {before[name]!r} -> {now[name]!r}" for name in now if before.get(name, now[name]) != now[name]
    ]
    if different:
        logger.warning("%s was written with other settings: %s", checkpoint.folder, ", ".join(different))


def check_optimizer(optimizer: Any, state: Mapping[str, Any]) -> None:
    """ValueError for the state of an optimizer that trains another number of weights, before any of it is loaded."""
    both = (optimizer.state_dict(), state)
    ours, theirs = ([len(group["params"]) for group in each.get("param_groups", ())] for each in both)
    if ours != theirs:
        raise ValueError(
            f"optimizer: the checkpoint's has groups of {theirs} weights, this run's of {ours}: resume with the same "
            "trained weights and an optimizer that was built in the same way"
        )


def spread_state(optimizer: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state of whole tensors in the shards of the parameters that it is about."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = dict(zip(numbers, (p for group in optimizer.param_groups for p in group["params"]), strict=True))
    spread = {
        number: {k: spread_like(v, parameters[number]) if isinstance(v, torch.Tensor) else v for k, v in own.items()}
        for number, own in state["state"].items()
    }
    return {**state, "state": spread}


def _check_equal(checkpoint: Checkpoint, theirs: Mapping[str, Any], ours: Mapping[str, Any], way_out: str = "") -> None:
    for name, value in ours.items():
        if theirs.get(name, value) != value:
            raise ValueError(
                f"{name}={value!r}: the checkpoint {checkpoint.folder} was written with {theirs[name]!r}; resume with "
                f"that, {way_out}or start a new run from its weights"
            )


# -- writing -------------------------------------------------------------------------------------


def seal(folder: Path, run: Run, *, step: int, world_size: int, expected: Iterable[str] = ()) -> None:
    """Put everything in a folder on the disk and write its manifest, which makes it whole.

    expected: files that must be there, those of other ranks.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    files = {path.relative_to(folder).as_posix(): _entry(path) for path in paths}
    if lacking := sorted(set(expected) - files.keys()):
        raise OSError(
            f"could not save to {str(folder)!r}: {lacking[0]} of another process is not there: share the disk"
        )
    flush_folder(folder)
    manifest = {
        "step": step,
        "world_size": world_size,
        "versions": _versions(),
        "run": {"identity": run.identity, "fixed": run.fixed, "settings": run.settings},
        "files": files,
    }
    beside = folder / f"{SAVING}{MANIFEST}"
    beside.write_text(json.dumps({**manifest, "checksum": _checksum(manifest)}, indent=1), encoding="utf-8")
    flush(beside)
    os.replace(beside, folder / MANIFEST)
    flush(folder)
    flush(folder.parent)


def _entry(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def save_checkpoint(target: Path, write: Callable[[Path], None], run: Run, *, step: int) -> None:
    """Write a checkpoint beside `target` and rename it there. Every process calls it; OSError if the disk is full.

    write: called by every process with the folder; random states of the process are written besides.
    """
    processes = PartialState()
    beside = hidden(target, SAVING)
    if processes.is_main_process:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    processes.wait_for_everyone()
    try:
        write_state(beside / RANDOM_STATE.format(rank=processes.process_index), random_state())
        write(beside)
        processes.wait_for_everyone()
        if processes.is_main_process:
            ranks = [RANDOM_STATE.format(rank=rank) for rank in range(processes.num_processes)]
            seal(beside, run, step=step, world_size=processes.num_processes, expected=ranks)
            put_in_place(beside, target)
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and not is_disk_error(error):
            raise
        shutil.rmtree(beside, ignore_errors=True)
        reason = str(error).splitlines()[0]
        raise OSError(f"could not save to {str(target)!r}: {reason}; what was there is unchanged") from error
    processes.wait_for_everyone()


def keep_newest(
    output_dir: str | os.PathLike[str],
    limit: int | None,
    *,
    prefix: str = PREFIX,
    keep: Iterable[Path] = (),
    is_old: Callable[[Path], bool] = lambda folder: False,
) -> None:
    """Remove the oldest checkpoints until `limit` are left, and killed saves older than the newest whole one.

    keep: never removed, besides the newest whole one. A folder is renamed before its files go. A checkpoint that has
    lost a file, an optimizer's that its user removed, say, is no killed save: it is one of the `limit`.
    """
    if not limit or limit < 0:
        return
    found = checkpoints(output_dir, prefix)
    whole = [folder for folder in found if is_whole(folder) or is_old(folder)]
    finished = [folder for folder in found if folder in whole or is_finished(folder)]
    protected = {path.resolve() for path in (*keep, *whole[-1:])}
    free = [folder for folder in finished if folder.resolve() not in protected]
    doomed = free[: max(0, len(finished) - max(limit, len(protected)))]
    torn = [path for path in found[: found.index(whole[-1])] if path not in finished] if whole else []
    for folder in (*doomed, *(path for path in torn if path.resolve() not in protected)):
        remove(folder)


def remove(folder: Path) -> None:
    """Rename a folder, so that it is whole or gone, and remove it; of a link, only the link."""
    if folder.is_symlink():
        folder.unlink()
        return
    away = hidden(folder, REMOVING)
    shutil.rmtree(away, ignore_errors=True)
    os.rename(folder, away)
    shutil.rmtree(away, ignore_errors=True)


def is_whole(folder: Path, *, contents: bool = False) -> bool:
    """Whether all files of a checkpoint are there with their sizes, and with their contents if asked."""
    try:
        check_files(folder, read_manifest(folder), contents=contents)
    except Torn:
        return False
    return True


def is_finished(folder: Path) -> bool:
    """Whether a save of this folder came to its end, whatever has happened to it since."""
    return (folder / MANIFEST).is_file()


def clean_up(output_dir: str | os.PathLike[str], prefix: str = PREFIX) -> None:
    """Remove what killed saves left; where one was overwriting a checkpoint, the older one gets its name back."""
    processes, root = PartialState(), Path(output_dir)
    if processes.is_main_process:
        for former in root.glob(f"{FORMER}{prefix}*"):
            target = root / former.name.removeprefix(FORMER)
            if is_whole(target):
                shutil.rmtree(former, ignore_errors=True)
            else:
                shutil.rmtree(target, ignore_errors=True)
                os.rename(former, target)
        own = (
            f"{SAVING}*",
            f"{REMOVING}*",
            f"{RESUMING}*",
            f"{prefix}*/{SAVING}*",
            f"rollouts/{SAVING}*",
        )  # no other run's below
        for pattern in own:
            for left in root.glob(pattern):
                shutil.rmtree(left, ignore_errors=True)
    processes.wait_for_everyone()


class LimitOfUser(TrainerCallback):
    """Keeps `Trainer` from removing older checkpoints before the new one is whole.

    For that `save_total_limit` is None while `Trainer` writes; other callbacks, which come after this one, see the
    user's number.
    """

    def __init__(self) -> None:
        self._held: tuple[int | None] | None = None

    def hold(self, args: TrainingArguments) -> None:
        """Called when the weights of a checkpoint are written after which `on_save` or `on_train_end` comes."""
        self._held = self._held or (args.save_total_limit,)
        args.save_total_limit = None

    def give_back(self, args: TrainingArguments) -> None:
        """Put the user's number back, if it is held."""
        if self._held is not None:
            (args.save_total_limit,), self._held = self._held, None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.give_back(args)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.give_back(args)


class SealCheckpoints(TrainerCallback):
    """Makes the checkpoints of transformers' `Trainer` whole.

    `Trainer` writes into `checkpoint-N` itself. `begin` puts a folder of that name aside before the first file, and the
    manifest is written after the last one. Only then are older checkpoints removed, and the one that was put aside.
    It is to be called after all other callbacks, and its `limit` before them.
    """

    def __init__(self, sealed: Callable[[Path], None] = lambda folder: None) -> None:
        """sealed: called by the first process with a checkpoint that is whole."""
        self.run: Run | None = None
        self._sealed = sealed
        self.limit = LimitOfUser()
        self._open: Path | None = None

    @property
    def is_open(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._open is not None

    def begin(self, folder: Path, args: TrainingArguments, state: TrainerState) -> None:
        """Called by every process before anything is written into `folder`."""
        if args.should_save:
            former = hidden(folder, FORMER)
            if folder.exists() and (is_whole(folder) or is_old_trainer_checkpoint(folder)):
                shutil.rmtree(former, ignore_errors=True)
                os.rename(folder, former)
            shutil.rmtree(folder, ignore_errors=True)
        self._open = folder
        PartialState().wait_for_everyone()
        state.stateful_callbacks[MANIFEST] = {}  # tells a folder that lost its manifest from one of release 1.0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget a folder that was saved outside of a run."""
        self._open = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by `Trainer` after its last file of a checkpoint."""
        folder, self._open = self._open, None
        self.limit.give_back(args)
        if folder is None:
            return
        PartialState().wait_for_everyone()
        if args.should_save and folder.is_dir():
            names = (
                ["rng_state.pth"] if args.world_size == 1 else [f"rng_state_{i}.pth" for i in range(args.world_size)]
            )
            expected = [] if args.save_only_model or args.save_on_each_node else names
            for shards in folder.glob(f"*/{METADATA}"):
                expected += [f"{shards.parent.name}/{name}" for name in shard_files(shards.parent)]
            assert self.run is not None
            seal(folder, self.run, step=state.global_step, world_size=args.world_size, expected=expected)
            shutil.rmtree(hidden(folder, FORMER), ignore_errors=True)
            if state.is_world_process_zero:
                self._sealed(folder)
            best = [Path(state.best_model_checkpoint)] if state.best_model_checkpoint else []
            keep_newest(folder.parent, args.save_total_limit, keep=[folder, *best], is_old=is_old_trainer_checkpoint)
        PartialState().wait_for_everyone()

    def undo(self, args: TrainingArguments) -> None:
        """Take away a checkpoint that could not be written; what it was to replace gets its name back."""
        folder, self._open = self._open, None
        self.limit.give_back(args)
        if folder is None:
            return
        if args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
            undo_rename(folder)


# -- finding and verifying -----------------------------------------------------------------------


def checkpoints(output_dir: str | os.PathLike[str], prefix: str = PREFIX) -> list[Path]:
    """The checkpoint folders of a run, whole or not, oldest first."""
    found = [path for path in Path(output_dir).glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()]
    return sorted((path for path in found if path.is_dir()), key=lambda path: number_of(path, prefix))


def number_of(folder: Path, prefix: str = PREFIX) -> int:
    """N of a folder `checkpoint-N`."""
    return int(folder.name.removeprefix(prefix))


def find(
    resume: bool | str | os.PathLike[str] | None,
    output_dir: str | os.PathLike[str] | None,
    *,
    prefix: str = PREFIX,
    is_old: Callable[[Path], bool] = lambda folder: False,
) -> Checkpoint | None:
    """The checkpoint to resume from. The first process verifies it, and all get its answer.

    True: the newest whole one in `output_dir`; None, with a line in the log, if there is none. A path that is not
    whole is an error. is_old: whether a folder without a manifest is a checkpoint of release 1.0.0, which is taken
    unverified.
    """
    if resume is None or resume is False:
        return None
    answer: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            answer[0] = _newest(output_dir, prefix, is_old) if resume is True else verified(Path(resume), is_old)
        except (Torn, OSError) as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise ValueError(answer[1])
    return answer[0]


def _newest(
    output_dir: str | os.PathLike[str] | None, prefix: str, is_old: Callable[[Path], bool]
) -> Checkpoint | None:
    if output_dir is None:
        raise Torn("resume_from_checkpoint=True looks in `output_dir`, which is not set: set it, or pass a folder")
    passed = False
    for folder in reversed(checkpoints(output_dir, prefix)):
        try:
            found = verified(folder, is_old)
        except Torn as error:
            passed = True
            logger.warning("%s; it is passed over", error)
            continue
        if passed:
            logger.warning("training goes on from %s", folder)
        return found
    logger.warning("no whole checkpoint in %s: training starts anew", output_dir)
    return None


def verified(folder: Path, is_old: Callable[[Path], bool] = lambda folder: False) -> Checkpoint:
    """The checkpoint in a folder; `Torn` if a file is missing or is not what was written."""
    undo_rename(folder)
    if not (folder / MANIFEST).exists() and is_old(folder):
        logger.warning("%s has no %s: release 1.0.0 wrote it, and it cannot be verified", folder, MANIFEST)
        return Checkpoint(folder, None)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    return Checkpoint(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; `Torn` if it is missing or damaged."""
    if not folder.is_dir():
        raise Torn(f"there is no checkpoint {folder}")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        checksum = manifest.pop("checksum")
    except FileNotFoundError:
        raise Torn(f"the checkpoint {folder} is not whole: it has no {MANIFEST}, which is written last") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Torn(f"the checkpoint {folder} is not whole: {MANIFEST} cannot be read ({error})") from error
    if checksum != _checksum(manifest):
        raise Torn(f"the checkpoint {folder} is not whole: the content of {MANIFEST} has changed")
    return manifest


def check_files(folder: Path, manifest: Mapping[str, Any], *, contents: bool = True) -> None:
    """`Torn`, with a file's name, unless all files of the manifest are as they were written."""
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise Torn(f"the checkpoint {folder} is not whole: {name} is missing")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise Torn(f"the checkpoint {folder} is not whole: {name} has {size} bytes of {entry['bytes']}")
        if contents and _entry(path) != entry:
            raise Torn(f"the checkpoint {folder} is not whole: the content of {name} has changed")


def is_old_trainer_checkpoint(folder: Path) -> bool:
    """Whether transformers' `Trainer` wrote a folder to its end for a release that had no manifests."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        return "global_step" in state and MANIFEST not in (state.get("stateful_callbacks") or {})
    except (OSError, ValueError, TypeError):
        return False


# -- states --------------------------------------------------------------------------------------


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Save tensors and plain values, so that `read_state` can read them."""
    with open(path, "wb") as file:
        torch.save(_plain(state, path.name), file)


def read_state(path: Path, *, allowed: Sequence[Any] = ()) -> Any:
    """What `write_state` saved. Nothing in the file can run code; ValueError, with the file's name, for anything else.

    allowed: further classes and functions that may be in it.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)) if allowed else nullcontext():
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except Exception as error:  # pickle, zip and torch each have their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"could not read {path}: {reason}") from error


def _plain(value: Any, where: str) -> Any:
    """The same with numbers of numpy as plain numbers; ValueError for what could not be read back."""
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(inner, f"{where}: {key}") for key, inner in value.items()}
    if isinstance(value, list | deque | set):
        return [_plain(inner, where) for inner in value]
    if isinstance(value, tuple):
        return tuple(_plain(inner, where) for inner in value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.Tensor | torch.dtype):
        return value
    raise ValueError(f"{where}: a {type(value).__name__} cannot be kept in a checkpoint: use tensors and plain values")


def random_state() -> dict[str, Any]:
    """The random states of Python, numpy, torch and the accelerators of this process."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if (device := torch.accelerator.current_accelerator(check_available=True)) is not None:
        module: Any = torch.get_device_module(device)
        every = hasattr(module, "get_rng_state_all")
        state[device.type] = module.get_rng_state_all() if every else [module.get_rng_state()]
    return state


def derived_random_state(seed: int, where: str, rank: int) -> dict[str, Any]:
    """Random states for a process that was not there when a checkpoint was written; where: the checkpoint's name."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {where} {rank}".encode()).digest()[:4], "big")
    kind, keys, *rest = np.random.RandomState(number).get_state()
    state = {
        "python": random.Random(number).getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.Generator().manual_seed(number).get_state(),
    }
    if (device := torch.accelerator.current_accelerator(check_available=True)) is not None:
        one = torch.Generator(device).manual_seed(number).get_state()
        state[device.type] = [one] * torch.accelerator.device_count()
    return state


def processes_text(count: int) -> str:
    """A number of processes in words."""
    return "1 process" if count == 1 else f"{count} processes"


def random_state_of(checkpoint: Checkpoint, rank: int, seed: int, *, old: str = RANDOM_STATE) -> dict[str, Any]:
    """What a process goes on with: its own random states, or derived ones where it was not there.

    old: how release 1.0.0 named the file.
    """
    if checkpoint.manifest is None:
        return read_state(checkpoint.folder / old.format(rank=rank), allowed=numpy_globals())  # type: ignore[no-any-return]
    written = checkpoint.manifest["world_size"]
    if (processes := PartialState().num_processes) != written and rank == 0:
        logger.warning(
            "%s was written by %s, this run has %d: random states of those that were not there come from the seed, so "
            "what is drawn differs from a run that goes on as it was",
            checkpoint.folder, processes_text(written), processes,
        )  # fmt: skip
    if rank >= written:
        return derived_random_state(seed, checkpoint.folder.name, rank)
    return read_state(checkpoint.folder / RANDOM_STATE.format(rank=rank))  # type: ignore[no-any-return]


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` gave."""
    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None and device.type in state:
        module: Any = torch.get_device_module(device)
        every = hasattr(module, "set_rng_state_all")
        module.set_rng_state_all(state[device.type]) if every else module.set_rng_state(state[device.type][0])


@contextmanager
def same_random_state() -> Iterator[None]:
    """Afterwards the random states are what they were before."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


def numpy_globals() -> list[Any]:
    """What numpy's numbers and arrays are made with when a file of release 1.0.0 is read: none of it runs code."""
    numbers = (np.float64(0), np.float32(0), np.int64(0), np.uint32(0))
    makers = [np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]]
    return [*makers, np.ndarray, np.dtype, *(type(number.dtype) for number in numbers)]
