"""SFTTrainer: every kind of row and argument, the words of older releases; packed rows never see each other."""

import datasets
import numpy as np
import pytest
import torch
from conformity import causal_lm, history, texts, tokenizer
from peft import LoraConfig
from tokenizers_for_tests import byte_tokenizer, word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    TrainerCallback,
    TrainingArguments,
)

from trl import DataCollatorForCompletionOnlyLM, SFTConfig, SFTTrainer
from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.legacy.constant_length import ConstantLengthDataset
from trl.trainer.sft_trainer import PackingCollator

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning", "ignore:You didn't pass a `max_seq_length`:UserWarning"
)
PLAIN = {
    "per_device_train_batch_size": 2, "max_steps": 1, "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
    "save_strategy": "no", "learning_rate": 1e-2, "lr_scheduler_type": "constant",
}  # fmt: skip


def config(tmp_path, **more):
    return SFTConfig(output_dir=str(tmp_path), **{**PLAIN, **more})


def plain(tmp_path, **more):
    return TrainingArguments(output_dir=str(tmp_path), **{**PLAIN, **more})


def trainer_of(args, rows=None, model=None, **more):
    rows = texts() if rows is None else rows
    more.setdefault("processing_class", tokenizer())
    return SFTTrainer(model=model or causal_lm(), args=args, train_dataset=rows, **more)


def learned(trainer, row=0):
    """The tokens of a row, each masked one as None."""
    record = trainer.train_dataset[row]
    return [i if m else None for i, m in zip(record["input_ids"], record["loss_mask"], strict=True)]


# -- rows -------------------------------------------------------------------------------------


def test_text_rows_end_with_eos_and_are_learned_whole(tmp_path):
    trainer = trainer_of(config(tmp_path), datasets.Dataset.from_dict({"text": ["a b c", "d"]}))
    assert learned(trainer) == [None, 5, 6, 2]


def test_prompts_are_learned_only_when_asked_for(tmp_path):
    rows = datasets.Dataset.from_dict({"prompt": ["a b "], "completion": ["c d"]})
    assert learned(trainer_of(config(tmp_path), rows)) == [None, None, 6, 7, 2]
    assert learned(trainer_of(config(tmp_path, completion_only_loss=False), rows)) == [None, 5, 6, 7, 2]


def test_assistant_turns_with_their_end(tmp_path):
    chat = byte_tokenizer()
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(chat), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
    )
    rows = datasets.Dataset.from_dict({"messages": [messages]})
    trainer = trainer_of(config(tmp_path, assistant_only_loss=True), rows, model, processing_class=chat)
    assert chat.decode([i for i in learned(trainer) if i is not None]) == "yo<|im_end|>"
    trainer.train()
    assert np.isfinite(history(trainer, "loss")[0])


def test_tool_results_inside_a_completion_are_learned_only_when_asked_for(tmp_path):
    chat = byte_tokenizer()
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(chat), **size))
    said = [("assistant", "I look."), ("tool", "no"), ("assistant", "Dry.")]
    completion = [{"role": role, "content": text} for role, text in said]
    rows = datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": "Rain?"}]], "completion": [completion]})
    texts_of = []
    for asked in (False, True):
        trainer = trainer_of(config(tmp_path, learn_tool_results=asked), rows, model, processing_class=chat)
        texts_of.append(chat.decode([i for i in learned(trainer) if i is not None]))
    told = "\n<|im_start|>tool\nno<|im_end|>\n<|im_start|>assistant\n"
    assert texts_of == ["I look.<|im_end|>Dry.<|im_end|>", f"I look.<|im_end|>{told}Dry.<|im_end|>"]
    for other in ({"assistant_only_loss": True}, {"completion_only_loss": False}):
        with pytest.raises(ValueError, match="learn_tool_results=True: it has no effect without the loss on compl"):
            config(tmp_path, learn_tool_results=True, **other)


def test_tokenised_rows_keep_their_labels(tmp_path):
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[-100, -100, 7]]})
    assert learned(trainer_of(config(tmp_path), rows)) == [None, None, 7]


@pytest.mark.parametrize("batched", [False, True])
def test_formatting_func_of_a_row_or_a_batch(batched, tmp_path):
    def of_row(row):
        return f"{row['one']} {row['two']}"

    def of_batch(rows):
        return [f"{one} {two}" for one, two in zip(rows["one"], rows["two"], strict=True)]

    rows = datasets.Dataset.from_dict({"one": ["a", "c"], "two": ["b", "d"]})
    trainer = trainer_of(plain(tmp_path), rows, formatting_func=of_batch if batched else of_row)
    assert [row["input_ids"] for row in trainer.train_dataset] == [[4, 5, 2], [6, 7, 2]]


