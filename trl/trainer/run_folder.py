"""The folder that a run writes into: it belongs to one live run, and to one run's checkpoints and records."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from trl.models.weight_files import SAVING
from trl.trainer.checkpoints import PREFIX, checkpoints, is_finished, remove
from trl.trainer.tally import METRICS

logger = logging.getLogger(__name__)

LOCK = ".lock"
RECORDS = ("rollouts", "unscored", "trace")
"""folders of what a run has sampled, and of its steps"""
RECORD, CONFIG, REPORT, PLAN = "run.json", "config.yaml", "report.html", "plan.json"
"""files of a run's folder: what the run is and how it ended, its settings, its report, what `trl plan` expected"""
EARLIER = "earlier-"
"""a folder with the records of a run that left no checkpoint, followed by a number"""
_held: set[int] = set()
"""file descriptors of the locks that this process holds"""


class FolderInUse(ValueError):
    """Another run writes into the folder, or its checkpoints are there."""


def check_writable(folder: str | os.PathLike[str]) -> None:
    """ValueError where a run could not write into a folder, before it has cost anything; nothing stays of the try."""
    place, new = Path(os.path.abspath(folder)), list[Path]()
    for last in (False, True):
        try:
            new = [path for path in (place, *place.parents) if not path.exists()]
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                return
        except OSError as error:
            if last or not isinstance(error, FileNotFoundError):  # another run that tried the same has tidied up
                raise _not_writable(folder, error) from error
        finally:
            for path in new:
                with suppress(OSError):
                    path.rmdir()


def _not_writable(folder: str | os.PathLike[str], error: OSError) -> ValueError:
    return ValueError(f"{str(folder)!r} cannot be written ({error.strerror or error}): give a folder that can")


# -- one live run --------------------------------------------------------------------------------


def _lock_file(descriptor: int) -> None:
    """OSError if another process holds the lock. The kernel gives it free when its process dies."""
    if os.name == "nt":
        import msvcrt

        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # far behind what the file says, which others may read
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _leave_locks() -> None:
    """In a forked child: a lock is its parent's, and must not outlive it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_locks)


def _acquire(folder: Path) -> int | None:
    """The descriptor of the folder's lock; None where the file system has no locks. `FolderInUse`, or OSError."""
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock_file(descriptor)
        except OSError as error:
            who = os.read(descriptor, 200).decode(errors="replace") if os.name != "nt" else ""
            os.close(descriptor)
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK):
                logger.warning("%s: its file system has no locks (%s); nothing keeps a second run out", folder, error)
                return None
            raise FolderInUse(
                f"another run writes into {str(folder)!r}{f' ({who})' if who else ''}: wait for its end, or write into "
                "another folder"
            ) from None
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        except FileNotFoundError:
            pass
        os.close(descriptor)  # the run before has just removed it
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    _held.add(descriptor)
    return descriptor


def _release(folder: Path, descriptor: int) -> None:
    if descriptor not in _held:
        return
    _held.discard(descriptor)
    with suppress(OSError):  # Windows removes no open file
        (folder / LOCK).unlink(missing_ok=True)  # while it is held: nobody else has it
    os.close(descriptor)


