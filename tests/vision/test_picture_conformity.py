"""One suite for every trainer with pictures: rows alone, the split into batches, resuming and ranks change nothing."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from conformity import build, history, weights
from families import FAMILIES, model_of, processor_of, rows
from picture_cases import KINDS, TEXT_ONLY, alone, answer_of, case, norm_of, of_ids, outside_pictures, ppo_of
from picture_runs import RUNS, SHARDED, runs
from process_group import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
PAIR = ("qwen2_5_vl", "gemma3")
"""one whose rows are packed, and one whose are not: its pictures are seen both ways"""
CHOSEN = (
    *((kind, name) for kind in ("sft", "grpo") for name in FAMILIES),
    *((kind, name) for kind in KINDS if kind not in ("sft", "grpo", "reward") for name in PAIR),
    ("reward", "gemma3"),
)
SMALL = {"mini_batch_size": 2, "gradient_accumulation_steps": 4}
BATCH = {"per_device_train_batch_size": 8, "max_steps": 1}


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR)


def first(trainer):
    """Loss and norm of the gradient of the first step."""
    trainer.train()
    return history(trainer, "loss")[0], history(trainer, "grad_norm")[0]


def close(expected):
    return pytest.approx(expected, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_learned_as_each_row_alone_would_be(name, tmp_path):
    """Loss and gradient of eight answers are those of the model's own call of each row."""
    got = first(build(case("sft", name, data="prompt_completion"), tmp_path, **BATCH))
    model, processor = model_of(name), processor_of(name)
    logps = torch.cat([answer_of(model, processor, row) for row in rows("prompt_completion")])
    assert got == close((-logps.mean().item(), norm_of(-logps.mean(), model)))


@pytest.mark.parametrize("name", ["gemma3", "smolvlm"])
def test_conversations_are_learned_whole_but_for_their_pictures(name, tmp_path):
    """Newlines, tags of tiles and whatever else the processor writes for a picture are never learned."""
    got = first(build(case("sft", name), tmp_path, **BATCH))
    model, processor = model_of(name), processor_of(name)
    learned = []
    for row in rows("conversations"):
        text = processor.apply_chat_template(row["messages"])
        logps = alone(model, processor, text, row["images"])
        learned.append(logps[torch.tensor(outside_pictures(processor, text, row["images"])[1:])])
    loss = -torch.cat(learned).mean()
    assert got == close((loss.item(), norm_of(loss, model)))


@pytest.mark.parametrize("name", PAIR)
def test_pairs_are_learned_as_each_row_alone_would_be(name, tmp_path):
    """At the reference DPO's loss is log 2, and its gradient -beta / 2 times that of the margin."""
    got = first(build(case("dpo", name, beta=0.3), tmp_path, **BATCH))
    model, processor = model_of(name), processor_of(name)
    margins = [
        answer_of(model, processor, row, "chosen").sum() - answer_of(model, processor, row, "rejected").sum()
        for row in rows("preference")
    ]
    assert got == close((math.log(2), 0.3 / 2 * norm_of(torch.stack(margins).mean(), model)))


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_are_learned_as_each_row_alone_would_be(name, tmp_path):
    """The policy gradient of what was sampled for eight prompts, of the model's own call of each row."""
    seen = []

    def reward(completion_ids, wanted, **columns):
        rewards = of_ids(completion_ids)
        seen.extend(zip(wanted, completion_ids, rewards, strict=True))
        return rewards

    of = case("grpo", name, scale_rewards="none", loss_type="dr_grpo", generation_batch_size=16, beta=0.0)
    trainer = build(of, tmp_path, per_device_train_batch_size=16, max_steps=1)
    trainer.reward_funcs = [reward]
    _, norm = first(trainer)
    model, processor, made = model_of(name), processor_of(name), rows("prompts")
    total = 0.0
    for i, (wanted, ids, own) in enumerate(seen):
        other = seen[i ^ 1]
        assert other[0] == wanted
        row = made["abcdefgh".index(wanted)]
        text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
        logps = alone(model, processor, text, row["images"], list(ids))[-len(ids) :]
        total = total - (own - other[2]) / 2 * logps.sum() / (len(seen) * 4)
    assert len(seen) == 16
    assert norm == close(norm_of(total, model))


@pytest.mark.parametrize("name", PAIR)
def test_ppo_scores_each_row_as_the_model_alone_does(name):
    seen, stats = [], []

    def reward(completion_ids, wanted, **columns):
        seen.extend(zip(wanted, completion_ids, strict=True))
        return of_ids(completion_ids)

    ppo_of(name, reward).train(callback=lambda step, logs, batch: stats.append(logs))
    model, processor, made = model_of(name), processor_of(name), rows("prompts")
    assert sorted(wanted for wanted, _ in seen) == list("abcdefgh")
    for (wanted, ids), got in zip(seen, stats[0]["objective/logprobs"], strict=True):
        row = made["abcdefgh".index(wanted)]
        text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
        logps = alone(model, processor, text, row["images"], list(ids))[-len(ids) :]
        assert got[: len(ids)].tolist() == pytest.approx(logps.tolist(), abs=2e-5)


