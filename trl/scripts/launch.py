"""Several processes: a job starts itself again through accelerate's launcher."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from trl.import_utils import is_deepspeed_available, pip_install

logger = logging.getLogger(__name__)

PROFILES = Path(__file__).parents[1] / "accelerate_configs"
OTHER_NAMES = {"multi_gpu": "ddp", "single_gpu": "one_process", "fsdp": "fsdp2"}
"""names of profiles in other releases and documents -> ours"""
OTHER_NAMES |= {f"deepspeed_zero{stage}": f"zero{stage}" for stage in (1, 2, 3)}
INSTEAD = {"fsdp1": "fsdp2"}
"""profiles that are not here -> which to take"""
LAUNCHED = "TRL_LAUNCHED"
"""environment variable of processes that the launcher started"""


@dataclass
class LaunchArguments:
    """How many processes train, and how they share the work."""

    num_processes: int | None = field(default=None)
    """processes of all machines; None: one, or with `--accelerate_config` one for each GPU"""
    accelerate_config: str | None = field(default=None)
    """ddp, fsdp2, zero1, zero2, zero3, one_process, or a file that `accelerate config` wrote"""
    num_machines: int | None = field(default=None)
    """machines that train together"""
    machine_rank: int | None = field(default=None)
    """which of them this one is, from 0"""
    main_process_ip: str | None = field(default=None)
    """address of machine 0"""
    main_process_port: int | None = field(default=None)
    """port of machine 0; None: a free one"""
    gpu_ids: str | None = field(default=None)
    """GPUs of this machine to use, as 0,1,3"""
    max_restarts: int | None = field(default=None)
    """how often all processes start once more, from the newest whole checkpoint, when one has failed"""

    def wanted(self) -> bool:
        """Whether other processes are to be started: not from a process that a launcher has started."""
        inside = LAUNCHED in os.environ or "LOCAL_RANK" in os.environ
        return not inside and (self.accelerate_config is not None or (self.num_processes or 1) > 1)


def launcher_words(launch: LaunchArguments, module: str, words: Sequence[str]) -> list[str]:
    """The command line of `accelerate launch` that runs `python -m module words` in every process."""
    line = []
    profile = launch.accelerate_config or _default_profile()
    if profile is not None:
        file, ours = profile_file(profile)
        line += ["--config_file", str(file)]
        if launch.num_processes is None and ours and file.stem != "one_process":
            line += ["--num_processes", str(_devices() * (launch.num_machines or 1))]
    given = {entry.name: getattr(launch, entry.name) for entry in fields(launch) if entry.name != "accelerate_config"}
    if (launch.num_machines or 1) == 1 and launch.main_process_port is None:
        given["main_process_port"] = 0  # a free one
    for name, value in given.items():
        if value is not None:
            line += [f"--{name}", str(value)]
    return [*line, "-m", module, *words]


def profile_file(profile: str) -> tuple[Path, bool]:
    """The file of a profile's name, or the file itself; and whether it is one of ours."""
    if profile in INSTEAD:
        raise ValueError(f"accelerate_config={profile!r}: it is not here; take {INSTEAD[profile]}, its successor")
    ours = PROFILES / f"{OTHER_NAMES.get(profile, profile)}.yaml"
    if ours.exists() and "/" not in profile:
        return ours, True
    if Path(profile).is_file():
        return Path(profile), False
    names = ", ".join(sorted(path.stem for path in PROFILES.glob("*.yaml")))
    raise ValueError(f"accelerate_config={profile!r}: choose one of {names}, or give a file that is there")


def check_profile(launch: LaunchArguments) -> None:
    """ValueError for a profile of ours that this machine cannot run; a line for one that means another thing here."""
    import torch

    profile = None if launch.accelerate_config is None else profile_file(launch.accelerate_config)[0].stem
    if profile is not None and profile.startswith("zero") and not is_deepspeed_available():
        raise ValueError(
            f"accelerate_config={profile!r}: needs DeepSpeed; {pip_install('deepspeed')}, or take fsdp2, which needs "
            "nothing more than PyTorch"
        )
    needed = ("num_machines", "machine_rank", "main_process_ip")
    missing = [f"--{name}" for name in needed if getattr(launch, name) is None]
    if profile is not None and profile.endswith("_nodes") and missing:
        raise ValueError(f"accelerate_config={profile!r}: it is for several machines; say {', '.join(missing)} too")
    if profile in ("fsdp2", "fsdp2_nodes") and not torch.accelerator.is_available():
        from trl.trainer.ranks import WHOLE_ON_A_CPU

        logger.warning("accelerate_config='fsdp2': %s", WHOLE_ON_A_CPU)


def _default_profile() -> str | None:
    """Data parallelism; None where `accelerate config` has written a default, which the launcher then reads."""
    from accelerate.commands.config.config_args import default_config_file

    return None if os.path.isfile(default_config_file) else "ddp"


def _devices() -> int:
    import torch

    return max(torch.accelerator.device_count(), 1)


def start(launch: LaunchArguments, module: str, words: Sequence[str]) -> int:
    """Start the processes and wait for them; the exit code of the first one that failed, or 0.

    The last line says which one that was, and why.
    """
    import subprocess

    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    check_profile(launch)
    arguments = launch_command_parser().parse_args(launcher_words(launch, module, words))
    os.environ[LAUNCHED] = "1"
    if not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        from trl.trainer.ranks import first_cause

        rank, text = first_cause(error.failures)
        print(f"error: rank {rank}: {text}", file=sys.stderr)
        return max(error.failures.get(rank, error.get_first_failure()[1]).exitcode, 1)
    except SignalException as error:  # the processes got it too, and have ended
        return 128 + int(error.sigval)
    except subprocess.CalledProcessError as error:
        return max(error.returncode, 1)
    finally:
        del os.environ[LAUNCHED]
    return 0
