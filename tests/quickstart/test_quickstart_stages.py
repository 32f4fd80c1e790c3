"""The quickstart's models and stages, on made-up reviews and a model of some thousand weights."""

import io
import random
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tiny_models import tiny_model as given_model
from transformers import BertConfig, BertForSequenceClassification, BertModel

from trl.quickstart import command as quickstart
from trl.quickstart import language_model
from trl.quickstart.language_model import adapters, open_model, tiny_model
from trl.quickstart.progress import Progress, StageCallback
from trl.quickstart.recipe import SMALL, TINY
from trl.quickstart.reviews import Review, Reviews
from trl.quickstart.stage_imitate_reward import freeze_lower, imitate, learn_reward, pair_accuracy
from trl.quickstart.stage_reinforce import finite, hacked, reinforce

GOOD = ["great", "wonderful", "moving", "bright", "funny", "warm"]
BAD = ["awful", "dull", "lifeless", "tired", "clumsy", "cold"]


def made_up(count: int, first: int) -> list[Review]:
    draw = random.Random(first)
    lines = []
    for i in range(first, first + count):
        good = i % 2 == 0
        words = draw.sample(GOOD if good else BAD, 3)
        text = f"story {i} is a {words[0]} film with {words[1]} jokes and {words[2]} songs"
        lines.append(Review(text, f"film {i}", good, 2.0 if good else -2.0))
    return lines


@pytest.fixture(scope="module")
def reviews() -> Reviews:
    return Reviews(made_up(40, 0), made_up(40, 100), made_up(24, 200))


@pytest.fixture
def progress() -> Progress:
    return Progress(Console(file=io.StringIO()))


MICRO = replace(
    TINY, imitation_steps=3, imitation_lines=4, reward_pairs=8, reward_batch=4, trained_layers=1, accuracy_pairs=6,
    ppo_steps=2, ppo_lines=4, ppo_minibatch=2, ppo_epochs=1, new_tokens=6, least_tokens=2, measured_prompts=5,
)  # fmt: skip


def test_the_three_stages(reviews, progress, tmp_path, tiny_tokenizer):
    model, tokenizer = tiny_model([review.text for review in reviews.imitate])
    model, imitation = imitate(model, tokenizer, reviews, MICRO, 0, tmp_path, progress)
    assert len(imitation.losses) == 3
    assert imitation.heldout_after < imitation.heldout_before

    config = BertConfig(
        vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "encoder")
    reward, preference = learn_reward(tmp_path / "encoder", tiny_tokenizer, reviews, MICRO, 0, tmp_path, progress)
    assert len(preference.losses) == preference.pairs // 4
    assert preference.accuracy.n == preference.judge_accuracy.n > 0

    trainer, outcome = reinforce(model, tokenizer, reward, reviews, MICRO, 0, progress)
    assert len(outcome.prompts) == len(outcome.before.texts) == len(outcome.after.judge) == 5
    assert {name: len(curve) for name, curve in outcome.history.items()} == {
        "reward": 2, "judge": 2, "KL": 2, "variety": 2,
    }  # fmt: skip
    assert outcome.before.kl == pytest.approx([0.0] * 5, abs=1e-4)
    assert any(abs(kl) > 1e-6 for kl in outcome.after.kl)
    assert sum(outcome.before.reward) == pytest.approx(0, abs=1e-3)
    assert all(text.startswith(prompt) for prompt, text in zip(outcome.prompts, outcome.before.texts, strict=True))
    assert list(progress.seconds) == ["Imitate", "Reward", "Before", "Reinforce", "After"]

    quickstart.keep((trainer, tokenizer, reward, tiny_tokenizer), tmp_path)
    quickstart.keep((trainer, tokenizer, reward, tiny_tokenizer), tmp_path)  # over an older one
    kept, _ = open_model(tmp_path / "policy")
    again = kept(torch.tensor([[5, 6, 7]])).logits
    assert torch.allclose(again, trainer.model.pretrained_model(torch.tensor([[5, 6, 7]])).logits, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "imitate", "policy", "reward", "reward-run"]


def test_the_tiny_model_is_of_about_a_million_weights(reviews):
    model, tokenizer = tiny_model([review.text for review in reviews.imitate])
    assert sum(weight.numel() for weight in model.parameters()) < 1.3e6
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.decode(tokenizer("A film, “that” works")["input_ids"]) == "A film, “that” works"


@pytest.mark.parametrize(("family", "kinds"), [("llama", 7), ("gpt2", 4)])
def test_adapters_go_on_every_linear_layer_of_the_top_blocks(family, kinds):
    from peft import get_peft_model

    config = adapters(given_model(family), share=0.5)
    assert config.layers_to_transform == [1]
    assert len(set(config.target_modules)) == kinds - (family == "gpt2")  # c_proj names two of GPT-2's
    names = [
        name for name, weight in get_peft_model(given_model(family), config).named_parameters() if weight.requires_grad
    ]
    assert len(names) == 2 * kinds
    assert all(".1." in name for name in names)


def test_no_adapters_where_all_weights_are_trained():
    assert adapters(given_model("llama"), share=0.0) is None


def test_only_the_top_layers_of_a_reward_model_learn():
    config = BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=50)
    model = BertForSequenceClassification(config)
    freeze_lower(model, 1)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert not [name for name in trained if "word_embeddings" in name or "layer.0" in name or "layer.1" in name]
    assert {"classifier.weight", "bert.pooler.dense.weight"} < trained
    assert [name for name in trained if "layer.2" in name]


