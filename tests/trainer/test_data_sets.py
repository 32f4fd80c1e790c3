"""Data sets as people hand them over, in every trainer: raw rows to evaluate on, other training rows, transforms,
dicts of splits, one message for a list of them, processors, tokens beyond the embedding."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conformity import CASES, build, causal_lm, pairs, prompts, reward_model, step_model, texts, tokenizer, unpaired
from conformity import weights as weights_of
from datasets import Dataset, DatasetDict, IterableDatasetDict
from tiny_models import tiny_model
from tokenizers_for_tests import CHATML, byte_tokenizer
from transformers import ProcessorMixin, TrainerCallback

import trl
from trl.trainer.kto_trainer import MISMATCHED, with_mismatched
from trl.trainer.reward_trainer import compute_accuracy

EACH = (
    "sft", "sft-packing", "reward", "dpo-sigmoid", "kto", "prm", "orpo", "cpo", "simpo", "grpo", "rloo", "online-dpo",
    "raft", "distillation", "gkd",
)  # fmt: skip
"""a case of every trainer"""
SOME = ("sft-packing", "dpo-sigmoid", "kto", "prm", "grpo", "gkd")
USER = {"role": "user", "content": "hi"}
YES, NO = ({"role": "assistant", "content": word} for word in ("yes", "no"))


def rows_of(dataset: Any) -> list[dict[str, Any]]:
    return [dict(row) for row in dataset]


def config(kind: str, folder: Path, **more: Any) -> Any:
    settings = {"report_to": "none", "max_steps": 1, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    return getattr(trl, kind)(output_dir=str(folder), **{**settings, **more})


def longer(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Texts with a word more at their start."""
    return {name: [f"z {v}" if isinstance(v, str) else v for v in values] for name, values in batch.items()}


