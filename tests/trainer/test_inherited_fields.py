"""M9: every field of TrainingArguments has its effect, or one line says what it does here, or it is an error."""

import logging
from dataclasses import dataclass, field, fields

import peft
import pytest
import torch
import transformers as t
from accelerate import ParallelismConfig
from conformity import build, causal_lm, history, tokenizer
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

import trl
from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.kernels.layers import is_compiled
from trl.losses.supervised import nll, smoothed
from trl.models.scoring import logits_and_labels, score
from trl.scripts.describe import field_docs
from trl.trainer import settings
from trl.trainer.ppo_forms import ONLY_TODAY
from trl.trainer.settings import INHERITED, means

CONFIGS = [
    config for name in trl.__all__
    if name.endswith("Config") and isinstance(config := getattr(trl, name), type)
    and issubclass(config, TrainingArguments)
]  # fmt: skip


# -- the table --------------------------------------------------------------------------------


def unexplained(config):
    known, docs = means(config), field_docs(config)
    return [entry.name for entry in fields(config) if not known.get(entry.name) and not docs.get(entry.name)]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_says_what_it_does(config):
    assert unexplained(config) == []


@pytest.mark.parametrize("name", ["PPOConfig", "DDPOConfig"])
def test_so_does_every_field_of_configs_of_their_own(name):
    config = getattr(trl, name)
    own = {entry.name for entry in fields(config)} - set(ONLY_TODAY)  # of which `test_ppo_forms` has a table
    assert own <= set(field_docs(config))


def test_a_field_of_a_new_release_is_missed():
    @dataclass
    class Newer(trl.SFTConfig):
        new_in_transformers: bool = field(default=False)

    Newer.__module__ = "elsewhere"  # its fields have no docstrings of ours
    assert unexplained(Newer) == ["new_in_transformers"]


def test_the_table_names_fields_that_are_there():
    there = {entry.name for entry in fields(TrainingArguments)}
    own = set(field_docs(trl.SFTConfig)) | set(means(trl.SFTConfig))
    assert set(INHERITED) <= there
    for table in (settings.ROLLOUTS, settings.BY_STEPS):
        assert set(table) <= there | own | {*settings.CORRECTION}
    assert there <= own


def test_the_rule_stands_in_the_readme():
    text = (settings.__file__.rsplit("/trl/", 1)[0]) + "/README.md"
    with open(text, encoding="utf-8") as readme:
        words = " ".join(readme.read().split())
    assert (
        "What would change numbers works or raises; a setting that only moves memory or speed elsewhere says" in words
    )


# -- fields that work -------------------------------------------------------------------------

EFFECTS = [
    {"max_grad_norm": 1e-3},
    {"data_seed": 11},
    {"weight_decay": 0.5},
    {"adam_beta1": 0.1},
    {"optim": "adafactor"},
    {"optim": "sgd", "optim_args": "momentum=0.9"},
    {"warmup_steps": 3, "lr_scheduler_type": "linear"},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.5}},
    {"train_sampling_strategy": "sequential"},
    {"train_sampling_strategy": "batch_rebalance"},
    {"group_by_length": True},
    {"neftune_noise_alpha": 50.0},
    {"label_smoothing_factor": 0.3},
    {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}},
]


