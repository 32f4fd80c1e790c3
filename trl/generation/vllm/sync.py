"""The policy's weights into vLLM: LoRA adapters, whole weights in a folder, or vLLM's own transfer (NCCL, IPC).

Each way is a `WeightSync`. `push` is collective: ranks that hold parts gather them, one rank tells the engine, and all
return, or fail alike, together. While weights are replaced their stamp says so, so no token of them is ever expected.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import secrets
import shutil
import socket
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from trl.data.pictures import processor_of
from trl.generation.vllm.engine import Engine, EngineError, Request, WeightSync
from trl.import_utils import pip_install
from trl.models.prepare import load_model, read_tokenizer
from trl.models.served_weights import Piece, pieces_of, unserved_adapter
from trl.models.sharded import whole
from trl.models.unwrap import below_value_head, holds_parts

logger = logging.getLogger(__name__)
T = TypeVar("T")

ADAPTER = "policy"
"""name under which an engine has the policy's adapter"""
SHARD_BYTES = 4 * 2**30
"""of a file of whole weights"""
MEMORY = "/dev/shm"
"""a folder that lies in memory, where there is one"""
PREFIX, LOCK = "trl-weights-", ".lock"


# -- ranks -----------------------------------------------------------------------------------


def _place() -> tuple[int, int]:
    """This process's number and how many there are."""
    several = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if several else (0, 1)


def on_all(value: T) -> list[T]:
    """What each rank says. Collective."""
    _, world = _place()
    found: list[Any] = [value] * world
    if world > 1:
        dist.all_gather_object(found, value)
    return found


@contextmanager
def as_one(doing: str) -> Iterator[None]:
    """An error of one rank within it becomes an error of all. Collective at its end."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    found = on_all(None if error is None else " ".join(str(error).split()) or type(error).__name__)
    if error is not None:
        raise error
    rank = next((rank for rank, text in enumerate(found) if text is not None), None)
    if rank is not None:
        raise EngineError(f"rank {rank} could not {doing}: {found[rank]}")


def everywhere(doing: str, make: Callable[[], T], *, each: bool = False) -> T:
    """What the first rank makes, on all ranks; each: what each rank makes. An error is one of all. Collective."""
    made: T | None = None
    with as_one(doing):
        if each or _place()[0] == 0:
            made = make()
    found: Any = made if each else on_all(made)[0]
    return found  # type: ignore[no-any-return]


def new_stamp() -> str:
    """The beginning of the stamps of a run's weights, which no other run has. Collective."""
    return on_all(f"policy-{secrets.token_hex(4)}")[0]


# -- what all ways share -------------------------------------------------------------------------


def _replace(engine: Engine, version: str, mode: str, load: Callable[[], None]) -> None:
    """Let an engine load weights while it rests; stamped as unfinished until they are there, whatever happens."""
    engine.pause(mode=mode)
    try:
        engine.set_version(f"{version}-unfinished")
        load()
        engine.set_version(version)
    except BaseException:
        with suppress(EngineError):
            engine.resume()
        raise
    engine.resume()


def _has(engine: Engine, version: str, adapter: str | None) -> bool:
    """Whether an engine samples by the weights of this stamp: by one token."""
    params = {"n": 1, "max_tokens": 1, "temperature": 0.0, "logprobs": 0}
    try:
        [[one]] = engine.generate([Request([1], params, adapter)])
    except EngineError:
        return False
    return bool(one.versions) and all(span.version == version for span in one.versions)


def _one_at_a_time() -> FileLock:
    """Processes of one user on this machine take turns: servers have no lock."""
    user = getattr(os, "getuid", getpass.getuser)()  # in a container a user may have no name
    return FileLock(Path(tempfile.gettempdir(), f"trl-vllm-{user}.lock"))


