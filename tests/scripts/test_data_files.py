"""C21: what is wrong with a data file is told with the file and the line, and the way out."""

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from trl import DatasetMixtureConfig, get_dataset
from trl.cli.main import run
from trl.scripts.data_config import named_dataset
from trl.scripts.data_files import told as told_of

ROW = b'{"text": "a"}\n'
FILES = {
    "empty.jsonl": (b"", ": the file is empty"),
    "blank.json": (b"\n \n", ": the file is empty"),
    "mark.csv": (b"\xef\xbb\xbf", ": the file is empty"),
    "torn.jsonl": (ROW + ROW + b'{"te', ", line 3: the last line is cut off"),
    "cut.json": (b'[\n{"text": "a"},\n{"te', ", line 3: it is not JSON"),
    "middle.jsonl": (ROW + b"{text}\n" + ROW, ", line 2: it is not JSON"),
    "nul.jsonl": (ROW + b'{"text": "b\0"}\n', ", line 2: it has a NUL byte"),
    "nuls.jsonl": (ROW + bytes(4096), ", line 2: it has a NUL byte"),
    "latin.jsonl": (ROW + b'{"text": "\xe9"}\n', ", line 2: it is not UTF-8 (byte 0xe9 at place 10); save the file as"),
    "wide.jsonl": (b"\xff\xfe{\0", ": the file is UTF-16 text; save it as UTF-8"),
    "half.jsonl": (ROW + b'{"text": "\\ud800"}\n', ", line 2: it has half a character"),
    "list.jsonl": (ROW + b"[1]\n", ", line 2: it is no JSON object with columns"),
    "twice.jsonl": (ROW + b'{"text": "a", "text": "b"}\n', ", line 2: it has the key 'text' twice"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000 + b"\n", ", line 1: it is nested too deeply"),
    "table.jsonl": (b"text,x\na,b\n", ", line 1: it is not JSON"),
    "table.json": (b"PAR1....", ": the file is a Parquet file; end its name in .parquet"),
    "packed.csv": (b"\x1f\x8b\x08\0", ": the file is packed by gzip; unpack it"),
    "ragged.csv": (b"text,x\na,b\nc,d,e\n", ", line 3: it has 3 fields and the header 2; put quotes around"),
    "twice.csv": (b"text,text\na,b\n", ", line 1: the header has the column 'text' twice; rename one"),
    "lines.csv": (ROW, ": it has a header and no rows"),
    "garbage.parquet": (b"PAR1 garbage", ": it is no whole Parquet file"),
    "text.parquet": (ROW, ": it is no whole Parquet file"),
    "empty.txt": (b"", ": the file is empty"),
}


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def told(path, option="data"):
    with pytest.raises(ValueError) as caught:
        named_dataset(str(path), option)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(name, tmp_path):
    content, message = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    assert told(path, "eval-data").startswith(f"--eval-data {path}{message}")


def test_damaged_tables(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": ["a"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-20])
    assert told(path).startswith(f"--data {path}: it is no whole Parquet file")
    parquet.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]), path)
    assert told(path) == f"--data {path}: it has the column 'text' twice; rename one"


def test_folders(tmp_path):
    (tmp_path / "none").mkdir()
    assert told(tmp_path / "none").startswith(f"--data {tmp_path}/none: the folder has no rows in files of .json,")
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "a.jsonl").write_bytes(ROW)
    (tmp_path / "some" / "b.jsonl").write_bytes(ROW + b"{")
    assert told(tmp_path / "some").startswith(f"--data {tmp_path}/some/b.jsonl, line 2: the last line is cut off")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    assert "it is no whole folder of `save_to_disk`" in told(tmp_path / "saved")
    (tmp_path / "folder.jsonl").mkdir()
    assert told(tmp_path / "folder.jsonl").endswith("folder.jsonl: it cannot be read (Is a directory)")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROW)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    assert told(path) == f"--data {path}: it cannot be read (Permission denied)"


def test_files_of_a_mixture(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROW + b"{")
    for one in ({"path": str(path)}, {"path": "json", "data_files": [str(path)]}):
        with pytest.raises(ValueError, match=r"--datasets .*rows\.jsonl, line 2: the last line is cut off"):
            get_dataset(DatasetMixtureConfig(datasets=[one]))


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf" + ROW + ROW, ROW + b"\n" + ROW, ROW + ROW.rstrip()])
def test_what_is_clear_is_read(content, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert named_dataset(str(path), "data")["train"].to_list() == [{"text": "a"}] * 2


def test_the_command_says_it_and_ends_with_2(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROW + b'{"te')
    assert run(["sft", "--model", "none", "--data", str(path), "--output_dir", str(tmp_path / "run"), "--use_cpu"]) == 2
    error = f"error: --data {path}, line 2: the last line is cut off"
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith(error)]


def test_streamed_files_are_told_where_they_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROW + b'{"text": "b\0"}\n')
    rows = named_dataset(str(path), "data", streaming=True)["train"]
    with (
        pytest.raises(ValueError, match=r"--data .*rows\.jsonl, line 2: it has a NUL byte"),
        told_of("data", [path], sure=False),
    ):
        list(rows)
    with pytest.raises(pa.ArrowInvalid, match="of another thing"), told_of("data", [tmp_path / "none.csv"], sure=False):
        raise pa.ArrowInvalid("of another thing")


@pytest.mark.parametrize("name", ["rows.csv", "folder"])
def test_answers_in_a_csv_file_are_texts(name, tmp_path):
    from trl.scripts.data_config import named_dataset

    (tmp_path / "folder").mkdir()
    for place in (tmp_path, tmp_path / "folder"):
        (place / "rows.csv").write_text("prompt,chosen,rejected,score,label\n1+1,2.,007,1.5,true\nnull,NA,1e3,,false\n")
    rows = named_dataset(str(tmp_path / name), "data", split="train")
    assert rows["chosen"][:] == ["2.", "NA"]
    assert rows["rejected"][:] == ["007", "1e3"]
    assert rows["prompt"][:] == ["1+1", "null"]
    assert rows["score"][:] == [1.5, None]
    assert rows["label"][:] == [True, False]
