"""What is uploaded to the Hub: the model, its card and what `from_pretrained` reads; nothing else that a run wrote."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy

from trl.models.weight_files import SAVING, WEIGHT_FILES

CARD = "README.md"


def files_in(folder: Path, *, top: bool = False) -> list[str]:
    """The names of what was just written into a folder, but for the pickled settings of the run.

    top: the folder holds other things too; only known names in the folder itself count.
    """
    paths = [path for path in (folder.iterdir() if top else folder.rglob("*")) if path.is_file()]
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    known = (
        *WEIGHT_FILES,
        "adapter_*",
        "*config.json",
        "*token*",
        "*vocab*",
        "merges.txt",
        "chat_template*",
        "*.model",
    )
    return [
        name
        for name in names
        if name != TRAINING_ARGS_NAME and (not top or any(fnmatch(name, pattern) for pattern in known))
    ]


def _linked(source: Path, names: Iterable[str], where: Path) -> Path:
    """A hidden folder in `where` with some files of `source`."""
    beside = Path(tempfile.mkdtemp(prefix=SAVING, dir=where))
    for name in names:
        if not (source / name).is_file():
            continue
        (beside / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, beside / name)
        except OSError:  # a file system without hard links
            shutil.copyfile(source / name, beside / name)
    return beside


def remove_when_done(folder: Path, job: Any = None) -> None:
    """Remove a folder, after an upload that is still running."""
    if hasattr(job, "add_done_callback"):
        job.add_done_callback(lambda _: shutil.rmtree(folder, ignore_errors=True))
    else:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def staged(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """A folder in `folder` with some of its files; the card that is written there comes back."""
    beside = _linked(folder, names, folder)
    (beside / CARD).unlink(missing_ok=True)
    if (folder / CARD).exists():
        shutil.copyfile(folder / CARD, beside / CARD)  # no link: it is written anew
    try:
        yield beside
        if (beside / CARD).exists():
            shutil.copyfile(beside / CARD, folder / CARD)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def upload_checkpoint(
    folder: Path, names: Iterable[str], strategy: HubStrategy, message: str, **where: Any
) -> list[Any]:
    """Upload the model of a checkpoint, and the whole folder where the strategy asks for it; the running uploads.

    where: `repo_id`, `token` and `revision`. Later checkpoints may remove this one meanwhile.
    """
    wanted: dict[str | None, Iterable[str]] = {None: names}
    if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        place = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
        wanted[place] = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    jobs = []
    for path_in_repo, files in wanted.items():
        beside = _linked(folder, files, folder.parent)
        said = message if path_in_repo is None else f"{message}, checkpoint"
        job = HfApi().upload_folder(
            folder_path=str(beside), path_in_repo=path_in_repo, commit_message=said, run_as_future=True, **where
        )
        remove_when_done(beside, job)
        jobs.append(job)
    return jobs
