"""DPOTrainer: the released numbers, the older methods, where the reference comes from, every loss, encoder-decoders."""

import json
import math

import datasets
import numpy as np
import pytest
import torch
from conformity import causal_lm, history, pairs, tokenizer, weights
from dpo_cases import COLUMNS, config, plain, trainer_of
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from tokenizers_for_tests import gpt2_words_tokenizer, word_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from trl import DPOTrainer
from trl.legacy.collators import DPODataCollatorWithPadding
from trl.trainer.dpo_trainer import DPO_LOSSES

pytestmark = pytest.mark.filterwarnings("ignore:.*is not set in the DPOTrainer's init.*:UserWarning")


# -- released numbers -------------------------------------------------------------------------


NUMBERS = {
    "policy_chosen_logps": [-10.0, -20.0, -5.0],
    "policy_rejected_logps": [-12.0, -15.0, -9.0],
    "reference_chosen_logps": [-11.0, -18.0, -5.5],
    "reference_rejected_logps": [-11.0, -16.0, -8.0],
}


@pytest.mark.parametrize(
    ("loss", "smoothing", "free", "expected"),
    [
        ("sigmoid", 0.0, False, [0.598139, 0.854355, 0.620957]),
        ("sigmoid", 0.1, False, [0.618139, 0.824355, 0.635957]),
        ("hinge", 0.0, False, [0.8, 1.3, 0.85]),
        ("ipo", 0.0, False, [9.0, 64.0, 12.25]),
        ("kto_pair", 0.0, False, [0.475021, 0.549834, 0.487503, 0.475021, 0.524979, 0.475021]),
        ("sigmoid", 0.0, True, [0.598139, 0.974077, 0.513015]),
    ],
)
def test_dpo_loss(loss, smoothing, free, expected, tmp_path):
    trainer = trainer_of(plain(tmp_path), loss_type=loss, label_smoothing=smoothing, beta=0.1)
    given = {name: torch.tensor(values) for name, values in NUMBERS.items()}
    losses, chosen, rejected = trainer.dpo_loss(**given, reference_free=free)
    assert losses.tolist() == pytest.approx(expected, abs=2e-6)
    assert chosen.tolist() == pytest.approx([0.1, -0.2, 0.05], abs=1e-6)
    assert rejected.tolist() == pytest.approx([-0.1, 0.1, -0.1], abs=1e-6)


def test_tokenize_row(tmp_path):
    gpt2 = gpt2_words_tokenizer()
    gpt2.pad_token = gpt2.eos_token
    model = GPT2LMHeadModel(GPT2Config(n_embd=2, n_layer=1, n_head=1, n_positions=32))
    row = {"prompt": "Which is the best programming language?", "chosen": " Python", "rejected": " C++"}
    rows = datasets.Dataset.from_list([row])
    trainer = trainer_of(plain(tmp_path), rows, model, processing_class=gpt2, max_length=30)
    made = trainer.tokenize_row(row)
    assert made["chosen_input_ids"] == [50256, 13828, 318, 262, 1266, 8300, 3303, 30, 11361, 50256]
    assert made["chosen_labels"] == [-100] * 8 + [11361, 50256]
    assert trainer.train_dataset[0]["prompt_ids"] == made["prompt_input_ids"]  # the same, as the trainer has it
    assert trainer.build_tokenized_answer(row["prompt"], row["chosen"])["input_ids"] == [11361]
    trainer = trainer_of(plain(tmp_path), rows, model, processing_class=gpt2, max_length=10, max_prompt_length=4)
    assert trainer.tokenize_row(row)["chosen_input_ids"] == [1266, 8300, 3303, 30, 11361, 50256]
    with pytest.raises(ValueError, match="prompt should be an str but got"):
        trainer.tokenize_row({**row, "prompt": 3})


