"""`max_tokens_per_microbatch` and long batches: same loss, same gradient, bounded forward passes."""

import pytest
from conformity import CASES, build, history

from trl.data import microbatches
from trl.models import forward

BUDGETED = dict.fromkeys(("sft", "sft-dft", "reward", "dpo-sigmoid", "dpo-many", "dpo-state", "prm", "simpo"), 14)
BUDGETED |= {"kto": 16, "kto-bco": 16}
"""at least the longest row, and the 13 tokens of the first step's probe"""


@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_changes_nothing_but_the_passes(name, tmp_path, monkeypatch):
    widths, run = [], forward._run

    def counted(model, packed, *how):
        widths.append(len(packed.ids_N))
        return run(model, packed, *how)

    seen = []
    for budget in (None, BUDGETED[name]):
        trainer = build(name, tmp_path, max_steps=2, max_tokens_per_microbatch=budget)
        widths.clear()
        monkeypatch.setattr(forward, "_run", counted)
        trainer.train()
        monkeypatch.setattr(forward, "_run", run)
        seen.append((history(trainer, "loss"), history(trainer, "grad_norm"), max(widths)))
    (loss, norm, _), (budget_loss, budget_norm, widest) = seen
    assert budget_loss == pytest.approx(loss, rel=1e-5)
    assert budget_norm == pytest.approx(norm, rel=2e-5)
    assert widest <= BUDGETED[name]


@pytest.mark.parametrize("name", ["dpo-sigmoid", "kto", "grpo"])
def test_a_batch_is_cut_unasked_on_the_cpu(name, tmp_path, monkeypatch):
    seen = []
    for tokens in (10**6, 20):
        monkeypatch.setattr(microbatches, "CPU_TOKENS", tokens)
        passes, run = [], forward._run
        monkeypatch.setattr(forward, "_run", lambda *how, run=run, passes=passes: passes.append(1) or run(*how))
        trainer = build(name, tmp_path, max_steps=2, per_device_train_batch_size=8)
        trainer.train()
        monkeypatch.setattr(forward, "_run", run)
        seen.append((history(trainer, "loss"), history(trainer, "grad_norm"), len(passes)))
    (loss, norm, few), (cut_loss, cut_norm, many) = seen
    assert cut_loss == pytest.approx(loss, rel=1e-5, abs=1e-7)
    assert cut_norm == pytest.approx(norm, rel=2e-5)
    assert many > few


def test_pairs_that_are_compared_with_each_other_are_never_cut_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(microbatches, "CPU_TOKENS", 14)
    assert "pieces" not in next(
        iter(build("dpo-sigmoid", tmp_path, max_steps=1, loss_type="aot").get_train_dataloader())
    )
    assert "pieces" in next(iter(build("dpo-sigmoid", tmp_path, max_steps=1).get_train_dataloader()))


def test_with_accumulation_evaluation_and_a_custom_collator(tmp_path):
    from trl.legacy.collators import DPODataCollatorWithPadding

    seen = []
    for budget, size, accumulation in ((None, 4, 1), (14, 2, 2)):
        trainer = build(
            "dpo-sigmoid", tmp_path, max_tokens_per_microbatch=budget, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation, eval_strategy="steps", eval_steps=1,
        )  # fmt: skip
        trainer.data_collator.inner = DPODataCollatorWithPadding(pad_token_id=0)
        trainer.train()
        seen.append([*history(trainer, "loss"), *history(trainer, "eval_loss"), *history(trainer, "rewards/margins")])
    assert seen[1] == pytest.approx(seen[0], rel=1e-4, abs=1e-7)


def test_a_budget_survives_a_resume(tmp_path):
    settings = {"max_steps": 4, "max_tokens_per_microbatch": 14, "save_strategy": "steps", "save_steps": 2}
    build("kto", tmp_path, **settings).train()
    resumed = build("kto", tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    whole = build("kto", tmp_path / "whole", **{**settings, "save_strategy": "no"})
    whole.train()
    assert history(resumed, "loss")[-2:] == history(whole, "loss")[-2:]
    assert CASES["kto"].trainer == type(whole).__name__
