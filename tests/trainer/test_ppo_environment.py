"""PPO on environments: by `train()`, and by a loop of `run` and `step`."""

import pytest
import torch
import transformers as t
from datasets import Dataset
from environments_for_tests import Letters, early, everything_is_a_call, letters, talkative
from tokenizers_for_tests import TOOLS, byte_tokenizer

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.environment.chat_environment import ChatEnvironment
from trl.environment.tools import SimpleCalculatorTool

pytestmark = pytest.mark.filterwarnings("ignore:No dataset is provided:UserWarning")

ROWS = [{"prompt": text, "wanted": text[0]} for text in ("a b c", "d e", "f g h", "i j", "k", "l m n o", "p q")]


def causal(**changes):
    torch.manual_seed(0)
    config = t.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.update(changes)
    return AutoModelForCausalLMWithValueHead.from_pretrained(t.AutoModelForCausalLM.from_config(config))


@pytest.fixture
def make(tiny_tokenizer):
    def build(environment=None, reward_funcs=None, model=None, tokens=tiny_tokenizer, rows=ROWS, **fields):
        numbers = {
            "batch_size": 4, "mini_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
            "ppo_epochs": 2, "steps": 12, "max_new_tokens": 20,
        }  # fmt: skip
        return PPOTrainer(
            PPOConfig(**{**numbers, **fields}), model or causal(), tokenizer=tokens, data_collator=list,
            dataset=Dataset.from_list(rows), reward_funcs=reward_funcs, environment=environment,
        )  # fmt: skip

    return build


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def recorded(trainer):
    """`(what was given, what was said)` of every turn, the batches of all steps, and their statistics."""
    turns, batches, all_stats = [], [], []
    sampler = trainer.source.sampler

    class Recorder:
        def sample(self, given, params, n=1):
            said = sampler.sample(given, params, n)
            turns.extend((list(ids), completion.ids) for ids, (completion,) in zip(given, said, strict=True))
            return said

    trainer.source.sampler = Recorder()
    trainer.train(callback=lambda step, stats, batch: (batches.append(batch), all_stats.append(stats)))
    return turns, batches, all_stats


def check_exact(turns, batches):
    """Every turn was given all tokens before it, as they are; what counts is what was sampled."""
    spoken = 0
    for batch in batches:
        for query, response, mask in zip(batch["queries"], batch["responses"], batch["masks"], strict=True):
            starts = [i for i in range(len(mask)) if mask[i] and (i == 0 or not mask[i - 1])]
            for start in starts:
                end = next((i for i in range(start, len(mask)) if not mask[i]), len(mask))
                before, turn = query.tolist() + response[:start].tolist(), response[start:end].tolist()
                assert any(given == before and said[: len(turn)] == turn for given, said in turns)
            spoken += len(starts)
    assert spoken == len(turns)


@pytest.mark.parametrize("kind", [talkative, letters])
def test_train_plays_and_learns_from_what_was_sampled(kind, make):
    trainer = make(kind())
    before = weights(trainer)
    turns, batches, stats = recorded(trainer)
    assert len(batches) == 3
    assert len(turns) == 3 * 4 * 3
    check_exact(turns, batches)
    for batch, said in zip(batches, stats, strict=True):
        sampled = sum(int(mask.sum()) for mask in batch["masks"])
        assert sampled < sum(map(len, batch["masks"]))  # tools have spoken
        assert said["ppo/policy/advantages"].shape == (sampled,)
        assert said["ppo/mean_scores"] == pytest.approx(float(torch.stack(batch["scores"]).mean()))
    assert not torch.equal(weights(trainer), before)


def test_the_first_pass_over_a_batch_has_ratio_one(make):
    ratios = []
    make(talkative(), ppo_epochs=1).train(callback=lambda step, stats, batch: ratios.append(stats["ppo/policy/ratio"]))
    for ratio in ratios:
        assert torch.as_tensor(ratio) == pytest.approx(1.0, abs=1e-5)


def test_turns_are_sampled_at_the_temperature_that_scores_them(make):
    assert make(talkative(), temperature=0.5).source.params(None).temperature == 0.5
    ratios = []
    trainer = make(talkative(), temperature=0.5, ppo_epochs=1, steps=4)
    trainer.train(callback=lambda step, stats, batch: ratios.append(stats["ppo/policy/ratio"]))
    assert torch.as_tensor(ratios[0]) == pytest.approx(1.0, abs=1e-5)


def test_reward_functions_read_the_episodes(make):
    seen = {}

    def judge(completions, histories, turn_rewards, wanted, **columns):
        seen.update(completions=completions, histories=histories, wanted=wanted)
        return [float(len(rewards)) for rewards in turn_rewards]

    scores = []
    trainer = make(talkative(reward_fn=None), reward_funcs=judge, steps=4)
    trainer.train(callback=lambda step, stats, batch: scores.extend(batch["scores"]))
    assert [float(score) for score in scores] == [3.0] * 4
    for text, episode in zip(seen["completions"], seen["histories"], strict=True):
        assert episode.text.endswith(text)