class _Folders:
    """Folders for weights: in memory where there is room, else on the disk; what dead processes left is removed."""

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        self.given = None if root is None else Path(root)
        self._open: dict[Path, FileLock] = {}
        self.close = weakref.finalize(self, _remove_all, self._open)  # at the latest when Python ends

    def new(self, size: int) -> Path:
        """A folder for so many bytes. OSError names it where there is no room."""
        root = self._root(size)
        root.mkdir(parents=True, exist_ok=True)
        _remove_left(root)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
        folder.chmod(0o755)  # a server may be another user's
        self._open[folder] = FileLock(folder / LOCK)
        self._open[folder].acquire()
        return folder

    def remove(self, folder: Path | None) -> None:
        """Remove a folder of this process, and nothing else."""
        lock = self._open.pop(folder, None) if folder is not None else None
        if lock is not None:
            shutil.rmtree(str(folder), ignore_errors=True)
            lock.release()

    def _root(self, size: int) -> Path:
        needed = size + size // 8 + 2**20
        if self.given is not None:
            return self.given
        memory, disk = Path(MEMORY), Path(tempfile.gettempdir())
        if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > needed:
            return memory
        if shutil.disk_usage(disk).free > needed:
            return disk
        raise OSError(
            f"neither {memory} nor {disk} has room for {size / 1e9:.1f} GB of weights: name a folder by "
            "vllm_sync_folder that the server sees too"
        )


def _remove_all(folders: dict[Path, FileLock]) -> None:
    for folder in list(folders):
        shutil.rmtree(folder, ignore_errors=True)
        folders.pop(folder).release()


def _remove_left(root: Path) -> None:
    """Remove folders of weights whose process is gone: nobody holds their lock."""
    for folder in root.glob(f"{PREFIX}*"):
        if not (folder / LOCK).exists():
            continue
        with suppress(OSError, Timeout), FileLock(folder / LOCK, timeout=0):
            shutil.rmtree(folder, ignore_errors=True)


def _seen(error: EngineError, folder: Path) -> EngineError:
    """An engine's refusal of a folder, with what is often the cause."""
    return EngineError(
        f"{error}; it was to load {folder}: a server on another machine, or in a container, needs a folder that it "
        "sees too (vllm_sync_folder)"
    )


# -- LoRA adapters ---------------------------------------------------------------------------


