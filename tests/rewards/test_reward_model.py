"""A reward model as a scorer of texts."""

import copy

import peft
import pytest
import torch
from tiny_models import CAUSAL
from transformers import AutoModelForSequenceClassification, LlamaConfig

from trl.models.forward import rows_padded
from trl.models.unwrap import below_peft
from trl.rewards.named import reward_panel
from trl.rewards.reward_model import RewardModel

TEXTS = ["movie was great", "movie was awful", "the sky is blue and the cat sat on the mat", "hello world"]


@pytest.fixture
def model():
    config = LlamaConfig.from_dict(CAUSAL["llama"].to_dict() | {"vocab_size": 100, "num_labels": 1})
    return AutoModelForSequenceClassification.from_config(config)


def by_hand(model, tokenizer, text):
    """One row alone, read at its last token."""
    ids = [*tokenizer(text)["input_ids"], *([] if tokenizer(text)["input_ids"][-1] == 2 else [2])]
    with torch.no_grad():
        hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
        return model.score(hidden).item()


def test_scores_are_read_at_the_last_token_whatever_shares_the_batch(model, tiny_tokenizer):
    scores = RewardModel(model.eval(), tiny_tokenizer, batch_size=2).raw(TEXTS)
    assert scores == pytest.approx([by_hand(model, tiny_tokenizer, text) for text in TEXTS], abs=1e-5)


def test_calibrated_scores_have_mean_0_and_deviation_1(model, tiny_tokenizer):
    scores = torch.tensor(RewardModel(model, tiny_tokenizer).calibrate(TEXTS).score(TEXTS))
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std().item() == pytest.approx(1, abs=1e-4)


def test_as_reward_function_it_scores_prompt_and_completion(model, tiny_tokenizer):
    reward = RewardModel(model, tiny_tokenizer)
    assert reward(["movie was"], [" great"], topic=["film"]) == pytest.approx(reward.score(["movie was great"]))


def test_the_mode_of_the_model_stays(model, tiny_tokenizer):
    model.train()
    RewardModel(model, tiny_tokenizer).raw(TEXTS)
    assert model.training


def test_a_long_text_loses_its_end(model, tiny_tokenizer):
    reward = RewardModel(model, tiny_tokenizer, max_length=4)
    long, short = reward.raw(["movie was great and the cat sat", "movie was great hello"])
    assert long == pytest.approx(short, abs=1e-6)


def test_what_cannot_be_calibrated(model, tiny_tokenizer):
    for texts in ([], ["movie"], ["movie", "movie"]):
        with pytest.raises(ValueError, match=f"calibrate on {len(texts)} texts"):
            RewardModel(model, tiny_tokenizer).calibrate(texts)


def test_a_classifier_of_several_labels_gives_their_mean(model, tiny_tokenizer):
    model.config.num_labels = 2
    with pytest.warns(UserWarning, match="num_labels=2: a reward model usually has 1; the reward is the mean"):
        RewardModel(model, tiny_tokenizer)


def wrapped(model, how):
    if how == "compiled":
        return torch.compile(model, backend="eager")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    made = peft.get_peft_model(model, config)
    return torch.compile(made, backend="eager") if how == "both" else made


@pytest.mark.parametrize("how", ["peft", "compiled", "both"])
def test_wrapped_models_are_reward_models(model, tiny_tokenizer, how):
    """R7, R13"""
    judge = wrapped(model.eval(), how)
    panel = reward_panel([judge], tiny_tokenizer)
    (scores,) = panel(4, {"prompts": [""] * 4, "completions": TEXTS}).scores
    assert scores == pytest.approx([by_hand(below_peft(judge), tiny_tokenizer, text) for text in TEXTS], abs=1e-5)
    assert not any(parameter.requires_grad for parameter in judge.parameters())


def test_a_module_of_ones_own_stays_a_function():
    """R13"""

    class Judge(torch.nn.Module):
        def forward(self, completions, **columns):
            return [float(len(text)) for text in completions]

    assert reward_panel([Judge()])(2, {"prompts": ["", ""], "completions": ["a", "bb"]}).scores == [[1.0, 2.0]]


@pytest.mark.parametrize("in_config", [None, 0])
def test_a_tokenizer_without_padding_will_do(model, tiny_tokenizer, in_config):
    """R14"""
    bare, expected = copy.deepcopy(tiny_tokenizer), RewardModel(model.eval(), tiny_tokenizer).raw(TEXTS)
    bare.pad_token, model.config.pad_token_id = None, in_config
    with rows_padded(True):
        assert reward_panel([model], bare)(4, {"prompts": [""] * 4, "completions": TEXTS}).scores[0] == pytest.approx(
            expected, abs=1e-5
        )
    assert RewardModel(model, bare).raw(TEXTS) == pytest.approx(expected, abs=1e-5)