def test_get_batch_logps_by_hand():
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]]))
    labels = torch.tensor([[0, 1, 1]])
    assert DPOTrainer.get_batch_logps(logits, labels).item() == pytest.approx(math.log(0.5 * 0.75), rel=1e-5)
    averaged = DPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)
    assert averaged.item() == pytest.approx(math.log(0.5 * 0.75) / 2, rel=1e-5)
    masked = DPOTrainer.get_batch_logps(logits, torch.tensor([[0, -100, 1]]))
    assert masked.item() == pytest.approx(math.log(0.75), rel=1e-5)
    decoder = DPOTrainer.get_batch_logps(logits, labels, is_encoder_decoder=True)
    assert decoder.item() == pytest.approx(math.log(0.5 * 0.75 * 0.1), rel=1e-5)
    with pytest.raises(ValueError, match="must have the same shape"):
        DPOTrainer.get_batch_logps(logits, labels[:, :2])


def test_concatenated_inputs_by_hand():
    batch = {
        "chosen_input_ids": torch.tensor([[1, 2, 3]]), "chosen_labels": torch.tensor([[-100, 2, 3]]),
        "chosen_attention_mask": torch.ones(1, 3), "rejected_input_ids": torch.tensor([[1, 4]]),
        "rejected_labels": torch.tensor([[-100, 4]]), "rejected_attention_mask": torch.ones(1, 2), "prompt": ["a"],
    }  # fmt: skip
    joined = DPOTrainer.concatenated_inputs(batch, padding_value=9)
    assert joined["concatenated_input_ids"].tolist() == [[1, 2, 3], [1, 4, 9]]
    assert joined["concatenated_labels"].tolist() == [[-100, 2, 3], [-100, 4, -100]]
    assert joined["concatenated_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    seq2seq = {
        "prompt_input_ids": torch.tensor([[7, 8]]), "prompt_attention_mask": torch.ones(1, 2),
        "chosen_labels": torch.tensor([[2, 3]]), "rejected_labels": torch.tensor([[4]]),
    }  # fmt: skip
    joined = DPOTrainer.concatenated_inputs(seq2seq, is_encoder_decoder=True)
    assert joined["concatenated_input_ids"].tolist() == [[7, 8], [7, 8]]
    assert joined["concatenated_labels"].tolist() == [[2, 3], [4, -100]]


# -- the older methods against the packed path ------------------------------------------------


def padded_batch(trainer, rows):
    collate = DPODataCollatorWithPadding(pad_token_id=0)
    return collate([trainer.tokenize_row(row) for row in rows])


def test_padded_methods_equal_the_packed_objective(tmp_path):
    trainer = trainer_of(plain(tmp_path), ref_model=causal_lm(seed=5), max_length=30, beta=0.3)
    batch = padded_batch(trainer, pairs())
    with torch.no_grad():
        chosen, rejected, chosen_logits, _ = trainer.concatenated_forward(trainer.model, batch)
        reference = trainer.compute_reference_log_probs(batch)
        expected = trainer.dpo_loss(chosen, rejected, *reference)[0].mean()
        packed = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
        loss, metrics = trainer.get_batch_loss_metrics(trainer.model, packed, "eval")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert chosen_logits.shape[::2] == (8, 100)
    assert metrics["eval_logps/chosen"].item() == pytest.approx(chosen.mean().item(), rel=1e-5)
    assert set(metrics) == {
        f"eval_{name}" for name in (
            "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
            "logps/rejected", "logits/chosen", "logits/rejected", "entropy",
                "mean_token_accuracy",
        )
    }  # fmt: skip


def test_a_collator_of_the_older_kind_equals_our_own(tmp_path):
    ours = trainer_of(config(tmp_path))
    theirs = trainer_of(config(tmp_path), data_collator=DPODataCollatorWithPadding(pad_token_id=0))
    for trainer in (ours, theirs):
        trainer.train()
    assert history(theirs, "loss") == pytest.approx(history(ours, "loss"), rel=1e-6)
    assert history(theirs, "grad_norm") == pytest.approx(history(ours, "grad_norm"), rel=1e-5)
    with pytest.raises(ValueError, match=r"the data collator returned \['x'\]: it must give"):
        trainer_of(config(tmp_path), data_collator=lambda rows: {"x": 1}).train()


