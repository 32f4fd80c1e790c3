"""What users try with pictures first: files of rows, and what they get wrong."""

import json
from unittest import mock

import pytest
import torch
from datasets import Dataset, load_dataset
from families import config_of, model_of, picture, processor_of
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification

import trl
from trl.data.batches import pair_rows_of_padded, rows_of_padded
from trl.data.pictures import Album, pictures_among, read_by
from trl.data.prompt_rows import PromptsJob
from trl.data.tokenize import tokenize
from trl.models.peft_support import add_adapter
from trl.models.prepare import load_model
from trl.rollout.rewards import TokenRewards
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


def test_a_folder_of_rows_and_pictures_is_read_by_its_rows(beside):
    """`datasets` would take the pictures for the rows, and drop the texts."""
    for name in ("train-0", "test"):
        (beside / f"{name}.jsonl").write_text(json.dumps({"text": name, "image": "pics/0.png"}))
    for seed in range(1, 4):
        picture(seed).save(beside / "pics" / f"{seed}.png")
    rows = named_dataset("../data", "data")
    assert {split: part[0]["text"] for split, part in rows.items()} == {"train": "train-0", "test": "test"}
    assert rows["train"][0]["image"] == str(beside.parent / "elsewhere" / "../data" / "pics/0.png")


def test_a_folder_whose_pictures_are_the_rows_stays_one(beside):
    (beside / "metadata.jsonl").write_text(json.dumps({"file_name": "pics/0.png", "text": "A cat."}))
    row = named_dataset("../data", "data", split="train")[0]
    assert (row["text"], row["image"].size) == ("A cat.", (16, 16))


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


def classifier():
    torch.manual_seed(0)
    config = config_of("gemma3")
    config.num_labels = 1
    judge = AutoModelForSequenceClassification.from_config(config).eval()
    for title, weight in judge.named_parameters():
        if title.endswith("mm_input_projection_weight"):  # 0 in a new one: no picture would matter
            torch.nn.init.normal_(weight, std=0.1)
    return judge


@pytest.mark.parametrize("name", ["RLOO", "PPO"])
def test_a_reward_model_that_reads_tokens_sees_their_pictures(name, tmp_path):
    """It was refused as one that reads none. Its scores are those of the plain classifier, row by row."""
    processor, judge = processor_of("gemma3"), classifier()
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    rows = Dataset.from_list([{"prompt": asked, "images": [picture(seed)]} for seed in range(2)])
    common = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "report_to": "none"}
    how = {"model": model_of("gemma3"), "processing_class": processor, "train_dataset": rows, "reward_model": judge}
    if name == "RLOO":
        args = trl.RLOOConfig(**common, num_generations=2, max_completion_length=2, max_steps=1, save_strategy="no")
        trainer = trl.RLOOTrainer(args=args, **how)
    else:
        args = trl.PPOConfig(**common, num_mini_batches=1, total_episodes=4, response_length=2, num_ppo_epochs=1)
        trainer = trl.PPOTrainer(args=args, ref_model=None, value_model=classifier(), **how)
    scored, own = [], TokenRewards.__call__

    def noted(self, rollout, *more):
        scored.append((rollout, own(self, rollout, *more)))
        return scored[-1][1]

    with mock.patch.object(TokenRewards, "__call__", noted):
        trainer.train()
    rollout, found = scored[0]
    rows = zip(rollout.prompts, rollout.completions, found.scores_BF[:, 0].tolist(), strict=True)
    for prompt, completion, score in rows:
        ids = list(prompt) + list(completion)
        (number,) = pictures_among(ids)
        values = processor(text=["<start_of_image>"], images=[[Album.open(number)]], return_tensors="pt")
        plain = torch.tensor([[judge.config.image_token_id if token < 0 else token for token in ids]])
        kinds = (plain == judge.config.image_token_id).long()
        with torch.no_grad():
            logits = judge(input_ids=plain, token_type_ids=kinds, pixel_values=values["pixel_values"]).logits
        assert logits.item() == pytest.approx(score, abs=1e-5)


def test_what_has_no_classifier_and_no_layers_of_an_adapter_says_so(tmp_path):
    model_of("llava").save_pretrained(tmp_path / "tiny")
    with pytest.raises(ValueError, match=r"transformers has no AutoModelForSequenceClassification of its kind"):
        load_model(str(tmp_path / "tiny"), AutoModelForSequenceClassification, {"num_labels": 1})
    with pytest.raises(ValueError, match=r"of a model of kind 'llava' to adapt: name them by `target_modules`"):
        add_adapter(model_of("llava"), LoraConfig())


@pytest.mark.parametrize("pixels", ["pixel_values", "pixel_values_images"])
def test_a_batch_with_pictures_as_tensors_is_refused(pixels):
    """A collator that calls the processor: its pictures had been left out, and the rows learned without them."""
    ids = torch.tensor([[1, 2, 3]])
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids), pixels: torch.zeros(1, 3, 4, 4)}
    with pytest.raises(ValueError, match=f"the data collator returned {pixels}: the trainer reads pictures itself"):
        rows_of_padded(batch)
    pair = {f"{name}_{side}": ids for name in ("input_ids", "attention_mask") for side in ("chosen", "rejected")}
    with pytest.raises(ValueError, match=f"the data collator returned {pixels}: the trainer reads pictures itself"):
        pair_rows_of_padded({**pair, pixels: batch[pixels]})
    assert len(rows_of_padded({**batch, pixels: None})) == 1


def test_rows_that_nothing_tokenises_are_told(tmp_path):
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "What?"}], "images": [picture(0)]}])
    args = trl.SFTConfig(str(tmp_path), report_to="none", dataset_kwargs={"skip_prepare_dataset": True})
    with pytest.raises(ValueError, match="the train data set has no column 'input_ids', but messages, images; leave"):
        trl.SFTTrainer(model_of("llava"), args=args, train_dataset=rows, processing_class=processor_of("llava"))
