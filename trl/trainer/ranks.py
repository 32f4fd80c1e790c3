"""Many processes: what they must agree on, and what is said when one of them fails, hangs or is lost."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from trl.models.unwrap import below_accelerate
from trl.trainer.checkpoints import Run, data_fingerprint
from trl.trainer.run_record import versions

logger = logging.getLogger(__name__)

ERROR_FILE, RESTARTS = "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RESTART_COUNT"
"""environment variables that torchrun sets in the processes that it starts"""


def several() -> bool:
    """Whether this process is one of several of a run."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


# -- sharded or not ------------------------------------------------------------------------------

WHOLE_ON_A_CPU = (
    "accelerate shares weights out over accelerators only; here on the CPU every process holds the whole model, as "
    "with ddp"
)


def say_unsharded(accelerator: Any) -> None:
    """One line where FSDP was asked for, by a config or by the launcher, and accelerate does not turn it on."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"  # a config's plugin sets it too
    if asked and accelerator.distributed_type.value != "FSDP" and accelerator.is_main_process:
        on_cpu = accelerator.device.type == "cpu"
        why = WHOLE_ON_A_CPU if on_cpu else "it is not turned on: start one process for each GPU with `torchrun`"
        logger.warning("fsdp: %s", why)


# -- agreement -----------------------------------------------------------------------------------

MAY_DIFFER = (
    "output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "log_level", "log_on_each", "hub_",
    "push_to_hub", "local_rank", "debug", "resume_", "dataloader_num_workers", "dataloader_pin", "dataloader_prefetch",
    "dataloader_persistent", "dataset_num_proc", "ddp_timeout", "ddp_backend", "save_on_each_node", "tracker_",
    "project_", "exp_name", "logdir", "log_with", "accelerator_kwargs", "num_completions_to_print", "trackio_", "_",
)  # fmt: skip
"""beginnings of the names of settings that a process may have for itself"""
SAME_SETTINGS = "give every process the same settings"
WAYS_OUT = {
    "trainer": "start the same script in every process",
    "model": "give every process the same model",
    "train data": "let every process load the same rows in the same order; the loader shares them out",
    "eval data": "let every process load the same rows in the same order; the loader shares them out",
}
"""what an error says to do about a difference, where that is not in the settings"""
PACKAGES = ("trl", "torch", "transformers", "accelerate", "peft", "deepspeed")
"""packages whose versions must be the same"""
PROBES = 64
"""numbers of each weight that are compared"""
FRESH_SHARE = 0.5
"""of the weights: what a new head or adapter has at most"""


def check_agreement(
    run: Run, config: Any, model: nn.Module, frozen: Sequence[nn.Module] = (), eval_rows: Any = None
) -> None:
    """Collective. ValueError, on every process, where processes differ in what they must have in common.

    run, config: what is trained, on what, with which settings. frozen: models that nobody sends to the others: a
    reference, a teacher. Where only weights differ that are new, a head or an adapter, all take those of rank 0.
    """
    if not several():
        return
    sets = eval_rows if isinstance(eval_rows, Mapping) else {"": eval_rows}
    data = {"train data": run.settings.get("data"), "eval data": [data_fingerprint(rows) for rows in sets.values()]}
    facts = {**run.identity, **_versions(), **data, **_known_settings(config)}
    _compare({name: value for name, value in facts.items() if not _is_place(value)})
    _take_new_weights(model, _differing_weights(model, "the trained model"))
    for one in frozen:
        _differing_weights(one, "a frozen model")


def _versions() -> dict[str, str]:
    return {name: found for name, found in versions().items() if name in PACKAGES}


def _known_settings(config: Any) -> dict[str, Any]:
    """The settings of fields that this library or transformers knows; a user's own may say anything."""
    if not is_dataclass(config) or isinstance(config, type):
        return {}
    known = set()
    for kind in type(config).__mro__:
        if kind.__module__.partition(".")[0] in ("trl", "transformers") and is_dataclass(kind):
            known |= {entry.name for entry in fields(kind)}
    given: dict[str, Any] = config.to_dict()  # type: ignore[attr-defined]
    kept = {name: value for name, value in given.items() if name in known and not name.startswith(MAY_DIFFER)}
    return json.loads(json.dumps(kept, default=lambda value: type(value).__name__))