def test_conversations_with_tools(make):
    tokens = byte_tokenizer(TOOLS)
    ends = [tokens.convert_tokens_to_ids("<|im_end|>"), *range(20, len(tokens), 3)]
    model = causal(vocab_size=len(tokens), max_position_embeddings=1024, eos_token_id=ends[0])
    environment = ChatEnvironment(environment_factory=Letters, parser=everything_is_a_call, max_iterations=1)
    rows = [{"prompt": [{"role": "user", "content": letter}], "wanted": letter} for letter in "abcdef"]
    fields = {"max_new_tokens": 300, "generation_kwargs": {"eos_token_id": ends}, "steps": 4}
    trainer = make(environment, model=model, tokens=tokens, rows=rows, **fields)
    turns, batches, _ = recorded(trainer)
    assert len(turns) == 8
    check_exact(turns, batches)


def test_minibatches_do_not_change_the_update(make):
    ends = []
    for size in (1, 2, 4):
        trainer = make(letters(), mini_batch_size=size, gradient_accumulation_steps=4 // size, learning_rate=1e-3)
        trainer.train()
        ends.append(weights(trainer))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_run_and_so_does_a_resumed_one(make, tmp_path):
    whole = make(letters())
    whole.train()
    again = make(letters())
    again.train()
    assert torch.equal(weights(whole), weights(again))
    saving = {"output_dir": str(tmp_path), "save_steps": 1, "save_total_limit": 3}
    make(letters(), **saving).train()
    resumed = make(letters(), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ({"environment": talkative(reward_fn=None)}, "reward_funcs: the environment gives no rewards"),
        ({"environment": talkative(), "reward_funcs": early}, "reward_funcs: the environment has a reward_fn"),
        ({"environment": talkative(), "missing_eos_penalty": 1.0}, "missing_eos_penalty"),
        ({"environment": talkative(generation_kwargs={"top_k": 3})}, "generation_kwargs top_k have no effect"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, wrong, make):
    with pytest.raises(ValueError, match=wrong):
        make(**arguments)


# --- run and step -------------------------------------------------------------------------------------------------


def calculator_trainer(tokens):
    model = causal(vocab_size=len(tokens), max_position_embeddings=512, eos_token_id=tokens.eos_token_id)
    config = PPOConfig(batch_size=4, mini_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, ppo_epochs=1)
    return PPOTrainer(config, model, tokenizer=tokens)


def test_the_loop_of_older_scripts():
    tokens = byte_tokenizer(eos="<|endoftext|>")
    environment = talkative()
    environment.tools, environment.tokenizer = {"tool": SimpleCalculatorTool()}, tokens
    environment.reward_fn = lambda texts, answers: [float(a in text) for text, a in zip(texts, answers, strict=True)]
    environment.generation_kwargs = {"do_sample": True, "top_k": 0, "max_new_tokens": 4}
    ends = {}
    for name in ("masked", "unmasked"):
        trainer = calculator_trainer(tokens)
        environment.model = trainer.model
        for _ in range(2):
            torch.manual_seed(1)
            queries, responses, masks, rewards, histories = environment.run(["1+1="] * 4, answers=["2", "3", "a", "b"])
            scores = [torch.tensor(reward) for reward in rewards]
            stats = trainer.step(queries, responses, scores, masks if name == "masked" else None)
            counted = sum(int(mask.sum()) if name == "masked" else len(mask) for mask in masks)
            assert stats["ppo/policy/advantages"].shape == (counted,)
            assert stats["ppo/policy/ratio"] == pytest.approx(1.0, abs=1e-5)
            assert all("<response>" in history.text for history in histories)
        ends[name] = weights(trainer)
    assert not torch.equal(ends["masked"], ends["unmasked"])


def test_what_tools_said_has_no_gradient():
    """The loss of a step does not depend on how likely the tool's tokens are, only on what was sampled behind them."""
    tokens = byte_tokenizer(eos="<|endoftext|>")
    trainer = calculator_trainer(tokens)
    queries, responses = [torch.tensor([5, 6])] * 4, [torch.tensor([7, 8, 9, 10])] * 4
    masks = [torch.tensor([1, 1, 0, 0])] * 4  # the tool has the last word
    scores = [torch.tensor(score) for score in (1.0, 0.0, 2.0, 0.5)]
    trainer.step(queries, responses, scores, masks)
    other = calculator_trainer(tokens)
    other.step(queries, [torch.tensor([7, 8, 30, 31])] * 4, scores, masks)
    torch.testing.assert_close(weights(trainer), weights(other), rtol=1e-5, atol=1e-6)
