"""Folders of weights: they are saved whole or not at all; a few tensors of a big one can be read alone."""

import errno
import io
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.hub import cached_file

from trl.models import zero
from trl.models.unwrap import has_parts, in_parts, is_fsdp2

SAVING, FORMER = ".saving-", ".former-"
"""prefixes of hidden names: what is still being written, and what was there before"""

HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
"""keywords of `from_pretrained` that say where a file is, so that every file is looked for in the same place"""

WEIGHT_FILES = (
    SAFE_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    "model-?????-of-?????.safetensors",
    WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    "pytorch_model-?????-of-?????.bin",
)
"""glob patterns of all the files that may hold the weights of a whole model"""


def is_disk_error(error: BaseException | None) -> bool:
    """Whether a file could not be written; torch says so in a RuntimeError, and `writing` passes causes on."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    words = (
        "PytorchStreamWriter", "unexpected pos", "iostream error", "could not save to", "No space left",
        "File too large",
    )  # fmt: skip
    return error is not None and any(word in str(error) for word in words)


def flush(path: Path) -> None:
    """Wait until a file or a folder's list of files is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Wait until a folder and everything in it is on the disk."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def hidden(target: Path, prefix: str) -> Path:
    """The folder beside `target` with the same name after a prefix such as `.saving-`."""
    return target.with_name(f"{prefix}{target.name}")


def put_in_place(beside: Path, target: Path) -> None:
    """Rename a finished folder to `target`. If the process is killed, the old or the new folder is there, whole.

    The old folder is called `.former-NAME` for a moment; `undo_rename` gives it its name back.
    """
    flush_folder(beside)
    former = hidden(target, FORMER)
    if target.exists():
        shutil.rmtree(former, ignore_errors=True)
        os.rename(target, former)
    os.rename(beside, target)
    flush(target.parent)
    shutil.rmtree(former, ignore_errors=True)


def undo_rename(target: Path) -> None:
    """Give a folder its name back if `put_in_place` was killed between its two renames."""
    former = hidden(target, FORMER)
    if former.exists() and not target.exists():
        os.rename(former, target)


@contextmanager
def writing(directory: str | os.PathLike[str], replaces: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to write in, whose files are renamed into `directory` once all of them are on the disk.

    `replaces`: glob patterns of the files that hold weights. If any is written, those of an earlier save are removed.
    At every moment `directory` loads as it was before or as it is afterwards, also where weights have several files.
    OSError names the folder if the disk is full or not writable; `directory` is then as it was before.
    """
    target = Path(directory)
    if target.is_file():
        raise ValueError(f"cannot save to {str(target)!r}: it is a file; pass the name of a folder")
    existed = target.is_dir()
    beside: Path | None = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=SAVING, dir=target))  # inside: a rename never leaves the disk
        yield beside
        flush_folder(beside)
        _move(beside, target, replaces)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not isinstance(error, OSError | SafetensorError) and not is_disk_error(error):
            raise
        reason = str(error).splitlines()[0]
        raise OSError(f"could not save to {str(target)!r}: {reason}; nothing there has changed") from error
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
        if not existed and target.is_dir() and not any(target.iterdir()):
            target.rmdir()


def _move(source: Path, target: Path, replaces: Sequence[str]) -> None:
    """Rename the files of `source` into `target`, an index of shards after its shards."""
    files = sorted((file.relative_to(source) for file in source.rglob("*") if file.is_file()), key=_is_index)
    for index in filter(_is_index, files):
        _keep_old_shards(target / index)
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / file, target / file)
    for kept in filter(Path.is_file, target.glob(f"{FORMER}*")):
        kept.unlink()
    if any(file.match(pattern) for file in files for pattern in replaces):  # else another rank wrote the weights
        stale = {old for pattern in replaces for old in target.glob(pattern) if old.relative_to(target) not in files}
        for old in sorted(stale, key=_is_index, reverse=True):
            old.unlink(missing_ok=True)
    flush(target)


def _is_index(file: Path) -> bool:
    return file.name.endswith(".index.json")


def _keep_old_shards(index: Path) -> None:
    """Let an index name its shards by second names, under which they stay when files of the same names replace them."""
    if not index.exists():
        return
    table = json.loads(index.read_text(encoding="utf-8"))
    for shard in set(table["weight_map"].values()):
        kept = index.with_name(f"{FORMER}{shard}")
        if shard.startswith(FORMER) or not (index.parent / shard).exists():
            continue
        kept.unlink(missing_ok=True)
        try:
            os.link(index.parent / shard, kept)
        except OSError:  # a file system without hard links
            shutil.copyfile(index.parent / shard, kept)
    names = table["weight_map"].items()
    table["weight_map"] = {key: shard if shard.startswith(FORMER) else f"{FORMER}{shard}" for key, shard in names}
    beside = index.with_name(f"{FORMER}{index.name}")
    beside.write_text(json.dumps(table), encoding="utf-8")
    flush(beside)
    os.replace(beside, index)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model's folder; ValueError where it holds none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        wrong = f"it is not JSON (line {error.lineno}: {error.msg})"
    except UnicodeDecodeError:
        wrong = "it is not UTF-8"
    except OSError as error:
        wrong = f"it cannot be read ({error.strerror or error})"
    else:
        if isinstance(found, dict):
            return found
        wrong = "it holds no JSON object"
    raise ValueError(f"{file}: {wrong}; mend it, or fetch or save the model again")


def find_file(source: str, name: str, **where: Any) -> str | None:
    """Path of the file `name` of a model folder or Hub repository; None if it has no such file.

    `where`: any of `HUB_ARGUMENTS`.
    """
    try:
        return cached_file(
            source,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **where,
        )
    except (OSError, HFValidationError):
        return None


def read_modules(source: str, modules: Sequence[str], *, adapter: bool = False, **where: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names start with one of `modules` ("v_head"); {} if there are none.

    Only they are read: of a sharded checkpoint, only the shards that hold one. `adapter`: the folder is an adapter's,
    where `pytorch_model.bin` holds nothing but these modules and counts before any weights of a base model.
    """
    names = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME]
    for name in names[::-1] if adapter else names:
        file = find_file(source, name, **where)
        if file is None:
            continue
        tensors = (_read_shards if name.endswith(".json") else _read)(file, modules, source=source, where=where)
        if tensors or not os.path.isdir(source):  # of a repository never fetch a second format only to look into it
            return tensors
    return {}