def losses(folder, case="sft", **given):
    trainer = build(case, folder, max_steps=3, **given)
    trainer.train()
    return [*zip(history(trainer, "loss"), history(trainer, "grad_norm"), strict=True)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return losses(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("given", EFFECTS)
def test_it_changes_the_training(given, plain, tmp_path):
    assert losses(tmp_path, **given) != plain


def test_the_last_batch_is_dropped(tmp_path):
    runs = [
        build("sft", tmp_path, per_device_train_batch_size=3, max_steps=-1, num_train_epochs=1, **more)
        for more in ({}, {"dataloader_drop_last": True})
    ]
    for run in runs:
        run.train()
    assert [run.state.global_step for run in runs] == [3, 2]


@pytest.mark.parametrize("case", ["dpo-sigmoid", "kto", "reward", "prm", "sft"])
def test_rows_of_every_trainer_can_be_ordered_by_length(case, tmp_path):
    trainer = build(case, tmp_path, group_by_length=True, per_device_train_batch_size=2, max_steps=-1)
    if case in ("dpo-sigmoid", "kto", "reward"):
        columns = [name for name in trainer.train_dataset.column_names if name.endswith("_ids")]
        expected = [sum(len(row[name]) for name in columns) for row in trainer.train_dataset]
        assert trainer.train_dataset["length"][:] == expected
    batches = [batch["packed"] for batch in trainer.get_train_dataloader()]
    sizes = [len(packed.ids_N) for packed in batches]
    assert sizes[0] == max(sizes)  # the sampler puts the longest first
    trainer.evaluate()


def test_a_config_given_twice_is_not_written_into(tmp_path):
    given = {"gradient_accumulation_kwargs": {"num_steps": 2}}
    first, second = (losses(tmp_path, accelerator_config=given) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("how", [{"eval_do_concat_batches": False}, {"batch_eval_metrics": True}])
def test_reward_models_count_their_accuracy_themselves(how, tmp_path):
    metrics = [build("reward", tmp_path, per_device_eval_batch_size=2, **more).evaluate() for more in ({}, how)]
    assert metrics[1]["eval_accuracy"] == pytest.approx(metrics[0]["eval_accuracy"])


# -- smoothed labels --------------------------------------------------------------------------


SIZES = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
HEADS = {
    "linear": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES)),
    "soft-capped": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**SIZES, final_logit_softcapping=5.0)),
    "scaled": lambda: t.CohereForCausalLM(t.CohereConfig(**SIZES, logit_scale=0.25)),
    "biased": lambda: t.PhiForCausalLM(t.PhiConfig(**SIZES)),
    "adapted": lambda: peft.get_peft_model(
        t.LlamaForCausalLM(t.LlamaConfig(**SIZES)),
        peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"),
    ),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("factor", [0.1, 0.6])
def test_smoothed_labels_are_those_of_transformers(head, factor):
    torch.manual_seed(0)
    model = HEADS[head]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    packed = pack([TokenTree([], [Branch([5, 9, 8, 7], [0, 1, 0, 1])]), TokenTree([5, 6], [Branch([11, 30, 2])])])
    logits, labels = logits_and_labels(model, packed)
    expected = LabelSmoother(epsilon=factor)({"logits": logits}, labels, shift_labels=True)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    scores = score(model, packed, lift=True)
    loss = smoothed(nll(scores.logprobs_BT, packed.mask_BT), scores.lift_BT, packed.mask_BT, factor).mean
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_trainers_with_labels_smooth_them(tmp_path):
    trainer = build("sft", tmp_path, label_smoothing_factor=0.4, max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = LabelSmoother(epsilon=0.4)({"logits": logits}, batch["labels"], shift_labels=True)
    assert trainer.objective(trainer.model, batch).mean.item() == pytest.approx(expected.item(), rel=1e-5)

    steps = build("prm", tmp_path, label_smoothing_factor=0.4)
    batch = next(iter(steps.get_train_dataloader()))
    expected = torch.nn.functional.cross_entropy(
        steps._logits(steps.model, batch), batch["step_label"], label_smoothing=0.4
    )
    assert steps.objective(steps.model, batch).mean.item() == pytest.approx(expected.item(), rel=1e-5)
    assert steps.predictions(steps.model, batch)[0].mean.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:No data collator is provided", "ignore:No labels are provided")
def test_so_does_the_trainer_by_steps(tmp_path):
    def loss(**more):
        args = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            logging_steps=1,
            report_to="none",
            per_device_train_batch_size=2,
            **more,
        )
        trainer = trl.IterativeSFTTrainer(causal_lm(), args, tokenizer=tokenizer())
        trainer.step(input_ids=[torch.tensor([1, 5, 6, 7, 2]), torch.tensor([1, 8, 9, 2])])
        return history(trainer, "loss")[0]

    assert loss(label_smoothing_factor=0.5) != loss()


