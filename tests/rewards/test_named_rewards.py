"""What the name of a reward function may mean."""

import sys
import types

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

from trl.data.packing import pack
from trl.data.prompt_rows import PairsJob
from trl.data.records import Branch, TokenTree
from trl.data.tokenize import tokenize
from trl.models.scoring import rewards
from trl.rewards.named import REWARDS, reward_named, reward_panel
from trl.rewards.reward_model import RewardModel


@pytest.fixture
def scorer(tiny_tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_labels=1,
        num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("name", REWARDS)
def test_every_entry_scores_texts_and_conversations(name):
    texts = ["good 1", "<think>a</think> bad"]
    for completions in (texts, [[{"role": "assistant", "content": text}] for text in texts]):
        prompts = ["p ", "q "] if completions is texts else [[{"role": "user", "content": p}] for p in "pq"]
        values = reward_named(name)(
            prompts=prompts, completions=completions, completion_ids=[[1], [2]], solution=["1", "2"], other=[0, 0]
        )
        assert len(values) == 2
        assert all(value is None or isinstance(value, float) for value in values)


def test_a_function_of_a_module(monkeypatch):
    module = types.ModuleType("my_rewards")
    module.mine = lambda **columns: [1.0]
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    assert reward_named("my_rewards:mine") is module.mine
    with pytest.raises(ValueError, match="my_rewards:other"):
        reward_named("my_rewards:other")
    with pytest.raises(ValueError, match="no_such_module"):
        reward_named("no_such_module:f")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"reward_funcs='acuracy'.*accuracy.*think_format"):
        reward_named("acuracy")


def test_a_reward_model_and_its_folder_say_the_same(scorer, tiny_tokenizer, tmp_path):
    scorer.save_pretrained(tmp_path / "scorer")
    tiny_tokenizer.save_pretrained(tmp_path / "scorer")
    panel = reward_panel([str(tmp_path / "scorer"), scorer, "repetition"], [None, tiny_tokenizer, None])
    assert panel.names == ["scorer", "reward_model", "repetition"]
    assert isinstance(panel.functions[1], RewardModel)
    scores = panel(2, {"prompts": ["a ", "b "], "completions": ["c d", "e"], "completion_ids": [[1, 2], [3]]}).scores
    assert scores[0] == pytest.approx(scores[1])
    assert scores[0][0] != scores[0][1]


def test_one_tokenizer_each():
    with pytest.raises(ValueError, match="reward_processing_classes: 2 for 1"):
        reward_panel("accuracy", [None, None])


def test_a_reward_model_reads_conversations_as_its_trainer_does(chat_tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(chat_tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_labels=1,
        num_attention_heads=2, pad_token_id=chat_tokenizer.pad_token_id,
    )  # fmt: skip
    judge = RewardModel(AutoModelForSequenceClassification.from_config(config), chat_tokenizer)
    prompt, replies = [{"role": "user", "content": "hi"}], [[{"role": "assistant", "content": c}] for c in ("yes", "n")]
    row = {"prompt": prompt, "chosen": replies[0], "rejected": replies[1]}
    rows, _ = tokenize([row], PairsJob(tokenizer=chat_tokenizer))
    trees = [TokenTree(rows[0]["prompt_ids"], [Branch(rows[0][name])]) for name in ("chosen_ids", "rejected_ids")]
    expected = rewards(judge.model, pack(trees)).tolist()
    assert judge(prompts=[prompt] * 2, completions=replies) == pytest.approx(expected, rel=1e-4)
