"""Rollouts as people run them: rewards that log, wrapped judges, tags, rollout functions, streams, last logs."""

import logging
from pathlib import Path

import pytest
import torch
from conformity import causal_lm, early_letters, history, prompts, tokenizer
from datasets import Dataset, IterableDataset, load_dataset
from tiny_models import tiny_model
from tokenizers_for_tests import CHATML, THINKING, byte_tokenizer

import trl
from trl.data.records import Completion, Rollout
from trl.environment import TextEnvironment
from trl.generation.stopping import without_ends
from trl.rewards.named import pairwise
from trl.rewards.panel import RewardError, RewardPanel
from trl.rollout.collector import columns_of, replace_groups
from trl.rollout.prompts import PromptStream
from trl.rollout.rewards import RolloutRewards, asked_of
from trl.rollout.source import FunctionSource, calls_of, rollout_of

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR)


def make(folder, reward_funcs=early_letters, rows=None, model=None, names=None, arguments=None, **settings):
    base = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4,
        "max_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    return trl.GRPOTrainer(
        model or causal_lm(), reward_funcs, trl.GRPOConfig(**{**base, **settings}),
        prompts() if rows is None else rows, processing_class=names or tokenizer(), **(arguments or {}),
    )  # fmt: skip


class Says:
    """A sampler that says the same to each prompt."""

    def __init__(self, names, text):
        self.ids = names(text, add_special_tokens=False)["input_ids"]

    def sample(self, asked, params, n=1):
        numbers = [-1.0] * len(self.ids)
        return [[Completion(self.ids, numbers, numbers, "stop") for _ in range(n)] for _ in asked]


# --- rewards ------------------------------------------------------------------------------------------------------


def test_what_functions_log_is_in_logs_table_and_file(tmp_path, capsys):
    """R3"""

    def judge(completions, log_extra, log_metric, environments):
        assert environments is None
        log_extra("words", [len(text.split()) for text in completions])
        log_extra("note", [[text[:1]] for text in completions])
        log_metric("share", 0.25)
        return early_letters(completions)

    evaluation = prompts().select([0, 1])
    trainer = make(tmp_path, judge, log_completions=True, arguments={"eval_dataset": evaluation})
    trainer.train()
    assert history(trainer, "share") == [0.25]
    shown = capsys.readouterr().out
    assert "words" in shown
    assert "note" in shown
    assert "step 1" in shown  # L13: as the log says
    (file,) = Path(tmp_path).glob("rollouts/*.parquet")
    rows = load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path))
    assert rows["words"][:] == [len(text.split()) for text in rows["completion"]]
    assert rows["note"][0].startswith('["')
    assert rows["step"][0] == 1
    assert trainer.evaluate()["eval_share"] == 0.25


@pytest.mark.parametrize("name", ["reward", "loss", "rewards/judge/mean"])
def test_a_metric_of_the_trainer_is_not_logged_by_a_function(name, tmp_path):
    """R3"""

    def judge(completions, log_metric):
        log_metric(name, 1.0)
        return early_letters(completions)

    with pytest.raises(ValueError, match=f"log_metric: '{name}' is a metric of the trainers already"):
        make(tmp_path, judge).train()


def judged(number, score, **extra):
    made = Rollout([[1]] * 2, [[number]] * 2, [[0.0]] * 2, [[1]] * 2, texts=[str(number)] * 2)

    def judge(log_extra, log_metric):
        log_metric("m", number)
        for name, value in extra.items():
            log_extra(name, [value] * 2)
        return [score, score + number]

    return made, RolloutRewards(RewardPanel([judge]))(made, ["p"] * 2, {})


def test_logged_columns_move_with_their_groups():
    """R3: dynamic sampling"""
    (made, rewards), further = judged(0, 1.0, here="a"), judged(5, 2.0, here="b", there="c")
    rows = ["old"]
    replace_groups(rows, made, rewards, (["new"], *further), 2)
    assert rows == ["new"]
    assert rewards.logs.extra == {"here": ["b", "b"], "there": ["c", "c"]}
    assert rewards.logs.metrics == {"m": [0.0, 5.0]}