def belongs(key: str, modules: Sequence[str]) -> bool:
    """Whether a state-dict key names a tensor of one of `modules`."""
    return key.split(".")[0] in modules


def _read_shards(index: str, modules: Sequence[str], *, source: str, where: Mapping[str, Any]) -> dict[str, Tensor]:
    with open(index, encoding="utf-8") as file:
        weight_map: dict[str, str] = json.load(file)["weight_map"]
    tensors: dict[str, Tensor] = {}
    for shard in sorted({shard for key, shard in weight_map.items() if belongs(key, modules)}):
        path = find_file(source, shard, **where)
        if path is None:
            raise OSError(f"the checkpoint {source!r} lacks its shard {shard!r}: fetch or save it again")
        tensors |= _read(path, modules)
    return tensors


def holds_other_modules(file: Path, modules: Sequence[str]) -> bool:
    """Whether pickled weights hold anything besides `modules`."""
    return file.exists() and any(not belongs(key, modules) for key in _unpickle(str(file)))


def _unpickle(file: str) -> Mapping[str, Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def _read(file: str, modules: Sequence[str], **_: Any) -> dict[str, Tensor]:
    try:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as stored:
                return {key: stored.get_tensor(key) for key in stored.keys() if belongs(key, modules)}  # noqa: SIM118
        return {key: tensor.clone() for key, tensor in _unpickle(file).items() if belongs(key, modules)}
    except Exception as error:  # pickle, zip, safetensors and torch each have their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(f"could not read the weights {file!r}: {reason}") from error


# -- sharded weights -----------------------------------------------------------------------------


def on_host(value: Any, keep: bool) -> Any:
    """The same with whole tensors on the CPU in place of shards. Collective; a process that keeps none gets None there.

    One tensor after the other is gathered, so that a process which keeps none holds at most one.
    """
    if isinstance(value, Mapping):
        return {key: on_host(inner, keep) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_host(inner, keep) for inner in value)
    if in_parts(value):
        with zero.gathered_weights([value]):
            return value.detach().to("cpu", copy=True) if keep else None
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    return full.cpu() if keep else None


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in the shards of another one, if that is sharded. Collective."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    own = value.to(like.device)
    return distribute_tensor(own, like.device_mesh, like.placements, src_data_rank=None)


def tied_names(model: nn.Module) -> dict[str, str]:
    """Further names of parameters that stand in a model several times -> their first name."""
    first: dict[int, str] = {}
    names = [(first.setdefault(id(p), name), name) for name, p in model.named_parameters(remove_duplicate=False)]
    return {name: one for one, name in names if name != one}


def gathered_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """A state dict with whole tensors, those that are tied as one. Collective; `keep`: see `on_host`."""
    inner = getattr(model, "pretrained_model", model)  # a value head's own state dict is without PEFT's
    parts = has_parts(model)  # which are known by the weights themselves
    own = {**inner.state_dict(keep_vars=parts), **model.state_dict(keep_vars=parts)}
    state: dict[str, Tensor] = on_host(own, keep)
    return {**state, **{name: state[first] for name, first in tied_names(inner).items() if first in state}}


@contextmanager
def saved_whole(model: nn.Module, keep: bool) -> Iterator[None]:
    """Within it a model that FSDP2 has sharded gives whole tensors to what saves it, and has the name of its own class.

    Collective at the start; only in a process that keeps them, see `on_host`.
    """
    whole = gathered_state(model, keep) if is_fsdp2(model) else {}
    if not whole or not keep:
        yield
        return

    def state_dict(*, destination: dict[str, Any] | None = None, prefix: str = "", **_: Any) -> dict[str, Any]:
        found = {} if destination is None else destination
        found.update({f"{prefix}{name}": value for name, value in whole.items()})
        return found

    sharded = type(model)
    model.state_dict = state_dict  # type: ignore[method-assign, assignment]
    model.__class__ = next(kind for kind in sharded.__mro__ if not issubclass(kind, FSDPModule))
    try:
        yield
    finally:
        model.__class__ = sharded
        del model.state_dict


@contextmanager
def loaded_whole(model: nn.Module) -> Iterator[None]:
    """Within it a model that FSDP2 has sharded loads state dicts of whole tensors, each process its part of them."""
    if not is_fsdp2(model):
        yield
        return
    load = model.load_state_dict

    def load_state_dict(state: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        own = model.state_dict()
        parts = {name: spread_like(value, own[name]) if name in own else value for name, value in state.items()}
        return load(parts, *args, **kwargs)

    model.load_state_dict = load_state_dict  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del model.load_state_dict


def reads_saved_form(model: nn.Module) -> None:
    """From now on the model's `load_state_dict` takes weights as its `save_pretrained` writes them, too.

    transformers saves those of many models (vision-language models, mixtures of experts) as older releases named them.
    """
    if isinstance(model, PreTrainedModel):
        model.register_load_state_dict_pre_hook(_take_saved_form)


def _take_saved_form(model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if not prefix:
        own = as_in_model(model, state)
        if own is not state:
            state.clear()
            state.update(own)


def as_in_model(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Weights that `save_pretrained` wrote, by the names and in the form that they have in the model."""
    known = {name for of in (model.named_parameters, model.named_buffers) for name, _ in of(remove_duplicate=False)}
    floats = [value.dtype for value in state.values() if isinstance(value, Tensor) and value.is_floating_point()]
    if not floats or not isinstance(model, PreTrainedModel) or known.issuperset(state):
        return state
    widest = max(floats, key=lambda dtype: dtype.itemsize)
    read, info = type(model).from_pretrained(
        None, config=model.config, state_dict=dict(state), dtype=widest, output_loading_info=True
    )
    unknown = {name: state[name] for name in info["unexpected_keys"] if name in state}
    return {name: value for name, value in read.state_dict().items() if name not in info["missing_keys"]} | unknown


METADATA = ".metadata"
"""the file that says what is where in a folder of torch.distributed.checkpoint; it is a pickle"""
PLAIN_CLASSES = {
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"), ("builtins", "set"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    *(("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
}  # fmt: skip
"""what that pickle may name, besides dtypes: none of it runs code"""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and (module, name) not in PLAIN_CLASSES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def shard_files(folder: Path) -> list[str]:
    """The files that a folder of torch.distributed.checkpoint consists of, those of other processes too."""
    found = _read_metadata(folder)
    return [METADATA, *sorted({place.relative_path for place in found.storage_data.values()})]


def check_shards(folder: Path) -> None:
    """ValueError, with a file's name, where torch, which unpickles parts of this folder, would run code from it."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata  # takes .3 s, and few runs shard

    found = _read_metadata(folder)
    for index, place in found.storage_data.items():
        if not isinstance(found.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            continue  # tensors are read with `weights_only=True`
        path = folder / place.relative_path
        try:
            if getattr(place, "transform_descriptors", None):
                raise ValueError(f"{index.fqn} is stored by an extension")
            with open(path, "rb") as file:
                file.seek(place.offset)
                torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
        except Exception as error:  # pickle, zip and torch each have their own
            raise ValueError(f"could not read {path}: {str(error).splitlines()[0]}") from error


def _read_metadata(folder: Path) -> Any:
    path = folder / METADATA
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file).load()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except Exception as error:  # of a pickle that is damaged
        raise ValueError(f"could not read {path}: {str(error).splitlines()[0]}") from error
