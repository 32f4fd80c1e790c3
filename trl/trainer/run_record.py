"""What a folder says of its run: `run.json` (what it is, on what, how it ended) and `config.yaml` (its settings)."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, fields, is_dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl.data.any_text import encodable
from trl.models.weight_files import SAVING
from trl.models.zero import elements
from trl.trainer.run_folder import CONFIG, PLAN, RECORD, RunFacts, RunListener
from trl.trainer.settings import OfForm, WholeOfForm
from trl.trainer.signals import TERMINATED

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "tokenizers", "numpy")
OURS = "# The settings of a run of trl"
"""how the first line of each `config.yaml` of ours begins"""
OTHER_CONFIG = "config-of-run.yaml"
"""where the settings go if a `config.yaml` of the user's is there"""
DERIVED = ("remove_unused_columns", "debug", "dataloader_pin_memory")
"""fields that configs set by themselves, whatever they were given"""
SECRET = ("hub_token", "access_token", "auth_token", "password", "api_key", "secret")
"""ends of the names of settings whose values are not written"""


# -- circumstances -------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Of this package, Python, the platform, and the packages that a run depends on."""
    import trl

    found = {"trl": trl.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def peak_memory() -> int:
    """The most bytes that this process has held in main memory; 0 where the system does not say."""
    with suppress(OSError, ValueError, IndexError):  # Linux; `getrusage` there counts what the parent held too
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


def peak_device_memory() -> int | None:
    """The most bytes that torch has held on this process's GPU; None without one. Nothing waits for the device."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() and torch.cuda.is_initialized() else None


def command_line(words: Sequence[str]) -> str:
    """The words as one line for a shell, without the values of secrets."""
    shown: list[str] = []
    for word in words:
        name, equals, _ = word.partition("=")
        if shown and _is_secret(shown[-1]) and not word.startswith("--"):
            shown.append("...")
        else:
            shown.append(f"{name}=..." if equals and _is_secret(name) else word)
    return shlex.join(shown)


def _is_secret(name: str) -> bool:
    return name.startswith("--") and _names_secret(name[2:])


def _names_secret(name: str) -> bool:
    return name.replace("-", "_").lower().endswith(SECRET)


def write_whole(path: Path, text: str) -> None:
    """Write beside, then rename: the file is never half written. OSError if that cannot be."""
    beside = path.with_name(f"{SAVING}{path.name}")
    try:
        beside.write_text(encodable(text), encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error


# -- settings ------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A setting as YAML and JSON know it; another object as a text."""
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):  # subclasses, which YAML does not know, become what they are
        if isinstance(value, kind):
            return kind(value)
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one) for one in value]
    return str(value)


class Resolved:
    """A setting of a run: its default, what it was given as, and what it became."""

    def __init__(self, name: str, default: Any, given: Any, now: Any, is_written: bool = True):
        """is_written: whether it can be given again; else its default would count as given."""
        self.name, self.default, self.given, self.now, self.is_written = name, default, given, now, is_written

    @property
    def differs(self) -> bool:
        return bool(self.given != self.default)


def resolved(settings: Sequence[Any]) -> Iterator[Resolved]:
    """Each field of the dataclasses, secrets left out; `given` can be read again in place of `now`."""
    seen = {"config"}
    for one in settings:
        # a `PPOConfig` answers for its arguments, which were asked for other values
        asked = one.asked if hasattr(type(one), "asked") else None
        for entry in fields(one):
            if not entry.init or entry.name in seen or _names_secret(entry.name):
                continue
            seen.add(entry.name)
            default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
            of_form = isinstance(default, OfForm | WholeOfForm)
            derived, written = of_form or entry.name in DERIVED, not of_form or entry.name in (asked or ())
            default = plain(None if default is MISSING else default)
            now = plain(getattr(one, entry.name))
            yield Resolved(entry.name, default, _given(entry.name, default, now, asked, derived), now, written)


def _given(name: str, default: Any, now: Any, asked: Mapping[str, Any] | None, derived: bool) -> Any:
    """The value to be read again: not one that is derived of others, which would be given twice then."""
    if asked is None:
        return now
    if name not in asked:
        return default if default is None or derived else now
    told = plain(asked[name])
    if derived:
        return told
    changed_later = isinstance(now, int | float) and isinstance(told, int | float)
    return now if changed_later else told


def differing(settings: Sequence[Any]) -> dict[str, Any]:
    """The settings that are not at their defaults."""
    return {each.name: each.given for each in resolved(settings) if each.differs}


def config_text(settings: Sequence[Any], reads: Callable[[str, Any], bool] = lambda name, value: True) -> str:
    """The settings as YAML that `--config` reads: first those that differ from their defaults, then the others.

    reads: whether a setting can be read back; where not, it is a comment.
    """
    every = list(resolved(settings))
    first = [_entry(each, reads) for each in every if each.differs]
    rest = [_entry(each, reads) for each in every if not each.differs]
    head = f"{OURS}. `--config` reads them; `# became ...` is what the run made of one. Secrets are left out."
    return "\n".join([head, "", "# other than the default", *first, "", "# at the default", *rest, ""])


def _entry(each: Resolved, reads: Callable[[str, Any], bool]) -> str:
    import yaml

    text = yaml.safe_dump({each.name: each.given}, sort_keys=False, allow_unicode=True, width=10**6).rstrip("\n")
    if each.now != each.given and (each.now is None or isinstance(each.now, bool | int | float | str)):
        became = f"# became {json.dumps(each.now)}"
        text = f"{text}  {became}" if "\n" not in text else f"{became}\n{text}"
    return (
        text
        if each.is_written and reads(each.name, each.given)
        else "\n".join(f"# {line}" for line in text.splitlines())
    )