@pytest.mark.parametrize("reward", [1e30, 1e39, -1e20])
def test_rewards_of_a_rollout_function_and_an_environment_are_float32(reward):
    """R5"""
    made = Rollout([[1]] * 2, [[1]] * 2, [[0.0]] * 2, [[1]] * 2, rewards=[0.0, reward])
    with pytest.raises(RewardError, match=r"rollout_func gave .* for completion 1"):
        RolloutRewards(None)(made, [], {})
    made.metadata["histories"] = []
    with pytest.raises(RewardError, match="the environment gave"):
        RolloutRewards(None)(made, [], {})


def test_tags_that_are_special_tokens_stay():
    """R8"""
    names = byte_tokenizer(CHATML)
    names.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<|eot|>"]})
    ids = names("<think>two</think>4<|im_end|><|eot|>", add_special_tokens=False)["input_ids"]
    pads = [names.pad_token_id] * 2
    assert without_ends(names, [ids + pads]) == ["<think>two</think>4<|eot|>"]
    assert without_ends(names, [ids, []], [ids[-1], ids[1]]) == ["<think>two</think>4", ""]


@pytest.mark.parametrize("name", ["think_format", "think_answer_format"])
@pytest.mark.parametrize("form", ["special", "opened", "both"])
def test_thoughts_are_rewarded_however_they_are_written(form, name, tmp_path):
    """R8, R9"""
    names = byte_tokenizer(CHATML if form == "special" else THINKING)
    if form != "opened":
        names.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    text = ("<think>" if form == "special" else "") + "two</think><answer>4</answer><|im_end|>"
    rows = [{"prompt": [{"role": "user", "content": "2 + 2?"}]}] * 2
    model = tiny_model("llama", vocab_size=len(names), max_position_embeddings=512)
    trainer = make(tmp_path, name, Dataset.from_list(rows), model, names)
    own = [dict(trainer.train_dataset[0])]
    trainer.source.sampler = Says(names, text)
    rollout = trainer.collector.draw(own, 2, 0)
    assert trainer.collector.judge(rollout, own, 2, None).scores_BF.flatten().tolist() == [1.0, 1.0]


def test_functions_get_the_policys_own_turns():
    """R11: in a text environment"""

    def ask(text):
        return "The answer is 42"

    names = byte_tokenizer(None)
    env = TextEnvironment(tools={"ask": ask}, reward_fn=lambda texts: [0.0] * len(texts), max_turns=1, tokenizer=names)
    from trl.environment.turns import SampledTurns
    from trl.generation.sampler import SamplingParams

    turns = SampledTurns(Says(names, "6?<request><ask>x<call>"), SamplingParams(max_new_tokens=40))
    rollout = env.rollout([{"prompt": "q", "prompt_ids": [5]}], turns, [1], 200)
    assert "The answer is 42" in rollout.texts[0]
    asked = asked_of(rollout, ["q"], {})
    assert asked["turn_texts"] == [["6?<request><ask>x<call>"]]
    assert asked["completions"] == rollout.texts
    panel = RewardPanel([trl.rewards.pattern_reward("42"), trl.rewards.pattern_reward("6")])
    assert panel(1, asked).scores == [[0.0], [1.0]]


def test_environments_reach_the_functions():
    """R3"""

    class Own:
        def reset(self):
            pass

        def look(self) -> str:
            """Look."""
            return ""

    from trl.environment.episodes import Episode, OwnEnvironment, as_rollout
    from trl.environment.text_history import TextHistory

    history = TextHistory("q", torch.tensor([5]))
    own = OwnEnvironment(Own)
    Episode(history, own=own)
    seen = []

    def judge(environments):
        seen.extend(environments)
        return [0.0]

    RolloutRewards(RewardPanel([judge]))(as_rollout([history]), ["q"], {})
    assert seen == [own.instance]