def _is_place(value: Any) -> bool:
    """Whether a value is a path, which may be another one on another machine."""
    return isinstance(value, str) and os.path.isabs(value)


def _compare(facts: Mapping[str, Any]) -> None:
    found = _gathered(dict(facts))
    names = dict.fromkeys(name for each in found for name in each)
    differing = [name for name in names if any(each.get(name) != found[0].get(name) for each in found)]
    if not differing:
        return
    name, *others = differing
    values = [each.get(name) for each in found]
    also = f" ({', '.join(others[:4])}{', ...' if len(others) > 4 else ''} differ too)" if others else ""
    way_out = WAYS_OUT.get(name, SAME_SETTINGS)
    if name in PACKAGES:
        way_out = "install the same versions on every machine"
    raise ValueError(f"{name}: the processes of this run differ: {_by_rank(values)}{also}; {way_out}")


def _by_rank(values: Sequence[Any]) -> str:
    """`1 on ranks 0-2, 3 on rank 3`."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(repr(value), []).append(rank)
    return ", ".join(f"{value} on {_ranks(found)}" for value, found in ranks.items())


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}-{ranks[-1]}"
    listed = ", ".join(map(str, ranks[:6]))
    return f"ranks {listed}{', ...' if len(ranks) > 6 else ''}"


def _take_new_weights(model: nn.Module, names: Sequence[str]) -> None:
    """Collective: give these weights the values of rank 0, as DDP does; other engines would mix them."""
    if not names:
        return
    own, device = dict(below_accelerate(model).named_parameters()), PartialState().device
    with torch.no_grad():
        for name in names:
            weight = own[name].detach().to(device).contiguous()
            dist.broadcast(weight, 0)
            own[name].copy_(weight)
    if not dist.get_rank():
        more = f" and of {len(names) - 1} more" if len(names) > 1 else ""
        logger.warning("%s%s: new weights differ between the processes; all take those of rank 0", names[0], more)


def _differing_weights(model: nn.Module, what: str) -> list[str]:
    """Collective: names of the weights in which processes differ, by a few numbers of each; shards are not compared.

    ValueError where those are most of the model.
    """
    weights = dict(below_accelerate(model).named_parameters())
    whole = bool(weights) and all(_is_whole(weight) for weight in weights.values())
    mine = torch.stack([_probe(weight) for weight in weights.values()]) if whole else None
    codes = _gathered(None if mine is None else sha256(mine.numpy().tobytes()).hexdigest())
    if None in codes or len(set(codes)) == 1:
        return []
    probes = _gathered(mine)
    near = torch.stack([torch.isclose(each, probes[0], rtol=1e-3, atol=1e-6, equal_nan=True) for each in probes])
    names = [name for name, equal in zip(weights, near.all(0), strict=True) if not equal]
    if sum(weights[name].numel() for name in names) > FRESH_SHARE * sum(each.numel() for each in weights.values()):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(
            f"{names[0]}{more}: the processes of this run differ in the weights of {what}; load the same files in "
            "every process, or set the same seed (transformers.set_seed) before a model is made"
        )
    return names


def _gathered(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _is_whole(weight: Tensor) -> bool:
    sharded = isinstance(weight, DTensor) or hasattr(weight, "ds_id")
    return not sharded and not weight.is_meta and weight.numel() > 0


def _probe(weight: Tensor) -> Tensor:
    """A number that another weight hardly has: some of its values, weighted by their places. []"""
    flat = weight.detach().reshape(-1)
    some = flat[:: max(1, len(flat) // PROBES)].to("cpu", torch.float64)
    return (some * torch.arange(1, len(some) + 1, dtype=torch.float64)).sum()


# -- a restart -----------------------------------------------------------------------------------


def restarts() -> int:
    """How often the launcher has started the processes of this run once more."""
    count = os.environ.get(RESTARTS, "0")
    return int(count) if count.isdigit() else 0


def join_again(backend: str | None = None, seconds: float | None = None) -> None:
    """Join the processes after a restart, before accelerate does.

    The launcher's store outlives a restart (torch 2.13), and the addresses of processes that are gone with it: a
    process that reads one of them fails, or waits for ever. So each restart has keys of its own.
    """
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and "MASTER_PORT" in os.environ
    if not restarts() or not kept or dist.is_initialized():
        return
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    limit = timedelta(seconds=TrainingArguments.ddp_timeout if seconds is None else seconds)
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    store = dist.PrefixStore(f"restart-{restarts()}", dist.TCPStore(*address, world, is_master=False, timeout=limit))
    on_gpus = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true")
    chosen = backend or ("cuda:nccl,cpu:gloo" if on_gpus else "gloo")
    dist.init_process_group(chosen, store=store, rank=rank, world_size=world, timeout=limit)


def after_restart(resume: Any, folder: str | os.PathLike[str] | None) -> Any:
    """What to resume from: where a launcher has started the processes once more, the newest whole checkpoint."""
    count = restarts()
    if not count or folder is None:
        return resume
    if resume and resume is not True and Path(resume).resolve().parent != Path(folder).resolve():
        logger.warning(
            "restart %s: resume_from_checkpoint=%s lies elsewhere, so the run begins there again", count, resume
        )
        return resume
    if int(os.environ.get("RANK", "0")) == 0:
        logger.warning("restart %s: the run goes on from the newest whole checkpoint in %s", count, folder)
    return True


# -- errors --------------------------------------------------------------------------------------

OF_RANKS = re.compile(r"gloo/|gloo |NCCL|ProcessGroup|pair closure", re.IGNORECASE)
"""what an error of communication says of where it comes from"""
LATE = re.compile(r"time(d )?.?out", re.IGNORECASE)


def _is_of_ranks(error: BaseException) -> bool:
    """Whether a process found that another one does not answer; a reward function's own errors say who they are."""
    if not isinstance(error, RuntimeError) or str(error).startswith("reward function"):
        return False
    return isinstance(error, dist.DistError) or bool(OF_RANKS.search(str(error)))


