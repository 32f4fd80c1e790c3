"""Rows with pictures: the ids are the processor's own, with the pictures' tokens in place of its placeholders."""

import logging
from typing import Any

import datasets
import pytest
from datasets import Dataset
from families import ANSWERS, FAMILIES, picture, processor_of, rows
from tokenising import (
    tokenize_preference,
    tokenize_prompts,
    tokenize_stepwise,
    tokenize_supervised,
    tokenize_unpaired,
)

from trl.data.formats import apply_chat_template
from trl.data.packed_dataset import pack_dataset
from trl.data.pictures import Album, PictureReader, number_of, read_by, reader_of
from trl.data.supervised_rows import SupervisedJob
from trl.data.tokenize import noted

KNOWN: dict[str, Any] = {}


def reading(family: str = "qwen2_5_vl") -> Any:
    """The tokenizer of the family's processor, which reads pictures."""
    if family not in KNOWN:
        KNOWN[family] = read_by(processor_of(family))
    return KNOWN[family]


def reader(family: str = "qwen2_5_vl") -> PictureReader:
    found = reader_of(reading(family))
    assert found is not None
    return found


def own_ids(family: str, messages: list[Any], images: list[Any], **how: Any) -> list[int]:
    """What the processor itself makes of a conversation, as its documentation has it."""
    processor = reader(family).processor
    text = processor.apply_chat_template(_parts(messages), tokenize=False, **how)
    return plain_ids(family, text, images)


def plain_ids(family: str, text: str, images: list[Any]) -> list[int]:
    processor = reader(family).processor
    return processor(text=[text], images=[images] if images else None, add_special_tokens=False)["input_ids"][0]


def _parts(messages: list[Any]) -> list[Any]:
    """The messages without the keys that Arrow adds."""
    clean = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        parts = [
            {"type": "image"} if part["type"] != "text" else {"type": "text", "text": part["text"]} for part in content
        ]
        clean.append({"role": message["role"], "content": parts})
    return clean