@pytest.mark.parametrize("first", [0, 1])
def test_a_column_that_some_rows_lack(first, tmp_path):
    """R12"""
    rows = [{"prompt": "a b", "answer": "1"}, {"prompt": "c d"}]
    seen = {}

    def judge(prompts, completions, answer):
        seen.update(zip(prompts, answer, strict=True))
        return early_letters(completions)

    make(tmp_path, judge, rows[first:] + rows[:first]).train()
    assert seen == {"a b": "1", "c d": None}
    assert columns_of([{"prompt": "a"}, {"prompt": "b", "x": 1, "y": [2]}], 2) == {
        "x": [None, None, 1, 1], "y": [None, None, [2], [2]],
    }  # fmt: skip


# --- rollout functions ----------------------------------------------------------------------------------------------


def todays(asked, trainer):
    made = [[5, 6, 7][: 1 + i % 3] for i in range(len(asked))]
    return {
        "prompt_ids": [[3, 4]] * len(asked), "completion_ids": made, "logprobs": [[-4.0] * len(ids) for ids in made],
        "env_reward": [float(i) for i in range(len(asked))],
    }  # fmt: skip


def by_prompts(prompts, trainer):
    assert all(isinstance(prompt, str) for prompt in prompts)
    assert trainer.args.num_generations == 2
    return todays(prompts, trainer)


def by_rows(rows, trainer):
    rows[0]["prompt"] = "changed"
    return {**todays(rows, trainer), "logprobs": None}


def earlier(prompts, args, processing_class):
    assert args.num_generations == 2
    return {
        **todays(prompts, None),
        "completion_ids": [processing_class("a b")["input_ids"]] * len(prompts),
        "logprobs": None,
    }


@pytest.mark.parametrize("function", [by_prompts, by_rows, earlier])
def test_rollout_functions_of_today(function, tmp_path):
    """L1"""

    def judge(completions, env_reward, **columns):
        return env_reward

    trainer = make(tmp_path, judge, arguments={"rollout_func": function})
    trainer.train()
    assert history(trainer, "reward") == [1.5]
    assert history(trainer, "grad_norm")[0] > 0
    if function is not by_prompts:  # measured by the trainer itself
        assert history(trainer, "ratio") == [pytest.approx(1.0, abs=1e-5)]