def test_a_tie_is_half_a_hit():
    pairs = [{"chosen": "long", "rejected": "a"}, {"chosen": "a", "rejected": "a"}, {"chosen": "b", "rejected": "b"}]
    assert pair_accuracy(lambda texts: [len(text) for text in texts], pairs).mean == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("figures", "reason"),
    [
        ({"KL": 3.0, "variety": 0.93}, ""),
        ({"KL": SMALL.highest_kl + 1, "variety": 0.93}, "KL"),
        ({"KL": 3.0, "variety": 0.93 - SMALL.lost_variety - 0.01}, "the distinct-word ratio"),
    ],
)
def test_the_guard_against_hacked_rewards(figures, reason):
    assert hacked(figures, 0.93, SMALL).startswith(reason)
    assert bool(hacked(figures, 0.93, SMALL)) is bool(reason)


def test_a_guard_ends_the_stage(reviews, progress, monkeypatch, tiny_tokenizer):
    from trl.rewards.reward_model import RewardModel

    config = BertConfig(
        vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    reward = RewardModel(BertForSequenceClassification(config), tiny_tokenizer)
    model, tokenizer = tiny_model([review.text for review in reviews.imitate])
    _, outcome = reinforce(model, tokenizer, reward, reviews, replace(MICRO, lost_variety=-1.0), 0, progress)
    assert len(outcome.history["KL"]) == 1
    assert outcome.ending.startswith("stopped after step 1 of 2: the distinct-word ratio fell from")


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_named(score):
    with pytest.raises(ValueError, match="reward of text 1 is"):
        finite([0.0, score])


# --- bad input --------------------------------------------------------------------------------------------------------


def saved(folder, tokenizer, **changes):
    given_model("llama", **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_is_opened_with_its_tokenizer(tmp_path, tiny_tokenizer):
    model, tokenizer = open_model(saved(tmp_path, tiny_tokenizer, vocab_size=100))
    assert model.dtype == torch.float32
    assert len(tokenizer) == 100


def test_a_vocabulary_of_another_model(tmp_path, tiny_tokenizer):
    with pytest.raises(ValueError, match="has 100 tokens but the model only 60 embeddings"):
        open_model(saved(tmp_path, tiny_tokenizer))


def test_a_tokenizer_that_cannot_end(tmp_path, tiny_tokenizer):
    tiny_tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        open_model(saved(tmp_path, tiny_tokenizer, vocab_size=100))


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path, tiny_tokenizer):
    tiny_tokenizer.pad_token = None
    assert open_model(saved(tmp_path, tiny_tokenizer, vocab_size=100))[1].pad_token_id == 2


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"--model .*gone: there is no such folder"):
        open_model(tmp_path / "gone")


@pytest.mark.parametrize("damage", ["empty", "weights"])
def test_a_folder_that_is_no_model_is_one_line(tmp_path, tiny_tokenizer, damage):
    folder = tmp_path / "model"
    if damage == "empty":
        folder.mkdir()
    if damage == "weights":
        saved(folder, tiny_tokenizer)
        (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"--model .*model: cannot be read .*save_pretrained") as caught:
        open_model(folder)
    assert "\n" not in str(caught.value)


def test_a_model_too_short_for_the_lines_is_named(tmp_path, tiny_tokenizer):
    with pytest.raises(ValueError, match="has 8 positions"):
        language_model.check_length(given_model("llama", max_position_embeddings=8), SMALL, "short")


def test_extras_are_checked_first(monkeypatch):
    monkeypatch.setattr(quickstart, "NEEDED", ("scipy", "no_such_package"))
    with pytest.raises(ImportError, match="needs no_such_package: pip install no_such_package"):
        quickstart.check_extras()


def test_an_output_that_cannot_be_written_is_named_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"--output .*file: cannot write there"):
        quickstart.prepare_folder(tmp_path / "file")


def test_tiny_takes_no_model():
    with pytest.raises(ValueError, match="--tiny"):
        quickstart.command(model="x", tiny=True)


def test_a_failed_save_keeps_the_older_folder(tmp_path):
    class Full:
        def save_pretrained(self, folder):
            folder.mkdir()
            (folder / "half").write_text("")
            raise OSError(28, "No space left on device")

    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "whole").write_text("")
    with pytest.raises(OSError, match=r"cannot save .*policy: No space left"):
        quickstart.replace_folder(tmp_path / "policy", Full())
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    assert (tmp_path / "policy" / "whole").exists()


def test_without_a_terminal_progress_is_a_line_a_stage(progress):
    with progress, progress.stage("Imitate", 2) as stage:
        stage.advance(figures={"loss": 1.0})
    assert progress.console.file.getvalue() == "Imitate ...\n"
    assert progress.seconds["Imitate"] > 0


def test_without_a_terminal_a_long_stage_still_tells_where_it_is(progress, monkeypatch):
    monkeypatch.setattr("trl.quickstart.progress.QUIET_SECONDS", 0.0)
    with progress, progress.stage("Imitate", 2) as stage:
        stage.advance(figures={"loss": 1.0})
    assert progress.console.file.getvalue() == "Imitate ...\nImitate 1/2  loss 1.00\n"


def test_on_a_terminal_progress_is_a_bar_with_figures():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress(console) as progress, progress.stage("Reinforce", 2) as stage:
        watch = StageCallback(stage, {"loss": "loss"})
        watch.on_log(None, None, None, logs={"loss": 0.25, "other": 1.0})
        stage.advance(figures={"KL": 1.5})
    shown = console.file.getvalue()
    assert "Reinforce" in shown
    assert "1/2" in shown
    assert "1.50" in shown
    assert watch.losses == [0.25]
