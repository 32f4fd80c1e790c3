"""The README beside a model: filled, valid metadata, nobody's own is replaced."""

import warnings

import pytest
from conformity import build
from huggingface_hub import ModelCard

import trl
from trl.trainer.model_card import MARK, WAYS, CardFacts, card_text, licence_of, write_card
from trl.trainer.run_record import resolved

HOSTILE = "a: b\n---\n# big | `x` <script>alert(1)</script> [l](http://x) \x1b[31m"


def metadata(text):
    return ModelCard(text, ignore_metadata_errors=False).data


@pytest.mark.parametrize("case", ["sft", "dpo-sigmoid", "reward", "grpo"])
def test_what_was_done_is_there(case, tmp_path):
    trainer = build(case, tmp_path / "mine", max_steps=2, logging_steps=1, learning_rate=3e-3)
    trainer.train()
    trainer.create_model_card(dataset_name="someone/rows", tags="extra", license="mit")
    text = (tmp_path / "mine" / "README.md").read_text()
    data = metadata(text)
    assert (data.license, data.model_name, data.datasets) == ("mit", "mine", ["someone/rows"])
    assert {"trl", "extra"} <= set(data.tags)
    assert f"`{type(trainer).__name__}` of trl), 2 steps." in text
    assert WAYS[type(trainer).__name__] in text
    assert "| learning_rate | 0.003 |" in text
    assert f"| trl | {trl.__version__} |" in text
    assert "| source | someone/rows |" in text
    assert f"| train | {len(trainer.train_dataset)} rows" in text
    assert "| loss | " in text
    assert "output_dir" not in text
    assert str(tmp_path) not in text


def test_every_trainer_has_its_words():
    names = {name for name in trl.__all__ if name.endswith("Trainer") and not name.startswith(("PPO", "DDPO", "BCO"))}
    assert names - {"BaseTrainer"} <= set(WAYS)


@pytest.mark.parametrize("place", ["name", "base", "dataset", "setting"])
def test_no_text_is_markup(place, tmp_path):
    config = trl.SFTConfig(str(tmp_path), chat_template_path=HOSTILE if place == "setting" else "x", use_cpu=True)
    text = card_text(
        CardFacts(
            "SFTTrainer", HOSTILE if place == "name" else "m", HOSTILE if place == "base" else "someone/base",
            resolved([config]), datasets=[HOSTILE if place == "dataset" else "someone/rows"],
        )
    )  # fmt: skip
    data = metadata(text)
    assert data.license == "unknown"
    assert data.model_name == (HOSTILE if place == "name" else "m")
    assert data.base_model == (None if place == "base" else "someone/base")
    body = text.split(MARK)[1]
    assert "<script>" not in body.replace("\\<script", "")
    assert "\n# big" not in body
    assert "\x1b" not in body


@pytest.mark.parametrize(
    ("readme", "found"),
    [
        ("---\nlicense: gemma\n---\n# x", "gemma"),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\nlicense: unknown\n---\n", None),
        ("---\n: [\n---\n", None),
        ("# x", None),
        (None, None),
    ],
)
def test_the_licence_is_that_of_the_base(readme, found, tmp_path):
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert licence_of(str(tmp_path)) == found


@pytest.mark.parametrize("base", ["", "nobody/has-this", "a b/c\n", "x" * 300])
def test_a_base_that_is_not_here_has_none(base):
    assert licence_of(base) is None


def test_a_readme_of_somebodys_stays(tmp_path):
    (tmp_path / "README.md").write_text("# My own words")
    assert not write_card(tmp_path, f"{MARK} new")
    assert (tmp_path / "README.md").read_text() == "# My own words"
    for old in (f"{MARK} old", "# Model Card for Model ID"):
        (tmp_path / "README.md").write_text(old)
        assert write_card(tmp_path, f"{MARK} new")
        assert (tmp_path / "README.md").read_text() == f"{MARK} new"


def test_an_adapter_says_so(tmp_path):
    trainer = build("sft", tmp_path / "mine", lora=True, max_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.save_model()
    trainer.create_model_card()
    text = (tmp_path / "mine" / "README.md").read_text()
    assert metadata(text).library_name == "peft"
    assert "an adapter: needs peft" in text