def test_what_a_rollout_function_gives_is_read():
    """L1"""
    given = {
        "prompt_ids": torch.tensor([[1], [2]]), "completion_ids": [[3, 4], [5]],
        "logprobs": [[[-1.0, -9.0], [-2.0]], [-3]],
        "env_mask": [[1, 0], [1]], "rewards": [1.0, 2.0], "note": ["a", "b"],
    }  # fmt: skip
    made = rollout_of(given)
    assert (made.logprobs, made.masks, made.rewards) == ([[-1.0, -2.0], [-3.0]], [[1, 0], [1]], [1.0, 2.0])
    assert made.metadata == {"rewards": [1.0, 2.0], "note": ["a", "b"]}
    unknown = FunctionSource(lambda rows: {"prompt_ids": [[1]], "completion_ids": [[2]]}, lambda made: [[-7.0]])
    assert unknown.draw([{"prompt": "p"}]).logprobs == [[-7.0]]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"completion_ids": None}, "completion_ids"),
        ({"note": ["a"]}, "note has 1 values for 2 completions"),
        ({"logprobs": [[-1.0], [-1.0]]}, r"logprobs\[0\] has 1 numbers for 2 tokens"),
        ({"env_mask": [[1, 1], []]}, r"env_mask\[1\] has 0 numbers for 1 tokens"),
        ({"steps": 3}, "steps is a int; give a list"),
        ({"note": {"a": 1, "b": 2}}, "note is a dict; give a list"),
        ({"completion_ids": ["ab", "c"]}, r"completion_ids\[0\] is 'ab'; give a list of token ids"),
        ({"prompt_ids": [[1], None]}, r"prompt_ids\[1\] is None; give a list of token ids"),
        ({"logprobs": [[-1.0, -1.0], None]}, r"logprobs\[1\] is None; give a number for each token, or None for all"),
    ],
)
def test_what_a_rollout_function_cannot_give(changes, what):
    """L1"""
    given = {"prompt_ids": [[1], [2]], "completion_ids": [[3, 4], [5]], **changes}
    with pytest.raises(ValueError, match=what):
        rollout_of({name: value for name, value in given.items() if value is not None})
    with pytest.raises(ValueError, match="rollout_func gave a list: return"):
        FunctionSource(lambda rows: [1]).draw([{"prompt": "p"}])
    assert calls_of(lambda rows, trainer: (rows, trainer), [1], [2, 3])([{"prompt": "p"}]) == ([{"prompt": "p"}], 1)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"completion_ids": [[3, 9]]}, r"completion_ids\[0\] has the token 9, and the policy knows 0 to 8; give ids"),
        ({"prompt_ids": [[-100, 1]]}, r"prompt_ids\[0\] has the token -100"),
        ({"logprobs": [[-1.0, 0.7]]}, r"logprobs\[0\] has 0.7; give natural logarithms"),
        ({"logprobs": [[float("nan"), -1.0]]}, r"logprobs\[0\] has nan"),
        ({"logprobs": [[-1.0, float("-inf")]]}, r"logprobs\[0\] has -inf"),
    ],
)
def test_tokens_and_numbers_of_a_rollout_function_must_be_the_policys(changes, what):
    """L1: also those of a `Rollout`; what the policy did not write may have any number."""
    given = {"prompt_ids": [[1]], "completion_ids": [[3, 4]], "logprobs": [[-1.0, 0.0]], **changes}
    ours = Rollout(given["prompt_ids"], given["completion_ids"], given["logprobs"], [[1, 1]])
    for made in (given, ours):
        with pytest.raises(ValueError, match=what):
            FunctionSource(lambda rows, made=made: made, words=9).draw([{"prompt": "p"}])
    if "logprobs" in changes:
        masks = [[int(-50 < number <= 0) for number in given["logprobs"][0]]]
        FunctionSource(lambda rows: {**given, "env_mask": masks}, words=9).draw([{"prompt": "p"}])


def test_a_rollout_function_and_a_judge_may_be_async():
    """L1, R1"""

    async def made(rows):
        return {"prompt_ids": [[1]] * len(rows), "completion_ids": [[2]] * len(rows), "logprobs": [None] * len(rows)}

    async def judge(prompts, pairs):
        return [1] * len(prompts)

    source = FunctionSource(made, lambda rollout: [[-7.0]] * len(rollout), 3)
    assert source.draw([{"prompt": "p"}], group=2).logprobs == [[-7.0], [-7.0]]
    assert pairwise(judge)(["p", "p"], ["a", "b"]) == [0.0, 1.0]


# --- streams of prompts -----------------------------------------------------------------------------------------------


def stream(count=5):
    return Dataset.from_list([{"prompt": letter} for letter in "abcdefgh"[:count]]).to_iterable_dataset()


def test_a_stream_of_prompts_is_read_over_and_over_from_any_place():
    """L2"""
    rows = PromptStream(stream(3), seed=0)
    whole = [row["prompt"] for row in rows.take(0, 8)]
    assert whole == list("abcabcab")
    assert [row["prompt"] for row in PromptStream(stream(3), seed=0).take(4, 2)] == whole[4:6]
    assert [row["prompt"] for place in (0, 3, 4) for row in rows.take(place, 1)] == ["a", "a", "b"]
    shuffled = PromptStream(stream(8).shuffle(seed=1, buffer_size=8), seed=0)
    first, second = ([row["prompt"] for row in shuffled.take(start, 8)] for start in (0, 8))
    assert sorted(first) == sorted(second)
    assert first != second
    with pytest.raises(ValueError, match="it has no rows"):
        PromptStream(IterableDataset.from_generator(lambda: iter(())), seed=0).take(0, 1)


