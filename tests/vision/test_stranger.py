"""What users try with pictures first: files of rows, and what they get wrong."""

import json

import pytest
from datasets import load_dataset
from families import picture, processor_of

from trl.data.pictures import read_by
from trl.data.prompt_rows import PromptsJob
from trl.data.tokenize import tokenize
from trl.scripts.data_config import named_dataset


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A folder with a picture, where rows lie that name it; the working directory is another one."""
    (tmp_path / "data" / "pics").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    picture(0).save(tmp_path / "data" / "pics" / "0.png")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "data"


def part(**fields):
    return {"role": "user", "content": [{"type": "text", "text": "path"}, fields]}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"images": ["pics/0.png", None]}, lambda row: row["images"][0]),
        ({"image": "pics/0.png"}, lambda row: row["image"]),
        ({"image": {"path": "pics/0.png", "bytes": None}}, lambda row: row["image"]["path"]),
        ({"prompt": [part(type="image", image="pics/0.png")]}, lambda row: row["prompt"][0]["content"][1]["image"]),
        (
            {"messages": [part(type="image_url", image_url={"url": "pics/0.png"})]},
            lambda row: row["messages"][0]["content"][1]["image_url"]["url"],
        ),
    ],
)
def test_pictures_of_a_file_of_rows_may_lie_beside_it(row, found, streaming, beside):
    (beside / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    rows = named_dataset("../data/rows.jsonl", "data", split="train", streaming=streaming)
    assert [found(one) for one in rows] == [str(beside.parent / "elsewhere" / "../data/pics/0.png")] * 2
    assert streaming or rows.num_rows == 2


@pytest.mark.parametrize(
    "row",
    [
        {"images": ["pics/1.png"]},  # nowhere: the error of reading it names it as it stands
        {"images": ["https://example.org/pics/0.png"]},
        {"path": "pics/0.png", "text": "pics/0.png"},
        {"messages": [{"role": "tool", "content": "x", "arguments": {"path": "pics/0.png"}}]},
    ],
)
def test_what_is_no_picture_beside_the_file_stays(row, beside):
    (beside / "rows.jsonl").write_text(json.dumps(row))
    assert named_dataset("../data/rows.jsonl", "data", split="train")[0] == row


def test_the_working_directory_comes_first(beside):
    (beside.parent / "elsewhere" / "pics").mkdir()
    picture(1).save("pics/0.png")
    (beside / "rows.jsonl").write_text(json.dumps({"image": "pics/0.png"}))
    assert named_dataset("../data/rows.jsonl", "data")["train"][0] == {"image": "pics/0.png"}


@pytest.mark.parametrize("field", ["image", "path", "image_url"])
def test_a_file_that_parts_of_several_kinds_name_is_read_again(field, beside):
    """`datasets` keeps such parts as JSON: the cached rows showed the picture that had been there before."""
    path = str(beside / "pics" / "0.png")
    kind, value = ("image_url", {"url": path}) if field == "image_url" else ("image", path)
    (beside / "rows.jsonl").write_text(json.dumps({"prompt": [part(type=kind, **{field: value})]}))
    rows = load_dataset("json", data_files=str(beside / "rows.jsonl"), split="train")
    assert "Json" in str(rows.features)
    job, found = PromptsJob(tokenizer=read_by(processor_of("llava"))), []
    for seed in (0, 0, 1):
        picture(seed).save(path)
        found.append(tokenize(rows, job)[0][0]["prompt_ids"])
    assert found[0] == found[1] != found[2]