def test_stored_metrics_come_with_the_next_log(tmp_path):
    trainer = trainer_of(config(tmp_path))
    trainer.store_metrics({"mine": 1.0})
    trainer.store_metrics({"mine": 3.0})
    trainer.store_metrics({"eval_mine": 5.0}, train_eval="eval")
    trainer.log({"loss": 0.5})
    trainer.log({"eval_loss": 0.5})
    assert trainer.state.log_history[0]["mine"] == 2.0
    assert trainer.state.log_history[1]["eval_mine"] == 5.0
    trainer.log({"loss": 0.5})
    assert "mine" not in trainer.state.log_history[2]


# -- losses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", DPO_LOSSES)
def test_every_loss_trains(loss, tmp_path):
    options = {"label_smoothing": 1e-3} if loss == "exo_pair" else {}
    trainer = trainer_of(config(tmp_path, loss_type=loss, **options), eval_dataset=pairs().select(range(2)))
    trainer.train()
    assert np.isfinite(history(trainer, "loss")[0])
    assert history(trainer, "grad_norm")[0] > 0
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_policy_equal_to_its_reference_gives_ln_2(tmp_path):
    trainer = trainer_of(config(tmp_path), eval_dataset=pairs())
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert metrics["eval_rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_a_step_raises_the_margin(tmp_path):
    trainer = trainer_of(config(tmp_path, max_steps=5), eval_dataset=pairs())
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/margins"] > 0.05
    assert metrics["eval_rewards/accuracies"] > 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "kto"}, "Unknown loss type: kto. Should be one of"),
        ({"loss_type": "orpo"}, "trainers of their own"),
        ({"loss_type": []}, "loss_type=.*choose among"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing: has no effect"),
        ({"discopop_tau": 0.1}, "discopop_tau: has no effect"),
        ({"ipo_average_log_prob": True}, "average: has no effect"),
        ({"f_alpha_divergence_coef": 0.3}, "f_alpha_divergence_coef=0.3: it has no effect"),
        ({"precompute_ref_batch_size": 4}, "precompute_ref_batch_size=4: it has no effect"),
        ({"reference_free": True, "f_divergence_type": "forward_kl"}, "f_divergence_type='forward_kl': it has no"),
        ({"reference_free": True, "precompute_ref_log_probs": True}, "precompute_ref_log_probs=True: it has no"),
        ({"use_weighting": True, "loss_type": "aot"}, "use_weighting=True: .*aot"),
        ({"loss_type": "aot", "max_tokens_per_microbatch": 99}, "max_tokens_per_microbatch=99: .*cannot be cut"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "sync_ref_model=True: a precomputed reference"),
    ],
)
def test_options_without_effect_are_refused(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        config(tmp_path, **options)


def test_equal_losses_add_their_weights(tmp_path):
    assert config(tmp_path, loss_type=["sigmoid", "sigmoid"], loss_weights=[1.0, 0.5]).losses() == {"sigmoid": 1.5}


# -- the reference ----------------------------------------------------------------------------


def first_loss(trainer):
    trainer.train()
    return history(trainer, "loss")[0], history(trainer, "grad_norm")[0]


def test_a_reference_of_its_own_by_object_or_name(tmp_path):
    causal_lm(seed=5).save_pretrained(tmp_path / "ref")
    tokenizer().save_pretrained(tmp_path / "ref")
    by_object = trainer_of(config(tmp_path), ref_model=causal_lm(seed=5))
    with pytest.warns(UserWarning, match="You passed a model_id to the DPOTrainer"):
        by_name = trainer_of(
            config(tmp_path, ref_model_init_kwargs={"dtype": "float32"}), ref_model=str(tmp_path / "ref")
        )
    assert not any(p.requires_grad for p in by_name.ref_model.parameters())
    expected, own = first_loss(by_object), first_loss(trainer_of(config(tmp_path)))
    assert first_loss(by_name) == pytest.approx(expected, rel=1e-6)
    assert abs(expected[0] - own[0]) > 1e-3


@pytest.mark.parametrize("kind", ["copy", "given", "adapter"])
def test_precomputed_equals_live(kind, tmp_path):
    def build(**more):
        given = {"given": {"ref_model": causal_lm(seed=5)}, "adapter": {"model": adapted()}}.get(kind, {})
        sets = {"one": pairs().select([0, 1]), "two": pairs().select([2, 5, 7])}
        return trainer_of(config(tmp_path, max_steps=2, **more), eval_dataset=sets, **given)

    live, ahead = build(), build(precompute_ref_log_probs=True, precompute_ref_batch_size=3)
    assert (ahead.ref_model is None) == (kind != "given")  # no second model is kept for the copy
    for trainer in (live, ahead):
        trainer.train()
        trainer.metrics = trainer.evaluate()
    assert set(COLUMNS) <= set(ahead.train_dataset.column_names)
    assert set(COLUMNS) <= set(ahead.eval_dataset["two"].column_names)
    assert history(ahead, "loss") == pytest.approx(history(live, "loss"), rel=1e-5)
    assert history(ahead, "grad_norm") == pytest.approx(history(live, "grad_norm"), rel=1e-4)
    for name in ("eval_one_loss", "eval_two_loss", "eval_two_rewards/margins"):
        assert ahead.metrics[name] == pytest.approx(live.metrics[name], rel=1e-4, abs=1e-6), name


def adapted():
    torch.manual_seed(9)
    return get_peft_model(
        causal_lm(),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )


def test_precomputed_numbers_survive_a_resume(tmp_path):
    def build(**more):
        return trainer_of(config(tmp_path, max_steps=4, precompute_ref_log_probs=True, **more))

    whole = build()
    whole.train()
    build(save_strategy="steps", save_steps=2).train()
    resumed = build(save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[key]), key


def test_precomputation_that_cannot_be_honoured_is_an_error(tmp_path):
    trainer = trainer_of(config(tmp_path, precompute_ref_log_probs=True))
    trainer.train()
    with pytest.raises(ValueError, match="came after training had moved the policy"):
        trainer.evaluate(trainer.train_dataset.remove_columns(list(COLUMNS)))
    with pytest.raises(ValueError, match="without length"):
        trainer_of(config(tmp_path, precompute_ref_log_probs=True), pairs().to_iterable_dataset()).train()


@pytest.mark.parametrize("names", [COLUMNS, ("ref_chosen_logps", "ref_rejected_logps")])
def test_numbers_in_the_rows_are_used(names, tmp_path):
    rows = pairs()
    for name in names:
        rows = rows.add_column(name, [-1.5] * len(rows))
    trainer = trainer_of(config(tmp_path), rows, eval_dataset=rows)
    if names is COLUMNS:
        assert trainer.ref_model is None
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/chosen"] == pytest.approx(0.1 * (metrics["eval_logps/chosen"] + 1.5), rel=1e-5)


def test_the_adapter_switched_off_is_the_reference(tmp_path):
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = trainer_of(config(tmp_path), peft_config=adapter, eval_dataset=pairs())
    assert trainer.ref_model is None
    got = trainer.evaluate()
    explicit = trainer_of(config(tmp_path), model=trainer.model, ref_model=causal_lm(), eval_dataset=pairs())
    assert got["eval_loss"] == pytest.approx(explicit.evaluate()["eval_loss"], rel=1e-6)
    assert abs(got["eval_loss"] - math.log(2)) > 1e-4


def test_an_older_adapter_is_merged_first(tmp_path):
    fresh = LoraConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM")
    trainer = trainer_of(config(tmp_path), model=adapted(), peft_config=fresh, eval_dataset=pairs())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), rel=1e-5)  # the reference holds the old one
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert names
    assert all("k_proj.lora" in name for name in names)