class LostRank(RuntimeError):
    """Another process of the run has failed, hangs or is gone; the text says which, and what it was doing."""


def record_error(error: BaseException, secondary: bool = False) -> None:
    """Write the error where the launcher reads it, once: torchrun and `trl` show the first one of all processes.

    secondary: another process failed first.
    """
    place = os.environ.get(ERROR_FILE)
    if not place or os.path.exists(place):
        return
    line = f"{type(error).__name__}: {' '.join(str(error).split())}"
    stack = "".join(traceback.format_exception(error))
    extra = {"py_callstack": f"{line}\n{stack}", "timestamp": str(int(time.time()))}
    text = {"message": {"message": line, "extraInfo": extra}, "time": time.time(), "secondary": secondary}
    with suppress(OSError):
        Path(place).write_text(json.dumps(text), encoding="utf-8")


# -- what each process is doing ------------------------------------------------------------------

SITE = tuple({os.path.dirname(os.path.dirname(torch.__file__)), os.path.dirname(os.__file__)})
"""folders of installed packages and of Python's own modules"""
OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GRACE = 10.0
"""seconds that a process has to end by itself when another one has failed"""


@dataclass(frozen=True)
class Note:
    """What a process was doing when it last wrote."""

    number: int
    step: int
    place: str
    seconds: float
    """for how long it has been doing that"""
    waits: bool
    """for other processes"""
    theirs: bool
    """in a function of the user"""

    def text(self) -> str:
        return f"{self.place} for {self.seconds:.0f} s (step {self.step})"


def late(notes: Mapping[int, Note]) -> str:
    """What those were doing that keep others waiting: processes in code of the user, or else outside of collectives."""
    some = {rank: note for rank, note in notes.items() if note.theirs and not note.waits}
    some = some or {rank: note for rank, note in notes.items() if not note.waits} or dict(notes)
    shown = [f"rank {rank} has been {note.text()}" for rank, note in sorted(some.items())[:4]]
    return "; ".join(shown or ["they say nothing"]) + ("; ..." if len(some) > 4 else "")