# -- the callback --------------------------------------------------------------------------------


class RunFolderCallback(TrainerCallback, RunListener):
    """Writes `run.json` and `config.yaml` into the run's folder, beside `metrics.jsonl`; `trl report` reads them.

    `run.json` holds the command line, versions, what is known of the data, the settings that are not at their defaults,
    seconds, peak memory, and the status: running, finished, stopped or failed, with how. A run that is resumed keeps
    the records of its earlier parts. settings: dataclasses to write; None: the trainer's config alone. words: of the
    command line; None: this process's. reads: whether `--config` can read a value of a setting. more: further facts of
    each data set.
    """

    def __init__(
        self,
        settings: Sequence[Any] | None = None,
        words: Sequence[str] | None = None,
        reads: Callable[[str, Any], bool] = lambda name, value: True,
        more: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        self._settings, self._words, self._reads, self._more = settings, words, reads, more or {}
        self._args: TrainingArguments | None = None
        self._state: TrainerState | None = None
        self._clocks = (time.perf_counter(), time.process_time())
        self.record: dict[str, Any] = {}
        """what `run.json` holds"""

    def begin_run(self, facts: RunFacts) -> None:
        goes_on = facts.resumes or bool(self.record)  # or the same trainer trains once more
        self._args, self._state = facts.args or self._args, None
        earlier = read_record(self._folder) if goes_on and self._folder is not None else None
        before = [] if earlier is None else [*earlier.pop("earlier", []), earlier]
        self._clocks = (time.perf_counter(), time.process_time())
        data = {name: {**self._more.get(name, {}), **known} for name, known in facts.data.items()}
        self.record = {
            "status": "running",
            "how": "",
            "trainer": facts.trainer,
            "command": command_line(sys.orig_argv if self._words is None else self._words),
            "started": _now(),
            "process": {"id": os.getpid(), "host": socket.gethostname()},
            "versions": versions(),
            "data": data,
            "earlier": before,
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._args, self._state = args, state
        if not state.is_world_process_zero:
            return
        if not self.record:  # a trainer that has no folder of its own
            self.begin_run(RunFacts(""))
        settings, model = self._all_settings(), kwargs.get("model")
        self.record |= {
            "step": state.global_step,
            "resumed_from": state.global_step or None,
            "max_steps": state.max_steps,
            "processes": int(args.world_size),
            "device": str(args.device),
            "settings": differing(settings),
            **_of_model(model),
        }
        planned = None if self._folder is None else read_record(self._folder, PLAN)
        self.record |= {} if planned is None else {"planned": planned}
        self._write()
        self._write_config(settings)

    def planned(self, facts: Mapping[str, Any]) -> None:
        self.record["predicted"] = dict(facts)

    def _all_settings(self) -> Sequence[Any]:
        return [self._args] if self._settings is None else self._settings

    def end_run(self, error: BaseException | None) -> None:
        """Write how the run ended."""
        if not self.record:
            return
        step = 0 if self._state is None else self._state.global_step
        wall, cpu = time.perf_counter() - self._clocks[0], time.process_time() - self._clocks[1]
        status, how = _ending(error, step, self.record.get("max_steps", 0))
        self.record |= {
            "status": status,
            "how": how,
            "ended": _now(),
            "step": step,
            "seconds": {"wall": round(wall, 2), "cpu": round(cpu, 2)},
            "peak_memory": {"bytes": peak_memory(), "device_bytes": peak_device_memory()},
        }
        self._write()

    @property
    def _folder(self) -> Path | None:
        return None if self._args is None or self._args.output_dir is None else Path(str(self._args.output_dir))

    def _write(self) -> None:
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder / RECORD, json.dumps(_finite(self.record), indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            logger.warning("%s", error)

    def _write_config(self, settings: Sequence[Any]) -> None:
        if self._folder is None:
            return
        path = self._folder / CONFIG
        try:
            if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(OURS):
                path = self._folder / OTHER_CONFIG
            write_whole(path, config_text(settings, self._reads))
        except OSError as error:
            logger.warning("%s", error)


def _of_model(model: Any) -> dict[str, Any]:
    if model is None:
        return {}
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    sizes = [(elements(p), p.requires_grad) for p in model.parameters()]
    return {"model": name, "parameters": sum(n for n, _ in sizes), "trained": sum(n for n, learns in sizes if learns)}


def _finite(value: Any) -> Any:
    """The value as strict JSON: numbers that are not finite as texts."""
    if isinstance(value, Mapping):
        return {str(name): _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value


def _ending(error: BaseException | None, step: int, most: int) -> tuple[str, str]:
    """The status at the end, and how it came to that."""
    if error is None:
        early = 0 < step < most
        return ("stopped", f"by a callback after step {step} of {most}") if early else ("finished", "")
    if isinstance(error, KeyboardInterrupt):
        return "stopped", f"by an interruption (Ctrl-C) after step {step}"
    if isinstance(error, SystemExit):
        if error.code == TERMINATED:
            return "stopped", f"by SIGTERM after step {step}, which is saved"
        return "stopped", f"by exit code {error.code} after step {step}"
    return "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def read_record(folder: Path, name: str = RECORD) -> dict[str, Any] | None:
    """What `run.json` in a folder holds, or another such file; None where there is none that can be read."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