@pytest.mark.parametrize("name", PAIR)
def test_ppo_with_smaller_minibatches_and_resumed_is_the_same_run(name, tmp_path):
    saving = {"steps": 16, "output_dir": str(tmp_path), "save_steps": 1, "save_total_limit": 3}
    ends, logs = [], []
    for fields, checkpoint in ((saving, None), (saving, str(tmp_path / "checkpoint-1")), ({}, None), (SMALL, None)):
        trainer = ppo_of(name, **fields)
        logs.append(trainer.train(checkpoint))
        ends.append(weights(trainer))
    for key, value in ends[0].items():
        assert torch.equal(ends[1][key], value), key
    for key in ("ppo/loss/policy", "ppo/loss/value", "ppo/policy/approxkl"):  # of two epochs: the second sees the first
        assert logs[3][key] == pytest.approx(logs[2][key], rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize(("kind", "name"), CHOSEN)
def test_neither_the_split_into_microbatches_nor_padding_changes_anything(kind, name, tmp_path):
    splits = [(8, 1, True), (2, 4, True), (8, 1, False)]
    seen = [
        first(
            build(
                case(kind, name), tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated,
                padding_free=packed, max_steps=1,
            )
        )
        for size, accumulated, packed in splits
    ]  # fmt: skip
    assert seen[0][1] > 0
    assert seen[1] == close(seen[0])
    assert seen[2] == close(seen[0])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("sft", "qwen3_vl"), ("dpo", "gemma3"), ("kto", "internvl"), ("reward", "gemma3"), ("grpo", "qwen2_5_vl"),
        ("rloo", "smolvlm"), ("online-dpo", "llava"), ("distillation", "qwen2_5_vl"),
    ],
)  # fmt: skip
def test_resume_equals_the_uninterrupted_run_bit_for_bit(kind, name, tmp_path):
    of, saved = case(kind, name), {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = build(of, tmp_path, **saved)
    whole.train()
    resumed = build(of, tmp_path, **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected, got = weights(whole), weights(resumed)
    for key, value in expected.items():
        assert torch.equal(value, got[key]), key
    assert history(whole, "loss")[2:] == history(resumed, "loss")[-2:]


@pytest.mark.parametrize("targets", [TEXT_ONLY, "all-linear"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("sft", "smolvlm"), ("dpo", "qwen2_5_vl"), ("kto", "internvl"), ("reward", "gemma3"), ("grpo", "gemma3"),
        ("rloo", "qwen3_vl"), ("online-dpo", "llava"), ("distillation", "qwen2_5_vl"),
    ],
)  # fmt: skip
def test_lora_with_the_vision_tower_frozen_and_trained(kind, name, targets, tmp_path):
    trainer = build(case(kind, name, targets), tmp_path, lora=True)
    before = weights(trainer)
    trainer.train()
    changed = {key for key, value in weights(trainer).items() if not torch.equal(value, before[key])}
    assert changed
    assert all("lora" in key or "modules_to_save" in key for key in changed)  # the latter: a classifier's head
    assert any("vision" in key or "visual" in key for key in changed) == (targets == "all-linear")


@pytest.mark.parametrize(("kind", "name"), [("sft", name) for name in FAMILIES] + [("grpo", "qwen3_vl")])
def test_layers_computed_again_change_nothing(kind, name, tmp_path):
    seen = [first(build(case(kind, name), tmp_path, **BATCH, gradient_checkpointing=again)) for again in (False, True)]
    assert seen[1] == close(seen[0])


@pytest.mark.slow
@pytest.mark.parametrize(("of", "sharded"), [(RUNS, False), (SHARDED, True)], ids=["ddp", "fsdp2"])
def test_two_ranks_are_one(of, sharded, tmp_path):
    on_ranks(runs, 2, str(tmp_path / "two"), of, sharded)
    runs(0, 1, str(tmp_path / "one"), of)
    one, two = (torch.load(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == set(of)
    for key, (weight, losses, norms) in one.items():
        assert max(norms) > 0
        torch.testing.assert_close(two[key][0], weight, rtol=1e-5, atol=2e-6, msg=str(key))
        assert (two[key][1], two[key][2]) == (close(losses), close(norms)), key


def test_a_model_that_sees_is_not_gathered_layer_by_layer(tmp_path):
    trainer = build(case("grpo", "llava", gather="layers"), tmp_path)
    trainer.is_fsdp_enabled, trainer.accelerator = True, SimpleNamespace(is_fsdp2=True)
    with pytest.raises(ValueError, match="gather='layers': a model that reads pictures is not sampled layer by layer"):
        trainer._check_sharding()