def test_formatting_func_must_return_texts(tmp_path):
    with pytest.raises(ValueError, match="should return a list of processed strings"):
        trainer_of(plain(tmp_path), formatting_func=lambda row: 3)


def test_truncation_is_reported(tmp_path, caplog):
    rows = datasets.Dataset.from_dict({"text": ["a b c d e f", "a"]})
    trainer = trainer_of(config(tmp_path, max_length=4), rows)
    assert trainer.train_dataset[0]["input_ids"] == [4, 5, 6, 7]
    assert "1 rows were truncated (3 tokens cut)" in caplog.text
    kept_end = trainer_of(config(tmp_path, max_length=4, truncation_mode="keep_end"), rows)
    assert kept_end.train_dataset[0]["input_ids"] == [7, 8, 9, 2]


class _Rows(torch.utils.data.Dataset):
    """Tokenised rows as tensors, the last one padded."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        ids = torch.tensor([4, 5, 6 + index, 0])
        return {
            "input_ids": ids,
            "labels": torch.tensor([-100, 5, 6 + index, -100]),
            "attention_mask": (ids > 0).long(),
        }


def test_a_torch_dataset_is_used_as_it_is(tmp_path):
    rows = _Rows()
    trainer = trainer_of(plain(tmp_path), rows)
    assert trainer.train_dataset is rows
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["packed"].ids_N.numel() == 6  # 2 rows, padding gone
    assert batch["packed"].target_S.numel() == 4
    trainer.train()
    assert np.isfinite(history(trainer, "loss")[0])


def test_a_stream_trains_and_evaluates(tmp_path):
    stream = texts().to_iterable_dataset()
    trainer = trainer_of(config(tmp_path, max_steps=2), stream, eval_dataset=stream)
    trainer.train()
    whole = trainer_of(config(tmp_path, max_steps=2), eval_dataset=texts())
    assert len(history(trainer, "loss")) == 2
    assert trainer_of(config(tmp_path), stream, eval_dataset=stream).evaluate()["eval_loss"] == pytest.approx(
        whole.evaluate()["eval_loss"], rel=1e-6
    )


def test_a_dict_of_evaluation_sets(tmp_path):
    sets = {"short": texts().select([0, 4]), "long": texts().select([3, 7])}
    trainer = trainer_of(config(tmp_path, eval_strategy="steps", eval_steps=1), eval_dataset=sets)
    trainer.train()
    assert history(trainer, "eval_short_loss")
    assert history(trainer, "eval_long_loss")
    assert set(sets["short"].column_names) == {"text"}  # the caller's own dict stays as it is


def test_evaluation_is_the_mean_over_all_tokens(tmp_path):
    losses = [
        trainer_of(config(tmp_path, per_device_eval_batch_size=size), eval_dataset=texts()).evaluate()["eval_loss"]
        for size in (1, 3, 8)
    ]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)


# -- packing ----------------------------------------------------------------------------------


def test_packed_sequences_do_not_see_each_other():
    """The gradient of one sequence's loss with respect to the other's embeddings is exactly 0."""
    model = causal_lm()
    row = {"input_ids": [5, 6, 7, 8, 9, 10], "loss_mask": [0, 1, 1, 0, 1, 1], "seq_lengths": [3, 3]}
    packed = PackingCollator()([row])["packed"]
    assert packed.position_N.tolist() == [0, 1, 2, 0, 1, 2]
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, given, out: seen.append(out) or out.retain_grad())
    from trl.models.scoring import score

    logprobs_BT = score(model, packed).logprobs_BT
    logprobs_BT[1].sum().backward()
    gradient = seen[-1].grad[0]
    assert torch.equal(gradient[:3], torch.zeros_like(gradient[:3]))
    assert (gradient[3:5].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packing_over_the_whole_set(strategy, tmp_path):
    rows = texts()  # 4, 6, 8, 10 tokens with EOS, twice
    trainer = trainer_of(config(tmp_path, packing=True, packing_strategy=strategy, max_length=14), rows)
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    assert (len(lengths), sum(lengths), max(lengths)) == (4, 56, 14)
    trainer.train()


def test_packing_of_whole_sequences_changes_no_loss(tmp_path):
    packed = trainer_of(config(tmp_path, packing=True, max_length=14), eval_dataset=texts()).evaluate()["eval_loss"]
    apart = trainer_of(config(tmp_path), eval_dataset=texts()).evaluate()["eval_loss"]
    assert packed == pytest.approx(apart, rel=1e-6)


def test_older_packing_is_the_constant_length_dataset(tmp_path):
    with pytest.warns(UserWarning, match="training your model with `max_steps` strategy"):
        trainer = trainer_of(
            plain(tmp_path), packing=True, dataset_text_field="text", max_seq_length=7, num_of_sequences=2,
            chars_per_token=100.0, dataset_kwargs={"append_concat_token": False},
        )  # fmt: skip
    assert {len(row["input_ids"]) for row in trainer.train_dataset} == {7}
    assert all(2 not in row["input_ids"] for row in trainer.train_dataset)  # no end token
    trainer.train()


@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_older_packing_of_conversations(keys, tmp_path):
    """Release 0.8-0.11 rendered them by the chat template."""
    own = word_tokenizer(chat_template="{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}")
    column = "messages" if keys[0] == "role" else "conversations"
    talk = [[dict(zip(keys, ("user", "a b"), strict=True)), dict(zip(keys, ("assistant", "c"), strict=True))]]
    with pytest.warns(UserWarning, match="training your model with `max_steps` strategy"):
        trainer = trainer_of(
            plain(tmp_path), datasets.Dataset.from_dict({column: talk * 4}), packing=True, max_seq_length=6,
            num_of_sequences=2, chars_per_token=100.0, processing_class=own,
        )  # fmt: skip
    unknown, eos = own.unk_token_id, own.eos_token_id
    rows = [[unknown, 4, 5, unknown, 6, eos]] * len(trainer.train_dataset)  # `user a b assistant c`
    assert [row["input_ids"] for row in trainer.train_dataset] == rows


@pytest.mark.filterwarnings("ignore:The dataset reached end")
def test_a_ready_constant_length_dataset(tmp_path):
    ready = ConstantLengthDataset(tokenizer(), texts(), dataset_text_field="text", seq_length=8)
    trainer = trainer_of(plain(tmp_path), ready)
    assert trainer.train_dataset is ready
    assert ready.infinite
    trainer.train()
    assert np.isfinite(history(trainer, "loss")[0])


def test_too_little_data_to_pack(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    with pytest.raises(ValueError, match="at least yield one packed sequence"):
        trainer_of(
            config(tmp_path, packing=True, packing_strategy="constant_length", max_length=50, max_steps=-1), rows
        )


# -- words of older releases ------------------------------------------------------------------


def test_messages_of_older_releases(tmp_path):
    rows = datasets.Dataset.from_dict({"quote": ["a b"]})
    with pytest.raises(ValueError, match=r"You passed `packing=False` to the SFTTrainer.*columns.*quote"):
        trainer_of(plain(tmp_path), rows)
    with (
        pytest.warns(UserWarning, match="max_steps"),
        pytest.raises(ValueError, match="You need to pass a `dataset_text_field` or `formatting_func`"),
    ):
        trainer_of(plain(tmp_path), rows, packing=True)
    collator = DataCollatorForCompletionOnlyLM([5], tokenizer=tokenizer())
    with (
        pytest.warns(UserWarning, match="max_steps"),
        pytest.raises(ValueError, match="not compatible with the `packing` argument"),
    ):
        trainer_of(plain(tmp_path), packing=True, data_collator=collator)
    with pytest.raises(ValueError, match="You passed model_kwargs to the SFTTrainer"):
        trainer_of(plain(tmp_path), model_init_kwargs={"dtype": "float32"})
    with pytest.raises(ValueError, match="you need to pass a PeftConfig object to the SFTTrainer"):
        trainer_of(plain(tmp_path), peft_config="lora")
    with pytest.raises(ValueError, match="two names of one argument"):
        trainer_of(plain(tmp_path), tokenizer=word_tokenizer())


def test_warnings_of_older_releases(tmp_path):
    with pytest.warns(FutureWarning, match="infinite"):
        trainer_of(plain(tmp_path), infinite=True)
    with pytest.warns(UserWarning, match="will default to 64"):
        trainer_of(plain(tmp_path))
    with pytest.warns(UserWarning, match="`formatting_func` makes the texts"):
        trainer_of(plain(tmp_path), dataset_text_field="text", formatting_func=lambda row: row["text"])


def test_a_keyword_against_the_config_is_refused_and_the_callers_config_stays(tmp_path):
    args = config(tmp_path, max_length=20)
    with pytest.raises(ValueError, match="cannot specify both `max_length`"):
        trainer_of(args, max_seq_length=10)
    args = config(tmp_path)
    trainer = trainer_of(args, max_seq_length=10)
    assert (trainer.args.max_length, args.max_length) == (10, 1024)


@pytest.mark.filterwarnings("ignore:[0-9,]+ trained weights are stored in bfloat16")
def test_model_by_name_with_its_own_tokenizer(tmp_path):
    causal_lm().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match="You passed a model_id to the SFTTrainer"):
        trainer = SFTTrainer(
            str(tmp_path / "model"),
            config(tmp_path, model_init_kwargs='{"dtype": "bfloat16"}'),
            train_dataset=texts(),
        )
    assert trainer.model.dtype == torch.bfloat16
    assert trainer.tokenizer.eos_token == "<eos>"
    trainer.train()


@pytest.mark.parametrize("takes_trial", [False, True])
def test_model_init(takes_trial, tmp_path):
    trainer = SFTTrainer(
        args=config(tmp_path),
        train_dataset=texts(),
        processing_class=tokenizer(),
        eval_dataset=texts(),
        model_init=(lambda trial: causal_lm()) if takes_trial else (lambda: causal_lm()),
    )
    direct = trainer_of(config(tmp_path), eval_dataset=texts())
    assert trainer.evaluate()["eval_loss"] == direct.evaluate()["eval_loss"]
    trainer.train()
    assert np.isfinite(history(trainer, "loss")[0])


def test_completion_only_collator(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a b . c d", "a . e"]})
    dot = tokenizer().convert_tokens_to_ids(".")
    collator = DataCollatorForCompletionOnlyLM([dot], tokenizer=tokenizer())
    trainer = trainer_of(config(tmp_path), rows, data_collator=collator)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    assert batch["packed"].target_S.tolist() == [6, 7, 8]
    trainer.train()
    with pytest.raises(ValueError, match="assistant_only_loss=True: your data_collator decides"):
        trainer_of(config(tmp_path, assistant_only_loss=True), rows, data_collator=collator)


def test_a_collator_of_transformers_equals_our_own(tmp_path):
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9, 10, 11]]})
    rows = rows.map(lambda row: {"labels": row["input_ids"]})
    collator = DataCollatorForSeq2Seq(tokenizer(), padding=True)
    args = config(tmp_path, dataset_kwargs={"skip_prepare_dataset": True})
    theirs = trainer_of(args, rows, data_collator=collator, eval_dataset=rows)
    ours = trainer_of(config(tmp_path), rows, eval_dataset=rows)
    assert theirs.evaluate()["eval_loss"] == pytest.approx(ours.evaluate()["eval_loss"], rel=1e-6)


# -- NEFTune, losses, PEFT, metrics -----------------------------------------------------------


def test_neftune_is_on_only_while_training(tmp_path):
    trainer = trainer_of(config(tmp_path), neftune_noise_alpha=5.0)
    quiet = trainer_of(config(tmp_path))
    trainer.train()
    quiet.train()
    assert history(trainer, "loss") != history(quiet, "loss")
    embeddings = trainer.model.get_input_embeddings()
    assert len(embeddings._forward_hooks) == 0
    model = trainer._trl_activate_neftune(trainer.model).train()
    ids = torch.tensor([[5, 6]])
    assert not torch.equal(embeddings(ids), embeddings(ids))
    model.eval()
    assert torch.equal(embeddings(ids), embeddings(ids))
    assert model.neftune_hook_handle is trainer.neftune_hook_handle
    model.neftune_hook_handle.remove()
    assert len(embeddings._forward_hooks) == 0


def test_dft_weighs_each_token_by_its_probability(tmp_path):
    model = causal_lm()
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7, 8]]})
    packed = pack([TokenTree([], [Branch([5, 6, 7, 8])])])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0, :-1].log_softmax(-1)
        logprobs = logits.gather(1, torch.tensor([[6], [7], [8]])).squeeze(1)
    trainer = trainer_of(config(tmp_path, loss_type="dft"), rows, model, eval_dataset=rows)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(float(-(logprobs.exp() * logprobs).mean()), rel=1e-5)
    assert metrics["eval_nll"] == pytest.approx(float(-logprobs.mean()), rel=1e-5)
    assert len(packed.target_S) == 3


def test_lora_trains_and_saves_its_adapter_alone(tmp_path):
    trainer = trainer_of(config(tmp_path), peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.train()
    trainer.save_model()
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["adapter_model.safetensors"]


def test_compute_metrics_sees_logits_and_labels_once_preprocessed(tmp_path):
    shapes = []

    def accuracy(prediction):
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        counted = prediction.label_ids[:, 1:] != -100
        hits = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
        return {"hits": float(hits[counted].mean()), "loss": -1.0}

    rows = texts()
    trainer = trainer_of(
        config(tmp_path, per_device_eval_batch_size=3),
        rows,
        eval_dataset=rows,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    metrics = trainer.evaluate()
    assert shapes == [((8, 10), (8, 10))]
    assert 0 <= metrics["eval_hits"] <= 1
    assert metrics["eval_loss"] > 0  # ours: a mean over tokens
    expected = []
    for row in trainer.eval_dataset:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            expected += (trainer.model(input_ids=ids).logits[0, :-1].argmax(-1) == ids[0, 1:]).tolist()
    assert metrics["eval_hits"] == pytest.approx(np.mean(expected))


def test_eos_pad_and_template_of_the_config(tmp_path):
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    own = word_tokenizer()
    trainer = trainer_of(
        config(tmp_path, eos_token="yes", pad_token="mat", chat_template_path=str(tmp_path / "chat.jinja")),
        processing_class=own,
    )
    assert trainer.train_dataset[0]["input_ids"][-1] == own.convert_tokens_to_ids("yes")
    assert own.pad_token == "mat"
    assert own.chat_template.startswith("{% for m")
    with pytest.raises(ValueError, match="eos_token='<nothing>': not in the tokenizer's vocabulary"):
        trainer_of(config(tmp_path, eos_token="<nothing>"), processing_class=word_tokenizer())
    word_tokenizer(chat_template="{{ messages }}").save_pretrained(tmp_path / "other")
    trainer_of(config(tmp_path, chat_template_path=str(tmp_path / "other")), processing_class=own)
    assert own.chat_template == "{{ messages }}"
    with pytest.raises(ValueError, match=r"chat_template_path=.*give a file"):
        trainer_of(config(tmp_path, chat_template_path=str(tmp_path / "none")), processing_class=word_tokenizer())


def test_tokens_of_the_config_help_the_tokenizer_that_lacks_them(tmp_path):
    bare = word_tokenizer()
    bare.pad_token = bare.eos_token = None
    with pytest.raises(ValueError, match="neither a pad token nor an EOS token"):
        trainer_of(config(tmp_path), processing_class=bare)
    trainer = trainer_of(config(tmp_path, eos_token="yes", pad_token="mat"), processing_class=bare)
    assert trainer.train_dataset[0]["input_ids"][-1] == bare.convert_tokens_to_ids("yes")
    assert bare.pad_token == "mat"


def test_encoder_decoders_are_sent_elsewhere(tmp_path):
    from tiny_models import tiny_model

    with pytest.raises(ValueError, match="use IterativeSFTTrainer"):
        trainer_of(config(tmp_path), model=tiny_model("t5", vocab_size=100))


def test_models_without_positions_give_logits_for_metrics_too(tmp_path):
    from tiny_models import tiny_model

    rows = texts()
    trainer = trainer_of(
        config(tmp_path), rows, tiny_model("bloom", vocab_size=100), eval_dataset=rows,
        compute_metrics=lambda prediction: {"width": prediction.predictions.shape[-1]},
    )  # fmt: skip
    assert trainer.evaluate()["eval_width"] == 100


def test_saved_with_its_tokenizer(tmp_path):
    trainer = trainer_of(config(tmp_path))
    trainer.save_model(str(tmp_path / "saved"))
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token == "<eos>"


# -- gradients that somebody keeps --------------------------------------------------------------


class KeepsGradients(TrainerCallback):
    """Keeps each step's gradients in several ways, and what they were."""

    WAYS = (
        lambda grad: grad,
        lambda grad: grad.detach(),
        lambda grad: grad.view(-1),
        lambda grad: grad.data,
        lambda grad: grad.clone(),
    )

    def __init__(self, way):
        self.way, self.kept = way, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            self.kept.append((name, self.WAYS[self.way](parameter.grad), parameter.grad.clone()))


@pytest.mark.parametrize("way", range(5))
@pytest.mark.parametrize("clipped", [True, False])
def test_a_kept_gradient_is_never_overwritten(way, clipped, tmp_path):
    keeper = KeepsGradients(way)
    trainer_of(config(tmp_path, max_steps=3, max_grad_norm=1.0 if clipped else 0.0), callbacks=[keeper]).train()
    names = {name for name, _, _ in keeper.kept}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= names
    assert len(keeper.kept) == 3 * len(names)
    for name, kept, copy in keeper.kept:
        assert torch.equal(kept.flatten(), copy.flatten()), name
