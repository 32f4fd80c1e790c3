"""Settings of a GPU's script and of other releases: one warning or one line says what they do here, or they raise."""

import logging
import re
import sys
import warnings
from dataclasses import fields, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from conformity import CASES, build, causal_lm, prompts, reward_model, tokenizer
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, TrainingArguments

import trl
from trl.trainer import settings
from trl.trainer.settings import NO_EFFECT, TRANSLATED

ROOT = Path(__file__).parents[2]
OTHER = {bool: True, int: 3, float: 0.5, str: "something"}
"""a value of each type that is no default"""
CONFIGS = [
    name for name in trl.__all__
    if name.endswith("Config") and isinstance(getattr(trl, name), type)
    and issubclass(getattr(trl, name), TrainingArguments)
]  # fmt: skip
DECLARED = [(name, entry.name) for name in CONFIGS for entry in fields(getattr(trl, name)) if entry.name in NO_EFFECT]


def made(name, folder, **given):
    """A config, and the texts of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return getattr(trl, name)(output_dir=str(folder), report_to="none", **given), [str(w.message) for w in caught]


@pytest.fixture
def laptop(monkeypatch):
    """A machine without a GPU, whose CPU has no bfloat16."""
    monkeypatch.setattr(settings, "is_gpu_available", lambda: False)
    monkeypatch.setattr(settings, "cpu_has_bfloat16", lambda: False)
    monkeypatch.setattr(settings, "is_torch_bf16_gpu_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


def other_value(entry):
    default = settings.default_of(entry)
    if isinstance(default, bool):
        return not default
    kinds = [kind for kind in (bool, int, float, str) if kind.__name__ in str(entry.type)]
    return OTHER[type(default) if default is not None else kinds[0]]


# --- the table --------------------------------------------------------------------------------------------------------


def test_every_entry_is_a_field_of_some_config():
    declared = {entry.name for name in CONFIGS for entry in fields(getattr(trl, name))}
    assert set(NO_EFFECT) | set(TRANSLATED) <= declared
    assert not set(NO_EFFECT) & set(TRANSLATED)


@pytest.mark.parametrize(("name", "field"), DECLARED)
def test_a_field_that_does_nothing_here_says_so_in_one_line(name, field, tmp_path, caplog):
    config_class = getattr(trl, name)
    entry = config_class.__dataclass_fields__[field]
    assert entry.metadata["help"] == NO_EFFECT[field]
    with caplog.at_level(logging.WARNING, "trl"):
        made(name, tmp_path)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "trl"):
        _, warned = made(name, tmp_path, **{field: other_value(entry)})
    assert not warned
    (line,) = caplog.messages
    assert line.startswith(f"{field}=")
    assert NO_EFFECT[field] in line
    assert "\n" not in line


def test_fields_of_one_reason_share_a_line(tmp_path, caplog):
    made("GRPOConfig", tmp_path, vllm_mode="server", vllm_gpu_memory_utilization=0.5, cache_implementation="static")
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("vllm_mode='server', vllm_gpu_memory_utilization=0.5: ")


def test_the_page_has_the_table_of_the_code():
    page = (ROOT / "docs" / "deviations" / "settings.md").read_text(encoding="utf-8")
    assert settings.table() in page, "run `python scripts/write_settings.py`"


# --- fields that were renamed or dropped ------------------------------------------------------------------------------


BECOMES = [
    (
        "GRPOConfig", {"use_vllm": True, "vllm_mode": "server", "vllm_guided_decoding_regex": "a+"},
        {"vllm_structured_outputs_regex": "a+", "vllm_guided_decoding_regex": None},
    ),
    ("OnlineDPOConfig", {"gpu_memory_utilization": 0.5}, {"vllm_gpu_memory_utilization": 0.5}),
    ("RLOOConfig", {"vllm_max_model_len": 64}, {"vllm_max_model_length": 64, "vllm_max_model_len": None}),
    ("SFTConfig", {"torch_compile": True}, {"compile_layers": "inductor", "torch_compile": False}),
    ("SFTConfig", {"torch_compile_backend": "eager"}, {"compile_layers": "eager", "torch_compile_backend": None}),
    ("DPOConfig", {"torch_compile_mode": "default"}, {"compile_layers": "inductor:default"}),
    ("GRPOConfig", {"torchdynamo": "eager"}, {"compile_layers": "eager", "torchdynamo": None}),
    ("SFTConfig", {"warmup_ratio": 0.1}, {"warmup_steps": 0.1, "warmup_ratio": None}),
    ("GRPOConfig", {"warmup_ratio": 0.0}, {"warmup_steps": 0}),
    ("DPOConfig", {"no_cuda": True}, {"use_cpu": True}),
    ("KTOConfig", {"evaluation_strategy": "steps"}, {"eval_strategy": "steps"}),
    ("SFTConfig", {"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
    ("SFTConfig", {"include_inputs_for_metrics": True}, {"include_for_metrics": ["inputs"]}),
    ("SFTConfig", {"max_seq_length": 77}, {"max_length": 77}),
    ("SFTConfig", {"loss_type": "chunked_nll"}, {"loss_type": "chunked_nll"}),
    ("GKDConfig", {"max_new_tokens": 7}, {"max_completion_length": 7, "max_new_tokens": 7}),
    ("OnlineDPOConfig", {"max_new_tokens": 7}, {"max_completion_length": 7, "max_new_tokens": 7}),
    ("RewardConfig", {"logging_dir": "logs"}, {"logging_dir": "logs"}),
    ("DPOConfig", {"max_target_length": 9}, {"max_completion_length": 9}),
    (
        "GRPOConfig", {"wandb_log_unique_prompts": True, "log_completions": True}, {"log_unique_prompts": True},
    ),
    ("OnlineDPOConfig", {"per_device_train_batch_size": 1}, {"per_device_train_batch_size": 2}),
    ("RLOOConfig", {"rloo_k": 4, "num_ppo_epochs": 3}, {"num_generations": 4, "num_iterations": 3, "temperature": 0.7}),
    ("RLOOConfig", {"kl_coef": 0.3, "cliprange": 0.1, "response_length": 9},
     {"beta": 0.3, "epsilon": 0.1, "max_completion_length": 9}),
    ("RLOOConfig", {"normalize_advantage": True, "num_sample_generations": 2, "exp_name": "small"},
     {"normalize_advantages": True, "log_completions": True, "run_name": "small"}),
]  # fmt: skip


def test_all_translations_are_tried():
    tried = {field for _, given, _ in BECOMES for field in given} | {"use_liger"}
    assert set(TRANSLATED) <= tried


@pytest.mark.parametrize(("name", "given", "becomes"), BECOMES)
def test_a_field_of_another_release_becomes_todays(name, given, becomes, tmp_path):
    one, warned = made(name, tmp_path, **given)
    assert {key: getattr(one, key) for key in becomes} == becomes
    assert not warned
    again = replace(one)
    assert {key: getattr(again, key) for key in becomes} == becomes


def test_the_share_of_warm_steps_is_used(tmp_path):
    trainer = build("sft", tmp_path, warmup_ratio=0.5, max_steps=4)
    assert trainer.args.get_warmup_steps(4) == 2


def test_steps_win_over_the_share_and_say_so(tmp_path, caplog):
    assert made("SFTConfig", tmp_path, warmup_ratio=0.1, warmup_steps=3)[0].warmup_steps == 3
    assert caplog.messages == ["warmup_ratio=0.1: warmup_steps=3 wins"]


def test_liger_is_left_out_where_it_is_not_installed(tmp_path, monkeypatch):
    for field in ("use_liger", "use_liger_kernel"):
        monkeypatch.setitem(sys.modules, "liger_kernel", None)
        assert made("SFTConfig", tmp_path, **{field: True})[0].use_liger_kernel is False
        monkeypatch.setattr(settings, "is_installed", lambda name: True)
        assert made("SFTConfig", tmp_path, **{field: True})[0].use_liger_kernel is True
        monkeypatch.undo()


def test_the_folder_of_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    trainer = build("sft", tmp_path, logging_dir=str(tmp_path / "logs"), report_to="tensorboard")
    trainer.train()
    assert any((tmp_path / "logs").iterdir())


def test_trackio_is_told_of_a_run(tmp_path, monkeypatch):
    """transformers' own callback needs the package alone."""
    trackio = MagicMock(__spec__=ModuleSpec("trackio", None), __version__="0.43.0")
    trackio.context_vars.current_space_id.get.return_value = None  # nothing is uploaded
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    build("sft", tmp_path, report_to="trackio", run_name="mine", project="ours").train()
    asked = trackio.init.call_args.kwargs
    assert (asked["project"], asked["name"]) == ("ours", "mine")
    assert {"train/loss", "train/global_step"} <= {name for call in trackio.log.call_args_list for name in call.args[0]}
    trackio.finish.assert_called_once()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("SFTConfig", {"warmup_ratio": 1.5}, "warmup_ratio=1.5: give a share"),
        ("SFTConfig", {"max_seq_length": 7, "max_length": 9}, "max_seq_length=7, max_length=9: two names"),
        ("GKDConfig", {"max_new_tokens": 7, "max_completion_length": 9}, "max_new_tokens=7, max_completion_length=9"),
        ("OnlineDPOConfig", {"max_length": 64}, "max_length=64: give more than max_completion_length=64"),
        ("GRPOConfig", {"use_vllm": True, "vllm_server_base_url": "ftp://a"}, "'ftp://a' is no server's address"),
        ("RLOOConfig", {"use_vllm": True, "vllm_mode": "both"}, "vllm_mode='both': choose 'colocate' or 'server'"),
        ("GRPOConfig", {"use_vllm": True, "vllm_structured_outputs_regex": "a+"}, "follows no pattern"),
        ("GRPOConfig", {"use_vllm": True, "vllm_guided_decoding_regex": "a+"}, "follows no pattern"),
    ],
)
def test_what_would_change_numbers_raises(name, given, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        made(name, tmp_path, **given)
    assert "\n" not in str(error.value)


# --- a script for a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["bf16", "fp16"])
@pytest.mark.parametrize("cpu_can", [True, False])
def test_precision_of_a_laptop(asked, cpu_can, laptop, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "cpu_has_bfloat16", lambda: cpu_can)
    one, (warning,) = made("SFTConfig", tmp_path, **{asked: True})
    assert (one.bf16, one.fp16) == (cpu_can, False)
    assert one.mixed_precision == ("bf16" if cpu_can else "no")
    instead = "bfloat16, which this CPU has" if cpu_can else "float32"
    assert warning == f"{asked}=True on a CPU: training computes in {instead}"


def test_a_cpu_that_is_asked_for_bfloat16_computes_in_it(laptop, tmp_path):
    one, warned = made("SFTConfig", tmp_path, bf16=True, use_cpu=True)
    assert (one.bf16, warned) == (True, [])


def test_both_precisions_at_once_are_refused(laptop, tmp_path):
    with pytest.raises(ValueError):
        made("SFTConfig", tmp_path, bf16=True, fp16=True)


def test_evaluation_in_bfloat16(laptop, tmp_path):
    one, warned = made("SFTConfig", tmp_path, bf16_full_eval=True)
    assert (one.bf16_full_eval, one.use_cpu, warned) == (True, True, [])


def test_float32_of_ten_bits(laptop, tmp_path):
    one, (warning,) = made("SFTConfig", tmp_path, tf32=True)
    assert one.tf32 is None
    assert warning == "tf32=True: no GPU here computes it; products stay in float32"


@pytest.mark.parametrize("name", sorted(settings.ADAMW))
def test_adamw_of_a_gpu_is_torchs(name, laptop, tmp_path, monkeypatch):
    one, (warning,) = made("DPOConfig", tmp_path, optim=name)
    assert one.optim == "adamw_torch"
    assert warning.startswith(f"optim={name!r}: ")
    assert warning.endswith("adamw_torch is used, whose states are in the weights' precision")


def test_another_optimizer_is_not_replaced(laptop, tmp_path):
    assert made("SFTConfig", tmp_path, optim="paged_lion_8bit")[0].optim == "paged_lion_8bit"


def test_a_machine_with_a_gpu_keeps_its_optimizer(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "is_gpu_available", lambda: True)
    one, warned = made("SFTConfig", tmp_path, optim="paged_adamw_8bit")
    assert (one.optim, warned) == ("paged_adamw_8bit", [])


@pytest.mark.parametrize("case", ["grpo", "rloo"])
def test_vllm_is_replaced_by_the_local_sampler(case, tmp_path, caplog):
    given = {"use_vllm": True, "vllm_gpu_memory_utilization": 0.4, "vllm_max_model_length": 99}
    one, (warning,) = made(CASES[case].config, tmp_path, **given)
    assert "the local sampler draws the completions, from the same distribution" in warning
    assert "pip install \"vllm>=0.32,<0.33\", or vllm_mode='server'" in warning
    assert (one.use_vllm, one.vllm_mode, caplog.messages) == (False, "colocate", [])
    with pytest.warns(UserWarning, match="local sampler"):
        asked = build(case, tmp_path / "a", max_steps=1, **given)
    asked.train()
    plain = build(case, tmp_path / "b", max_steps=1)
    plain.train()
    assert asked.state.log_history[0]["loss"] == plain.state.log_history[0]["loss"]


# --- online DPO and distillation --------------------------------------------------------------------------------------


def test_defaults_of_today():
    args = trl.OnlineDPOConfig()
    assert (args.temperature, args.learning_rate, args.max_new_tokens) == (0.9, 5e-7, 64)
    assert (trl.GKDConfig().learning_rate, trl.GKDConfig().max_new_tokens) == (2e-5, 128)


def test_lengths_of_online_dpo(tmp_path):
    args, _ = made("OnlineDPOConfig", tmp_path, max_new_tokens=6, max_length=8)
    assert args.max_prompt_length == 2
    args, _ = made("OnlineDPOConfig", tmp_path, max_new_tokens=6, max_length=80, max_prompt_length=3)
    assert args.max_prompt_length == 3


def test_a_completion_without_end_is_punished(tmp_path):
    from trl.data.records import Rollout
    from trl.rollout.rewards import Rewards
    from trl.trainer.online_dpo_trainer import without_end

    rollout = Rollout([[1]] * 3, [[2]] * 3, [], [], metadata={"truncated": [False, True, True]})
    rewards = Rewards(["r"], torch.tensor([[1.0], [2.0], [torch.nan]]), torch.ones(1), [False])
    punished = without_end(rewards, rollout, 3.0)
    assert punished.total_B()[:2].tolist() == [1.0, -1.0]
    assert punished.total_B()[2].isnan()
    assert without_end(rewards, rollout, None) is rewards
    build("online-dpo", tmp_path, missing_eos_penalty=1.0, max_steps=1).train()


def test_online_dpo_with_a_reward_model_by_name(tmp_path):
    reward_model().save_pretrained(tmp_path / "rm")
    tokenizer().save_pretrained(tmp_path / "rm")
    settings = {"max_completion_length": 6, "per_device_train_batch_size": 4, "max_steps": 1}
    args, _ = made("OnlineDPOConfig", tmp_path, reward_model_path=str(tmp_path / "rm"), **settings)
    data = {"train_dataset": prompts(), "processing_class": tokenizer()}
    trainer = trl.OnlineDPOTrainer(causal_lm(), args=args, **data)
    trainer.train()
    given = trl.OnlineDPOTrainer(
        causal_lm(), args=args, reward_model=reward_model(), reward_processing_class=tokenizer(), **data
    )
    assert given.rewards.panel is not None
    with pytest.raises(ValueError, match="reward_model: an older name of reward_funcs"):
        trl.OnlineDPOTrainer(causal_lm(), ["repetition"], args=args, reward_model=reward_model(), **data)


def test_a_teacher_by_two_equal_names_and_a_revision(tmp_path, monkeypatch):
    teacher = str(tmp_path / "teacher")
    causal_lm(seed=7).save_pretrained(teacher)
    args, _ = made(
        "DistillationConfig", tmp_path, teacher_model_name_or_path=teacher, teacher_model_revision="v1",
        max_completion_length=6, per_device_train_batch_size=4,
    )  # fmt: skip
    told = []

    def load(source, auto_class, keywords, **how):
        told.append((source, keywords))
        return causal_lm(seed=7)

    monkeypatch.setattr("trl.trainer.distillation_trainer.load_model", load)
    data = {"train_dataset": prompts(), "processing_class": tokenizer()}
    trl.DistillationTrainer(causal_lm(), teacher, args=args, **data)
    assert told == [(teacher, {"revision": "v1"})]
    with pytest.raises(ValueError, match="not both"):
        trl.DistillationTrainer(causal_lm(), "another", args=args, **data)
    with pytest.raises(ValueError, match="teacher_model: give the teacher"):
        trl.DistillationTrainer(causal_lm(), args=replace(args, teacher_model_name_or_path=None), **data)


# --- templates and collators ------------------------------------------------------------------------------------------


def test_the_template_of_a_folder(tmp_path, chat_tokenizer):
    from trl.models.chat_setup import template_at

    chat_tokenizer.save_pretrained(tmp_path / "chat")
    assert template_at(str(tmp_path / "chat")) == chat_tokenizer.chat_template
    tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="the tokenizer there has no chat template"):
        template_at(str(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"chat_template_path='none\.jinja': .*give a file with a Jinja template"):
        template_at("none.jinja")
    with pytest.raises(OSError, match="could not load a tokenizer from 'nowhere'"):
        template_at("nowhere")


def test_a_collator_without_labels_is_named(tmp_path):
    args, _ = made("SFTConfig", tmp_path)
    trainer = trl.SFTTrainer(
        causal_lm(), args, DataCollatorForSeq2Seq(tokenizer()), Dataset.from_dict({"text": ["a b c"]}),
        processing_class=tokenizer(),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"the data collator DataCollatorForSeq2Seq returned .*give `input_ids` and"):
        next(iter(trainer.get_train_dataloader()))


# --- packages ---------------------------------------------------------------------------------------------------------


def test_errors_name_packages_not_this_project():
    """pip would fetch another project's `trl`."""
    from trl.import_utils import pip_install

    assert pip_install("peft", "math-verify[antlr4_13_2]") == 'pip install peft "math-verify[antlr4_13_2]"'
    for file in [*(ROOT / "trl").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        if file.name != "import_utils.py":
            assert "trl[" not in file.read_text(encoding="utf-8"), file
