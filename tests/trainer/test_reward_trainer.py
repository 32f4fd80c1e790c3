"""RewardTrainer and PRMTrainer: the loss by hand, tokenised columns of older releases, encoders, words and warnings."""

import datasets
import numpy as np
import pytest
import torch
from conformity import causal_lm, config, history, pairs, reward_model, step_model, steps, tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    RobertaConfig,
    TrainingArguments,
)

from trl import PRMConfig, PRMTrainer, RewardConfig, RewardTrainer
from trl.legacy.collators import RewardDataCollatorWithPadding
from trl.rewards.reward_model import RewardModel

PLAIN = {
    "per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
    "save_strategy": "no", "learning_rate": 1e-2, "lr_scheduler_type": "constant", "seed": 3,
}  # fmt: skip
SMALL = {
    "vocab_size": 100, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip


def args_of(tmp_path, **more):
    return RewardConfig(output_dir=str(tmp_path), **{**PLAIN, **more})


def trainer_of(tmp_path, rows=None, model=None, settings=None, **more):
    more.setdefault("processing_class", tokenizer())
    return RewardTrainer(
        model or reward_model(), args_of(tmp_path, **(settings or {})), train_dataset=pairs() if rows is None else rows,
        **more,
    )  # fmt: skip


def tokenised_pairs(longest=6):
    """Rows as users of older releases tokenise them."""
    made = []
    for row in pairs():
        sides = {}
        for side in ("chosen", "rejected"):
            ids = tokenizer()(row["prompt"] + row[side])["input_ids"][:longest]
            sides |= {f"input_ids_{side}": ids, f"attention_mask_{side}": [1] * len(ids)}
        made.append(sides)
    return datasets.Dataset.from_list(made)


def rewards_by_hand(model, rows):
    def reward(ids):
        return model(input_ids=torch.tensor([ids])).logits[0, 0].item()

    with torch.no_grad():
        return [[reward(row["input_ids_chosen"]), reward(row["input_ids_rejected"])] for row in rows]


def test_margin_and_centre_by_hand(tmp_path):
    rows = tokenised_pairs().add_column("margin", [0.5, -0.25] * 4)
    model = reward_model()
    trainer = trainer_of(tmp_path, rows, model, {"center_rewards_coefficient": 0.1}, eval_dataset=rows)
    metrics = trainer.evaluate()
    chosen, rejected = np.array(rewards_by_hand(model, rows)).T
    margin = np.array([0.5, -0.25] * 4)
    expected = np.log1p(np.exp(-(chosen - rejected - margin))) + 0.1 * (chosen + rejected) ** 2
    assert metrics["eval_loss"] == pytest.approx(expected.mean(), rel=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx((chosen > rejected).mean())
    assert metrics["eval_margin"] == pytest.approx((chosen - rejected).mean(), rel=1e-4, abs=1e-6)


def test_outputs_of_compute_loss(tmp_path):
    rows = tokenised_pairs().add_column("margin", [1.0] * 8)
    trainer = trainer_of(tmp_path, rows)
    batch = trainer.data_collator([rows[0]])  # rows as the user has them
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    expected = -torch.nn.functional.logsigmoid(
        outputs["rewards_chosen"] - outputs["rewards_rejected"] - batch["margin"]
    ).mean()
    assert outputs["rewards_chosen"].shape == (1, 1)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_rows_longer_than_the_limit_are_cut_and_counted(tmp_path, caplog):
    rows = tokenised_pairs(longest=20)
    trainer = trainer_of(tmp_path, rows, settings={"max_length": 4})
    assert "7 rows were truncated (28 tokens cut)" in caplog.text
    assert "2 rows lost their whole answer to truncation and are left out" in caplog.text
    assert trainer.train_dataset.num_rows == 6
    long = max(len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in trainer.train_dataset)
    assert long == 4


def test_the_older_collator_equals_our_own(tmp_path):
    rows = tokenised_pairs().add_column("margin", [0.5] * 8)
    losses = []
    for collator in (None, RewardDataCollatorWithPadding(tokenizer(), max_length=20)):
        trainer = trainer_of(tmp_path, rows, data_collator=collator)
        trainer.train()
        losses.append([history(trainer, "loss")[0], history(trainer, "grad_norm")[0]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_text_pairs_equal_their_tokenised_rows(tmp_path):
    text = trainer_of(tmp_path, eval_dataset=pairs()).evaluate()
    rows = []
    for row in trainer_of(tmp_path).train_dataset:
        sides = {side: row["prompt_ids"] + row[f"{side}_ids"] for side in ("chosen", "rejected")}
        rows.append({f"input_ids_{side}": ids for side, ids in sides.items()})
    tokenised = trainer_of(tmp_path, eval_dataset=datasets.Dataset.from_list(rows)).evaluate()
    assert tokenised["eval_loss"] == pytest.approx(text["eval_loss"], rel=1e-6)


def test_words_and_warnings_of_older_releases(tmp_path):
    older = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    with pytest.warns(FutureWarning, match="RewardConfig"):
        RewardTrainer(reward_model(), older, train_dataset=pairs(), tokenizer=tokenizer())
    with pytest.warns(FutureWarning, match="max_length"):
        trainer = trainer_of(tmp_path, max_length=20)
    assert trainer.args.max_length == 20
    with (
        pytest.warns(FutureWarning, match="max_length"),
        pytest.raises(ValueError, match=r"You cannot specify both `max_length` and `args\.max_length`"),
    ):
        trainer_of(tmp_path, settings={"max_length": 20}, max_length=30)
    with pytest.warns(UserWarning, match=r"max_length=100: the model has 64 positions"):
        trainer_of(tmp_path, settings={"max_length": 100})
    with pytest.raises(ValueError, match="tokenizer: none was given"):
        trainer_of(tmp_path, processing_class=None)
    # transformers' default, which scripts also set: the trainer drops what it does not need, and only that
    assert args_of(tmp_path, remove_unused_columns=True).remove_unused_columns is False


def test_older_spelling_of_the_evaluation_strategy(tmp_path):
    args = args_of(tmp_path, evaluation_strategy="steps", eval_steps=1)
    trainer = RewardTrainer(reward_model(), args, train_dataset=pairs(), eval_dataset=pairs(), tokenizer=tokenizer())
    trainer.train()
    assert history(trainer, "eval_accuracy")


def test_metrics_of_the_caller_win(tmp_path):
    trainer = trainer_of(tmp_path, eval_dataset=pairs(), compute_metrics=lambda prediction: {"accuracy": 7.0})
    assert trainer.evaluate()["eval_accuracy"] == 7.0


def test_by_name_with_one_label(tmp_path):
    causal_lm().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="You passed a model_id to the RewardTrainer"):
        trainer = RewardTrainer(str(tmp_path / "base"), args_of(tmp_path), train_dataset=pairs())
    assert trainer.model.config.num_labels == 1


@pytest.mark.parametrize(
    ("labels", "settings"), [(2, {}), (3, {"center_rewards_coefficient": 0.1}), (2, {"margin": 1})]
)
def test_several_labels_are_averaged(tmp_path, labels, settings):
    """M7: as release 0.7.7: the mean over the labels of each one's loss; the reward is the mean of their scores."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config(num_labels=labels)).eval()
    rows = tokenised_pairs()
    margin = settings.pop("margin", None)
    if margin is not None:
        rows = rows.add_column("margin", [0.5 * i for i in range(len(rows))])
    with pytest.warns(UserWarning, match=f"num_labels={labels}: .* the reward is the mean over the labels"):
        trainer = trainer_of(tmp_path, rows, model, settings=settings, eval_dataset=rows)
    losses, right = [], []
    with torch.no_grad():
        for row in rows:
            chosen, rejected = (
                model(input_ids=torch.tensor([row[f"input_ids_{side}"]])).logits[0] for side in ("chosen", "rejected")
            )
            loss = -torch.nn.functional.logsigmoid(chosen - rejected - row.get("margin", 0.0))
            loss += settings.get("center_rewards_coefficient", 0.0) * (chosen + rejected) ** 2
            losses.append(loss.mean().item())
            right.append(float(chosen.mean() > rejected.mean()))
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx(np.mean(right))
    if labels == 3:
        return
    before = trainer.model.score.weight.detach().clone()
    trainer.train()
    assert (trainer.model.score.weight != before).any(1).all()
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(saved.score.weight, trainer.model.score.weight)
    with pytest.warns(UserWarning, match="the reward is the mean over the labels"):
        reward = RewardModel(saved, tokenizer())
    ids = torch.tensor([reward._row(reward.encoder.encode(["a b c"])[0], "a b c")])
    assert reward.raw(["a b c"])[0] == pytest.approx(saved.eval()(input_ids=ids).logits.mean().item(), abs=1e-5)


# -- encoders ---------------------------------------------------------------------------------


ENCODERS = {"bert": BertConfig, "roberta": RobertaConfig}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_as_reward_models(name, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(ENCODERS[name](**SMALL, num_labels=1)).eval()
    rows = tokenised_pairs()
    trainer = trainer_of(tmp_path, rows, model, eval_dataset=rows)
    metrics = trainer.evaluate()
    chosen, rejected = np.array(rewards_by_hand(model, rows)).T
    assert metrics["eval_loss"] == pytest.approx(np.log1p(np.exp(rejected - chosen)).mean(), rel=1e-5)
    trainer.train()
    assert history(trainer, "grad_norm")[0] > 0


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_as_process_reward_models(name, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_config(ENCODERS[name](**SMALL, num_labels=2)).eval()
    args = PRMConfig(output_dir=str(tmp_path), **PLAIN)
    trainer = PRMTrainer(model, args, None, steps(), steps(), tokenizer())
    losses = []
    for row in trainer.eval_dataset:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        labels = torch.tensor(row["step_labels"])
        losses += torch.nn.functional.cross_entropy(
            logits[labels != -100], labels[labels != -100], reduction="none"
        ).tolist()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    trainer.train()


# -- process reward models --------------------------------------------------------------------


def test_process_rewards_by_hand(tmp_path):
    model = step_model()
    args = PRMConfig(output_dir=str(tmp_path), **PLAIN, step_separator=" . ")
    trainer = PRMTrainer(model, args, None, steps(), steps(), tokenizer())
    hits, losses = [], []
    for row in trainer.eval_dataset:
        labels = torch.tensor(row["step_labels"])
        ends = labels != -100
        assert {row["input_ids"][i] for i in ends.nonzero().flatten().tolist()} == {
            tokenizer().convert_tokens_to_ids(".")
        }
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0][ends]
        losses += torch.nn.functional.cross_entropy(logits, labels[ends], reduction="none").tolist()
        hits += (logits.argmax(-1) == labels[ends]).tolist()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx(np.mean(hits))


def test_process_reward_model_needs_two_labels(tmp_path):
    model = AutoModelForTokenClassification.from_config(config(num_labels=1))
    with pytest.raises(ValueError, match="num_labels=1: a process reward model has 2"):
        PRMTrainer(model, PRMConfig(output_dir=str(tmp_path)), None, steps(), None, tokenizer())
