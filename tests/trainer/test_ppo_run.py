"""PPOTrainer.train: prompts in, scores of functions and models, and a run that can be taken up where it stopped."""

import os
import shutil

import pytest
import torch
import transformers as t
from datasets import Dataset
from ppo_cases import batch

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.data.records import Rollout
from trl.rewards.panel import RewardError
from trl.rollout.prompts import prompt_ids
from trl.rollout.rewards import RolloutRewards, panel_of, total_scores
from trl.trainer import checkpoints

COMMON = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PROMPTS = [{"prompt": text, "wanted": text[0]} for text in ("a b c", "d e", "f g h", "i j", "k", "l m n o", "p q")]


def causal(**changes):
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(t.LlamaConfig(**{**COMMON, **changes}))
    return AutoModelForCausalLMWithValueHead.from_pretrained(model)


def wanted_letters(completions, wanted, **columns):
    return [float(text.split().count(letter)) for text, letter in zip(completions, wanted, strict=True)]


@pytest.fixture
def make(tiny_tokenizer):
    def build(reward_funcs=wanted_letters, dataset=PROMPTS, given=None, **fields):
        numbers = {"batch_size": 4, "mini_batch_size": 2, "learning_rate": 1e-2, "ppo_epochs": 2, "steps": 16,
                   "max_new_tokens": 4, "use_score_scaling": True, "use_score_norm": True}  # fmt: skip
        config = PPOConfig(**{**numbers, **fields})
        data = Dataset.from_list(dataset)
        return PPOTrainer(
            config,
            causal(),
            tokenizer=tiny_tokenizer,
            dataset=data,
            data_collator=list,
            reward_funcs=reward_funcs,
            **(given or {}),
        )

    return build


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_train_runs_all_steps(make):
    seen = []
    trainer = make(anneal_learning_rate=True)
    before = weights(trainer)
    stats = trainer.train(callback=lambda step, stats, batch: seen.append((step, len(batch["response"]))))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert stats["ppo/learning_rate"] == pytest.approx(1e-2 / 4)
    assert not torch.equal(weights(trainer), before)


def test_prompts(tiny_tokenizer):
    assert prompt_ids({"input_ids": torch.tensor([[4, 5]])}, tiny_tokenizer).tolist() == [4, 5]
    assert prompt_ids({"query": "a b"}, tiny_tokenizer).tolist() == [4, 5]
    with pytest.raises(ValueError, match=r"columns \['text'\]"):
        prompt_ids({"text": "a"}, tiny_tokenizer)
    with pytest.raises(ValueError, match="prompt is a conversation, and the tokenizer has no chat_template"):
        prompt_ids({"prompt": [{"role": "user", "content": "a"}]}, tiny_tokenizer)


def test_a_tokenizer_of_another_model_is_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="the model's embedding has 8 rows: use the model's own tokenizer"):
        PPOTrainer(PPOConfig(), causal(vocab_size=8), tokenizer=tiny_tokenizer, dataset=Dataset.from_list(PROMPTS))


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([], "dataset: it has no rows"),
        ([{"text": "a"}], r"dataset: of its columns \['text'\] none is read"),
        ([{"prompt": None}] * 4, r"row 0 .*: column 'prompt' should be a text or a conversation, got None"),
    ],
)
def test_rows_that_are_no_prompts(make, rows, what):
    with pytest.raises(ValueError, match=what):
        make(dataset=rows).train()


TEXTS = ["d", "e f"]


def lengths(completions, **columns):
    return [len(text) for text in completions]


def scored(functions, own_tokenizer, tokenizers=None, prompts=("a", "b c"), **columns):
    """Scores of two responses."""
    rollout = Rollout([[4], [5, 6]], [[7], [8, 9]], [], [[1], [1, 1]], texts=TEXTS)
    panel = panel_of(functions, tokenizers, own_tokenizer, "cpu")
    return total_scores(RolloutRewards(panel)(rollout, prompts, columns))


def test_scores_add_up(tiny_tokenizer):
    torch.manual_seed(1)
    model = t.AutoModelForSequenceClassification.from_config(t.LlamaConfig(**COMMON, num_labels=1)).eval()
    with torch.no_grad():  # "ad" and "b ce f", with EOS as in training
        alone = [model(input_ids=torch.tensor([ids])).logits[0, 0].item() for ids in ([3, 2], [5, 3, 9, 2])]
    one = scored(model, tiny_tokenizer)
    both = scored([lengths, model, lengths], tiny_tokenizer)
    for row, (got, sum_) in enumerate(zip(one, both, strict=True)):
        assert sum_.item() == pytest.approx(got.item() + 2 * len(TEXTS[row]))
    assert [score.item() for score in one] == pytest.approx(alone, rel=1e-4)


def test_reward_model_with_a_tokenizer_of_its_own(tiny_tokenizer, chat_tokenizer):
    torch.manual_seed(1)
    config = t.BertConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    model = t.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        expected = [
            model(input_ids=torch.tensor([[*chat_tokenizer(text)["input_ids"], chat_tokenizer.eos_token_id]])).logits[
                0, 0
            ]
            for text in ("ad", "b ce f")
        ]
    torch.testing.assert_close(torch.stack(scored(model, tiny_tokenizer, chat_tokenizer)), torch.stack(expected))


