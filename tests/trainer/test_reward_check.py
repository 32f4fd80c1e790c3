"""Before training rewards are tried on trivial answers; while it goes on, a held-out judge is asked beside them."""

import json
import logging
import socket
import time

import pytest
import torch
from conformity import CASES, causal_lm, tokenizer

import trl
from trl.data.records import Rollout
from trl.rewards import get_soft_overlong_punishment
from trl.rewards.panel import RewardPanel
from trl.rollout import reward_check
from trl.rollout.reward_check import OWN, check_rewards, trivial_rollouts
from trl.rollout.rewards import RolloutRewards
from trl.scripts.training import function_of_file

PROMPTS = ["what color", "good dog"]


def judged(*functions, weights=None, servers=False, own=("ab", "b")):
    names = tokenizer()
    ids = [names(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS]
    tried = {kind: (made, 1) for kind, made in trivial_rollouts(PROMPTS, ids, names, 12, None).items()}
    tried[OWN] = Rollout(ids, [[1], [1]], [], [[1], [1]], texts=list(own)), 1

    def judge(rewards, rollout, copies):
        return rewards(rollout, PROMPTS, {"answer": ["x", "y"]})

    rewards = RolloutRewards(RewardPanel(list(functions)), weights)
    return check_rewards(rewards, tried, judge, servers=servers)


def longer(completions, **columns):
    return [float(len(text)) for text in completions]


def shorter(completions, **columns):
    return [-float(len(text)) for text in completions]


def echoes(completions, prompts, **columns):
    return [float(prompt in text) for text, prompt in zip(completions, prompts, strict=True)]


def sound(completions, **columns):
    return [1.0 if text in ("ab", "b") else 0.0 for text in completions]


@pytest.mark.parametrize(("function", "kind"), [(longer, "very long"), (shorter, "empty"), (echoes, "echoed prompt")])
def test_a_planted_weakness_is_found(function, kind):
    found = judged(function)
    assert next(line.split(" answers")[0] for line in found.weaknesses) == kind
    assert {each.kind for each in found.tried} == {
        "empty", "constant", "echoed prompt", "very long", "repeated word", OWN
    }  # fmt: skip


def forgets(completions, **columns):
    return [None for _ in completions]


def test_a_function_that_says_nothing_is_named():
    """Alone, beside another one, and where the policy's own samples are not tried."""
    line = "forgets gave None for each of these answers, the policy's own among them: of answers like them nothing is"
    assert [one[: len(line)] for one in judged(forgets).weaknesses] == [line]
    assert judged(sound, forgets).weaknesses[0].startswith(line)
    assert not any("None" in one for one in judged(lambda completions, **_: [None, *[1.0] * (len(completions) - 1)],
                                                   ).weaknesses)  # fmt: skip


def test_a_sound_reward_has_none():
    found = judged(sound)
    assert not found.weaknesses
    assert {each.kind: each.total for each in found.tried}[OWN] == 1.0


def test_weights_add_up():
    found = judged(longer, sound, weights=[0.5, 10.0], own=("abcd", "abcd"))
    own = next(each for each in found.tried if each.kind == OWN)
    assert own.rewards == {"longer": 4.0, "sound": 0.0}
    assert own.total == 2.0


def test_state_stays_as_it_was(tmp_path):
    calls = []

    class Counting:
        def __init__(self):
            self.count = 0

        def __call__(self, completions, **columns):
            self.count += 1
            calls.append(len(completions))
            torch.rand(1)
            return [float(self.count)] * len(completions)

    counting, before = Counting(), torch.get_rng_state()
    found = judged(counting)
    assert counting.count == 0
    assert not calls
    assert torch.equal(torch.get_rng_state(), before)
    assert len(found.tried) == 6


def dies(completions, **columns):
    import os

    os._exit(3)


def hangs(completions, **columns):
    time.sleep(60)


def raises(completions, **columns):
    raise KeyError("no such thing")


def asks(completions, **columns):
    with socket.create_connection(("192.0.2.1", 443), timeout=1):
        return [1.0] * len(completions)


async def waits(completions, **columns):
    return [float(text == "") for text in completions]


def test_what_goes_wrong_is_told_and_the_others_are_tried(monkeypatch):
    monkeypatch.setattr(reward_check, "SECONDS", 6.0)
    found = judged(dies, hangs, raises, asks, waits)
    notes = "\n".join(found.notes)
    assert "dies was not tried: its process ended" in notes
    assert "hangs was not tried: it had not answered after 6 s" in notes
    assert "raises was not tried: reward function 'raises' failed: KeyError" in notes
    assert "asks was not tried: it asks 192.0.2.1, which may cost money" in notes
    assert found.tried[0].rewards == {"waits": 1.0}
    assert found.weaknesses[0].startswith("empty answers earn 1")


def test_functions_may_ask_this_machine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def local(completions, **columns):
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                return [1.0] * len(completions)

        assert not judged(local).notes


def grpo(folder, reward, judges=None, **settings):
    rows = CASES["grpo"].rows()
    config = trl.GRPOConfig(
        str(folder), per_device_train_batch_size=4, num_generations=2, max_completion_length=8, learning_rate=1e-2,
        seed=3, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, **settings,
    )  # fmt: skip
    return trl.GRPOTrainer(
        causal_lm(), reward, config, train_dataset=rows, processing_class=tokenizer(), judge_funcs=judges
    )


class Sly:
    """A reward with state, that gives the length."""

    def __init__(self):
        self.seen = 0

    def __call__(self, completions, **columns):
        self.seen += len(completions)
        return [float(len(text)) for text in completions]


def judge(completions, **columns):
    return [-float(len(text)) for text in completions]


def test_a_judge_that_is_a_reward_too_is_no_held_out_opinion(tmp_path, caplog):
    """Also where a file was loaded twice; two rewards of one factory are others."""
    source = "def short(completions, **columns):\n    return [-float(len(text)) for text in completions]\n"
    (tmp_path / "mine.py").write_text(source)
    loaded = [function_of_file("mine.py:short", str(tmp_path / "mine.py"), "short") for _ in range(2)]
    overlong = [get_soft_overlong_punishment(length, 2) for length in (8, 9)]
    said = []
    for place, (rewards, judges) in enumerate(
        [(judge, [judge]), (loaded[:1], loaded[1]), (overlong[:1], overlong[1:]), (judge, None)]
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "trl"):
            grpo(tmp_path / str(place), rewards, judges)
        said.append([text for text in caplog.messages if text.startswith("judge_funcs:")])
    assert [len(lines) for lines in said] == [1, 1, 0, 0]
    assert said[1][0].startswith(
        "judge_funcs: short is among the reward_funcs too: it is learned from, so it is no held"
    )


def test_a_run_with_a_check_is_the_run_without(tmp_path, caplog, capsys):
    weights, seen = [], []
    for how in ("no", "yes"):
        reward = Sly()
        with caplog.at_level(logging.WARNING, "trl"):
            trainer = grpo(tmp_path / how, reward, check_rewards=how, max_steps=2)
            trainer.train()
        weights.append(torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()]))
        seen.append(reward.seen)
    assert torch.equal(*weights)
    assert seen[0] == seen[1]
    found = json.loads((tmp_path / "yes" / "reward_check.json").read_text())
    assert not (tmp_path / "no" / "reward_check.json").exists()
    assert "very long" in found["weaknesses"][0]
    assert any("very long answers earn" in message for message in caplog.messages)
    assert "What answers earn before training" in capsys.readouterr().out


def test_a_held_out_judge_is_logged_and_not_learned(tmp_path):
    weights, logs = [], []
    for funcs in (None, judge):
        trainer = grpo(tmp_path / str(bool(funcs)), Sly(), funcs, max_steps=2)
        trainer.train()
        weights.append(torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()]))
        logs.append([row for row in trainer.state.log_history if "reward" in row])
    assert torch.equal(*weights)
    assert "judge/judge/mean" not in logs[0][0]
    for row in logs[1]:
        assert row["judge/judge/mean"] == pytest.approx(-row["reward"], rel=1e-6)
    assert logs[0][0]["reward"] == logs[1][0]["reward"]


def test_a_judge_that_fails_ends_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "trl"):
        trainer = grpo(tmp_path, Sly(), raises, max_steps=1)
        trainer.train()
    assert any("nothing is logged of it" in message for message in caplog.messages)
