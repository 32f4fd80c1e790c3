"""Which rows a script trains on: one data set by name, or a mixture of several."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trl.scripts.data_files import FILE_FORMATS, check_file, told


@dataclass
class ScriptArguments:
    """The data set of a script."""

    dataset_name: str | None = field(default=None)
    """Hub name, file (.jsonl, .json, .csv, .parquet, .txt), folder of files, or folder of `save_to_disk`"""
    dataset_config: str | None = field(default=None)
    """configuration of the data set, `name` of `datasets.load_dataset`"""
    dataset_train_split: str = field(default="train")
    """split to train on"""
    dataset_test_split: str = field(default="test")
    """split to evaluate on, where `eval_strategy` asks for evaluation"""
    dataset_streaming: bool = field(default=False)
    """read the rows while training, instead of loading them first"""
    ignore_bias_buffers: bool = field(default=False)
    """distributed training: do not synchronise boolean buffers (a work-around for some models)"""


@dataclass
class GRPOScriptArguments(ScriptArguments):
    """The data set and the rewards of a script that trains on a policy's own completions."""

    reward_model_name_or_path: str | None = field(default=None)
    """reward model: folder or Hub name"""
    reward_funcs: list[str] | None = field(default=None, metadata={"action": "extend"})
    """what to reward: names such as accuracy_reward, package.module.function, file.py:function (both
    run that code), reward-model folders"""
    judge_funcs: list[str] | None = field(default=None, metadata={"action": "extend"})
    """held-out judges, named like rewards: logged as `judge/NAME/mean`, and nothing is learned of them"""


RLOOScriptArguments = GRPOScriptArguments


@dataclass
class SFTScriptArguments(ScriptArguments):
    """`ScriptArguments` by the name and with the fields of releases 0.9 and 0.10."""

    gradient_checkpointing_use_reentrant: bool = field(default=False)
    """read by scripts of that time, which hand it to `gradient_checkpointing_kwargs`"""


@dataclass
class DPOScriptArguments(SFTScriptArguments):
    """`ScriptArguments` by the name and with the fields of releases 0.9 and 0.10."""

    sanity_check: bool = field(default=False)
    """read by scripts of that time, which then train on 1,000 rows"""


@dataclass
class DatasetConfig:
    """One data set of a mixture; the fields are arguments of `datasets.load_dataset`."""

    path: str
    """Hub name, or folder"""
    name: str | None = field(default=None)
    """configuration of the data set"""
    data_dir: str | None = field(default=None)
    """folder inside of it"""
    data_files: str | list[str] | dict[str, Any] | None = field(default=None)
    """files to read"""
    split: str = field(default="train")
    """split to take"""
    columns: list[str] | None = field(default=None)
    """columns to keep; None: all"""


@dataclass
class DatasetMixtureConfig:
    """Several data sets that are trained on as one."""

    datasets: list[DatasetConfig] = field(default_factory=list)
    """data sets, one after the other: objects with path, name, data_dir, data_files, split and columns"""
    streaming: bool = field(default=False)
    """read the rows while training, instead of loading them first"""
    test_split_size: float | None = field(default=None)
    """share (or number) of rows that is split off for evaluation; None: none"""

    def __post_init__(self) -> None:
        self.datasets = [DatasetConfig(**one) if isinstance(one, Mapping) else one for one in self.datasets]


def get_dataset(mixture_config: DatasetMixtureConfig) -> Any:
    """The mixture as a `DatasetDict` with `train`, and `test` where `test_split_size` asks for it."""
    import datasets

    if not mixture_config.datasets:
        raise ValueError("datasets: the mixture is empty; give one data set or more")
    if mixture_config.streaming and mixture_config.test_split_size is not None:
        size = mixture_config.test_split_size
        raise ValueError(f"test_split_size={size}: rows that are streamed cannot be split; set streaming=False")
    parts = []
    for one in mixture_config.datasets:
        keywords = {name: value for name, value in asdict(one).items() if name not in ("path", "columns")}
        part = named_dataset(one.path, "datasets", streaming=mixture_config.streaming, **keywords)
        parts.append(part if one.columns is None else part.select_columns(one.columns))
    mixed = datasets.concatenate_datasets(parts)
    if mixture_config.streaming:
        return datasets.IterableDatasetDict({"train": mixed})
    if mixture_config.test_split_size is None:
        return datasets.DatasetDict({"train": mixed})
    size = mixture_config.test_split_size
    return mixed.train_test_split(test_size=int(size) if size >= 1 else size, shuffle=True)


