"""KTOTrainer: the loss by hand, its KL over the whole step, single rows, precomputed references, encoder-decoders."""

import datasets
import numpy as np
import pytest
import torch
from conformity import causal_lm, history, pairs, tokenizer, unpaired
from tiny_models import lora, tiny_model

from trl import KTOConfig, KTOTrainer
from trl.trainer.kto_trainer import MISMATCHED, REFERENCE_COLUMNS, with_mismatched

PLAIN = {
    "per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
    "save_strategy": "no", "learning_rate": 1e-2, "lr_scheduler_type": "constant", "seed": 3,
}  # fmt: skip


def trainer_of(tmp_path, rows=None, model=None, ref_model=None, eval_dataset=None, peft_config=None, **settings):
    return KTOTrainer(
        model or causal_lm(), ref_model, KTOConfig(output_dir=str(tmp_path), **{**PLAIN, **settings}),
        train_dataset=unpaired() if rows is None else rows, eval_dataset=eval_dataset, processing_class=tokenizer(),
        peft_config=peft_config,
    )  # fmt: skip


def logprob(model, prompt, completion):
    ids = torch.tensor([list(prompt) + list(completion)])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    return float(logprobs[len(prompt) - 1 :].sum())


def test_the_loss_by_hand(tmp_path):
    """Eq. 8 of arXiv:2402.01306 with the KL of completions behind other rows' prompts."""
    policy, reference = causal_lm(), causal_lm(seed=5)
    trainer = trainer_of(
        tmp_path, model=policy, ref_model=reference, eval_dataset=unpaired(), per_device_eval_batch_size=8, beta=0.3,
        desirable_weight=1.5, undesirable_weight=0.5,
    )  # fmt: skip
    metrics = trainer.evaluate()
    rows = list(trainer.eval_dataset)

    def ratio(row, column):
        return logprob(policy, row["prompt_ids"], row[column]) - logprob(reference, row["prompt_ids"], row[column])

    kl = max(0.0, float(np.mean([ratio(row, MISMATCHED) for row in rows])))
    losses = []
    for row in rows:
        sign, weight = (1, 1.5) if row["label"] else (-1, 0.5)
        losses.append(weight * (1 - 1 / (1 + np.exp(-sign * 0.3 * (ratio(row, "completion_ids") - kl)))))
    assert metrics["eval_kl"] == pytest.approx(kl, abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    good = [0.3 * ratio(row, "completion_ids") for row in rows if row["label"]]
    assert metrics["eval_rewards/chosen"] == pytest.approx(np.mean(good), rel=1e-4)


def test_kl_is_that_of_the_whole_step(tmp_path):
    """One row a micro-batch, four of them: the same KL, loss and gradient as one batch of four."""
    seen = []
    for size, accumulation in ((4, 1), (1, 4)):
        trainer = trainer_of(
            tmp_path, model=causal_lm(seed=5),
            ref_model=causal_lm(), per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        seen.append([history(trainer, name)[0] for name in ("kl", "loss", "grad_norm")])
    assert seen[1] == pytest.approx(seen[0], rel=1e-5)
    assert seen[0][0] > 0


def test_single_rows_train(tmp_path):
    trainer = trainer_of(tmp_path, per_device_train_batch_size=1, max_steps=2)
    trainer.train()
    assert np.isfinite(history(trainer, "loss")).all()


def test_mismatched_completions_have_another_prompt():
    rows = datasets.Dataset.from_dict({"prompt_ids": [[1], [1], [2], [1]], "completion_ids": [[10], [11], [12], [13]]})
    assert with_mismatched(rows, "train")[MISMATCHED][:] == [[12], [12], [13], [12]]
    with pytest.raises(ValueError, match="all rows of the train data set have one prompt"):
        with_mismatched(rows.select([0, 1]), "train")
    with pytest.raises(ValueError, match="must be a whole `Dataset`"):
        with_mismatched(rows.to_iterable_dataset(), "train")


def test_pairs_are_taken_apart(tmp_path):
    trainer = trainer_of(tmp_path, pairs())
    assert trainer.train_dataset.num_rows == 16
    assert sum(trainer.train_dataset["label"]) == 8


@pytest.mark.parametrize("loss", ["kto", "bco", "apo_zero_unpaired"])
@pytest.mark.parametrize("adapter", [False, True])
def test_precomputed_equals_live(loss, adapter, tmp_path):
    peft_config = lora(init_lora_weights="gaussian", target_modules=["q_proj", "v_proj"]) if adapter else None
    seen = []
    for ahead in (False, True):
        trainer = trainer_of(
            tmp_path, loss_type=loss, precompute_ref_log_probs=ahead, max_steps=2, peft_config=peft_config,
            eval_dataset={"one": unpaired().select([0, 1]), "two": unpaired().select([2, 3, 4])},
        )  # fmt: skip
        trainer.train()
        metrics = trainer.evaluate()
        seen.append([*history(trainer, "loss"), metrics["eval_one_loss"], metrics["eval_two_loss"]])
    assert seen[1] == pytest.approx(seen[0], rel=1e-5)
    needed = REFERENCE_COLUMNS if loss == "kto" else REFERENCE_COLUMNS[:1]
    assert set(needed) <= set(trainer.train_dataset.column_names)


def test_a_synchronised_reference_and_its_resume(tmp_path):
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 4}
    whole = trainer_of(tmp_path / "whole", **settings)
    whole.train()
    trainer_of(tmp_path / "parts", **settings, save_strategy="steps", save_steps=2).train()
    resumed = trainer_of(tmp_path / "parts", **settings, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    for key, value in whole.ref_model.state_dict().items():
        assert torch.equal(value, resumed.ref_model.state_dict()[key]), key


def test_encoder_decoder(tmp_path):
    trainer = trainer_of(tmp_path, model=tiny_model("t5", vocab_size=100), max_completion_length=4)
    trainer.train()
    assert history(trainer, "grad_norm")[0] > 0


def test_what_cannot_be_honoured_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data_collator: KTOTrainer packs its rows itself"):
        KTOTrainer(causal_lm(), data_collator=lambda rows: rows, train_dataset=unpaired(), processing_class=tokenizer())
    with pytest.raises(ValueError, match="compute_metrics: completions without a pair"):
        KTOTrainer(causal_lm(), compute_metrics=lambda p: {}, train_dataset=unpaired(), processing_class=tokenizer())
    with pytest.raises(ValueError, match="quantization_config: says how a model is loaded"):
        KTOTrainer(causal_lm(), quantization_config={}, train_dataset=unpaired(), processing_class=tokenizer())
    with pytest.raises(ValueError, match="model: none was given"):
        KTOTrainer(train_dataset=unpaired(), processing_class=tokenizer())


def test_bco_is_kto_with_its_loss(tmp_path):
    """By its config, by plain TrainingArguments and by `loss_type`: one training."""
    from transformers import TrainingArguments

    from trl import BCOConfig, BCOTrainer

    settings = {**PLAIN, "output_dir": str(tmp_path), "max_steps": 2}
    common = {"train_dataset": unpaired(), "processing_class": tokenizer()}
    runs = [
        BCOTrainer(causal_lm(), args=BCOConfig(**settings, max_length=None), **common),
        BCOTrainer(causal_lm(), args=TrainingArguments(**settings), **common),
        KTOTrainer(causal_lm(), args=KTOConfig(**settings, loss_type="bco", max_length=None), **common),
    ]
    losses = []
    for trainer in runs:
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == losses[1] == losses[2]
    assert runs[1].args.loss_type == "bco"