def check(family: str, ids: list[int], expected: list[int], images: list[Any]) -> None:
    assert reader(family).plain(ids) == expected
    shown = reader(family).occurrences(ids)
    assert [list(Album.open(number).get_flattened_data()) for number in shown] == [
        list(image.get_flattened_data()) for image in images
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_are_tokenised_as_the_processor_does(family: str) -> None:
    given = rows("conversations")
    made, report = tokenize_supervised(given, reading(family), assistant_only_loss=True)
    assert len(made) == len(given)
    for row, one, answer in zip(given, made, ANSWERS, strict=True):
        check(family, one["input_ids"], own_ids(family, row["messages"], row["images"]), row["images"])
        learned = [i for i, m in zip(one["input_ids"], one["loss_mask"], strict=True) if m]
        assert min(learned) >= 0
        assert reading(family).decode(learned, skip_special_tokens=True).strip() == answer
    assert (report.met.pictures, report.pictured) == (9, 6)
    assert "9 pictures in 6 rows" in report.lines()[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_and_answers_apart(family: str) -> None:
    given = rows("preference")
    made, report = tokenize_preference(given, reading(family))
    prompts, _ = tokenize_prompts(rows("prompts"), reading(family))
    unpaired, _ = tokenize_unpaired(rows("unpaired"), reading(family))
    for row, pair, prompt, one in zip(given, made, prompts, unpaired, strict=True):
        for side in ("chosen", "rejected"):
            whole = own_ids(family, row["prompt"] + row[side], row["images"])
            ids = pair["prompt_ids"] + pair[f"{side}_ids"]
            check(family, ids, whole[: len(ids)], row["images"])  # an answer ends at its stop token
        assert pair["prompt_ids"] == one["prompt_ids"] == prompt["prompt_ids"]
        opened = own_ids(family, row["prompt"], row["images"], add_generation_prompt=True)
        assert reader(family).plain(prompt["prompt_ids"]) == opened
    assert (report.met.pictures, report.pictured) == (9, 6)


def hidden_tokens(ids: list[int], family: str) -> list[int]:
    """The tokens that stand for pictures, as the processor writes them."""
    return sorted(token for number in reader(family).occurrences(ids) for token in reader(family).ids_of(number))


@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm", "llava"])
def test_supervised_rows_of_other_forms(family: str) -> None:
    whole, _ = tokenize_supervised(rows("conversations"), reading(family), assistant_only_loss=True)
    apart, report = tokenize_supervised(rows("prompt_completion"), reading(family))
    everything, _ = tokenize_supervised(rows("conversations"), reading(family))
    for one, other, all_of_it in zip(whole, apart, everything, strict=True):
        length = len(other["input_ids"])
        assert other["input_ids"] == one["input_ids"][:length]
        assert all_of_it["input_ids"] == one["input_ids"]
        learned = [i for i, m in zip(all_of_it["input_ids"], all_of_it["loss_mask"], strict=True) if m]
        silent = [i for i, m in zip(all_of_it["input_ids"], all_of_it["loss_mask"], strict=True) if not m][1:]
        assert min(learned) >= 0
        assert sorted(silent) == hidden_tokens(one["input_ids"], family)  # nothing of a picture is learned, all else is
    assert (report.met.pictures, report.pictured) == (9, 6)


def test_pictures_without_parts_stand_first_and_those_of_parts_are_the_same() -> None:
    before, _ = tokenize_supervised(rows("images"), reading())
    for row, one in zip(rows("images"), before, strict=True):
        messages = [dict(message) for message in row["messages"]]
        text = {"type": "text", "text": messages[0]["content"]}
        messages[0]["content"] = [{"type": "image"}] * len(row["images"]) + [text]
        check("qwen2_5_vl", one["input_ids"], own_ids("qwen2_5_vl", messages, row["images"]), row["images"])
    urls, report = tokenize_supervised(rows("data_urls"), reading())
    assert report.met.pictures == 9
    for row, one in zip(rows("images"), urls, strict=True):
        assert len(reader().occurrences(one["input_ids"])) == len(row["images"])


IMAGE = {"type": "image"}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def chat(*content: Any) -> list[dict[str, Any]]:
    said = content[0] if len(content) == 1 and isinstance(content[0], str) else list(content)
    return [{"role": "user", "content": said}, {"role": "assistant", "content": "Red."}]


A, B = picture(1), picture(2, (32, 16))


def ids_of(row: dict[str, Any], family: str = "qwen2_5_vl") -> list[int]:
    ((one,), _) = tokenize_supervised([row], reading(family))
    return list(one["input_ids"])


def test_many_ways_to_say_the_same() -> None:
    wanted = ids_of({"messages": chat(IMAGE, text(" or "), IMAGE, text("?")), "images": [A, B]})
    assert ids_of({"messages": chat({"type": "image", "image": A}, text(" or "), {"image": B}, text("?"))}) == wanted
    assert ids_of({"messages": chat(A, " or ", B, "?")}) == wanted
    mixed = chat(IMAGE, text(" or "), {"type": "image", "image": B}, text("?"))
    assert ids_of({"messages": mixed, "image": A}) == wanted
    numbered = chat({**IMAGE, "index": 1}, text(" or "), {**IMAGE, "index": 0}, text("?"))
    assert ids_of({"messages": numbered, "images": [B, A]}) == wanted
    assert ids_of({"messages": chat("<image> or <image>?"), "images": [A, B]}) == wanted
    sharegpt = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "Red."}]
    assert ids_of({"conversations": sharegpt, "images": [[A], [B]]}) == wanted
    assert ids_of({"prompt": chat(A, " or ", B, "?")[:1], "completion": "Red."}) == wanted[:-1]
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    assert ids_of({"messages": chat(f"{place} or {place}?"), "images": [A, B]}) == wanted


def test_the_same_picture_has_the_same_tokens_and_another_has_others() -> None:
    rows_ = [{"prompt": chat(one, "What?")[:1]} for one in (A, A.copy(), B)]
    made, _ = tokenize_prompts(rows_, reading())
    assert made[0]["prompt_ids"] == made[1]["prompt_ids"] != made[2]["prompt_ids"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "smolvlm"])