TEXT_COLUMNS = ("text", "prompt", "completion", "chosen", "rejected", "query", "solution", "answer")
TEXTS_OF_CSV: dict[str, Any] = {
    "converters": dict.fromkeys(TEXT_COLUMNS, str), "keep_default_na": False, "na_values": [""],
}  # fmt: skip
"""keywords that read a CSV file as it stands: its reader makes numbers of answers such as `76.`, and None of `NA`"""

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
"""how files of pictures end"""
SPLITS = {"test": ("test", "testing", "eval", "evaluation"), "validation": ("validation", "valid", "val", "dev")}
"""first words in the names of files that are no rows to train on, as `datasets` reads them"""


def named_dataset(path: str, option: str, *, split: str | None = None, **keywords: Any) -> Any:
    """The rows of a file, a folder of `save_to_disk`, a folder of files, or a Hub name; all splits, or one of them.

    `option` is the setting that named them; `keywords` go to `datasets.load_dataset`.
    """
    import datasets

    place = Path(path)
    if place.suffix in FILE_FORMATS:
        if not place.exists():
            raise ValueError(f"--{option} {path}: there is no such file")
        check_file(place, option)
        keywords |= {"path": FILE_FORMATS[place.suffix], "data_files": path, "name": None}
        keywords |= TEXTS_OF_CSV if place.suffix == ".csv" else {}
        with told(option, [path]):
            return _pictures_beside(datasets.load_dataset(split=split, **keywords), str(place.absolute().parent))
    if place.is_file():
        raise ValueError(f"--{option} {path}: give a file of {', '.join(FILE_FORMATS)}, or a folder")
    if (place / "dataset_dict.json").exists() or (place / "state.json").exists():
        loaded = _saved(path, option)
        splits = loaded if isinstance(loaded, datasets.DatasetDict) else datasets.DatasetDict({"train": loaded})
        return splits if split is None else split_of(splits, split, option)
    if not keywords.get("data_files") and (rows := _rows_among_pictures(place)):
        kind = Path(next(iter(rows.values()))[0]).suffix
        keywords |= {"path": FILE_FORMATS[kind], "data_files": rows, "name": None}
        keywords |= TEXTS_OF_CSV if kind == ".csv" else {}
        with told(option, [path]):
            return _pictures_beside(datasets.load_dataset(split=split, **keywords), str(place.absolute()))
    kinds = {file.suffix for file in place.rglob("*")} & FILE_FORMATS.keys() if place.is_dir() else set()
    keywords |= TEXTS_OF_CSV if path == "csv" or kinds == {".csv"} else {}
    with told(option, [path, *_paths(keywords.get("data_files"))]):
        return datasets.load_dataset(path, split=split, **keywords)


def _rows_among_pictures(folder: Path) -> dict[str, list[str]]:
    """The files of rows that lie in a folder of pictures, by split; none where `datasets` reads the folder itself.

    It would take the pictures alone for the rows, except where a file `metadata` names them.
    """
    if not folder.is_dir():
        return {}
    files = [file for file in sorted(folder.iterdir()) if FILE_FORMATS.get(file.suffix, "text") != "text"]
    kinds = {FILE_FORMATS[file.suffix] for file in files}
    if len(kinds) != 1 or any(file.stem == "metadata" for file in files):
        return {}
    if not any(file.suffix.lower() in PICTURES for file in folder.rglob("*")):
        return {}
    splits: dict[str, list[str]] = {}
    for file in files:
        word = re.split("[^a-z]", file.stem.lower())[0]
        split = next((name for name, words in SPLITS.items() if word in words), "train")
        splits.setdefault(split, []).append(str(file))
    return splits


def _pictures_beside(loaded: Any, folder: str) -> Any:
    """The rows of a file, all splits or one of them, whose pictures may lie beside it."""
    from trl.data.picture_rows import found_beside

    if isinstance(loaded, dict):
        return type(loaded)({split: found_beside(rows, folder) for split, rows in loaded.items()})
    return found_beside(loaded, folder)


def _paths(data_files: Any) -> list[str]:
    """The places that `data_files` names, in a text, a list or a dict of them."""
    if isinstance(data_files, Mapping):
        return [path for one in data_files.values() for path in _paths(one)]
    return [data_files] if isinstance(data_files, str) else list(data_files or [])


def _saved(path: str, option: str) -> Any:
    import datasets
    from pyarrow import ArrowException

    try:
        return datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError, TypeError, ArrowException) as error:
        cause = " ".join(str(error).split())
        raise ValueError(
            f"--{option} {path}: it is no whole folder of `save_to_disk` ({cause}); save it again"
        ) from error


def split_of(dataset: Any, split: str, option: str) -> Any:
    """One split of a data set; the ValueError names the splits that it has."""
    if split not in dataset:
        raise ValueError(f"--{option} {split}: the data set has no such split; choose one of {', '.join(dataset)}")
    return dataset[split]