# -- fields that are errors, or say that they do nothing ----------------------------------------

REFUSED = [
    ("DPOConfig", {"label_smoothing_factor": 0.1}, "no labels to smooth; leave it out; `label_smoothing` is that"),
    ("KTOConfig", {"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1: this loss has no labels to smooth"),
    ("RewardConfig", {"label_smoothing_factor": 0.1}, "this loss has no labels to smooth"),
    ("GRPOConfig", {"label_smoothing_factor": 0.1}, "this loss has no labels to smooth"),
    ("SFTConfig", {"label_smoothing_factor": 0.1, "loss_type": "dft"}, "this loss has no labels to smooth"),
    ("SFTConfig", {"label_smoothing_factor": 1.5}, r"label_smoothing_factor=1.5: give a weight in \[0, 1\)"),
    ("SFTConfig", {"optim_target_modules": ["q_proj"]}, "optim='adamw_torch_fused' reads none, only GaLore and APOLLO"),
    ("SFTConfig", {"optim_args": "rank=4"}, "optim_args='rank=4': optim='adamw_torch_fused' reads none"),
    ("SFTConfig", {"past_index": 0}, "past_index=0: no state is carried from row to row"),
    (
        "SFTConfig",
        {"parallelism_config": ParallelismConfig(tp_size=2)},
        "parallelism_config: tp_size=2: heads and layers are not cut here",
    ),
    ("GRPOConfig", {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0: noise would make another policy"),
    ("RLOOConfig", {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0: noise would make another policy"),
    ("RAFTConfig", {"auto_find_batch_size": True}, "the batch size is part of a rollout"),
]


@pytest.mark.parametrize(("name", "given", "message"), REFUSED)
def test_what_cannot_be_honoured_raises(name, given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        getattr(trl, name)(output_dir=str(tmp_path), **given)


def test_averages_of_each_rank_are_refused_on_several(tmp_path, monkeypatch):
    args = trl.SFTConfig(str(tmp_path), average_tokens_across_devices=False)  # one rank: nothing to average
    monkeypatch.setattr(type(args), "world_size", 2)
    args.average_tokens_across_devices = False
    with pytest.raises(
        ValueError, match="average_tokens_across_devices=False: the loss is divided by the count of all"
    ):
        args.validate()


def test_plain_arguments_are_checked_too(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=0.1, report_to="none")
    with pytest.raises(ValueError, match="this loss has no labels to smooth"):
        build("kto", tmp_path, args=args)


SAID = [
    ("DPOConfig", {"label_names": ["labels"]}, ["label_names=['labels']: has no effect"]),
    ("SFTConfig", {"liger_kernel_config": {"rope": True}}, ["liger_kernel_config={'rope': True}: has no effect"]),
    ("GRPOConfig", {"dataloader_drop_last": True, "dataloader_num_workers": 1}, ["dataloader_drop_last=True, data"]),
    ("GRPOConfig", {"group_by_length": True}, ["train_sampling_strategy='group_by_length': 'sequential' becomes"]),
    ("SFTConfig", {"dataloader_drop_last": True, "group_by_length": True}, []),
    ("GRPOConfig", {}, []),
    ("SFTConfig", {"warmup_steps": 3, "lr_scheduler_type": "constant"}, ["warmup_steps=3: has no effect with lr"]),
    ("SFTConfig", {"warmup_ratio": 0.1, "lr_scheduler_type": "linear"}, []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "lines"), SAID)
def test_what_does_nothing_says_so(name, given, lines, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "trl"):
        getattr(trl, name)(output_dir=str(tmp_path), **given)
    assert len(caplog.messages) == len(lines)
    for message, line in zip(caplog.messages, lines, strict=True):
        assert message.startswith(line)


ASKED = [
    ({"torch_compile": True}, "inductor"), ({"torch_compile_mode": "max-autotune"}, "inductor:max-autotune"),
    ({"torch_compile_backend": "eager"}, "eager"), ({"torchdynamo": "aot_eager"}, "aot_eager"),
    ({"compile_layers": "eager", "torch_compile": True}, "eager"), ({}, None),
]  # fmt: skip


@pytest.mark.parametrize(("given", "means"), ASKED)
def test_who_asks_for_compilation_asks_for_the_layers(given, means, tmp_path):
    config = trl.SFTConfig(output_dir=str(tmp_path), **given)
    assert config.compile_layers == means
    assert not config.torch_compile


@pytest.mark.parametrize("asked", ["foo", "inductor:foo", "inductor:default:more"])
def test_a_backend_or_mode_that_torch_does_not_know_names_the_setting(asked, tmp_path):
    with pytest.raises(ValueError, match=rf"^compile_layers='{asked}': .*(foo|default:more)"):
        build("grpo", tmp_path, compile_layers=asked, max_steps=1).train()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler looks
def test_compiled_layers_train_alike(tmp_path):
    """GRPO: passes with gradients, those of a reference without, and sampling in between, which is not compiled."""
    torch._dynamo.reset()
    weights, logs = [], []
    for backend in (None, "aot_eager"):
        trainer = build("grpo", tmp_path / str(backend), compile_layers=backend, beta=0.1, max_steps=2)
        trainer.train()
        weights.append(torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()]))
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert is_compiled(trainer.model)
    assert is_compiled(trainer.ref_model)
    assert logs[1] == pytest.approx(logs[0], abs=1e-6)
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler looks
@pytest.mark.parametrize("plain", [False, True])
def test_a_run_that_asks_for_compilation_compiles_its_layers(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: None)  # transformers would set it for all
    given = {"torch_compile": True, "torch_compile_backend": "eager"}
    if plain:
        args = TrainingArguments(output_dir=str(tmp_path), report_to="none", max_steps=1, save_strategy="no", **given)
        trainer = build("kto", tmp_path, args=args)
    else:
        trainer = build("sft", tmp_path, **given)
    trainer.train()
    assert not hasattr(trainer.model_wrapped, "_orig_mod")
    assert is_compiled(trainer.model)
    torch._dynamo.reset()


def test_batches_are_not_dispatched(tmp_path, caplog, plain):
    assert losses(tmp_path, accelerator_config={"dispatch_batches": True}) == plain
    assert [m for m in caplog.messages if m.startswith("dispatch_batches=True: has no effect")]


def test_prompts_in_the_order_of_the_rows(tmp_path):
    trainer = build("grpo", tmp_path, train_sampling_strategy="sequential")
    assert trainer.args.shuffle_dataset is False
    build("grpo", tmp_path, group_by_length=True, include_for_metrics=["inputs"]).evaluate()
    plain = TrainingArguments(str(tmp_path), train_sampling_strategy="sequential", report_to="none")
    assert build("raft", tmp_path, args=plain).args.shuffle_dataset is False


def test_noise_pads_the_rows_of_those_who_sample(tmp_path):
    trainer = build("raft", tmp_path, neftune_noise_alpha=30.0)
    assert trainer.pads_rows
    trainer.train()


@pytest.mark.filterwarnings("ignore:No data collator is provided")
def test_the_trainer_by_steps_says_what_its_loop_does_not_read(tmp_path, caplog):
    args = TrainingArguments(
        str(tmp_path), max_steps=2, num_train_epochs=5, dataloader_drop_last=True, report_to="none"
    )  # fmt: skip
    trl.IterativeSFTTrainer(causal_lm(), args, tokenizer=tokenizer())
    (line,) = [m for m in caplog.messages if "`step` is called with the data" in m]
    assert line.startswith("num_train_epochs=5, dataloader_drop_last=True: has no effect")
