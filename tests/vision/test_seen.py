"""Pictures are seen: in the inspector, in tables of completions, in files of rollouts and in reports."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from families import data_url, model_of, picture, processor_of
from PIL import Image
from pyarrow import parquet
from transformers import AutoModelForImageTextToText

from trl.cli.main import run
from trl.data.inspect import inspect_html, inspect_row, pieces
from trl.data.pictures import Album, read_by, reader_of
from trl.data.records import Rollout
from trl.data.thumbnails import Gallery, mark, plain, small_copy, stored, thumbnail
from trl.reports.run_folder import read_run
from trl.reports.run_report import render
from trl.rollout.report import print_table, table_of, write_parquet
from trl.rollout.rewards import Rewards
from trl.scripts.open_model import open_model


def bytes_of(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def kept(image):
    return Album.keep(bytes_of(image))


def size_of(path):
    with Image.open(path) as image:
        return image.size


def opened(url):
    head, _, data = url.partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == f"data:image/{image.format.lower()};base64"
    return image


# -- thumbnails ----------------------------------------------------------------------------------

NOISE = Image.effect_noise((640, 480), 80)


@pytest.mark.parametrize(
    ("image", "size"),
    [
        (picture(0, (8, 8)), (8, 8)),
        (NOISE.convert("RGB"), (160, 120)),
        (NOISE.convert("CMYK"), (160, 120)),
        (NOISE.convert("RGBA"), (160, 120)),
        (NOISE.convert("P"), (160, 120)),
        (NOISE.convert("1"), (160, 120)),
        (NOISE.convert("LA"), (160, 120)),
        (NOISE.convert("I"), (160, 120)),
        (NOISE.convert("F"), (160, 120)),
        (Image.fromarray(np.arange(640 * 100, dtype=np.uint16).reshape(100, 640)), (160, 25)),
        (Image.new("RGB", (4000, 3)), (160, 1)),
    ],
)
def test_a_thumbnail_is_small_in_every_mode(image, size):
    before = image.size
    url = thumbnail(image)
    assert opened(url).size == size
    assert len(url) < 40_000
    assert image.size == before


def test_pixels_of_small_pictures_stay_and_noise_becomes_jpeg():
    small = picture(3, (8, 8))
    assert opened(thumbnail(small)).convert("RGB").tobytes() == small.tobytes()
    assert small_copy(NOISE.convert("RGB")).kind == "jpeg"


def test_sixteen_bits_are_not_white():
    image = Image.fromarray(np.full((4, 4), 1000, dtype=np.uint16))
    image.putpixel((0, 0), 3000)
    assert opened(thumbnail(image)).getextrema() == (0, 255)


def test_what_cannot_be_read_has_no_thumbnail(tmp_path):
    torn = Image.open(io.BytesIO(bytes_of(NOISE)[:5000]))
    assert [thumbnail(one) for one in (torn, Image.new("RGB", (0, 0)), 12345)] == ["", "", ""]
    assert stored([12345, torn], tmp_path) == [None, None]
    assert mark(12345, 4) == "[picture, 4 tokens]"
    assert mark(torn, 1) == "[picture 640x480, 1 token]"


# -- the inspector -------------------------------------------------------------------------------


def row(name, text, images):
    """Ids with a picture for each placeholder; the last five tokens are learned."""
    tokenizer = read_by(processor_of(name))
    reader = reader_of(tokenizer)
    numbers = [kept(image) for image in images]
    whole = reader.expand(text.replace("PICTURE", reader.placeholder), [], numbers).text
    ids = reader.tokens(tokenizer(whole, add_special_tokens=False)["input_ids"], numbers)
    return tokenizer, ids, [0] * (len(ids) - 5) + [1] * 5


WIDE, TALL = picture(1, (32, 16)), picture(2, (16, 24))


@pytest.mark.parametrize(
    ("name", "marks"),
    [
        ("gemma3", ["[picture 32x16, 4 tokens]"] * 2 + ["[picture 16x24, 4 tokens]"]),
        ("llava", ["[picture 32x16, 16 tokens]"] * 2 + ["[picture 16x24, 16 tokens]"]),
        ("idefics3", ["[picture 32x16, 12 tokens in 3 parts]"] * 2 + ["[picture 16x24, 20 tokens in 5 parts]"]),
    ],
)
def test_a_picture_is_one_mark(name, marks):
    """Twice the same one side by side, tiles, and characters of several bytes around them."""
    tokenizer, ids, mask = row(name, "é PICTUREPICTURE 😀PICTURE😀 ends here", [WIDE, WIDE, TALL])
    found = list(pieces(tokenizer, ids, mask))
    assert [token for piece in found for token in piece.ids] == ids
    assert [piece.text for piece in found if piece.picture is not None] == marks
    assert not any(piece.learned for piece in found if piece.picture is not None)
    text = inspect_row(tokenizer, ids, mask).plain
    assert [text.count("😀"), text.count("é"), text.count("\ufffd")] == [2, 1, 0]
    assert text.endswith(" here")


def test_without_a_reader_a_run_of_tokens_is_a_picture():
    _, ids, _ = row("gemma3", "a PICTURE b", [WIDE])
    other = processor_of("gemma3").tokenizer
    assert "[picture 32x16, 4 tokens]" in inspect_row(other, ids, [0] * len(ids)).plain


def test_a_page_embeds_a_picture_once():
    tokenizer, ids, mask = row("llava", "a PICTURE b PICTURE c", [WIDE, WIDE])
    page = inspect_html(tokenizer, [("one", ids, mask), ("two", ids, mask)])
    assert page.count("data:image/") == 1
    assert page.count('role="img" aria-label="picture 32x16, 16 tokens"') == 4
    assert not re.search(r"(src|href)=", page)


# -- rollouts ------------------------------------------------------------------------------------


def rollout(prompts, completions):
    count = len(prompts)
    return Rollout(prompts, completions, [[0.0]] * count, [[1]] * count, texts=[f"answer {i}" for i in range(count)])


def rewards(count):
    return Rewards(["f"], torch.ones(count, 1), torch.ones(1), [False])


def tokens(image, count=4):
    return [-1 - kept(image)] * count


ASKED = [
    {"role": "user", "content": [{"type": "text", "text": "Is"}, {"type": "image"}, {"type": "text", "text": "1?"}]}
]
BARE = [{"role": "user", "content": "Which digit is it?"}]


def table(prompts, ids, pictures=True, **learned):
    made = rollout(ids, [[5, 6]] * len(ids))
    return table_of(1, made, prompts, rewards(len(ids)), learned, pictures)


def test_the_table_shows_marks(capsys):
    columns = table([ASKED, BARE, BARE], [[5, *tokens(WIDE), 6], [*tokens(TALL), 7], [*tokens(WIDE), 7]])
    print_table(columns, None, unique=True)
    shown = capsys.readouterr().out
    assert "user: Is [picture 32x16] 1?" in shown
    assert "[picture 16x24]\nuser: Which digit is it?" in shown
    assert "[picture 32x16]\nuser: Which digit is it?" in shown  # the same text with another picture
    assert [shown.count("answer"), shown.count("images")] == [3, 0]


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image", "image": WIDE}, "[picture 32x16]"),
        ({"type": "image_url", "image_url": {"url": data_url(TALL)}}, "[picture 16x24]"),
        ({"type": "image_url", "image_url": data_url(TALL)}, "[picture 16x24]"),
        ({"type": "image", "image": bytes_of(WIDE)}, "[picture 32x16]"),
        ({"type": "image", "image": {"bytes": bytes_of(WIDE), "path": None}}, "[picture 32x16]"),
        ({"type": "image", "image": "cat.png"}, "[picture]"),
    ],
)
def test_a_picture_in_a_message_is_a_mark_in_any_form(part, said, capsys, tmp_path):
    prompt = [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]
    columns = table([prompt], [[1]], pictures=False)
    print_table(columns, None, unique=False)
    assert f"user: {said} What is it?" in capsys.readouterr().out
    written = parquet.read_table(write_parquet(tmp_path, 1, columns)).to_pylist()[0]
    message = json.loads(written["prompt"])[0]
    assert message["content"][1]["text"] == "What is it?"
    assert "PIL" not in written["prompt"]
    assert len(written["prompt"]) < 200


ODD = [
    (WIDE, "[picture 32x16]"),
    ([WIDE, None], ["[picture 32x16]", None]),
    (bytes_of(WIDE, "GIF"), "[picture 32x16]"),
    (b"no picture", "[10 bytes]"),
    ({"bytes": bytes_of(WIDE), "path": "a.png"}, "[picture 32x16]"),
    ({"bytes": None, "path": "a.png"}, {"bytes": None, "path": "a.png"}),
    (data_url(WIDE), "[picture 32x16]"),
    ("data:image/png;base64,AAA", "[picture]"),
    (np.zeros((3, 5, 3), dtype=np.uint8), "[picture 5x3]"),
    ({1: (WIDE,)}, {"1": ["[picture 32x16]"]}),
]


@pytest.mark.parametrize(("value", "written"), ODD)
def test_json_is_valid_whatever_a_column_holds(value, written, tmp_path, capsys):
    assert json.loads(json.dumps(plain(value))) == written
    columns = table([BARE], [[1]], pictures=False, given=[[value]])
    print_table(columns, None, unique=False)
    assert "PIL" not in capsys.readouterr().out
    cell = parquet.read_table(write_parquet(tmp_path, 1, columns)).to_pylist()[0]["given"]
    if isinstance(value, Image.Image):
        assert size_of(tmp_path / cell[0]) == (32, 16)
    else:
        assert json.loads(cell) == [written]


def test_the_files_have_paths_of_thumbnails(tmp_path):
    """Each picture is stored once; rows without pictures and files without any have the same types."""
    folder = tmp_path / "rollouts"
    first = write_parquet(folder, 1, table([BARE] * 2, [[1], [2]]))
    second = write_parquet(
        folder, 2, table([BARE] * 3, [[*tokens(WIDE), *tokens(TALL), *tokens(WIDE)], [3], tokens(TALL)])
    )
    assert parquet.read_schema(first) == parquet.read_schema(second)
    assert parquet.read_table(first)["images"].to_pylist() == [[], []]
    found = parquet.read_table(second)["images"].to_pylist()
    assert found == [[f"pictures/{kept(WIDE)}.png", f"pictures/{kept(TALL)}.png"], [], [f"pictures/{kept(TALL)}.png"]]
    assert [size_of(folder / path) for path in found[0]] == [(32, 16), (16, 24)]
    assert len(list((folder / "pictures").iterdir())) == 2


def test_rows_of_text_have_no_column():
    assert "images" not in table([BARE], [[1]], pictures=False)


# -- the report ----------------------------------------------------------------------------------


def test_the_report_shows_thumbnails(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    for number in (1, 2):
        columns = table([BARE] * 2, [[*tokens(WIDE), 7], [*tokens(WIDE), *tokens(TALL), 8]])
        write_parquet(tmp_path / "rollouts", number, columns)
    page = render(read_run(tmp_path))
    assert page.count("data:image/") == 2
    assert page.count('role="img" aria-label="picture ') == 6
    assert "pictures/" not in page
    assert not re.search(r"(src|href)=", page)


@pytest.mark.parametrize(
    "path", ["../secret.png", "pictures/../../secret.png", "pictures/none.png", "pictures/text.png"]
)
def test_the_report_reads_thumbnails_of_the_folder_alone(path, tmp_path):
    import pyarrow

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "rollouts" / "pictures").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(bytes_of(WIDE))
    (tmp_path / "rollouts" / "pictures" / "text.png").write_text("<script>")
    row = {"step": [1], "prompt": ["p"], "completion": ["c"], "images": [[path]]}
    parquet.write_table(pyarrow.table(row), tmp_path / "rollouts" / "rollout-000001.parquet")
    page = render(read_run(tmp_path))
    assert "data:image/" not in page
    assert "<script>" not in page


def test_captions_are_escaped():
    gallery = Gallery()
    assert "<b>" not in gallery.tag(WIDE, '"<b>')
    assert "<b>" not in gallery.tag(12345, '"<b>')


# -- commands ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders of tiny models with their processors, by the names of their families."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            model_of(name).save_pretrained(made[name])
            processor_of(name).save_pretrained(made[name])
        return str(made[name])

    return folder


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_a_merged_adapter_keeps_the_processor(name, tiny, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForImageTextToText.from_pretrained(tiny(name))
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    assert run(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "whole")]) == 0
    assert "log-probabilities of 32 tokens are the adapter's" in capsys.readouterr().out
    assert (tmp_path / "whole" / "processor_config.json").is_file()
    opened = open_model(str(tmp_path / "whole"))
    assert type(opened.model) is type(base)
    assert reader_of(opened.tokenizer).placeholder == processor_of(name).image_token