def is_live(folder: str | os.PathLike[str]) -> bool:
    """Whether a process on this machine holds the folder's lock: a run writes there now."""
    try:
        descriptor = os.open(Path(folder) / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        _lock_file(descriptor)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


# -- who is told ---------------------------------------------------------------------------------


@dataclass
class RunFacts:
    """What a callback cannot know: which trainer runs, and on what."""

    trainer: str
    args: TrainingArguments | None = None
    resumes: bool = False
    """the run goes on with what is in its folder"""
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    """of each data set what is known of it"""


class RunListener:
    """A callback that is also told, on the first process, when a run has its folder and how it ends."""

    def begin_run(self, facts: RunFacts) -> None:
        """The folder is locked; nothing is computed yet."""

    def planned(self, facts: Mapping[str, Any]) -> None:
        """What the run will need is predicted, and what its settings left open is chosen."""

    def end_run(self, error: BaseException | None) -> None:
        """The run is over, by this error if there is one; the folder is still locked."""


@contextmanager
def told(callbacks: Sequence[Any], facts: Callable[[], RunFacts]) -> Iterator[None]:
    """Tell the listeners among the callbacks when the block begins and how it ends."""
    listeners = [each for each in callbacks if isinstance(each, RunListener)] if PartialState().is_main_process else []
    for each in listeners:
        each.begin_run(facts())
    try:
        yield
    except BaseException as error:
        for each in listeners:
            each.end_run(error)
        raise
    for each in listeners:
        each.end_run(None)


# -- what is in it -------------------------------------------------------------------------------


class RunFolder:
    """A run's folder. `held` locks it while the run writes; the first process does so for all."""

    def __init__(
        self,
        prefix: str = PREFIX,
        is_old: Callable[[Path], bool] = lambda folder: False,
        resume: str = "resume_from_checkpoint=True",
    ):
        """resume: what a message says to go on with a checkpoint."""
        self._prefix, self._is_old, self._resume = prefix, is_old, resume
        self.own: set[Path] = set()
        """checkpoints that this object's runs have written"""
        self.own_metrics: int | None = None
        """where the lines of this object begin in `metrics.jsonl`; None before the first"""

    def goes_on(self, resume: bool | str | os.PathLike[str] | None, folder: str | os.PathLike[str]) -> bool:
        """Whether a run that resumes so goes on with what is in `folder`, and not with a checkpoint from elsewhere."""
        if not resume or resume is True:
            return bool(resume)
        path, place = Path(resume).resolve(), Path(folder).resolve()
        return place in (path, path.parent)

    @contextmanager
    def held(
        self,
        folder: str | os.PathLike[str],
        *,
        resumes: bool,
        overwrite: bool,
        asked: bool = False,
        root: str | os.PathLike[str] | None = None,
    ) -> Iterator[None]:
        """Try the folder for writing and lock it. ValueError, on all processes, where it is in use or not writable.

        resumes: the run goes on with a checkpoint of `folder`. If not, another run's checkpoints there are refused, or
        removed with `overwrite`, or named where a checkpoint from elsewhere was `asked` for; records of a run that left
        no checkpoint are put aside. root: where the lock and the
        records are, if not in `folder`.
        """
        top, place = Path(root or folder), Path(folder)
        answer: list[Any] = [None]
        descriptor = None
        if PartialState().is_main_process:
            try:
                descriptor = self._begin(top, place, resumes, overwrite, asked)
            except (ValueError, OSError) as error:
                answer[0] = str(error)
        broadcast_object_list(answer)
        if answer[0] is not None:
            raise FolderInUse(answer[0])
        try:
            yield
        finally:
            if descriptor is not None:
                self.own |= {path.resolve() for path in checkpoints(place, self._prefix)}
                _release(top, descriptor)

    def _begin(self, top: Path, place: Path, resumes: bool, overwrite: bool, asked: bool) -> int | None:
        try:
            top.mkdir(parents=True, exist_ok=True)
            descriptor = _acquire(top)
        except OSError as error:
            raise _not_writable(top, error) from error
        try:
            if not resumes:
                self._clear(top, place, overwrite, asked)
        except BaseException:
            if descriptor is not None:
                _release(top, descriptor)
            raise
        return descriptor

    def _clear(self, top: Path, place: Path, overwrite: bool, asked: bool) -> None:
        found = [path for path in checkpoints(place, self._prefix) if path.resolve() not in self.own]
        others = [path for path in found if is_finished(path) or self._is_old(path)]
        if others and asked and not overwrite:
            logger.warning(
                "%s holds %s of another run than the checkpoint that this one goes on with: `save_total_limit` counts "
                "it, and a checkpoint of the same number replaces it",
                top,
                others[-1].name,
            )
            return
        if others and not overwrite:
            raise FolderInUse(
                f"{str(top)!r} holds {others[-1].name} of another run: go on with it by {self._resume}, remove it "
                "by overwrite_output_dir=True, or write into another folder"
            )
        for path in others:
            remove(path)
        if self.own or self.own_metrics == 0:
            return  # the same trainer trains once more: its records stay
        records = [top / name for name in RECORDS if any((top / name).glob("**/*.parquet"))]
        if overwrite:
            for path in records:
                remove(path)
            for name in (RECORD, REPORT):  # `config.yaml` may be the user's
                (top / name).unlink(missing_ok=True)
        else:
            self._put_aside(top, records)

    def _put_aside(self, top: Path, records: list[Path]) -> None:
        """Move what an earlier run has left, which left no checkpoint, and what it has logged."""
        metrics = top / METRICS
        logged = metrics.read_bytes()[: self.own_metrics] if metrics.is_file() else b""
        if not records and not logged.strip():
            return
        number = max((int(path.name.removeprefix(EARLIER)) for path in _earlier(top)), default=0) + 1
        aside = top / f"{EARLIER}{number}"
        aside.mkdir()
        for path in records:
            os.rename(path, aside / path.name)
        for name in (RECORD, REPORT):
            if (top / name).is_file():
                os.rename(top / name, aside / name)
        if logged:
            (aside / METRICS).write_bytes(logged)
        names = [*(path.name for path in records), *([METRICS] if logged else [])]
        logger.warning("%s of an earlier run, which left no checkpoint: now in %s", " and ".join(names), aside)

    def begin_metrics(self, folder: str | os.PathLike[str], upto: int | None) -> None:
        """Leave in `metrics.jsonl` what a run has logged up to the step that it goes on from.

        upto: that step; None: a new run, before which only this object's own lines stay.
        """
        path, lines = Path(folder) / METRICS, []
        if path.exists():
            kept = path.read_bytes()[0 if upto is not None else self.own_metrics or 0 :] if self._keeps(upto) else b""
            lines = [line for line in kept.decode(errors="replace").splitlines() if upto is None or _upto(line, upto)]
            beside = path.with_name(f"{SAVING}{METRICS}")
            beside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            os.replace(beside, path)
        self.own_metrics = 0

    def _keeps(self, upto: int | None) -> bool:
        return upto is not None or self.own_metrics is not None

    def mark_metrics(self, folder: str | os.PathLike[str]) -> None:
        """Called before this object's first line."""
        path = Path(folder) / METRICS
        self.own_metrics = path.stat().st_size if path.exists() else 0


def _earlier(top: Path) -> list[Path]:
    return [path for path in top.glob(f"{EARLIER}*") if path.name.removeprefix(EARLIER).isdigit()]


def _upto(line: str, step: int) -> bool:
    """Whether a line was logged up to a step; not the summary at the end of a run, nor one that a kill has torn."""
    try:
        logged = json.loads(line)
        return logged["step"] <= step and "train_runtime" not in logged
    except (ValueError, KeyError, TypeError):
        return False
