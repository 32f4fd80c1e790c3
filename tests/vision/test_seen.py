"""Pictures are seen: in the inspector, in tables of completions, in files of rollouts and in reports."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from families import data_url, model_of, picture, processor_of, rows
from PIL import Image
from pyarrow import parquet
from tiny_models import tiny_model
from tokenizers_for_tests import byte_tokenizer
from transformers import AutoModelForImageTextToText, GenerationConfig

import trl
from trl.cli.main import run
from trl.data.inspect import inspect_html, inspect_row, pieces
from trl.data.pictures import Album, pictures_among, read_by, reader_of
from trl.data.records import Rollout
from trl.data.thumbnails import Gallery, mark, plain, small_copy, stored, thumbnail
from trl.generation.local import LocalSampler
from trl.reports.run_folder import read_run
from trl.reports.run_report import render
from trl.rollout.report import print_table, table_of, write_parquet
from trl.rollout.rewards import Rewards
from trl.scripts.chat import Chat
from trl.scripts.diff_runs import said
from trl.scripts.open_model import open_model
from trl.scripts.sampling import Asked


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
    adapted = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    assert run(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "whole")]) == 0
    assert "log-probabilities of 32 tokens below a picture are the adapter's" in capsys.readouterr().out
    assert (tmp_path / "whole" / "processor_config.json").is_file()
    opened = open_model(str(tmp_path / "whole"))
    assert type(opened.model) is type(base)
    assert reader_of(opened.tokenizer).placeholder == processor_of(name).image_token


@pytest.fixture
def files(tmp_path):
    for place in range(3):
        picture(place, (16, 16)).save(tmp_path / f"{place}.png")
    return tmp_path


def lines(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


SHORT = ["--max-new-tokens", "2", "--temperature", "0"]


def answers(words, capsys):
    assert run([*words, *SHORT]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_generate_takes_pictures_of_the_line_and_of_rows(tiny, files, capsys):
    """The same picture and question in four forms: the same tokens, so the same answer."""
    path = str(files / "1.png")
    question = {"type": "text", "text": "What?"}
    url = {"type": "image_url", "image_url": {"url": data_url(picture(1))}}
    rows = [
        {"prompt": [{"role": "user", "content": "What?"}], "images": [path], "kept": 7},
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": path}, question]}]},
        {"prompt": [{"role": "user", "content": [url, question]}]},
    ]
    (said,) = answers(["generate", tiny("gemma3"), "What?", "--image", path], capsys)
    assert said["images"] == [path]
    found = [
        answers(["generate", tiny("gemma3"), "--data", lines(files / "rows.jsonl", [row])], capsys)[0] for row in rows
    ]
    assert {one["completion"] for one in found} == {said["completion"]}
    assert found[0]["kept"] == 7
    assert found[2]["prompt"][0]["content"][0]["image_url"] == {"url": "[picture 16x16]"}


def test_several_pictures_of_the_line_are_all_shown(tiny, files, capsys, monkeypatch):
    seen = []
    sampled = LocalSampler.sample

    def sample(self, prompts, params, n=1):
        seen.extend(prompts)
        return sampled(self, prompts, params, n=n)

    monkeypatch.setattr(LocalSampler, "sample", sample)
    paths = [str(files / f"{i}.png") for i in (0, 2)]
    answers(["generate", tiny("qwen2_5_vl"), "a", "b", "--image", paths[0], "--image", paths[1]], capsys)
    numbers = [Album.keep((files / f"{i}.png").read_bytes()) for i in (0, 2)]
    assert [pictures_among(prompt) for prompt in seen] == [numbers, numbers]


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("none.png", "which does not exist"),
        ("https://a.b/c.png", "nothing is fetched"),
        ("rows.jsonl", "is no picture that can be read"),
    ],
)
def test_a_bad_picture_is_told_before_a_model_is_loaded(image, said, files, capsys):
    (files / "rows.jsonl").write_text('{"prompt": "x"}\n')
    path = image if "//" in image else str(files / image)
    assert run(["generate", "no/such/model/at/all", "x", "--image", path]) == 2
    error = capsys.readouterr().err
    assert f"--image {path}" in error
    assert said in error


def test_rows_with_pictures_of_their_own_take_no_more(tiny, files, capsys):
    data = lines(files / "rows.jsonl", [{"prompt": "x"}, {"prompt": "y", "images": [str(files / "0.png")]}])
    assert run(["generate", tiny("llava"), "--data", data, "--image", str(files / "1.png")]) == 2
    assert "row 1 has pictures of its own" in capsys.readouterr().err


def test_a_model_of_text_says_that_it_reads_none(files, capsys, tmp_path):
    place = tmp_path / "text"
    tokenizer = byte_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(place)
    tokenizer.save_pretrained(place)
    assert run(["generate", str(place), "x", "--image", str(files / "1.png")]) == 2
    assert "reads no pictures" in capsys.readouterr().err
    data = lines(files / "rows.jsonl", [{"prompt": "y", "images": [str(files / "0.png")]}])
    assert run(["generate", str(place), "--data", data, *SHORT]) == 0
    assert "reads no pictures: those of the rows are left out" in capsys.readouterr().err


def test_chat_shows_pictures(tiny, files):
    """A picture goes with the next turn and stays in the conversation; the answer is that of `trl generate`."""
    written = []
    talk = Chat(open_model(tiny("gemma3")), Asked(2, temperature=0.0), None, None, written.append)
    assert talk.take(f"/image {files / '1.png'}")
    assert talk.take("What?")
    number = Album.keep((files / "1.png").read_bytes())
    assert pictures_among(talk._prompt([{"role": "user", "content": "And now?"}])) == [number]
    assert talk.pictures == []
    assert talk.take(f"/image {files / '2.png'}")
    assert talk.take("/clear")
    assert [talk.pictures, talk.messages] == [[], []]


@pytest.mark.parametrize(("line", "said"), [("/image none.png", "which does not exist"), ("/image", "say which file")])
def test_chat_tells_of_a_bad_picture(line, said, tiny, capsys):
    talk = Chat(open_model(tiny("gemma3")), Asked(2), None, None, print)
    assert talk.take(line)
    assert said in capsys.readouterr().err
    assert talk.pictures == []


def test_models_are_compared_on_rows_with_pictures(tiny, files, capsys):
    """A picture that two prompts show is embedded once; `trl eval` measures answers below pictures."""
    shown = [[str(files / "1.png")], [str(files / "1.png")], [str(files / "2.png")], []]
    asked = [[{"role": "user", "content": f"What, {place}?"}] for place in range(4)]
    said = [{"role": "assistant", "content": "red"}]
    rows = [{"messages": [*turns, *said], "images": images} for turns, images in zip(asked, shown, strict=True)]
    data = lines(files / "rows.jsonl", rows)
    page = files / "page.html"
    words = ["compare", tiny("gemma3"), tiny("llava"), "--data", data, "--html", str(page), *SHORT]
    assert run(words) == 0
    assert capsys.readouterr().out.count("[picture 16x16]") == 3
    html = page.read_text()
    assert html.count("data:image/") == 2
    assert html.count('role="img" aria-label="picture 16x16"') == 3
    assert run(["eval", tiny("gemma3"), "--data", data, "--json", str(files / "eval.json")]) == 0
    assert json.loads((files / "eval.json").read_text())["measures"]["loss"]["rows"] == 4


def test_inspect_shows_rows_of_a_file(tiny, files, capsys):
    row = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]}
    data = lines(files / "rows.jsonl", [{**row, "images": [str(files / "1.png")]}] * 2)
    page = files / "rows.html"
    assert run(["inspect", "sft", "--model", tiny("gemma3"), "--data", data, "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert out.count("[picture 16x16, 4 tokens]") == 2
    assert re.search("pictures +2 pictures in 2 rows", out)
    assert page.read_text().count("data:image/") == 1


def test_the_table_of_the_callback_has_marks(tmp_path, capsys):
    config = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=1, max_length=512, use_cpu=True, report_to="none", eval_steps=1,
        per_device_train_batch_size=2, assistant_only_loss=True,
    )  # fmt: skip
    data = rows("conversations")
    trainer = trl.SFTTrainer(
        model_of("gemma3"), config, train_dataset=data, eval_dataset=data, processing_class=processor_of("gemma3")
    )
    asked = GenerationConfig(max_new_tokens=2, do_sample=False)
    trainer.add_callback(trl.LogCompletionsCallback(trainer, asked, num_prompts=2, freq=1))
    trainer.train()
    shown = capsys.readouterr().out
    assert shown.count("[picture 16x16, 4 tokens]") >= 1
    assert shown.count("[picture ") == 1 + 2  # of the first row and of the second


def test_two_runs_are_told_apart_by_their_pictures():
    tokenizer, ids, _ = row("gemma3", "a PICTURE b", [WIDE])
    at = next(place for place, token in enumerate(ids) if token < 0)
    assert said(ids, at, tokenizer).startswith("'[picture 32x16, 4 tokens]<end_of_image>")
    assert said(ids, at + 2, tokenizer).startswith("'[picture 32x16, 2 tokens]")


def test_rewards_of_an_evaluation_get_the_pictures(tiny, files, capsys, monkeypatch):
    (files / "rewards.py").write_text(
        "def wide(completions, images, **columns): return [float(sum(one.size[0] for one in row)) for row in images]\n"
    )
    row = {"prompt": [{"role": "user", "content": "What?"}]}
    data = lines(files / "rows.jsonl", [{**row, "images": [str(files / f"{i}.png") for i in range(n)]} for n in (1, 2)])
    reward, figures = f"{files / 'rewards.py'}:wide", files / "eval.json"
    assert run(["eval", tiny("gemma3"), "--data", data, "--reward", reward, "--json", str(figures), *SHORT]) == 0
    assert json.loads(figures.read_text())["measures"]["reward wide"]["value"] == 24


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_a_run_of_the_command_shows_its_pictures(tiny, files, capsys):
    (files / "rewards.py").write_text("def none(completions, **columns): return [0.0] * len(completions)\n")
    row = {"prompt": [{"role": "user", "content": "What?"}]}
    data = lines(files / "rows.jsonl", [{**row, "images": [str(files / f"{i}.png")]} for i in range(2)])
    out = files / "out"
    words = ["grpo", "--model", tiny("gemma3"), "--data", data, "--reward", f"{files / 'rewards.py'}:none", "--use_cpu",
             "--output_dir", str(out), "--max_steps", "1", "--num_generations", "2", "--check_rewards", "no",
             "--per_device_train_batch_size", "4", "--max_completion_length", "2", "--log_completions"]  # fmt: skip
    assert run(words) == 0
    assert capsys.readouterr().out.count("[picture 16x16]\nuser: What?") == 2
    assert len(list((out / "rollouts" / "pictures").iterdir())) == 2
    assert (out / "report.html").read_text().count("data:image/") == 2
    assert (out / "processor_config.json").is_file()