def doing(frame: FrameType | None) -> tuple[str, bool, bool]:
    """The innermost function of the user, or else of ours; whether it waits for others; whether it is the user's."""
    ours, waits = None, False
    while frame is not None:
        file = frame.f_code.co_filename
        waits = waits or f"torch{os.sep}distributed" in file
        if file == __file__:
            pass
        elif file.startswith(OURS + os.sep):
            ours = ours or frame
            if frame.f_code.co_name == "train":  # what lies further out has called us
                break
        elif not file.startswith(SITE) and not file.startswith("<"):
            return _place(frame), waits, True
        frame = frame.f_back
    return ("between steps" if ours is None else _place(ours)), waits, False


def _place(frame: FrameType) -> str:
    code = frame.f_code
    return f"in {code.co_name} ({os.path.basename(code.co_filename)}, line {frame.f_lineno})"


class Watch:
    """Writes every few seconds into the group's store what this process is doing, and reads what others do."""

    count = 0
    """runs that this process has watched: each has keys of its own"""

    def __init__(self, step: Callable[[], int]):
        Watch.count += 1
        base = dist.distributed_c10d._get_default_store()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.timeout = base.timeout.total_seconds()
        self.interval = min(2.0, max(0.2, self.timeout / 10))
        store = base.clone()  # a connection of its own: the main thread may be waiting in the other
        store.set_timeout(timedelta(seconds=5))
        self._store = dist.PrefixStore(f"trl/{restarts()}/{Watch.count}", store)
        self._step, self._main = step, threading.get_ident()
        self._number, self._since, self._before = 0, time.monotonic(), ("", -1)
        self._over, self._said = threading.Event(), False
        self._seen: str | None = None
        """what the first process that failed has said, if it is another one"""
        self._thread = threading.Thread(target=self._beat, name="trl-watch", daemon=True)

    def begin(self) -> None:
        self._write()
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join(timeout=10)

    def _note(self) -> Note:
        place, waits, theirs = doing(sys._current_frames().get(self._main))
        step = self._step()
        here = (place.partition(", line")[0], step)
        if here != self._before:
            self._before, self._since = here, time.monotonic()
        self._number += 1
        return Note(self._number, step, place, time.monotonic() - self._since, waits, theirs)

    def _write(self) -> Note:
        note = self._note()
        self._store.set(f"doing/{self.rank}", json.dumps(vars(note)))
        return note

    def _beat(self) -> None:
        failed = math.inf
        while not self._over.wait(self.interval):
            if time.monotonic() - failed > GRACE:
                self._end_process()
            try:
                note = self._write()
                if self._seen is None and self.first_failure() is not None:
                    failed = time.monotonic()
                    self._store.set(f"left/{self.rank}", "1")
                elif not self._said and not self.rank and note.seconds > 0.9 * self.timeout:
                    self._said = True
                    logger.warning("step %s does not end: %s", note.step + 1, late({0: note, **self.notes()}))
            except (RuntimeError, ValueError):  # the store is gone: its process has ended
                if self._seen is None:
                    return

    def _end_process(self) -> None:
        """End this process, which waits for one that has failed, or computes what nobody will need."""
        error = LostRank(f"{self._seen} (this one, rank {self.rank}, is ended)")
        record_error(error, secondary=True)
        if not self._over.is_set():
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(1)

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process fails, unless another one was first, and that they need not wait for it."""
        line = f"rank {self.rank} failed first: {type(error).__name__}: {' '.join(str(error).split())[:2000]}"
        with suppress(RuntimeError, ValueError):
            self._store.compare_set("failed", "", line)
            self._store.set(f"left/{self.rank}", "1")
            if not self.rank and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # the store ends with us
                others = [f"left/{rank}" for rank in range(1, self.world)]
                until = time.monotonic() + 3 * self.interval
                while not self._store.check(others) and time.monotonic() < until:
                    time.sleep(0.1)

    def first_failure(self) -> str | None:
        """What the first process that failed has said, if it is another one."""
        if self._seen is None and self._store.check(["failed"]):
            text = self._store.get("failed").decode()
            self._seen = None if text.startswith(f"rank {self.rank} ") else text
        return self._seen

    def notes(self) -> dict[int, Note]:
        """The last note of each other process."""
        keys = {rank: f"doing/{rank}" for rank in range(self.world) if rank != self.rank}
        there = {rank: key for rank, key in keys.items() if self._store.check([key])}
        return {rank: Note(**json.loads(self._store.get(key))) for rank, key in there.items()}

    def explained(self, error: BaseException) -> LostRank:
        """An error of communication, by what the other processes did."""
        try:
            first = self._awaited_failure()
            if first is not None:
                return LostRank(first)
            if LATE.search(str(error)):
                return LostRank(
                    f"rank {self.rank} has waited {self.timeout:.0f} s (ddp_timeout) for the others: "
                    f"{late(self.notes())}; if that may take so long, raise ddp_timeout"
                )
            return LostRank(self._of_lost())
        except (RuntimeError, ValueError):
            return LostRank("rank 0, which keeps the store of this run, is gone: its own output says why")

    def _awaited_failure(self) -> str | None:
        for _ in range(5):  # who fails says so before its connections close, but the two go different ways
            first = self.first_failure()
            if first is not None:
                return first
            time.sleep(0.1)
        return None

    def _of_lost(self) -> str:
        before = self.notes()
        time.sleep(2.5 * self.interval)
        now = self.notes()
        silent = [rank for rank, note in before.items() if now[rank].number == note.number]
        lost = [rank for rank in silent if not self._store.check([f"left/{rank}"])]
        if not lost:
            return f"rank {self.rank} has lost its connection to the others: another process says why"
        said = "; ".join(f"rank {rank} is gone: it was {now[rank].text()}" for rank in lost[:4])
        return f"{said}; killed from outside (out of memory?) or crashed: its own output and `dmesg` say more"


def _take_timeout(seconds: float | None) -> None:
    """Let collectives end after a `ddp_timeout` that is not the default; transformers tells it to no group of a CPU."""
    store = dist.distributed_c10d._get_default_store()
    if seconds is None or seconds in (store.timeout.total_seconds(), TrainingArguments.ddp_timeout):
        return
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))
    store.set_timeout(timedelta(seconds=seconds))


@contextmanager
def watched(step: Callable[[], int], ddp_timeout: float | None = None) -> Iterator[None]:
    """Within, an error of one process ends all of them, and each one says what came first. Nothing for one process."""
    if not several() or dist.distributed_c10d._get_default_store() is None:  # MPI has none
        yield
        return
    _take_timeout(ddp_timeout)
    watch = Watch(step)
    watch.begin()
    try:
        yield
    except Exception as error:
        if _is_of_ranks(error):
            lost = watch.explained(error)
            watch.fail(lost)
            record_error(lost, secondary=True)
            raise lost from error
        watch.fail(error)
        record_error(error)
        raise
    finally:
        watch.end()


def first_cause(failures: Mapping[int, Any]) -> tuple[int, str]:
    """The rank that failed first and its message, of the failures that torchrun reports."""

    def order(rank: int) -> tuple[bool, float]:
        one = failures[rank]
        found, ended = one.error_file_data, one.exitcode == -signal.SIGTERM  # by the launcher
        return bool(found.get("secondary")) or ended, float(found.get("time", one.timestamp + 0.999))  # whole seconds

    rank = min(failures, key=order)
    failure = failures[rank]
    message = failure.message
    text = message.get("message", "") if isinstance(message, dict) else str(message)
    if failure.exitcode < 0:
        killed = "; out of memory?" if failure.exitcode == -signal.SIGKILL else ""
        text = f"it was ended by {failure.signal_name()}{killed}"
    elif not isinstance(message, dict):
        text = f"it ended with exit code {failure.exitcode}; its own output says why"
    text = " ".join(text.split())
    told = re.search(r"rank (\d+) failed first: (.*)", text)  # the launcher may have ended that one meanwhile
    return (int(told[1]), told[2]) if told else (rank, text)
