"""GRPO and RLOO on environments: what is sampled, masked, credited, refused."""

import logging

import pytest
import torch
from conformity import WORDS, causal_lm, config, history, prompts, tokenizer, weights
from datasets import Dataset
from environments_for_tests import Letters, early, everything_is_a_call, letters, talkative
from tokenizers_for_tests import TOOLS, byte_tokenizer, word_tokenizer
from transformers import AutoModelForCausalLM

import trl
from trl.data.records import Rollout
from trl.environment.chat_environment import ChatEnvironment
from trl.rollout.rewards import Rewards, credit_turns

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
LIMIT = 20


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR)


def make(directory, algorithm="GRPO", model=None, rows=None, tokens=None, arguments=None, **settings):
    base = {
        "output_dir": str(directory), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "num_generations": 4, "max_completion_length": LIMIT, "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return getattr(trl, f"{algorithm}Trainer")(
        model=model or causal_lm(),
        args=getattr(trl, f"{algorithm}Config")(**{**base, **settings}),
        train_dataset=rows or prompts(),
        processing_class=tokens or tokenizer(),
        **(arguments or {}),
    )


class Recorder:
    """A sampler that keeps what it was given and what it said."""

    def __init__(self, sampler):
        self.sampler, self.turns = sampler, []

    def sample(self, given, params, n=1):
        said = self.sampler.sample(given, params, n)
        self.turns += [(list(ids), completion) for ids, (completion,) in zip(given, said, strict=True)]
        return said


def recorded(trainer):
    trainer.source.sampler = recorder = Recorder(trainer.sampler)
    experiences = []
    make_rollout = trainer.rollouts.make
    trainer.rollouts.make = lambda state: experiences.append(make_rollout(state)) or experiences[-1]
    trainer.train()
    return recorder.turns, experiences