def test_conversations_and_columns_reach_the_functions(tiny_tokenizer):
    seen = {}

    def look(**asked):
        seen.update(asked)
        return [0.0, 1.0]

    chat = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    scored(look, tiny_tokenizer, prompts=chat, answer=[1, 2])
    assert (seen["answer"], seen["prompts"]) == ([1, 2], chat)
    assert seen["completions"][1] == [{"role": "assistant", "content": "e f"}]
    assert seen["completion_ids"] == [[7], [8, 9]]


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda **_: [1.0], RewardError, "gave 1 values for 2 completions"),
        (lambda **_: [1.0, float("nan")], RewardError, "nan"),
        (lambda **_: [1.0, None], ValueError, "completion 1 got a score from none"),
    ],
)
def test_scores_that_are_missing(tiny_tokenizer, function, error, message):
    with pytest.raises(error, match=message):
        scored(function, tiny_tokenizer)


def test_nothing_to_score_with(make):
    with pytest.raises(ValueError, match="pass `reward_funcs`"):
        make(reward_funcs=None).train()


def test_stop_token(make):
    assert make(stop_token="a", missing_eos_penalty=1.0, max_new_tokens=8, steps=4).train()
    with pytest.raises(ValueError, match="stop_token='a b'"):
        make(stop_token="a b").train()


@pytest.mark.parametrize("fields", [{}, {"adam_style": "tf", "adap_kl_ctrl": False, "anneal_learning_rate": True}])
def test_resume_is_exact(make, tmp_path, fields):
    whole = make(output_dir=str(tmp_path), save_steps=1, save_total_limit=4, **fields)
    whole.train()
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == [f"checkpoint-{i}" for i in (1, 2, 3, 4)]
    shutil.rmtree(tmp_path / "checkpoint-4")
    shutil.rmtree(tmp_path / "checkpoint-3")
    resumed = make(output_dir=str(tmp_path), save_steps=1, save_total_limit=2, **fields)
    torch.manual_seed(99)  # the state brings its own
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.kl_ctl.value == whole.kl_ctl.value
    assert resumed.running.std == whole.running.std
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]


def test_step_users_resume_through_batches(make, tmp_path):
    def go(trainer, stop=None):
        for rows in trainer.batches():
            queries = [prompt_ids(row, trainer.tokenizer) for row in rows]
            responses = trainer.generate(queries, return_prompt=False, do_sample=True, top_k=0, max_new_tokens=3)
            trainer.step(queries, responses, [torch.tensor(float(len(response))) for response in responses])
            if trainer.data_position == stop:
                trainer.save_state(tmp_path / "state")
        return weights(trainer)

    whole = go(make(), stop=2)
    again = make()
    again.load_state(tmp_path / "state")
    assert torch.equal(go(again), whole)


def test_a_script_with_rows_of_its_own_has_no_place_in_the_data(make, tmp_path, caplog):
    """It may go on with another batch size, as release 1.0.0 let it; one that reads `batches` may not."""
    first = make()
    first.step(*batch())
    first.save_state(tmp_path / "state")
    again = make(batch_size=2)
    again.load_state(tmp_path / "state")
    assert torch.equal(weights(again), weights(first))
    assert "rows in a step 4 -> 2" in caplog.text
    again.step(*batch(rows=2))
    next(first.batches())
    first.save_state(tmp_path / "state")
    with pytest.raises(ValueError, match=r"rows in a step=2: .* was written with 4"):
        make(batch_size=2).load_state(tmp_path / "state")


def test_checkpoint_is_a_model_folder(make, tmp_path):
    trainer = make()
    trainer.save_state(tmp_path / "state")
    trainer.save_state(tmp_path / "state")  # over itself
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "state"))
    assert torch.equal(loaded.v_head.summary.weight, trainer.model.v_head.summary.weight)


def test_a_kill_between_the_two_renames_loses_nothing(make, tmp_path):
    trainer = make()
    trainer.save_state(tmp_path / "state")
    os.rename(tmp_path / "state", tmp_path / ".former-state")
    trainer.load_state(tmp_path / "state")


def test_wrong_checkpoints(make, tmp_path):
    trainer = make()
    with pytest.raises(ValueError, match="holds no trainer_state"):
        trainer.load_state(tmp_path)
    trainer.save_state(tmp_path / "state")
    other = make()
    next(other.ref_model.parameters()).data += 1
    with pytest.raises(ValueError, match="reference model is not the one"):
        other.load_state(tmp_path / "state")
    frozen = make()
    frozen.model.v_head.requires_grad_(False)
    with pytest.raises(ValueError, match="model trains other weights"):
        frozen.load_state(tmp_path / "state")
    with pytest.raises(ValueError, match="lr_scheduler"):
        make(anneal_learning_rate=True).load_state(tmp_path / "state")
    with pytest.raises(ValueError, match="resume_from_checkpoint=True"):
        trainer.train(resume_from_checkpoint=True)


def test_a_full_disk_leaves_nothing_behind(make, tmp_path, monkeypatch):
    trainer = make()
    trainer.save_state(tmp_path / "state")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_state", full)
    with pytest.raises(OSError, match=r"could not save to .*state': .*No space left on device; what was there"):
        trainer.save_state(tmp_path / "state")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    trainer.load_state(tmp_path / "state")