def test_texts_hold_the_placeholder(family: str) -> None:
    mark = reader(family).placeholder
    said = f"See {mark} and {mark}: two."
    made, _ = tokenize_supervised([{"text": said, "images": [A, B]}, {"text": "None.", "images": []}], reading(family))
    tokenizer = reading(family)
    expected = plain_ids(family, said, [A, B])
    bos = [tokenizer.bos_token_id] if tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id else []
    check(family, made[0]["input_ids"], [*bos, *expected, tokenizer.eos_token_id], [A, B])
    shown = reader(family).occurrences(made[0]["input_ids"])
    joined = 2 if family == "gemma3" else 0  # the newlines around its pictures and a blank beside them are one token
    assert made[0]["loss_mask"].count(0) - 1 - joined in (
        len(hidden_tokens(made[0]["input_ids"], family)),
        18 - 1 - joined,
    )
    made, _ = tokenize_supervised(
        [{"prompt": f"See {mark}: ", "completion": f"a dog, and {mark}", "images": [A, B]}], reading(family)
    )
    assert reader(family).occurrences(made[0]["input_ids"]) == shown
    learned = [i for i, m in zip(made[0]["input_ids"], made[0]["loss_mask"], strict=True) if m]
    assert learned[-1] == tokenizer.eos_token_id
    assert min(learned) >= 0
    pair = {"chosen": f"See {mark}: one cat.", "rejected": f"See {mark}: two cats.", "images": [A]}
    made, _ = tokenize_preference([pair], reading(family))
    assert len(reader(family).occurrences(made[0]["prompt_ids"])) == 1
    assert tokenizer.decode(made[0]["chosen_ids"]) == f"one cat.{tokenizer.eos_token}"


def test_prompts_inside_the_answers_have_their_pictures_once() -> None:
    question, red, blue = [IMAGE, text("?")], answer("Red."), answer("Blue.")
    pair = {"chosen": [user(question), red], "rejected": [user(question), blue], "images": [A]}
    apart = {"prompt": [user(question)], "chosen": [red], "rejected": [blue], "images": [A]}
    made, report = tokenize_preference([pair], reading())
    assert made[0] == tokenize_preference([apart], reading())[0][0]
    assert report.met.pictures == 1
    brought = [{"type": "image", "image": A}, text("?")]
    own = {"chosen": [user(brought), red], "rejected": [user([brought[0], text("?")]), blue]}
    assert tokenize_preference([own], reading())[0][0] == made[0]
    for form in ([pair], Dataset.from_list([pair]), [own], Dataset.from_list([own]), Dataset.from_list([apart])):
        unpaired, report = tokenize_unpaired(form, reading())
        assert [seen(row["prompt_ids"]) for row in unpaired] == [seen(made[0]["prompt_ids"])] * 2
        assert [row["label"] for row in unpaired] == [True, False]
        assert report.met.pictures == 2


def user(content: list[Any]) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(said: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [text(said)]}


def seen(ids: list[int]) -> list[Any]:
    """The ids with the pixels of pictures in place of their numbers, which are those of their files."""
    return [token if token >= 0 else Album.open(number_of(token)).tobytes() for token in ids]


def test_several_processes_a_stream_and_a_list_give_the_same() -> None:
    given = rows("conversations")
    made, report = tokenize_supervised(given, reading(), num_proc=2)
    stream, partial = tokenize_supervised(given.to_iterable_dataset(), reading())
    listed, _ = tokenize_supervised(list(given), reading())
    assert [seen(row["input_ids"]) for row in made] == [seen(row["input_ids"]) for row in stream]
    assert [seen(row["input_ids"]) for row in made] == [seen(row["input_ids"]) for row in listed]
    assert made["loss_mask"][:] == listed["loss_mask"][:]
    assert made.features["input_ids"].feature.dtype == listed.features["input_ids"].feature.dtype == "int64"
    assert report.met.pictures == partial.met.pictures == 9


def test_prompts_keep_their_pictures_for_rewards() -> None:
    made, _ = tokenize_prompts(rows("prompts"), reading())
    assert made[1]["images"][0].size == (32, 16)
    assert made[3]["images"] == []
    stream, _ = tokenize_prompts(rows("prompts").to_iterable_dataset(), reading())
    first = list(stream)[1]
    assert first["images"][0].size == (32, 16)
    assert seen(first["prompt_ids"]) == seen(made[1]["prompt_ids"])


def test_pictures_are_not_decoded_by_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    decode = datasets.Image.decode_example
    monkeypatch.setattr(
        datasets.Image, "decode_example", lambda self, *a, **k: calls.append(1) or decode(self, *a, **k)
    )
    given = rows("conversations").select([0, 0, 0, 0, 0, 0, 1])
    tokenize_supervised(given, reading())
    assert len(calls) <= 2  # of the first row, whose format is found out


def test_another_processor_makes_the_cached_rows_anew() -> None:
    given = rows("conversations")
    one, _ = tokenize_supervised(given, reading())
    processor = processor_of("qwen2_5_vl")
    processor.image_processor.size = {"shortest_edge": 64, "longest_edge": 16 * 16}
    other, _ = tokenize_supervised(given, read_by(processor))
    assert one[0]["input_ids"] == other[0]["input_ids"]
    assert len(one[1]["input_ids"]) > len(other[1]["input_ids"])


