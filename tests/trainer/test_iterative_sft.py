"""IterativeSFTTrainer: what it refuses, what it learns from, and that its split into batches changes nothing."""

import numpy as np
import pytest
import torch
from conformity import causal_lm, tokenizer
from datasets import Dataset
from transformers import T5Config, T5ForConditionalGeneration, TrainingArguments

from trl import IterativeSFTTrainer, SFTConfig
from trl.models import forward

pytestmark = pytest.mark.filterwarnings("ignore:No data collator is provided", "ignore:No labels are provided")


def build(tmp_path, model=None, **more):
    fields = {"per_device_train_batch_size": 2, "max_steps": 10, "learning_rate": 1e-2, "report_to": "none"}
    own = {key: more.pop(key) for key in list(more) if key in TrainingArguments.__dataclass_fields__}
    args = TrainingArguments(output_dir=str(tmp_path), **{**fields, **own})
    return IterativeSFTTrainer(model or causal_lm(), args, tokenizer=tokenizer(), **more)


def ids():
    return [torch.tensor([1, 5, 6, 7, 2]), torch.tensor([1, 8, 9, 2]), torch.tensor([1, 4, 2]), torch.tensor([1, 5, 2])]


def test_it_learns_what_it_is_given(tmp_path):
    trainer = build(tmp_path, logging_steps=1)
    for _ in range(4):
        trainer.step(input_ids=ids())
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert trainer.state.global_step == 8
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_padding_free_false_of_another_config_is_heard(tmp_path, monkeypatch):
    args = SFTConfig(str(tmp_path), padding_free=False, max_steps=1, per_device_train_batch_size=4, report_to="none")
    trainer = IterativeSFTTrainer(causal_lm(), args, tokenizer=tokenizer())
    monkeypatch.setattr(forward, "fast", lambda *how: pytest.fail("rows were packed"))
    trainer.step(input_ids=ids())


def test_accumulation_equals_the_large_batch(tmp_path):
    weights = []
    for size, accumulation in ((4, 1), (1, 4)):
        trainer = build(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, optim="sgd"
        )
        trainer.step(input_ids=ids())
        weights.append(torch.cat([p.flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def test_texts_and_their_labels_are_tokenised(tmp_path):
    trainer = build(tmp_path)
    records = trainer._checked(None, None, None, ["a b c"], ["c b a"])
    assert records[0]["input_ids"].tolist() == tokenizer()("a b c")["input_ids"]
    assert records[0]["labels"].tolist() == tokenizer()("c b a")["input_ids"]


@pytest.mark.parametrize(("mode", "kept"), [("keep_end", [7, 2]), ("keep_start", [1, 5])])
def test_max_length_cuts_tokens(tmp_path, mode, kept):
    trainer = build(tmp_path, max_length=2, truncation_mode=mode)
    (record,) = trainer.prepare_model_inputs(ids()[:1], None, ids()[:1])
    assert record["input_ids"].tolist() == kept


def test_encoder_decoder(tmp_path):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer()), d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    trainer = build(tmp_path, T5ForConditionalGeneration(config))
    trainer.step(input_ids=ids(), labels=ids()[::-1])
    assert trainer.state.global_step == 2
    with pytest.raises(ValueError, match="No 'labels' or 'text_labels' are provided"):
        trainer.step(input_ids=ids())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Step should include `input_ids` or `texts`"),
        ({"input_ids": "1 2"}, "input_ids must be a list of tensors - got"),
        ({"input_ids": [1, 2]}, "Elements in input_ids must be tensors - got"),
        ({"input_ids": [["a"]]}, "Elements in input_ids must be tensors - got"),
        ({"input_ids": torch.ones(2, 2)}, r"Elements in input_ids must be tensors - got .* of torch.float32"),
        ({"texts": "a"}, "'text' must be a list of strings - got"),
        ({"texts": [1]}, "Elements in 'text' must be strings - got"),
        ({"texts": ["a"], "texts_labels": "a"}, "'text_labels' must be a list of strings - got"),
    ],
)
def test_wrong_steps_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path).step(**arguments)


@pytest.mark.parametrize("form", ["column", "torch column", "lists", "tuple", "array"])
def test_sequences_of_every_kind_are_rows(tmp_path, form):
    """M10: columns of a data set, lists, tuples and arrays give the records that tensors give."""
    rows = [row[:3] for row in ids()]
    dataset = Dataset.from_dict({"ids": [row.tolist() for row in rows], "mask": [[1, 1, 0]] * 4})
    columns = {
        "column": lambda name: dataset[name],
        "torch column": lambda name: dataset.with_format("torch")[name],
        "lists": lambda name: dataset[name][:],
        "tuple": lambda name: tuple(torch.tensor(row) for row in dataset[name]),
        "array": lambda name: np.array(dataset[name][:]),
    }
    given = {"input_ids": columns[form]("ids"), "attention_mask": columns[form]("mask")}
    trainer = build(tmp_path, optim="sgd")
    trainer.step(**given, labels=columns[form]("ids"))
    other = build(tmp_path / "other", optim="sgd")
    other.step(input_ids=rows, attention_mask=[torch.tensor([1, 1, 0])] * 4, labels=rows)
    for mine, theirs in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_column_of_texts(tmp_path):
    dataset = Dataset.from_dict({"text": ["a b c", "d e"]})
    build(tmp_path).step(texts=dataset["text"], texts_labels=dataset["text"])


def test_wrong_constructions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model must be a PreTrainedModel, got"):
        build(tmp_path, torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="you need to set the total number of training steps"):
        build(tmp_path, max_steps=-1)
    with pytest.raises(ValueError, match="truncation_mode='x'"):
        build(tmp_path, truncation_mode="x")
