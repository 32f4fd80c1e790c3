"""Data sets of a script: by name, from files, mixed."""

import json

import datasets
import pytest

from trl import DatasetMixtureConfig, get_dataset
from trl.scripts.data_config import DatasetConfig, named_dataset, split_of


@pytest.fixture
def folders(tmp_path):
    """Two folders of JSON lines with 3 and 2 rows."""
    for name, count in (("one", 3), ("two", 2)):
        (tmp_path / name).mkdir()
        rows = [{"text": f"{name} {i}", "more": i} for i in range(count)]
        (tmp_path / name / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [str(tmp_path / "one"), str(tmp_path / "two")]


def test_a_mixture_is_one_data_set(folders):
    mixture = DatasetMixtureConfig(datasets=[{"path": path, "columns": ["text"]} for path in folders])
    assert mixture.datasets[0] == DatasetConfig(folders[0], columns=["text"])
    mixed = get_dataset(mixture)
    assert list(mixed) == ["train"]
    assert mixed["train"]["text"][:] == ["one 0", "one 1", "one 2", "two 0", "two 1"]
    assert mixed["train"].column_names == ["text"]


def test_files_can_be_mixed_in(folders, tmp_path):
    named_dataset(folders[1], "data").save_to_disk(tmp_path / "saved")
    names = [f"{folders[0]}/rows.jsonl", str(tmp_path / "saved")]
    mixed = get_dataset(DatasetMixtureConfig(datasets=[{"path": path, "columns": ["more"]} for path in names]))
    assert mixed["train"]["more"][:] == [0, 1, 2, 0, 1]


def test_a_part_for_evaluation(folders):
    mixture = DatasetMixtureConfig(datasets=[DatasetConfig(path) for path in folders], test_split_size=0.4)
    mixed = get_dataset(mixture)
    assert (len(mixed["train"]), len(mixed["test"])) == (3, 2)


def test_a_streamed_mixture(folders):
    mixture = DatasetMixtureConfig(datasets=[DatasetConfig(path) for path in folders], streaming=True)
    mixed = get_dataset(mixture)
    assert isinstance(mixed, datasets.IterableDatasetDict)
    assert [row["more"] for row in mixed["train"]] == [0, 1, 2, 0, 1]
    mixture.test_split_size = 0.4
    with pytest.raises(ValueError, match=r"test_split_size=0\.4: rows that are streamed"):
        get_dataset(mixture)


def test_an_empty_mixture():
    with pytest.raises(ValueError, match="the mixture is empty"):
        get_dataset(DatasetMixtureConfig())


def test_files_and_folders(folders, tmp_path):
    assert len(named_dataset(f"{folders[0]}/rows.jsonl", "data")["train"]) == 3
    assert len(named_dataset(folders[1], "data")["train"]) == 2
    named_dataset(folders[0], "data").save_to_disk(tmp_path / "whole")
    assert list(named_dataset(str(tmp_path / "whole"), "data")) == ["train"]
    named_dataset(folders[0], "data")["train"].save_to_disk(tmp_path / "single")
    assert len(named_dataset(str(tmp_path / "single"), "data")["train"]) == 3
    (tmp_path / "rows.xml").write_text("x")
    with pytest.raises(ValueError, match=r"--data .*rows\.xml: give a file of .json"):
        named_dataset(str(tmp_path / "rows.xml"), "data")


def test_a_split_that_is_missing(folders):
    with pytest.raises(
        ValueError, match="--dataset_test_split test: the data set has no such split; choose one of train"
    ):
        split_of(named_dataset(folders[0], "data"), "test", "dataset_test_split")
