"""Pictures where they go wrong unseen: files and settings that change under a run, and models of other kinds."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import pytest
import torch
import transformers as t
from families import LLAVA, VISION, WIDE, _tokenizer, model_of, picture, processor_of, tokenizer_of
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from trl.data import picture_files
from trl.data.encode import Limits
from trl.data.packing import pack
from trl.data.pictures import Album, pictures_among, read_by, reader_of
from trl.data.records import Branch, TokenTree
from trl.data.supervised_rows import SupervisedJob
from trl.data.tokenize import tokenize
from trl.models.forward import in_module, rows_padded
from trl.models.pictures import introduce
from trl.rollout.prompts import with_opened_pictures


def content(seed: int, size: tuple[int, int] = (16, 16)) -> bytes:
    file = BytesIO()
    picture(seed, size).save(file, "PNG")
    return file.getvalue()


def kept(seed: int, size: tuple[int, int] = (16, 16)) -> int:
    return Album.keep(content(seed, size))


def states_of(model: Any, rows: list[list[int]], prompt: int = 1) -> torch.Tensor:
    packed = pack([TokenTree(row[:prompt], [Branch(row[prompt:])]) for row in rows])
    with torch.no_grad():
        return in_module(model, model.get_output_embeddings(), packed, lambda states_SD: states_SD)[0]


def text_config(tokenizer: Any, **more: Any) -> dict[str, Any]:
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    sizes = {"num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    return WIDE | sizes | ids | {"vocab_size": len(tokenizer)} | more


# -- settings of a processor -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "count"),
    [
        ("smolvlm", lambda processor: setattr(processor.image_processor, "do_image_splitting", False), 4),
        ("llava", lambda processor: setattr(processor, "patch_size", 8), 4),
        ("internvl", lambda processor: setattr(processor, "image_seq_length", 9), 9),
    ],
)
def test_a_processor_whose_settings_changed_reads_anew(name, change, count):
    """Another trainer of the same process would have tokens and tensors of the settings before."""
    processor, number = processor_of(name), kept(1)
    before = reader_of(read_by(processor))
    assert before.count(number) != count
    assert reader_of(read_by(processor)) is before
    change(processor)
    after = reader_of(read_by(processor))
    assert after is not before
    assert after.count(number) == count


def test_a_processor_and_its_tokenizer_are_copied_and_sent_to_other_processes():
    """The tokenizer holds what reads pictures, that the processor, and that the tokenizer."""
    processor, number = processor_of("gemma3"), kept(1)
    tokenizer = read_by(processor)
    expected = reader_of(tokenizer).ids_of(number)
    for copied in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(processor).tokenizer):
        reader = reader_of(copied)
        assert reader is not reader_of(tokenizer)
        assert reader.tokenizer is copied
        assert reader.ids_of(number) == expected


def test_threads_read_pictures_at_the_same_time(monkeypatch):
    """Rollouts that are drawn ahead are read in a thread of their own, and what is kept is bounded."""
    monkeypatch.setattr("trl.data.pictures.MOST_KEPT", 20_000)
    reader, numbers = reader_of(read_by(processor_of("llava"))), [kept(seed) for seed in range(12)]
    expected = {number: reader.values([number])["pixel_values"].clone() for number in numbers}
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            read = list(pool.map(lambda number: (number, reader.values([number])["pixel_values"]), numbers * 8))
    finally:
        sys.setswitchinterval(switch)
    assert all(torch.equal(values, expected[number]) for number, values in read)
    assert sum(one.size for one in reader._read.values()) <= 20_000


def test_a_processor_that_writes_no_token_for_a_picture_is_one_line():
    processor = processor_of("llava")
    processor.num_additional_image_tokens, processor.patch_size = -3, 8  # 1 token, and "default" takes that away
    reader, number = reader_of(read_by(processor)), kept(1)
    with pytest.raises(ValueError, match="LlavaProcessor writes '' for a picture, in which the token"):
        reader.count(number)


# -- the album -------------------------------------------------------------------------------------


def tokenised(rows: Any) -> Any:
    job = SupervisedJob(tokenizer=read_by(processor_of("llava")), limits=Limits())
    return tokenize(rows, job)[0]


def test_cached_rows_are_made_anew_once_the_album_was_removed(monkeypatch, tmp_path):
    from datasets import Dataset

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = [{"text": f"<image> is {seed}", "image": {"bytes": content(seed), "path": None}} for seed in range(2)]
    Dataset.from_list(source).to_parquet(tmp_path / "rows.parquet")
    rows = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "sets"))
    first = tokenised(rows)
    assert tokenised(rows)._fingerprint == first._fingerprint  # from the cache
    shutil.rmtree(tmp_path / "cache" / "trl_pictures")
    again = tokenised(rows)
    assert again["input_ids"][:] == first["input_ids"][:]
    for ids in again["input_ids"]:
        (number,) = pictures_among(ids)
        Album.open(number)


@pytest.mark.parametrize(("mode", "grey"), [("L", True), ("RGB", False), (None, False)])
def test_the_mode_of_a_column_holds(mode, grey):
    """`datasets` converts a picture where it decodes it, and here its file is read."""
    from datasets import Dataset, Features, Image, Value

    features = Features({"text": Value("string"), "image": Image(mode=mode)})
    rows = Dataset.from_list([{"text": "<image> it is", "image": picture(1)}], features=features)
    (number,) = pictures_among(tokenised(rows)["input_ids"][0])
    bands = [band.tobytes() for band in Album.open(number).split()]
    assert (bands[0] == bands[1] == bands[2]) is grey


def test_a_broken_file_of_the_album_is_written_again_and_others_may_read_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    before = os.umask(0o022)
    try:
        path = Album.path(kept(5))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644
    path.write_bytes(path.read_bytes()[:40])  # the disk was full, say
    assert Album.path(kept(5)).read_bytes() == content(5)
    assert [own.name for own in path.parent.iterdir()] == [path.name]


def test_a_reward_function_gets_one_picture_for_all_answers_to_a_prompt(monkeypatch):
    tokenizer, opened = read_by(processor_of("llava")), []
    first, second = content(1), content(2)
    whole = picture_files.open_picture
    monkeypatch.setattr(picture_files, "open_picture", lambda *args: opened.append(args) or whole(*args))
    images = with_opened_pictures({"image": [first] * 4 + [second] * 4}, tokenizer)["image"]
    assert len(opened) == 2
    assert [image is images[0] for image in images] == [True] * 4 + [False] * 4
    assert images[4].tobytes() == picture(2).tobytes()


# -- models of other kinds -------------------------------------------------------------------------


def llava_next() -> tuple[Any, Any]:
    """Tiles by the size of a picture, padded to the most of a row, and a list of states."""
    tokenizer, places = tokenizer_of("llava"), [[16, 32], [32, 16], [32, 32]]
    square = {"height": 16, "width": 16}
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 16}, crop_size=square, image_grid_pinpoints=places)
    settings = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = t.LlavaNextProcessor(images, tokenizer, chat_template=LLAVA, **settings)
    config = t.LlavaNextConfig(
        text_config=t.LlamaConfig(**text_config(tokenizer)),
        vision_config=t.CLIPVisionConfig(**VISION | {"num_hidden_layers": 2}, projection_dim=32),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=places,
        image_seq_length=16,
    )
    torch.manual_seed(0)
    return t.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval(), processor


def idefics2() -> tuple[Any, Any]:
    """Its processor is of an older kind, which does not say what it writes for a picture."""
    tokens = ["<image>", "<fake_token_around_image>", "<end_of_utterance>"]
    tokenizer = _tokenizer(tokens, "</s>", "<s>", adds_bos=True)
    images = Idefics2ImageProcessorPil(size={"shortest_edge": 16, "longest_edge": 32}, do_image_splitting=False)
    perceiver = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8}
    config = t.Idefics2Config(
        text_config=t.MistralConfig(**text_config(tokenizer), head_dim=16, sliding_window=None),
        vision_config=VISION | {"image_size": 32},
        perceiver_config=perceiver | {"num_key_value_heads": 1, "hidden_size": 32},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = t.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    return model, t.Idefics2Processor(images, tokenizer, image_seq_len=4)


def paligemma() -> tuple[Any, Any]:
    """It reads a prompt from both sides, and its processor gives labels."""
    tokenizer = _tokenizer(["<image>"], "<eos>", "<bos>", adds_bos=True, image_token="<image>")
    images = t.SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 16
    processor = t.PaliGemmaProcessor(images, tokenizer)
    config = t.PaliGemmaConfig(
        text_config=t.GemmaConfig(**text_config(tokenizer, head_dim=16)),
        vision_config=t.SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=32),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=32,
    )
    torch.manual_seed(0)
    return t.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval(), processor


@pytest.mark.parametrize("family", [llava_next, idefics2])
def test_rows_are_computed_as_the_processor_of_the_family_gives_them(family):
    model, processor = family()
    tokenizer = read_by(processor)
    reader = reader_of(tokenizer)
    introduce(model, reader)
    sizes = {"a": kept(1), "b": kept(2, (32, 16)), "c": kept(3, (16, 40)), "d": kept(4, (48, 48))}
    texts = [("two: <image> and <image>", "aa"), ("no picture", ""), ("<image> x <image> y <image>", "cdc")]
    if family is llava_next:  # Idefics2 writes two pictures otherwise where nothing is between them
        texts += [("<image><image>next", "bc"), ("<image>x<image>y<image><image>", "cada")]
    rows, expected = [], []
    for text, which in texts:
        numbers = [sizes[name] for name in which]
        given = {"images": [[Album.open(number) for number in numbers]]} if numbers else {}
        inputs = processor(text=[text], return_tensors="pt", **given)
        rows.append(reader.tokens(tokenizer(reader.expand(text, (), numbers).text)["input_ids"], numbers))
        assert reader.plain(rows[-1]) == inputs["input_ids"][0].tolist()
        with torch.no_grad():
            expected.append(model(**inputs, use_cache=False).logits[0, :-1])
    for padded in (False, True):
        with rows_padded(padded):
            logits = states_of(model, rows) @ model.get_output_embeddings().weight.T
        torch.testing.assert_close(logits, torch.cat(expected), atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_a_model_that_reads_answers_from_both_sides_is_not_trained_on_them():
    model, processor = paligemma()
    reader = reader_of(read_by(processor))
    introduce(model, reader)
    with pytest.raises(ValueError, match="reads a row with pictures from both sides, so its tokens would be predicted"):
        states_of(model, [[5, *reader.ids_of(kept(1)), 7, 8, 9, 10]], prompt=18)


def test_pictures_that_stand_together_without_marks_are_one_line():
    """Qwen's positions take them for one picture."""
    model = model_of("qwen2_5_vl")
    reader = reader_of(read_by(processor_of("qwen2_5_vl")))
    introduce(model, reader)
    together = [5, *reader.ids_of(kept(1)), *reader.ids_of(kept(2)), 7, 8]
    with pytest.raises(ValueError, match=r"finds no positions in a row with 2 pictures .*put its own marks, such as"):
        states_of(model, [together])