def stretches(mask):
    """`(start, end)` of what the model said."""
    edges = [i for i in range(len(mask) + 1) if (mask[i : i + 1] == [1]) != (i > 0 and mask[i - 1] == 1)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def check_exact(turns, experiences):
    """Every turn was given all tokens before it, as they are; what counts is what was sampled, in its order."""
    given = {tuple(ids) for ids, _ in turns}
    said = {(tuple(ids), tuple(completion.ids)) for ids, completion in turns}
    spoken = 0
    for experience in experiences:
        ids = [[row.tolist() for row in rows] for rows in (experience.prompts, experience.completions)]
        for prompt, completion, mask, logprobs in zip(
            *ids, experience.mask_BT.tolist(), experience.old_logprobs_BT.tolist(), strict=True
        ):
            assert not any(mask[len(completion) :] + logprobs[len(completion) :])
            for start, end in stretches(mask):
                before = tuple(prompt + completion[:start])
                assert before in given
                assert any(b == before and ids[: end - start] == tuple(completion[start:end]) for b, ids in said)
                spoken += 1
            assert all(bool(p) <= bool(m) for p, m in zip(logprobs, mask, strict=True))
    assert spoken == len(turns)


# -- token-exact -------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO"])
def test_rollouts_are_what_the_model_saw_and_said(algorithm, tmp_path):
    trainer = make(tmp_path, algorithm, arguments={"environment": talkative()})
    turns, experiences = recorded(trainer)
    assert len(turns) == 2 * 8 * 3
    check_exact(turns, experiences)
    assert history(trainer, "episodes/turns") == [3.0, 3.0]
    assert history(trainer, "episodes/sampled_tokens")[0] == experiences[0].mask_BT.sum() / 8
    assert history(trainer, "ratio")[0] == pytest.approx(1.0, abs=1e-5)
    for group in (experiences[0].completions[:4], experiences[0].completions[4:]):
        assert len({tuple(ids.tolist()) for ids in group}) > 1


def chat_tokens():
    return byte_tokenizer(TOOLS)


def chat_rows(count=6):
    talks = [[{"role": "user", "content": letter}] for letter in WORDS[:count]]
    return Dataset.from_list([{"prompt": talk, "wanted": WORDS[i]} for i, talk in enumerate(talks)])


def chat_arguments(tokens, **more):
    """Turns end with every third byte."""
    ends = [tokens.convert_tokens_to_ids("<|im_end|>"), *range(20, len(tokens), 3)]
    more = {"max_completion_length": 300, "generation_kwargs": {"stop_token_ids": ends}, **more}
    torch.manual_seed(0)
    changes = {"vocab_size": len(tokens), "max_position_embeddings": 1024, "pad_token_id": 0, "eos_token_id": ends[0]}
    model = AutoModelForCausalLM.from_config(type(config()).from_dict(config().to_dict() | changes))
    return {"model": model, "tokens": tokens, "rows": chat_rows(), **more}


def test_conversations_are_what_the_model_saw_and_said(tmp_path):
    environment = ChatEnvironment(environment_factory=Letters, parser=everything_is_a_call, max_iterations=2)
    seen = {}

    def judge(prompts, completions, environments, **columns):
        seen.update(prompts=prompts, completions=completions, environments=environments)
        return [environment.reward for environment in environments]

    arguments = {"environment": environment, "reward_funcs": judge}
    trainer = make(tmp_path, arguments=arguments, **chat_arguments(chat_tokens()))
    turns, experiences = recorded(trainer)
    check_exact(turns, experiences)
    roles = [message["role"] for message in seen["completions"][0]]
    assert roles == ["assistant", "tool"] * 2 + ["assistant"]
    assert [environment.wanted for environment in seen["environments"]] == [p[0]["content"] for p in seen["prompts"]]
    assert history(trainer, "ratio")[0] == pytest.approx(1.0, abs=1e-5)


def test_tools_as_a_factory_reward_by_themselves(tmp_path):
    arguments = {"environment_factory": Letters}
    trainer = make(tmp_path, arguments=arguments, max_tool_calling_iterations=1, **chat_arguments(chat_tokens()))
    trainer.train()
    assert history(trainer, "reward") == [0.0, 0.0]  # random bytes call nothing
    assert trainer.environment.max_iterations == 1


# -- timing, resuming, ranks --------------------------------------------------------------------


def test_rollouts_do_not_depend_on_the_timing_of_tools(tmp_path):
    seen = []
    for trial in range(4):
        environment = talkative(seed=trial, tool_timeout=5) if trial else talkative()
        seen.append(recorded(make(tmp_path, max_steps=1, arguments={"environment": environment}))[1][0])
    for one in seen:
        assert all(map(torch.equal, one.completions, seen[0].completions))
        assert torch.equal(one.mask_BT, seen[0].mask_BT)


@pytest.mark.parametrize("kind", [talkative, letters])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(kind, tmp_path):
    credit = {"turn_level_credit": kind is letters}
    whole = make(tmp_path / "whole", max_steps=4, arguments={"environment": kind()}, **credit)
    whole.train()
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "steps_per_generation": 4, **credit}
    whole = make(tmp_path / "whole", arguments={"environment": kind()}, **{**saving, "save_strategy": "no"})
    whole.train()
    make(tmp_path / "parts", arguments={"environment": kind()}, **saving).train()
    resumed = make(tmp_path / "parts", arguments={"environment": kind()}, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-1"))  # a rollout is half used
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_evaluation(tmp_path):
    trainer = make(tmp_path, arguments={"environment": letters(), "eval_dataset": prompts()}, num_generations_eval=1)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_reward"] == second["eval_reward"] > 0
    assert first["eval_loss"] == pytest.approx(-first["eval_reward"])


# -- rewards -----------------------------------------------------------------------------------


def test_reward_functions_read_the_texts_and_histories(tmp_path):
    seen = {}

    def judge(completions, histories, wanted, **columns):
        seen.update(completions=completions, histories=histories)
        return early([history.last_text_segment for history in histories])

    trainer = make(tmp_path, arguments={"environment": talkative(reward_fn=None), "reward_funcs": judge}, max_steps=1)
    trainer.train()
    for text, episode in zip(seen["completions"], seen["histories"], strict=True):
        assert episode.text.endswith(text)
        assert text.count("<response>") == 3


def test_columns_reach_the_environment_s_own_reward(tmp_path):
    seen = []

    def reward_fn(responses, wanted):
        seen.append(wanted)
        return [0.0] * len(responses)

    make(tmp_path, max_steps=1, arguments={"environment": talkative(reward_fn=reward_fn)}).train()
    assert [len(set(seen[0][i : i + 4])) for i in (0, 4)] == [1, 1]


def rollout_of(turn_ends, turn_rewards, width=6):
    rows = len(turn_ends)
    return Rollout(
        prompts=[[1]] * rows, completions=[[5] * width] * rows, logprobs=[[0.0] * width] * rows,
        masks=[[1] * width] * rows, metadata={"turn_ends": turn_ends, "turn_rewards": turn_rewards},
    )  # fmt: skip


def test_a_turn_is_credited_with_what_comes_after_it():
    """Group of 3, advantage = to-go minus the mean of those that have this turn.

    Totals 3, 1, 2; turn 0: 3, 1, 2 less 2. Behind turn 0 the first two earn 2 and 1 more: mean 1.5. The last has one.
    """
    rollout = rollout_of([[2, 5], [1, 3], [4]], [[1.0, 2.0], [0.0, 1.0], [2.0]])
    rewards = Rewards(["reward"], torch.tensor([[3.0], [1.0], [2.0]]), torch.ones(1), [False])

    def centred(given):
        total = given.total_B()
        return (total - total.nanmean()).nan_to_num()

    assert credit_turns(rewards, rollout, centred, 1) == [
        [1.0, 1.0, 0.5, 0.5, 0.5, 0.0], [-1.0, -0.5, -0.5, 0.0, 0.0, 0.0], [0.0] * 6,
    ]  # fmt: skip


def test_credit_by_turns_in_training(tmp_path):
    trainer = make(tmp_path, arguments={"environment": letters()}, turn_level_credit=True, scale_rewards="none")
    _, experiences = recorded(trainer)
    rows = zip(experiences[0].advantages_BT.tolist(), experiences[0].lengths, strict=True)
    levels = [len(set(row[: length - 1])) for row, length in rows]
    assert max(levels) > 1
    whole = make(tmp_path, arguments={"environment": letters()}, scale_rewards="none")
    _, plain = recorded(whole)
    assert all(map(torch.equal, plain[0].completions, experiences[0].completions))
    first = experiences[0].advantages_BT[:, 0]
    torch.testing.assert_close(first, plain[0].advantages_BT[:, 0])  # everything comes after the first turn


def test_truncated_episodes_can_be_left_out(tmp_path):
    environment = talkative(max_turns=9)
    trainer = make(tmp_path, arguments={"environment": environment}, mask_truncated_completions=True, max_steps=1)
    _, experiences = recorded(trainer)
    assert all(len(ids) == LIMIT for ids in experiences[0].completions)
    assert not experiences[0].mask_BT.any()
    assert history(trainer, "completions/clipped_ratio") == [1.0]


def test_filtered_sampling_is_scored_as_the_policy_at_its_temperature(tmp_path):
    trainer = make(tmp_path, arguments={"environment": talkative()}, temperature=0.7, top_k=5, max_steps=1)
    trainer.train()
    assert history(trainer, "ratio")[0] == pytest.approx(1.0, abs=1e-5)


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "settings", "wrong"),
    [
        ({"environment": talkative(reward_fn=None)}, {}, "reward_funcs: the environment gives no rewards"),
        ({"environment": talkative(), "reward_funcs": early}, {}, "reward_funcs: the environment has a reward_fn"),
        ({"environment": talkative(), "rollout_func": print}, {}, "rollout_func and an environment"),
        ({"environment": talkative(), "tools": [early]}, {}, "environment: it has its own tools"),
        ({"environment": talkative(generation_kwargs={"top_k": 3})}, {}, "generation_kwargs top_k have no effect"),
        ({"environment": talkative(prompt="x")}, {"max_prompt_length": 3}, "max_prompt_length=3"),
        ({"environment": talkative()}, {"max_tool_calling_iterations": 3}, "max_tool_calling_iterations"),
        ({"reward_funcs": early}, {"max_tool_calling_iterations": 3}, "max_tool_calling_iterations"),
        ({"reward_funcs": early}, {"turn_level_credit": True}, "turn_level_credit=True"),
        ({"environment": letters(), "reward_funcs": early}, {"turn_level_credit": True}, "turn_level_credit=True"),
        ({"environment_factory": Letters}, {}, "no chat template"),
        ({}, {"max_tool_calling_iterations": 0}, "max_tool_calling_iterations=0"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(arguments, settings, wrong, tmp_path):
    with pytest.raises(ValueError, match=wrong):
        make(tmp_path, arguments=arguments, **settings)


def test_another_vocabulary_is_refused(tmp_path):
    environment = talkative()
    environment.tokenizer = word_tokenizer(size=120)
    with pytest.raises(ValueError, match="another vocabulary"):
        make(tmp_path, arguments={"environment": environment})


def test_tools_need_conversations(tmp_path):
    tokens = chat_tokens()
    arguments = {**chat_arguments(tokens), "rows": prompts()}
    with pytest.raises(ValueError, match="tools need conversations"):
        make(tmp_path, arguments={"environment_factory": Letters}, **arguments).train()