class AdapterSync:
    """A LoRA adapter in a folder, loaded in the place of the one before; the base stays served beside it.

    The folder of the newest adapter stays until the next one is there, because an engine may read it again. otherwise:
    what is done instead where the engine refuses the first adapter; None: an error.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str] | None = None,
        *,
        own_engines: bool = False,
        mode: str = "wait",
        otherwise: Callable[[], WeightSync] | None = None,
    ) -> None:
        self.model, self.own_engines, self.mode, self.otherwise = model, own_engines, mode, otherwise
        self._folders = _Folders(folder)
        self._newest: Path | None = None
        self._inner = ""
        self._loaded = False
        self._instead: WeightSync | None = None

    @property
    def adapter(self) -> str | None:
        return ADAPTER if self._instead is None else self._instead.adapter

    def push(self, engine: Engine, version: str) -> None:
        if self._instead is not None:
            self._instead.push(engine, version)
            return
        before, self._newest = self._newest, self._written()
        refused = self._told(engine, version)
        self._folders.remove(before)
        said = next((text for text in on_all(refused) if text is not None), None)
        if said is None:
            self._loaded = True
            return
        if self._loaded or self.otherwise is None:
            raise EngineError(said)
        if not _place()[0]:
            logger.warning("vLLM does not take the adapter (%s): it gets the merged weights whole instead", said)
        self._instead = self.otherwise()
        self._folders.close()
        self._instead.push(engine, version)

    def again(self, engine: Engine, version: str) -> None:
        if self._instead is not None:
            self._instead.again(engine, version)
            return
        if self._newest is None:
            raise EngineError(f"the engine has lost the weights {version!r}, and this process has no copy of them")
        with _one_at_a_time():
            if not _has(engine, version, ADAPTER):
                self._load(engine, version)

    def close(self) -> None:
        """Remove what is left in folders."""
        self._folders.close()
        if self._instead is not None:
            _close(self._instead)

    def _told(self, engine: Engine, version: str) -> str | None:
        """What an engine said that is there and does not take the adapter. EngineError, on all ranks, for all else."""
        refused = None
        with as_one("give vLLM the adapter"):
            if _tells(self.own_engines):
                try:
                    self._load(engine, version)
                except EngineError as error:
                    engine.about()  # fails where nobody is there
                    refused = str(error)
        return refused

    def _load(self, engine: Engine, version: str) -> None:
        newest = self._newest
        assert newest is not None
        try:
            _replace(engine, version, self.mode, lambda: engine.load_adapter(ADAPTER, str(newest / self._inner)))
        except EngineError as error:
            raise _seen(error, newest) from error

    def _written(self) -> Path:
        """The folder of the adapter as it is now, the same for all ranks of a machine. Collective."""
        network = below_value_head(self.model)
        [name] = network.active_adapters
        marks = (f".{name}.", f".{name}")
        own = {
            key: weight
            for key, weight in network.named_parameters()
            if "lora_" in key and (marks[0] in key or key.endswith(marks[1]))
        }
        state = {key: whole(weight).detach().cpu() for key, weight in own.items()}
        size = sum(tensor.nbytes for tensor in state.values())
        self._inner = "" if name == "default" else name  # where PEFT writes it
        folder = _for_all(self._folders, size, self.own_engines)
        with as_one("write the adapter for vLLM"):
            if _writes(self.own_engines):
                network.save_pretrained(
                    str(folder), state_dict=state, selected_adapters=[name], save_embedding_layers=False
                )
        return folder


# -- whole weights in a folder ------------------------------------------------------------------


class FolderSync:
    """Whole weights in a folder, which the engine loads and which is then removed."""

    adapter = None

    def __init__(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str] | None = None,
        *,
        own_engines: bool = False,
        mode: str = "wait",
    ) -> None:
        self.model, self.own_engines, self.mode = model, own_engines, mode
        self._folders = _Folders(folder)
        self._mark: Tensor | None = None
        """some numbers of the weights that were given; None where no process has all weights"""

    def push(self, engine: Engine, version: str) -> None:
        pieces = pieces_of(self.model)
        folder = _for_all(self._folders, bytes_of(pieces), self.own_engines)
        try:
            with as_one("write the weights for vLLM"):
                write_weights(pieces, folder if _writes(self.own_engines) else None)
            self._mark = None if _is_shared_out(self.model) else _mark(self.model)
            with as_one("give vLLM the weights"):
                if _tells(self.own_engines):
                    self._load(engine, version, folder)
        finally:
            self._folders.remove(folder)

    def again(self, engine: Engine, version: str) -> None:
        if self._mark is None or not torch.equal(self._mark, _mark(self.model)):
            why = "no process has all of them" if self._mark is None else "the policy has others by now"
            raise EngineError(
                f"the engine has lost the weights {version!r}, and {why}; resume the run from its last checkpoint"
            )
        with _one_at_a_time():
            if _has(engine, version, None):
                return
            pieces = pieces_of(self.model)
            folder = self._folders.new(bytes_of(pieces))
            try:
                write_weights(pieces, folder)
                self._load(engine, version, folder)
            finally:
                self._folders.remove(folder)

    def close(self) -> None:
        self._folders.close()

    def _load(self, engine: Engine, version: str, folder: Path) -> None:
        try:
            _replace(engine, version, self.mode, lambda: engine.reload_weights(str(folder)))
        except EngineError as error:
            raise _seen(error, folder) from error


def bytes_of(pieces: Sequence[Piece]) -> int:
    """Of all the tensors in them."""
    return sum(
        torch.Size(shape).numel() * dtype.itemsize
        for piece in pieces
        for shape, dtype in zip(piece.shapes, piece.dtypes, strict=True)
    )


def write_weights(pieces: Sequence[Piece], folder: Path | None) -> None:
    """The tensors as a checkpoint in safetensors, a file at a time in memory. Collective; None: only take part.

    A rank that cannot write takes part to the end, because the others wait for it, and fails then.
    """
    held: dict[str, Tensor] = {}
    files: dict[str, str] = {}
    failed: Exception | None = None

    def flush() -> None:
        if held:
            name = f"model-{len(set(files.values())) + 1:05d}.safetensors"
            save_file(held, str(folder and folder / name), metadata={"format": "pt"})
            files.update(dict.fromkeys(held, name))
            held.clear()

    for piece in pieces:
        keeps = folder is not None and failed is None
        try:
            made = piece.make(keeps)
            if not keeps or made is None:
                continue
            held.update({n: t.cpu().contiguous().clone() for n, t in zip(piece.names, made, strict=True)})
            if sum(tensor.nbytes for tensor in held.values()) >= SHARD_BYTES:
                flush()
        except Exception as error:  # of the disk, which safetensors says by an error of its own, or of memory
            failed = failed or error
    if failed is not None:
        raise failed
    if folder is not None:
        flush()
        table = {"metadata": {"total_size": bytes_of(pieces)}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(table), encoding="utf-8")


def write_untied(source: str, folder: str | os.PathLike[str]) -> None:
    """A copy of a model and its tokenizer whose head is a weight of its own, equal to the embeddings.

    vLLM on a CPU lays a head out for its products, and for models whose code there leaves out a tied head it keeps the
    one that it had at the start. Served like this the head follows the policy's.
    """
    model: Any = load_model(source, AutoModelForCausalLM, frozen=True)
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_weights(pieces_of(model), Path(folder))
    config = deepcopy(model.config)
    config.tie_word_embeddings = False
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    with suppress(OSError, ValueError):  # a model may have none
        processor_of(read_tokenizer(source)).save_pretrained(folder)


# -- who writes, who tells ----------------------------------------------------------------------


def _tells(own_engines: bool) -> bool:
    """Whether this rank tells an engine: the first of all, or each rank its own."""
    return own_engines or _place()[0] == 0


def _writes(own_engines: bool) -> bool:
    """Whether this rank writes: the first of all, or the first of each machine."""
    return (_local_rank() if own_engines else _place()[0]) == 0


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK") or 0)


def _for_all(folders: _Folders, size: int, own_engines: bool) -> Path:
    """A new folder, the same for all ranks that it is for. Collective."""
    made: Path | None = None
    with as_one("make a folder for the weights"):
        if _writes(own_engines):
            made = folders.new(size)
    rank, _ = _place()
    machine = rank - _local_rank() if own_engines else 0
    return next(folder for key, folder in on_all((machine, made)) if key == machine and folder is not None)


def _is_shared_out(model: nn.Module) -> bool:
    return holds_parts(model) and _place()[1] > 1


def _mark(model: nn.Module) -> Tensor:
    """Some numbers of each weight, by which those of another step are known."""
    return torch.cat([weight.detach().flatten()[:4].double().cpu() for weight in model.parameters()])


def _close(sync: WeightSync) -> None:
    close = getattr(sync, "close", None)
    if close is not None:
        close()


# -- vLLM's own transfer --------------------------------------------------------------------------


@dataclass(frozen=True)
class TransferApi:
    """What is used of `vllm.distributed.weight_transfer`."""

    trainer_init: Callable[..., Any]
    client: Callable[[str], Any]
    nccl: Callable[..., Any]
    ipc: Callable[..., Any]
    meta: Callable[[str, torch.dtype, tuple[int, ...]], Any]


def transfer_api() -> TransferApi:
    """vLLM's. ImportError with the way out where it is not installed beside the trainer."""
    place = "vllm.distributed.weight_transfer"
    try:
        module, nccl, ipc = (import_module(name) for name in (place, f"{place}.nccl_engine", f"{place}.ipc_engine"))
        return TransferApi(
            module.WeightTransferTrainerFactory.trainer_init, module.HTTPVLLMWeightSyncClient,
            nccl.NCCLTrainerInitInfo, ipc.IPCTrainerInitInfo, module.ParamMeta,
        )  # fmt: skip
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"weights go to vLLM over NCCL or IPC by vLLM's own code ({error}): {pip_install('vllm')} beside the "
            "trainer, or send them by vllm_weight_sync='folder'"
        ) from error