def test_synchronised_reference_moves(tmp_path):
    trainer = trainer_of(
        config(tmp_path, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.25, max_steps=3)
    )
    start = {name: value.clone() for name, value in trainer.ref_model.state_dict().items()}
    trainer.train()
    moved = [name for name, value in trainer.ref_model.state_dict().items() if not torch.equal(value, start[name])]
    assert moved
    with pytest.raises(ValueError, match="sync_ref_model=True: the reference is no model of its own"):
        trainer_of(config(tmp_path, sync_ref_model=True), peft_config=LoraConfig(r=2, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("asked", [{"ref_model_sync_steps": 4}, {"ref_model_mixup_alpha": 0.4}])
def test_how_the_reference_moves_where_it_does_not(asked, tmp_path):
    """A callback that moves it may be added after construction, so training says it."""
    trainer = trainer_of(config(tmp_path, **asked))
    with pytest.raises(ValueError, match="it has no effect without sync_ref_model=True or a SyncRefModelCallback"):
        trainer.train()


def test_a_reference_where_none_is_used(tmp_path):
    with pytest.raises(ValueError, match="ref_model: the objective has no reference"):
        trainer_of(config(tmp_path, reference_free=True), ref_model=causal_lm())
    model = causal_lm()
    with pytest.raises(ValueError, match="the reference is the policy itself"):
        trainer_of(config(tmp_path), model=model, ref_model=model)
    trainer = trainer_of(config(tmp_path, reference_free=True))
    batch = padded_batch(trainer, pairs())
    with pytest.raises(ValueError, match="No reference model and model is not a Peft model"):
        trainer.compute_reference_log_probs(batch)


# -- encoder-decoders -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_train(name, tmp_path):
    model = tiny_model(name, vocab_size=100)
    trainer = trainer_of(config(tmp_path, max_completion_length=4), model=model, eval_dataset=pairs())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), rel=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_rewards/margins"] > 0
    assert all(len(row["chosen_ids"]) <= 4 for row in trainer.train_dataset)


def test_encoder_decoder_methods_equal_the_objective(tmp_path):
    model, reference = tiny_model("t5", vocab_size=100), tiny_model("t5", vocab_size=100)
    torch.nn.init.normal_(reference.lm_head.weight)
    trainer = trainer_of(plain(tmp_path), model=model, ref_model=reference)
    rows = [trainer.tokenize_row(row, model=model) for row in pairs()]
    batch = DPODataCollatorWithPadding(pad_token_id=0, is_encoder_decoder=True)(rows)
    with torch.no_grad():
        chosen, rejected, *_ = trainer.concatenated_forward(model, batch)
        expected = trainer.dpo_loss(chosen, rejected, *trainer.compute_reference_log_probs(batch))[0].mean()
        packed = trainer.data_collator(rows)  # the older columns, as they are
        loss = trainer.objective(model, packed).mean
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_the_model_is_must_agree_with_the_argument(tmp_path):
    with pytest.raises(ValueError, match="is_encoder_decoder=True: the model says False"):
        trainer_of(plain(tmp_path), is_encoder_decoder=True)
    with pytest.raises(ValueError, match="you need to pass the parameter is_encoder_decoder"):
        DPOTrainer(args=plain(tmp_path), train_dataset=pairs(), processing_class=tokenizer(), model_init=causal_lm)
    trainer = DPOTrainer(
        args=config(tmp_path), train_dataset=pairs(), processing_class=tokenizer(), is_encoder_decoder=False,
        model_init=lambda: causal_lm(),
    )  # fmt: skip
    trainer.train()


# -- words of older releases and today's ------------------------------------------------------


def test_messages_of_older_releases(tmp_path):
    with pytest.raises(ValueError, match=r"You passed model_kwargs to the DPOTrainer\. But your model is already"):
        trainer_of(plain(tmp_path), model_init_kwargs={"dtype": "float32"})
    with pytest.raises(ValueError, match="You passed ref_model_kwargs to the DPOTrainer"):
        trainer_of(plain(tmp_path), ref_model=causal_lm(), ref_model_init_kwargs={"dtype": "float32"})
    with pytest.raises(ValueError, match="truncation_mode='middle'"):
        trainer_of(plain(tmp_path), truncation_mode="middle")
    with pytest.raises(ValueError, match="column"):
        trainer_of(plain(tmp_path), datasets.Dataset.from_dict({"prompt": ["a"], "chosen": ["b"]}))


@pytest.mark.filterwarnings("default:.*is not set in the DPOTrainer's init.*:UserWarning")
def test_lengths_of_older_releases(tmp_path):
    with pytest.warns(UserWarning, match="`max_length` is not set in the DPOTrainer's init: it defaults to 64"):
        trainer = trainer_of(plain(tmp_path))
    assert (trainer.args.max_length, trainer.args.truncation_mode) == (64, "keep_end")
    with pytest.warns(UserWarning, match="`max_target_length` is not set"):
        trainer_of(plain(tmp_path), model=tiny_model("t5", vocab_size=100))


def test_both_call_styles_and_the_third_argument_of_today(tmp_path):
    older = trainer_of(plain(tmp_path), beta=0.3, loss_type="ipo", max_length=20, truncation_mode="keep_start")
    today = DPOTrainer(
        causal_lm(), None, config(tmp_path, beta=0.3, loss_type="ipo", max_length=20), train_dataset=pairs(),
        processing_class=tokenizer(),
    )  # fmt: skip
    assert today.args.beta == 0.3
    bos = [row["prompt_ids"][0] for row in older.train_dataset]
    assert set(bos) == {1}  # the older style always opens with BOS, today's does as the tokenizer does
    assert 1 not in {row["prompt_ids"][0] for row in today.train_dataset}


def test_compute_metrics_sees_rewards(tmp_path):
    def accuracy(prediction):
        return {"right": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}

    trainer = trainer_of(
        config(tmp_path), ref_model=causal_lm(seed=5), eval_dataset=pairs(), compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: -logits,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_right"] == pytest.approx(1 - metrics["eval_rewards/accuracies"], abs=1e-6)


def test_pad_token_and_dropout(tmp_path):
    own = word_tokenizer()
    with pytest.raises(ValueError, match="pad_token='<nothing>': not in the tokenizer"):
        trainer_of(config(tmp_path, pad_token="<nothing>"), processing_class=own)
    trainer_of(config(tmp_path, pad_token="mat"), processing_class=own)
    assert own.pad_token == "mat"
    model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=8, n_layer=1, n_head=1, n_positions=64))
    trainer_of(config(tmp_path, disable_dropout=False), model=model)
    assert model.transformer.drop.p == 0.1
    trainer_of(config(tmp_path), model=model)
    assert model.transformer.drop.p == 0.0


def test_json_from_a_command_line(tmp_path):
    assert config(tmp_path, model_init_kwargs=json.dumps({"a": 1})).model_init_kwargs == {"a": 1}
    with pytest.raises(ValueError, match=r"model_init_kwargs='\{': not JSON"):
        config(tmp_path, model_init_kwargs="{")


@pytest.mark.parametrize("case", ["frozen", "precomputed", "adapter", "given"])
def test_the_reference_computes_in_the_policys_precision(case, tmp_path):
    """A policy that is still its reference has the loss ln 2, under autocast too."""
    arguments = {"ref_model": causal_lm()} if case == "given" else {}
    if case == "adapter":
        arguments["peft_config"] = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    args = config(tmp_path, bf16=True, use_cpu=True, max_steps=1, precompute_ref_log_probs=case == "precomputed")
    trainer = trainer_of(args, **arguments)
    trainer.train()
    assert history(trainer, "loss") == [pytest.approx(math.log(2), abs=1e-6)]
    assert history(trainer, "rewards/margins") == [0]