def url(address: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": address}}


STANDS = "which stands for a picture, and"
UNLIKE: list[tuple[dict[str, Any], str]] = [
    (
        {"messages": chat(IMAGE, IMAGE), "images": [A]},
        "have 2 parts for pictures, and the row's column 'images' holds 1",
    ),
    (
        {"messages": chat(IMAGE, "?"), "images": [A, B]},
        "have 1 parts for pictures, and the row's column 'images' holds 2",
    ),
    ({"messages": chat(IMAGE, "?")}, "1 parts for pictures, and the row's column 'images' holds 0"),
    ({"messages": chat({**IMAGE, "index": 1}, "?"), "images": [A]}, "1 parts for pictures"),
    (
        {"messages": chat("<image><image>"), "images": [A]},
        f"'<image>' 2 times, {STANDS} the row's column 'images' holds 1",
    ),
    ({"messages": chat(A, "?"), "images": [B]}, "the messages bring 1 pictures of their own, and the row's column "),
    ({"messages": chat("<|image_pad|>")}, "prints 1 pictures ('<|image_pad|>') of a conversation that has 0: take "),
    ({"messages": chat("?")[1:], "images": [A]}, "no message is the user's"),
    ({"messages": chat("?"), "images": [A], "image": B}, "columns 'images' and 'image' both hold pictures"),
    ({"messages": chat("?"), "images": [A, "http://a/b"]}, "picture 1 of column 'images' is the address 'http://a/b'"),
    ({"messages": chat("?"), "images": [None]}, "picture 0 of column 'images' is None"),
    ({"messages": chat("?"), "image": b"no"}, "column 'image' is no picture that can be read"),
    (
        {"messages": chat(url("http://a/b"), "?")},
        "part 0 of message 0 of column 'messages' is the address 'http://a/b'",
    ),
    ({"messages": chat({**IMAGE, "text": "a dog"}), "images": [A]}, "is a picture and has the text 'a dog'"),
    ({"messages": chat({"type": "video", "video": "a.mp4"})}, "a part of kind 'video' in its content: only parts"),
    ({"messages": chat(picture(1, (900, 2)), "?")}, "the processor cannot read picture 0 (absolute aspect ratio must"),
    ({"text": "What?", "images": [A]}, f"the text has 0 times '<|image_pad|>', {STANDS} 1"),
    ({"text": "<|image_pad|>"}, f"the text has 1 times '<|image_pad|>', {STANDS} 0 pictures"),
]


@pytest.mark.parametrize(("row", "says"), UNLIKE)
def test_what_does_not_go_together_is_one_line(row: dict[str, Any], says: str) -> None:
    good = {"text": "x"} if "text" in row else {"messages": chat("x")}
    with pytest.raises(ValueError) as error:
        tokenize_supervised([good, row], reading())
    assert str(error.value).startswith("row 1 of the train data set: ")
    assert says in str(error.value)
    assert "column" in str(error.value)
    assert "\n" not in str(error.value)


def test_answers_and_steps_have_no_pictures() -> None:
    pair = {"prompt": chat("?")[:1], "chosen": [{"role": "assistant", "content": [{"type": "image", "image": A}]}]}
    with pytest.raises(ValueError, match="column 'chosen' has a picture: pictures belong to the prompt"):
        tokenize_preference([{**pair, "rejected": chat("?")[1:]}], reading())
    with pytest.raises(ValueError, match="column 'completion' has a picture"):
        tokenize_unpaired([{"prompt": pair["prompt"], "completion": pair["chosen"], "label": True}], reading())
    steps = {"prompt": "<|image_pad|>", "completions": ["a"], "labels": [True], "image": A}
    texts = {"chosen": "a <|image_pad|>", "rejected": "b <|image_pad|>", "image": A}
    with pytest.raises(ValueError, match="row 0 of the train data set: the row has a picture, and steps are judged of"):
        tokenize_stepwise([steps], reading())
    with pytest.raises(ValueError, match="the answers do not share the text before a picture: give a column 'prompt'"):
        tokenize_preference([texts], reading())


def test_a_tokenizer_alone_reads_no_pictures() -> None:
    tokenizer = processor_of("qwen2_5_vl").tokenizer
    tokenizer.chat_template = reading().chat_template
    for part in (IMAGE, {"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "image", "image": A}, A):
        with pytest.raises(ValueError, match=r"row 0 .*only parts of kind 'text' can be trained without the mod"):
            tokenize_supervised([{"messages": chat(part, "?"), "images": [A]}], tokenizer)
    made, report = tokenize_supervised([{"messages": chat("?"), "images": [A]}], tokenizer)
    assert "no one reads the column 'images' (pictures are read where the model's processor is" in report.findings[-1]
    assert made.features["input_ids"].feature.dtype == "int32"
    with pytest.raises(ValueError, match="ids are 0 or more"):
        tokenize_supervised([{"input_ids": [1, -5]}], tokenizer)


def test_tokenised_rows_have_pictures_that_the_album_knows() -> None:
    whole = ids_of({"messages": chat(A, "?")})
    made, report = tokenize_supervised([{"input_ids": whole}], reading())
    assert made[0]["input_ids"] == whole
    assert [m for i, m in zip(whole, made[0]["loss_mask"], strict=True) if i < 0] == [0] * 4
    assert report.met.pictures == 1
    with pytest.raises(ValueError, match=r"column 'input_ids' has -100 at entry 1: ids are 0 or more, or those of"):
        tokenize_supervised([{"input_ids": [1, -100]}], reading())
    with pytest.raises(
        ValueError, match=r"has the token '<.image_pad.>', which stands for a part of a picture, and no"
    ):
        tokenize_supervised([{"input_ids": [1, reader().image_token_id]}], reading())
    pair = {"prompt_ids": whole[:-5], "chosen_ids": [1, 2], "rejected_ids": [1, 3]}
    assert tokenize_preference([pair], reading())[1].met.pictures == 1
    with pytest.raises(ValueError, match="column 'chosen_ids' should be a list of token ids"):
        tokenize_preference([{**pair, "chosen_ids": whole}], reading())


def test_no_picture_is_cut() -> None:
    long = {"messages": chat(text("a b c d e f g h"), {"type": "image", "image": A})}
    length = len(ids_of(long))
    short = {"messages": chat("x")}
    after = length - reader().plain(ids_of(long))[::-1].index(reader().image_token_id)  # where the picture ends
    kept, report = tokenize_supervised([long, short], reading(), max_length=after + 2)
    assert (len(kept), report.picture_cut, report.truncated) == (2, 0, 1)
    for limit in (after, after - 1, after - 3):
        kept, report = tokenize_supervised([long, short], reading(), max_length=limit)
        assert (len(kept), report.picture_cut, report.left_out) == (1, 1, 1)
        assert "1 rows would have lost a part of a picture to truncation and are left out" in report.findings
    with pytest.raises(ValueError, match=r"all 1 rows .* 1 would lose a part of a picture to truncation; raise"):
        tokenize_supervised([long], reading(), max_length=after - 1)
    prompts = [{"prompt": one["messages"][:1]} for one in (long, short)]
    whole = tokenize_prompts(prompts, reading())[0][0]["prompt_ids"]
    tail = [token < 0 for token in reversed(whole)].index(True)  # how much stands behind the picture's 4 tokens
    for limit, cut in ((tail + 5, 0), (tail + 4, 1), (tail + 3, 1), (tail, 1)):
        kept, report = tokenize_prompts(prompts, reading(), max_prompt_length=limit)
        assert (len(kept), report.picture_cut) == (2 - cut, cut)
        pairs = [{**one, "chosen": [answer("a")], "rejected": [answer("b")]} for one in prompts]
        how = {"max_prompt_length": limit, "truncation_mode": "keep_end"}
        kept, report = tokenize_preference(pairs, reading(), **how)
        assert (len(kept), report.picture_cut) == (2 - cut, cut)


def test_what_is_odd_is_counted(tmp_path: Any) -> None:
    moving = tmp_path / "a.gif"
    A.save(moving, save_all=True, append_images=[B.resize(A.size)])
    asked = {"type": "image", "image": str(moving), "min_pixels": 4, "max_pixels": None}
    plain = {"type": "image_url", "image_url": {"url": moving.as_uri(), "detail": "auto"}}
    given = [{"messages": chat(asked, "?")}, {"messages": chat(plain, "?")}, {"messages": chat("?")}]
    _, report = tokenize_supervised(given, reading())
    assert (report.animated, report.unread_details, report.met.pictures, report.pictured) == (2, 1, 2, 2)
    assert "2 rows have a file with several pictures (an animation), of which the first is taken" in report.findings
    assert any(line.startswith("1 rows have pictures with fields that no one reads") for line in report.findings)


def test_a_formatting_function_keeps_the_pictures() -> None:
    given = [{"question": "What?", "images": [A]}, {"question": "Who?", "images": [B, A]}]

    def said(row: dict[str, Any]) -> str:
        return "<|image_pad|>" * len(row["images"]) + row["question"]

    for form in (given, Dataset.from_list(given)):
        made, report = tokenize_supervised(form, reading(), formatting_func=said)
        assert report.met.pictures == 3
        assert [len(reader().occurrences(row["input_ids"])) for row in made] == [1, 2]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packed_rows_have_whole_pictures(strategy: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenised, _ = tokenize_supervised(rows("conversations"), reading())
    longest = max(map(len, tokenised["input_ids"]))
    if strategy == "wrapped":
        with pytest.raises(ValueError, match=r"packing_strategy='wrapped' cuts rows anywhere.*pictures.*choose 'bfd'"):
            pack_dataset(tokenised, longest, strategy)
        return
    packed = pack_dataset(tokenised, longest, strategy)
    assert sum(len(lengths) for lengths in packed["seq_lengths"]) == len(tokenised)
    with caplog.at_level(logging.WARNING):
        packed = pack_dataset(tokenised, longest - 1, strategy)
    assert "1 rows with pictures are longer than seq_length" in caplog.text
    kept = [number for row in packed for number in reader().occurrences(row["input_ids"])]
    assert len(kept) == 9 - 3  # the longest row has three
    stream, _ = tokenize_supervised(rows("conversations").to_iterable_dataset(), reading())
    in_stream = [number for row in pack_dataset(stream, longest - 1, strategy) for number in row["input_ids"]]
    assert len(reader().occurrences(in_stream)) == 9 - 3
    with pytest.raises(ValueError, match="seq_length=3 holds none of the rows: they have pictures"):
        pack_dataset(tokenised.select([0, 1, 2]), 3, strategy)


def test_rows_that_were_chosen_keep_their_pictures() -> None:
    given = rows("conversations")
    whole, _ = tokenize_supervised(given, reading())
    for order in ([5, 1, 3], [7, 7, 0]):
        made, _ = tokenize_supervised(given.select(order), reading())
        assert made["input_ids"][:] == [whole[place]["input_ids"] for place in order]


def test_rows_are_noted_one_by_one() -> None:
    notes = list(noted(rows("conversations"), SupervisedJob(tokenizer=reading())).notes)
    assert [note.met.pictures for note in notes] == [1, 2, 1, 0, 1, 3, 1, 0]


@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm"])
def test_conversations_become_texts_with_the_placeholder(family: str) -> None:
    processor = reader(family).processor
    mark = reader(family).placeholder
    for kind in ("conversations", "images", "data_urls"):
        given = rows(kind)
        texts = given.map(apply_chat_template, fn_kwargs={"processing_class": processor}, remove_columns="messages")
        assert [text.count(mark) for text in texts["text"]] == [1, 2, 1, 0, 1, 3, 1, 0]
    whole, _ = tokenize_supervised(rows("conversations"), reading(family))
    given = rows("conversations")
    texts = given.map(apply_chat_template, fn_kwargs={"tokenizer": processor}, remove_columns="messages")
    apart, _ = tokenize_supervised(texts, reading(family), add_special_tokens=False, add_eos=False)
    assert [seen(row["input_ids"]) for row in apart] == [seen(row["input_ids"]) for row in whole]
    pair = {"prompt": chat(A, "?")[:1], "chosen": [answer("a")], "rejected": [answer("b")]}
    made = apply_chat_template(pair, processor)
    assert (made["prompt"].count(mark), mark in made["chosen"]) == (1, False)


@pytest.mark.parametrize("form", ["column", "parts", "pairs"])
def test_a_file_that_was_replaced_is_read_again(form: str, tmp_path: Any) -> None:
    path = tmp_path / "a.png"
    question = [{"type": "image", "image": None}, {"type": "text", "text": "?", "image": None}]
    if form != "column":
        question[0]["image"] = str(path)
    row: dict[str, Any] = {"images": [str(path)]} if form == "column" else {}
    tokenise = tokenize_unpaired if form == "pairs" else tokenize_prompts
    row |= {"chosen": [user(question), answer("a")], "rejected": [user(question), answer("b")]}
    given = Dataset.from_list([row if form == "pairs" else {**row, "prompt": [user(question)]}])
    found = []
    for image in (A, A, B):
        image.save(path)
        found.append(seen(tokenise(given, reading())[0][0]["prompt_ids"]))
    assert found[0] == found[1] != found[2]
    assert B.tobytes() in found[2]