class PieceSource:
    """The policy's weights as vLLM's `WeightSource` has them; ranks iterate it in step."""

    def __init__(self, pieces: Callable[[], list[Piece]], meta: Callable[..., Any], device: torch.device) -> None:
        self._pieces, self._meta, self._device = pieces, meta, device
        self._left: list[Piece] = []

    def begin(self) -> None:
        """A new round: all pieces are to be made once."""
        self._left = self._pieces()

    def metadata(self) -> list[Any]:
        return [
            self._meta(name, dtype, shape)
            for piece in self._pieces()
            for name, dtype, shape in zip(piece.names, piece.dtypes, piece.shapes, strict=True)
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        if not self._left:
            self.begin()
        while self._left:
            piece = self._left.pop(0)
            for name, tensor in zip(piece.names, piece.make(True) or [], strict=True):
                yield name, tensor.to(self._device)

    def held_names(self) -> None:
        return None

    def drain(self) -> None:
        """Take part in what is left, for the other ranks, after the sending has failed here."""
        while self._left:
            self._left.pop(0).make(False)


@dataclass
class EngineSync:
    """vLLM's own trainer engine: one broadcast from the first rank to each server's workers, or shared memory of a GPU.

    The server was started with `--weight-transfer-config '{"backend": "nccl"}'` (or "ipc").
    """

    model: nn.Module
    urls: Sequence[str]
    backend: str = "nccl"
    """nccl: the engine has other GPUs; ipc: the same"""
    group_port: int = 51216
    """of the first server's group; that of the next is one higher"""
    workers: Sequence[int] = ()
    """processes of each server; (): one each"""
    address: str | None = None
    """where the servers' workers reach the first rank; None: as this machine reaches them"""
    mode: str = "wait"
    clients: Sequence[Any] = ()
    """those that tell the engines, for engines that have no address; (): over HTTP"""
    device: torch.device | None = None
    api: Callable[[], TransferApi] = transfer_api
    adapter: str | None = field(default=None, init=False)
    _open: list[tuple[PieceSource, Any]] = field(default_factory=list, init=False)
    _mark: Tensor | None = field(default=None, init=False)

    def push(self, engine: Engine, version: str) -> None:
        first = _place()[0] == 0
        with as_one("let vLLM rest"):
            if first:
                engine.pause(mode=self.mode)
        try:
            with as_one("stamp the weights"):
                if first:
                    engine.set_version(f"{version}-unfinished")
            with as_one("open the transfer to vLLM"):
                self._begin()
            for source, transfer in self._open:
                with as_one("send the weights to vLLM"):
                    _send(source, transfer)
            self._mark = None if _is_shared_out(self.model) else _mark(self.model)
            with as_one("stamp the weights"):
                if first:
                    engine.set_version(version)
        except BaseException:
            self.close()  # a group whose other side is gone is of no use
            if first:
                with suppress(EngineError):
                    engine.resume()
            raise
        with as_one("let vLLM go on"):
            if first:
                engine.resume()

    def again(self, engine: Engine, version: str) -> None:
        moved = self._mark is None or not torch.equal(self._mark, _mark(self.model))
        if moved or _place()[1] > 1:
            why = "the policy has others by now" if moved else "a transfer needs all processes"
            raise EngineError(
                f"the engine has lost the weights {version!r}, and {why}; resume the run from its last checkpoint"
            )
        self.close()  # the group of the engine that is gone
        self.push(engine, version)

    def close(self) -> None:
        for _, transfer in self._open:
            with suppress(Exception):
                transfer.shutdown()
        self._open = []

    def _begin(self) -> None:
        if self._open:
            return
        api, (rank, _) = self.api(), _place()
        device = self.device or next(self.model.parameters()).device
        told = self.clients or [api.client(url) for url in self.urls]
        for place, client in enumerate(told):
            source = PieceSource(lambda: pieces_of(self.model), api.meta, device)
            self._open.append((source, api.trainer_init(self._info(api, rank, place), client=client, source=source)))

    def _info(self, api: TransferApi, rank: int, place: int) -> Any:
        if self.backend == "ipc":
            return api.ipc(rank=rank, packed=True)
        workers = self.workers[place] if self.workers else 1
        return api.nccl(
            master_address=self.address or own_address(self.urls[place]),
            master_port=self.group_port + place, world_size=1 + workers, rank=rank, packed=True,
        )  # fmt: skip


def _send(source: PieceSource, transfer: Any) -> None:
    source.begin()
    try:
        transfer.send_weights()
    except Exception as error:
        source.drain()
        if isinstance(error, EngineError):
            raise
        raise EngineError(f"the transfer of weights to vLLM broke off: {type(error).__name__}: {error}") from error


def own_address(url: str) -> str:
    """The address of this machine that a server at `url` reaches it by."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((parts.hostname or "127.0.0.1", parts.port or 80))  # sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


class HandSync:
    """Whole weights handed to the engines that ranks have in their processes, one tensor after the other."""

    adapter = None
    own_engines = True

    def __init__(self, model: nn.Module, *, mode: str = "wait") -> None:
        self.model, self.mode = model, mode

    def push(self, engine: Engine, version: str) -> None:
        take = getattr(engine, "take_weights", None)
        if take is None:
            raise EngineError(
                f"{type(engine).__name__} takes no tensors: send the weights by vllm_weight_sync='folder'"
            )
        device = next(self.model.parameters()).device
        source = PieceSource(lambda: pieces_of(self.model), lambda *meta: meta, device)
        source.begin()
        with as_one("hand vLLM the weights"):
            try:
                _replace(engine, version, self.mode, lambda: take(iter(source)))
            except Exception:
                source.drain()
                raise

    def again(self, engine: Engine, version: str) -> None:
        raise EngineError(f"the engine in this process has lost the weights {version!r}; resume the run")


# -- the choice -----------------------------------------------------------------------------------

WAYS = ("auto", "adapter", "nccl", "ipc", "memory", "folder")


def make_sync(
    model: nn.Module,
    way: str = "auto",
    *,
    urls: Sequence[str] = (),
    folder: str | os.PathLike[str] | None = None,
    max_rank: int | None = None,
    workers: Sequence[int] = (),
    group_port: int = 51216,
    own_engines: bool = False,
    clients: Sequence[Any] = (),
    mode: str = "wait",
) -> WeightSync:
    """How the weights of `model` reach the engine. ValueError for a way that cannot be gone.

    way: auto: an adapter where that is what is trained and vLLM can serve it; else whole weights: over NCCL from a GPU
    to a server, in a folder from a CPU, by hand to an engine of one process in this one. urls: of servers. max_rank,
    workers: what the engines say of themselves. own_engines: each rank has one in its process. clients: see
    `EngineSync`.
    """
    if way not in WAYS:
        raise ValueError(f"vllm_weight_sync={way!r}: choose among {', '.join(map(repr, WAYS))}")
    why = unserved_adapter(model, max_rank)

    def whole_weights() -> WeightSync:
        found = _whole_way(model, way, urls, workers, own_engines)
        if found == "memory":
            return HandSync(model, mode=mode)
        if found == "folder":
            return FolderSync(model, folder, own_engines=own_engines, mode=mode)
        return EngineSync(model, urls, found, group_port=group_port, workers=workers, mode=mode, clients=clients)

    if way == "adapter" and why is not None:
        raise ValueError(
            f"vllm_weight_sync='adapter': {why}, which vLLM cannot load as an adapter; leave it 'auto', and whole "
            "weights are sent"
        )
    if way == "adapter" or (way == "auto" and why is None):
        otherwise = whole_weights if way == "auto" else None
        return AdapterSync(model, folder, own_engines=own_engines, mode=mode, otherwise=otherwise)
    if way == "auto" and hasattr(below_value_head(model), "peft_config") and not _place()[0]:
        logger.warning("vLLM cannot load the adapter (%s): it gets the merged weights whole", why)
    return whole_weights()


def _whole_way(model: nn.Module, way: str, urls: Sequence[str], workers: Sequence[int], own_engines: bool) -> str:
    kind = next(model.parameters()).device.type
    if way in ("nccl", "ipc") and kind != "cuda":
        raise ValueError(
            f"vllm_weight_sync={way!r}: the policy is on {kind}, and vLLM transfers weights from GPUs only; take "
            "'folder'"
        )
    if way == "memory" and not own_engines:
        raise ValueError("vllm_weight_sync='memory': a server is another process; take 'folder', or 'nccl' from a GPU")
    if way not in ("auto", "adapter"):
        return way
    if own_engines:
        return "memory" if max(workers, default=1) == 1 else "folder"
    return "nccl" if urls and kind == "cuda" else "folder"