@pytest.mark.parametrize("name", EACH)
def test_raw_rows_are_prepared_to_evaluate_and_to_predict(name: str, tmp_path: Path) -> None:
    trainer = build(name, tmp_path)
    raw = CASES[name].rows().select(range(3))
    loss = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(raw)["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert trainer.evaluate(list(raw))["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert trainer.evaluate({"a": raw})["eval_a_loss"] == pytest.approx(loss, rel=1e-6)
    assert trainer.evaluate(trainer.eval_dataset.select(range(3)))["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert trainer.predict(raw).metrics["test_loss"] == pytest.approx(loss, rel=1e-6)
    trainer.eval_dataset = raw
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("name", EACH)
def test_a_data_set_of_splits_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = CASES[name].rows()
    splits = DatasetDict({"train": rows, "test": rows.select(range(2))})

    class Splits(DatasetDict):
        def select(self, places: Any) -> None:
            return None

    monkeypatch.setitem(CASES, name, replace(CASES[name], rows=lambda: Splits(splits)))
    wanted = (
        r"train data set is a Splits with the splits 'train' \(8 rows\), 'test' \(2 rows\): pass .* dataset\['train'\]"
    )
    with pytest.raises(ValueError, match=wanted):
        build(name, tmp_path)


def test_splits_later_and_of_streams_are_refused_too(tmp_path: Path) -> None:
    trainer = build("dpo-sigmoid", tmp_path)
    splits = DatasetDict({"test": pairs()})
    with pytest.raises(ValueError, match=r"with the splits 'test' \(8 rows\)"):
        trainer.train_dataset = splits
    with pytest.raises(ValueError, match="the test data set is a DatasetDict"):
        trainer.predict(splits)
    stream = IterableDatasetDict({"train": texts().to_iterable_dataset()})
    with pytest.raises(ValueError, match="is a IterableDatasetDict with the splits 'train': pass one of them"):
        trl.SFTTrainer(causal_lm(), config("SFTConfig", tmp_path), train_dataset=stream, processing_class=tokenizer())


@pytest.mark.parametrize("name", EACH)
def test_other_training_rows_are_used_between_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = CASES[name].rows().select([6, 4, 2, 1])
    trainer = build(name, tmp_path / "a", max_steps=1)
    trainer.train_dataset = other
    rows = CASES[name].rows
    monkeypatch.setitem(CASES, name, replace(CASES[name], rows=lambda: other))
    fresh = build(name, tmp_path / "b", max_steps=1)
    monkeypatch.setitem(CASES, name, replace(CASES[name], rows=rows))
    assert rows_of(trainer.train_dataset) == rows_of(fresh.train_dataset)
    if name in SOME:
        trainer.train()
        fresh.train()
        wanted = weights_of(fresh)
        assert all(torch.equal(value, wanted[key]) for key, value in weights_of(trainer).items())


@pytest.mark.parametrize("name", ["sft", "dpo-sigmoid", "grpo"])
def test_other_training_rows_within_a_run_are_refused(name: str, tmp_path: Path) -> None:
    trainer = build(name, tmp_path)

    class Harder(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            trainer.train_dataset = CASES[name].rows().select(range(4))

    trainer.add_callback(Harder())
    with pytest.raises(ValueError, match="a run reads the data set that it began with; set another one between two"):
        trainer.train()


def test_a_curriculum_draws_the_new_prompts_from_their_start(tmp_path: Path) -> None:
    drawn: list[str] = []

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        drawn.extend(prompts)
        return [float(len(text)) for text in completions]

    args = config("GRPOConfig", tmp_path, per_device_train_batch_size=4, num_generations=2, max_completion_length=3)
    easy, hard = (Dataset.from_dict({"prompt": [f"{word} {letter}" for letter in "abcd"]}) for word in ("one", "two"))
    trainer = trl.GRPOTrainer(causal_lm(), reward, args, train_dataset=easy, processing_class=tokenizer())
    trainer.train()
    assert {prompt.split()[0] for prompt in drawn} == {"one"}
    drawn.clear()
    trainer.train_dataset = hard
    trainer.train()
    assert {prompt.split()[0] for prompt in drawn} == {"two"}
    assert sorted(file.name for file in (tmp_path / "rollouts").iterdir()) == [
        "rollout-000000.parquet", "rollout-000001.parquet",
    ]  # fmt: skip


@pytest.mark.parametrize("name", EACH)
def test_a_transform_is_applied(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = CASES[name].rows()
    made = []
    for rows in (plain.map(longer, batched=True), plain.with_transform(longer)):
        monkeypatch.setitem(CASES, name, replace(CASES[name], rows=lambda rows=rows: rows))
        made.append(build(name, tmp_path).train_dataset)
    assert rows_of(made[0]) == rows_of(made[1])
    assert rows_of(made[0]) != rows_of(build(name, tmp_path).given.of(plain, "eval"))


def test_a_later_transform_and_hidden_columns_are_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows, wanted = prompts(), rows_of(prompts().map(longer, batched=True))
    args = config("GRPOConfig", tmp_path, per_device_train_batch_size=8, max_completion_length=2)
    reward = {"reward_funcs": lambda completions, **columns: [float(len(text)) for text in completions]}
    trainer = trl.GRPOTrainer(causal_lm(), args=args, train_dataset=rows, processing_class=tokenizer(), **reward)
    before = rows_of(trainer.train_dataset)
    rows.set_transform(longer)
    trainer.train()
    after = rows_of(trainer.train_dataset)
    assert [row["prompt"] for row in after] == [row["prompt"] for row in wanted] != [row["prompt"] for row in before]
    assert "the transform of the train data set is applied once, before training" in caplog.text
    hidden = prompts().with_format("torch", columns=["prompt"])
    trainer = trl.GRPOTrainer(causal_lm(), args=args, train_dataset=hidden, processing_class=tokenizer(), **reward)
    assert trainer.train_dataset.column_names == ["prompt", "prompt_ids"]


@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO", "Reward"])
def test_one_message_is_a_list_of_one(kind: str, tmp_path: Path) -> None:
    if kind == "SFT":
        single, listed = ([{"prompt": p, "completion": c}] for p, c in ((USER, YES), ([USER], [YES])))
    elif kind == "KTO":
        you = {**USER, "content": "you"}
        single = [{"prompt": USER, "completion": YES, "label": True}, {"prompt": you, "completion": NO, "label": False}]
        listed = [{**row, "prompt": [row["prompt"]], "completion": [row["completion"]]} for row in single]
    else:
        single, listed = (
            [{"prompt": USER, "chosen": YES, "rejected": NO}],
            [{"prompt": [USER], "chosen": [YES], "rejected": [NO]}],
        )
    tok = byte_tokenizer(CHATML)
    model = tiny_model("llama", vocab_size=300) if kind != "Reward" else None
    made = []
    for rows in (single, listed, Dataset.from_list(single)):
        own = model or reward_model()
        if kind == "Reward":
            own.resize_token_embeddings(300)
        trainer = getattr(trl, f"{kind}Trainer")(
            own, args=config(f"{kind}Config", tmp_path), train_dataset=rows, processing_class=tok
        )
        made.append(rows_of(trainer.train_dataset))
    assert made[0] == made[1] == made[2]
    assert tok.decode(
        next(v for k, v in made[0][0].items() if k in ("input_ids", "completion_ids", "chosen_ids"))
    ).endswith("yes<|im_end|>")


def test_a_text_prompt_before_one_answer_is_the_users_message(tmp_path: Path) -> None:
    rows = [{"prompt": "hi", "chosen": YES, "rejected": NO}]
    tok = byte_tokenizer(CHATML)
    trainer = trl.DPOTrainer(
        tiny_model("llama", vocab_size=300),
        args=config("DPOConfig", tmp_path),
        train_dataset=rows,
        processing_class=tok,
    )
    assert (
        tok.decode(trainer.train_dataset[0]["prompt_ids"]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "rows",
    [
        [{"chosen": f"the sky {w} is blue", "rejected": f"the sky {w} is green"} for w in ("a", "b")],
        [{"chosen": [{**USER, "content": w}, YES], "rejected": [{**USER, "content": w}, NO]} for w in ("a", "b")],
        [
            {"prompt": w, "chosen": [{**USER, "content": w}, YES], "rejected": [{**USER, "content": w}, NO]}
            for w in "ab"
        ],
        [{"prompt": [{**USER, "content": w}], "chosen": [YES], "rejected": [NO]} for w in "ab"],
        [{"prompt": w, "chosen": YES, "rejected": NO} for w in "ab"],
    ],
    ids=["texts", "conversations", "both", "apart", "one message"],
)
@pytest.mark.parametrize("kind", ["list", "table", "stream"])
def test_kto_takes_pairs_apart_as_dpo_does(rows: list[dict[str, Any]], kind: str, tmp_path: Path) -> None:
    tok = byte_tokenizer(CHATML) if not isinstance(rows[0]["chosen"], str) else tokenizer()
    model = tiny_model("llama", vocab_size=300)
    dpo = trl.DPOTrainer(
        model, args=config("DPOConfig", tmp_path), train_dataset=Dataset.from_list(rows), processing_class=tok
    )
    given: Any = {"list": rows, "table": Dataset.from_list(rows)}.get(kind)
    given = Dataset.from_list(rows).to_iterable_dataset() if kind == "stream" else given
    loss = "bco" if kind == "stream" else "kto"
    kto = trl.KTOTrainer(
        model, args=config("KTOConfig", tmp_path, loss_type=loss), train_dataset=given, processing_class=tok
    )
    wanted = [(r["prompt_ids"], r["chosen_ids"], True) for r in dpo.train_dataset]
    wanted += [(r["prompt_ids"], r["rejected_ids"], False) for r in dpo.train_dataset]
    assert [(r["prompt_ids"], r["completion_ids"], r["label"]) for r in kto.train_dataset] == wanted


def test_mismatched_completions_are_those_of_the_next_other_prompt() -> None:
    rows = Dataset.from_dict(
        {"prompt_ids": [[1], [1], [2, 3], [2, 3], [2], [1]], "completion_ids": [[i] * (i + 1) for i in range(6)]}
    )
    for dataset, places in ((rows, [2, 2, 4, 4, 5, 2]), (rows.select([4, 2, 3]), [2, 4, 4])):
        assert with_mismatched(dataset, "train")[MISMATCHED][:] == [[i] * (i + 1) for i in places]
    with pytest.raises(ValueError, match="all rows of the train data set have one prompt"):
        with_mismatched(rows.select([0, 1, 5]), "train")


class Both(ProcessorMixin):
    """A processor of text alone."""

    def __init__(self, inner: Any):
        self.tokenizer, self.chat_template = inner, CHATML


@pytest.mark.parametrize("kind", ["SFT", "DPO", "Reward", "KTO", "GRPO"])
def test_a_processors_tokenizer_is_used(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = {"SFT": texts, "DPO": pairs, "Reward": pairs, "KTO": unpaired, "GRPO": prompts}[kind]()
    model = reward_model() if kind == "Reward" else causal_lm()
    inner = tokenizer()
    inner.chat_template = None
    more = {"reward_funcs": lambda completions, **columns: [0.0] * len(completions)} if kind == "GRPO" else {}
    made = [
        getattr(trl, f"{kind}Trainer")(
            model, args=config(f"{kind}Config", tmp_path), train_dataset=rows, processing_class=one, **more
        )
        for one in (inner, Both(inner))
    ]
    assert rows_of(made[0].train_dataset) == rows_of(made[1].train_dataset)
    assert made[1].processing_class is inner
    assert inner.chat_template == CHATML
    inner.chat_template = None
    assert "of the Both its tokenizer is used, for text; checkpoints hold the tokenizer alone" in caplog.text


@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
def test_only_ids_that_rows_hold_must_have_an_embedding(kind: str, tmp_path: Path) -> None:
    tok = byte_tokenizer(CHATML)
    size = len(tok)
    tok.add_special_tokens({"additional_special_tokens": ["<image>"]})
    model = tiny_model("llama", vocab_size=size)
    more = {"reward_funcs": lambda completions, **columns: [0.0] * len(completions)} if kind == "GRPO" else {}

    def trainer_of(word: str) -> Any:
        row = {"SFT": {"text": word}, "DPO": {"prompt": "a", "chosen": word, "rejected": "b"}, "GRPO": {"prompt": word}}
        return getattr(trl, f"{kind}Trainer")(
            model, args=config(f"{kind}Config", tmp_path), train_dataset=[{**row[kind]}], processing_class=tok, **more
        )

    with pytest.warns(UserWarning, match=f"embedding has {size} rows, and the tokenizer's <image> lie beyond it"):
        assert len(trainer_of("c").train_dataset) == 1
    with (
        pytest.warns(UserWarning, match="lie beyond it"),
        pytest.raises(ValueError, match=f"row 0 of the train data set: '<image>' has the id {size}, and the model's"),
    ):
        trainer_of("c <image>")
    tok.pad_token = "<image>"  # padded rows would hold it
    with pytest.raises(ValueError, match=f"the tokenizer's highest id is {size}"):
        trainer_of("c")


def test_prm_accuracy_does_not_count_ignored_labels(tmp_path: Path) -> None:
    right, wrong = [0.1, 0.9], [0.9, 0.1]
    assert compute_accuracy(([[right, wrong, right, right]], [[1, -100, 1, -100]])) == {"accuracy": 1.0}
    assert compute_accuracy(([[right, wrong], [right, right]], [[1, 1], [0, -100]]))["accuracy"] == pytest.approx(1 / 3)
    assert compute_accuracy(([right, right, wrong], [1, -100, 1])) == {"accuracy": 0.5}
    trainer = build("prm", tmp_path)
    metrics = trainer.evaluate()
    predicted = trainer.predict(CASES["prm"].rows().select(range(3)))
    hits = predicted.predictions.argmax(-1) == predicted.label_ids
    assert metrics["eval_accuracy"] == pytest.approx(hits[predicted.label_ids != -100].mean())


def test_tokenised_steps_and_rewards_without_a_prompt(tmp_path: Path) -> None:
    trainer = build("prm", tmp_path)
    made = rows_of(trainer.train_dataset)
    for name in ("labels", "step_labels"):
        rows = [{"input_ids": row["input_ids"], name: row["step_labels"]} for row in made]
        again = trl.PRMTrainer(
            step_model(), config("PRMConfig", tmp_path), train_dataset=rows, processing_class=tokenizer()
        )
        assert rows_of(again.train_dataset) == made
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 1, 0]}]
    last = trl.PRMTrainer(
        step_model(), config("PRMConfig", tmp_path, train_on_last_step_only=True), train_dataset=rows,
        processing_class=tokenizer(),
    )  # fmt: skip
    assert last.train_dataset[0]["step_labels"] == [-100, -100, 0]
    with pytest.raises(ValueError, match=r"row 0 of the train data set: column 'labels' should hold 0, 1 or -100 .* 3"):
        trl.PRMTrainer(
            step_model(), config("PRMConfig", tmp_path), train_dataset=[{"input_ids": [5], "labels": [3]}],
            processing_class=tokenizer(),
        )  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        {"chosen_ids": [5, 6, 7], "rejected_ids": [5, 8]},
        {"chosen_input_ids": [5, 6, 7], "rejected_input_ids": [5, 8]},
        {"input_ids_chosen": [5, 6, 7], "input_ids_rejected": [5, 8]},
        {"prompt_input_ids": [5], "chosen_input_ids": [6, 7], "rejected_input_ids": [8]},
    ],
)
def test_tokenised_pairs_without_prompt_ids(row: dict[str, Any], tmp_path: Path) -> None:
    for kind, model in (("Reward", reward_model()), ("DPO", causal_lm())):
        trainer = getattr(trl, f"{kind}Trainer")(
            model, args=config(f"{kind}Config", tmp_path), train_dataset=[row, row], processing_class=tokenizer()
        )
        assert rows_of(trainer.train_dataset)[0] == {"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [8]}


def test_rewards_and_prompts_report_what_they_met(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The end tokens of the model count for a reward model, and arguments of a prompt's calls are decoded."""
    tok = byte_tokenizer(CHATML, eos="</s>")
    model = tiny_model("llama", vocab_size=300, max_position_embeddings=512)
    model.generation_config.eos_token_id = tok.convert_tokens_to_ids("<|im_end|>")
    turn = {"chosen": [USER, YES], "rejected": [USER, NO]}
    judge = reward_model()
    judge.resize_token_embeddings(300)
    judge.config.eos_token_id = model.generation_config.eos_token_id
    with caplog.at_level(logging.INFO, logger="trl.data.report"):
        trl.RewardTrainer(judge, config("RewardConfig", tmp_path), train_dataset=[turn], processing_class=tok)
    assert "no EOS token" not in caplog.text
    caplog.clear()
    called = {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
    }
    told = {"role": "tool", "name": "f", "content": "2"}
    trl.GRPOTrainer(
        model, lambda completions, **columns: [0.0] * len(completions), config("GRPOConfig", tmp_path),
        train_dataset=[{"prompt": [USER, called, told]}], processing_class=tok,
    )  # fmt: skip
    assert "1 arguments of tool calls were JSON text and were decoded" in caplog.text


def test_streams_are_split_and_refused_at_construction(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"messages": [USER, YES], "id": 1}] * 4)
    tok = byte_tokenizer(CHATML)
    student, teacher = tiny_model("llama", vocab_size=300), tiny_model("llama", vocab_size=300)
    for given in (rows, rows.to_list()):
        args = config("GKDConfig", tmp_path, max_completion_length=4)
        trainer = trl.GKDTrainer(student, teacher, args, train_dataset=given, processing_class=tok)
        assert trainer.train_dataset[0]["completion"][0]["content"] == "yes"
        assert "messages" not in trainer.train_dataset[0]
    with pytest.raises(ValueError, match="precompute_ref_log_probs=True: the given data are a IterableDataset"):
        trl.DPOTrainer(
            causal_lm(), args=config("DPOConfig", tmp_path, precompute_ref_log_probs=True),
            train_dataset=pairs().to_iterable_dataset(), processing_class=tokenizer(),
        )  # fmt: skip
