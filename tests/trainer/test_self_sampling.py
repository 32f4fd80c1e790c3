"""Online DPO, best-of-n fine-tuning and distillation: what they learn from a rollout, by hand; what they refuse."""

import logging
import math
from pathlib import Path

import pytest
import torch
from conformity import answered, causal_lm, config, early_letters, history, prompts, tokenizer, weights
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM

import trl
from trl.losses.distillation import generalized_jsd
from trl.rewards.named import pairwise
from trl.rewards.panel import RewardError
from trl.rollout.rewards import Rewards
from trl.trainer.online_dpo_trainer import ordered
from trl.trainer.raft_trainer import best_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
NAN = math.nan


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR)


def make(algorithm, directory, rows=None, model=None, arguments=None, tokens=None, **settings):
    base = {
        "output_dir": str(directory), "per_device_train_batch_size": 4, "max_completion_length": 6, "max_steps": 1,
        "logging_steps": 1, "learning_rate": 1e-2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    return getattr(trl, f"{algorithm}Trainer")(
        model=model or causal_lm(),
        args=getattr(trl, f"{algorithm}Config")(**{**base, **settings}),
        train_dataset=rows or prompts(),
        processing_class=tokens or tokenizer(),
        **(arguments or {}),
    )


def rollouts_of(directory):
    files = sorted(str(path) for path in Path(directory).glob("rollouts/*.parquet"))
    return load_dataset("parquet", data_files=files, split="train", cache_dir=str(directory))


def test_best_and_worst_of_each_group():
    scores = torch.tensor([[1.0], [3.0], [NAN], [2.0], [5.0], [5.0], [5.0], [NAN], [NAN], [NAN], [1.0], [NAN]])
    rewards = Rewards(["f"], scores, torch.ones(1), [False])
    best, worst, decided = ordered(rewards, 4)
    assert (best[0], worst[0]) == (1, 0)
    assert decided == [True, False, False]
    assert all(b != w for b, w in zip(best, worst, strict=True))


def test_best_rows():
    rewards_B = torch.tensor([1.0, 3.0, NAN, 2.0, -1.0, -1.0, NAN, NAN])
    assert best_rows(rewards_B, 4, 1, None).tolist() == [False, True, False, False, True, False, False, False]
    assert best_rows(rewards_B, 4, 2, 0.0).tolist() == [False, True, False, True, False, False, False, False]
    assert best_rows(rewards_B, 4, 3, None).sum() == 5


def test_a_judge_of_pairs_as_a_reward():
    def longer(prompts, pairs):
        assert prompts == ["p", "q", "r"]
        return [-1 if len(a) == len(b) else int(len(b) > len(a)) for a, b in pairs]

    judged = pairwise(longer)
    assert judged(prompts=["p", "p", "q", "q", "r", "r"], completions=["a", "bb", "cc", "d", "e", "f"]) == [
        0.0, 1.0, 1.0, 0.0, None, None,
    ]  # fmt: skip
    with pytest.raises(RewardError, match="the judge gave a dict"):
        pairwise(lambda prompts, pairs: {0: 1})(prompts=["p", "p"], completions=["a", "b"])
    with pytest.raises(TypeError, match="len"):  # the judge's own fault
        pairwise(lambda prompts, pairs: len(3))(prompts=["p", "p"], completions=["a", "b"])
    with pytest.raises(RewardError, match=r"gave \[2\] for 1 pairs"):
        pairwise(lambda prompts, pairs: [2])(prompts=["p", "p"], completions=["a", "b"])
    with pytest.raises(ValueError, match="judge=3"):
        pairwise(3)


class Shorter:
    """As judges of other releases are written: an object whose method reads texts."""

    def judge(self, prompts, completions, shuffle_order=True):
        self.prompts = prompts
        return [0 if len(first) < len(second) else 1 for first, second in completions]


def test_an_object_that_judges_reads_texts():
    def said(role, content):
        return {"role": role, "content": content}

    shorter = Shorter()
    asked = [said("system", "be brief"), said("user", [{"type": "text", "text": "and?"}])]
    answers = [[said("assistant", text)] for text in ("longer", "short", "a", "bb")]
    scores = pairwise(shorter)(prompts=[asked, asked, "plain", "plain"], completions=[*answers[:2], "a", "bb"])
    assert scores == [0.0, 1.0, 1.0, 0.0]
    assert shorter.prompts == ["System: be brief\n\nUser: and?\n\nAssistant:", "plain"]


# -- online DPO --------------------------------------------------------------------------------


def test_online_dpo_starts_at_ln_2_and_learns_the_order(tmp_path):
    trainer = make(
        "OnlineDPO", tmp_path, arguments={"reward_funcs": early_letters}, num_iterations=3, max_steps=3,
        num_generations=4, lr_scheduler_type="constant", learning_rate=1e-3,
    )  # fmt: skip
    trainer.train()
    losses = history(trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[0] > losses[1] > losses[2]
    table = rollouts_of(tmp_path)
    assert sorted(table["preference"]) == [-1, 0, 0, 1]
    rewards = dict(zip(table["preference"], table["reward_early_letters"], strict=True))
    assert rewards[1] == max(table["reward_early_letters"])
    assert rewards[-1] == min(table["reward_early_letters"])


def test_online_dpo_by_a_judge(tmp_path):
    class Judge:
        def judge(self, prompts, pairs):
            return [0] * len(pairs)

    trainer = make("OnlineDPO", tmp_path, arguments={"judge": Judge()})
    trainer.train()
    assert rollouts_of(tmp_path)["preference"] == [1, -1, 1, -1]
    assert history(trainer, "rewards/Judge/mean") == [0.5]


def test_undecided_pairs_teach_nothing(tmp_path):
    trainer = make("OnlineDPO", tmp_path, arguments={"reward_funcs": lambda completions, **_: [1.0] * len(completions)})
    trainer.train()
    before = causal_lm().state_dict()
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())


@pytest.mark.parametrize(
    ("arguments", "settings", "what"),
    [
        ({"judge": print, "reward_funcs": early_letters}, {}, "judge: reward_funcs order"),
        ({"judge": print}, {"num_generations": 4}, "num_generations=4: a judge compares 2"),
        ({}, {}, "reward_funcs: give"),
    ],
)
def test_online_dpo_refuses(arguments, settings, what, tmp_path):
    with pytest.raises(ValueError, match=what):
        make("OnlineDPO", tmp_path, arguments=arguments, **settings)


# -- best of n ---------------------------------------------------------------------------------


def test_raft_is_the_likelihood_of_the_best_by_hand(tmp_path):
    policy = causal_lm()
    trainer = make("RAFT", tmp_path, arguments={"reward_funcs": early_letters}, num_generations=4)
    trainer.train()
    table = rollouts_of(tmp_path)
    kept = [i for i, keep in enumerate(table["kept"]) if keep]
    assert len(kept) == 1
    assert table["reward_early_letters"][kept[0]] == max(table["reward_early_letters"])
    prompt, ids = tokenizer()(table["prompt"][0])["input_ids"], table["completion_ids"][kept[0]]
    with torch.no_grad():
        logprobs = policy(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
    expected = -sum(float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(ids)) / len(ids)
    assert history(trainer, "loss")[0] == pytest.approx(expected, rel=1e-4)


def test_rejection_of_all_changes_nothing(tmp_path):
    trainer = make("RAFT", tmp_path, arguments={"reward_funcs": early_letters}, num_generations=4, min_reward=99.0)
    trainer.train()
    assert history(trainer, "kept_ratio") == [0.0]
    before = causal_lm().state_dict()
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())


# -- distillation ------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_distillation_is_the_divergence_at_every_sampled_token(beta, tmp_path):
    student, teacher = causal_lm(), causal_lm(seed=7)
    trainer = make("Distillation", tmp_path, arguments={"teacher_model": causal_lm(seed=7)}, beta=beta)
    trainer.train()
    table, total, count = rollouts_of(tmp_path), 0.0, 0
    for prompt, ids in zip(table["prompt"], table["completion_ids"], strict=True):
        start = tokenizer()(prompt)["input_ids"]
        places = slice(len(start) - 1, len(start) + len(ids) - 1)
        with torch.no_grad():
            logits = [m(input_ids=torch.tensor([start + ids])).logits[0, places] for m in (student, teacher)]
        total += float(generalized_jsd(*logits, beta=beta).sum())
        count += len(ids)
    assert history(trainer, "loss")[0] == pytest.approx(total / count, rel=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path):
    trainer = make("Distillation", tmp_path, arguments={"teacher_model": causal_lm()})
    trainer.train()
    assert history(trainer, "loss")[0] == pytest.approx(0.0, abs=1e-6)


def test_distillation_comes_closer(tmp_path):
    trainer = make(
        "Distillation", tmp_path, arguments={"teacher_model": causal_lm(seed=7), "eval_dataset": prompts()},
        max_steps=8, per_device_train_batch_size=8, learning_rate=5e-3,
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before


def test_lmbda_mixes_in_the_completions_of_the_data(tmp_path):
    seen = {}
    for lmbda in (0.0, 0.5, 1.0):
        arguments = {"teacher_model": causal_lm(seed=7)}
        trainer = make("Distillation", tmp_path / str(lmbda), answered(), arguments=arguments, lmbda=lmbda, max_steps=4)
        trainer.train()
        table = rollouts_of(tmp_path / str(lmbda))
        wanted = {
            row["prompt"]: [*tokenizer()(row["completion"], add_special_tokens=False)["input_ids"], 2]
            for row in answered()
        }
        seen[lmbda] = [
            ids == wanted[prompt] for prompt, ids in zip(table["prompt"], table["completion_ids"], strict=True)
        ]
    assert all(seen[0.0])
    assert sum(seen[1.0]) < 4  # a sampled completion of two tokens may be that of the data by chance
    assert 3 < sum(seen[0.5]) < 13


def test_gkd_reads_whole_conversations(tmp_path, chat_tokenizer):
    def model(seed):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config(vocab_size=len(chat_tokenizer), max_position_embeddings=128))

    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    trainer = make(
        "GKD", tmp_path, Dataset.from_list([{"messages": turns}] * 4), model(0), {"teacher_model": model(1)},
        chat_tokenizer, lmbda=0.0, max_completion_length=16,
    )  # fmt: skip
    trainer.train()
    assert rollouts_of(tmp_path)["completion"] == ["yes"] * 4
    assert chat_tokenizer.decode(rollouts_of(tmp_path)["completion_ids"][0]) == "yes<|im_end|>"


def test_a_teacher_whose_embedding_is_longer(tmp_path):
    torch.manual_seed(7)
    teacher = AutoModelForCausalLM.from_config(config(vocab_size=len(tokenizer()) + 28))
    trainer = make("Distillation", tmp_path, arguments={"teacher_model": teacher})
    trainer.train()
    assert history(trainer, "grad_norm")[0] > 0


def small_teacher():
    return AutoModelForCausalLM.from_config(config(vocab_size=50))


@pytest.mark.parametrize(
    ("arguments", "settings", "what"),
    [
        (lambda: {}, {}, "teacher_model: give the teacher"),
        (lambda: {"teacher_model": causal_lm()}, {"teacher_model_name_or_path": "x"}, "not both"),
        (lambda: {"teacher_model": causal_lm()}, {"lmbda": 0.5}, "lmbda=0.5: needs a column `completion`"),
        (lambda: {"teacher_model": small_teacher()}, {}, "vocabularies of 50"),
    ],
)
def test_distillation_refuses(arguments, settings, what, tmp_path):
    with pytest.raises(ValueError, match=what):
        make("Distillation", tmp_path, arguments=arguments(), **settings)


def test_a_teacher_by_name(tmp_path):
    causal_lm(seed=7).save_pretrained(tmp_path / "teacher")
    trainer = make("Distillation", tmp_path, teacher_model_name_or_path=str(tmp_path / "teacher"))
    trainer.train()
    other = make("Distillation", tmp_path, arguments={"teacher_model": causal_lm(seed=7)})
    other.train()
    assert history(trainer, "loss") == history(other, "loss")