def test_training_on_a_stream_resumes_at_the_same_row(tmp_path):
    """L2"""
    seen = []

    def judge(prompts, completions, **columns):
        seen.extend(prompts[::2])
        return early_letters(completions)

    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    make(tmp_path / "a", judge, stream(), **settings).train()
    whole = seen.copy()
    assert whole == list("abcdea")
    seen.clear()
    make(tmp_path / "a", judge, stream(), **settings).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert seen == whole[4:]
    with pytest.raises(ValueError, match="max_steps"):
        make(tmp_path / "b", judge, stream(), max_steps=-1)


# --- settings of generation -----------------------------------------------------------------------------------------


def test_keywords_of_generate_are_honoured(tmp_path):
    """L10"""
    asked = {"do_sample": True, "temperature": 0.7, "top_k": 5, "max_new_tokens": 3, "eos_token_id": 2, "num_beams": 1}
    asked |= {"stop_strings": "x", "use_cache": True}
    trainer = make(tmp_path, max_completion_length=512, generation_kwargs=asked)
    params = trainer.sampling_params(0)
    assert (params.temperature, params.top_k, params.max_new_tokens) == (0.7, 5, 3)
    assert (params.stop_token_ids, params.stop_strings) == ((2,), ("x",))
    assert trainer.args.reshapes


@pytest.mark.parametrize(
    ("keywords", "what"),
    [
        ({"do_sample": False}, "do_sample=False explores nothing"),
        (
            {"num_beams": 4, "bad_words_ids": [[1]]},
            "no sampler follows num_beams, bad_words_ids; choose among do_sample",
        ),
        ({"generation_config": object()}, "no sampler follows generation_config"),
        ({"temperature": 0.5}, "generation_kwargs has temperature=0.5; say it once"),
    ],
)
def test_keywords_that_no_sampler_follows_are_named(keywords, what):
    """L10"""
    with pytest.raises(ValueError, match=what):
        trl.GRPOConfig(generation_kwargs=keywords, temperature=0.9, report_to="none")


def test_a_models_generation_config_is_honoured_or_refused(tmp_path):
    """L10"""
    model = causal_lm()
    model.generation_config.min_new_tokens, model.generation_config.top_k = 2, 20
    config = trl.GRPOConfig(str(tmp_path), report_to="none", per_device_train_batch_size=8)
    trainer = trl.GRPOTrainer(model, early_letters, config, prompts(), processing_class=tokenizer())
    assert (trainer.sampling_params(0).min_new_tokens, trainer.sampling_params(0).top_k) == (2, 0)
    assert config.generation_kwargs is None
    model.generation_config.suppress_tokens = [5]
    with pytest.raises(ValueError, match=r"model.generation_config.suppress_tokens=\[5\]: no sampler follows it"):
        make(tmp_path, model=model)


# --- logs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "every", "strategy"), [(1, 500, "steps"), (3, 2, "steps"), (2, 1, "no")])
def test_the_last_log_has_what_came_behind_the_one_before(steps, every, strategy, tmp_path):
    """L16"""
    rewards = []

    def judge(completions, **columns):
        rewards.append(sum(early_letters(completions)) / len(completions))
        return early_letters(completions)

    trainer = make(tmp_path, judge, max_steps=steps, logging_steps=every, logging_strategy=strategy)
    trainer.train()
    last = trainer.state.log_history[-1]
    rest = rewards if strategy == "no" else rewards[len(rewards) // every * every :]
    assert last["reward"] == pytest.approx(sum(rest) / len(rest))
    assert "train_loss" in last


def test_a_finished_run_makes_no_step_more(tmp_path):
    """L12"""
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make(tmp_path, **settings).train()
    again = make(tmp_path, **settings)
    before = None
    for _ in range(2):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        weights = {name: value.clone() for name, value in again.model.state_dict().items()}
        assert again.state.global_step == 1
        assert before is None or all(torch.equal(value, before[name]) for name, value in weights.items())
        before = weights
